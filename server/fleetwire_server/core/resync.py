"""What becomes of a command at a connect, by what this server has stored and what the agent says. Pure.

docs/protocol.md has the same as a table."""

from dataclasses import dataclass
from typing import Literal

from fleetwire_server.core.command_states import CommandEvent, is_proved
from fleetwire_server.model import Command, CommandStatus
from fleetwire_shared.messages import LedgerEntry

_HELD = {"accepted": CommandEvent.HELD_ACCEPTED, "running": CommandEvent.HELD_RUNNING}


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """`answer` settles the agent's entry, if it has one; `event` happens to the stored command; `cancel`, or a
    question, is sent after the welcome, and the answer to it counts."""

    answer: Literal["keep", "forget", "cancel"] | None = None
    event: CommandEvent | None = None
    cancel: Literal["cancelled", "expired"] | None = None
    is_question: bool = False  # what the agent remembers of it
    is_orphan: bool = False  # to be stored as a new command
    warning: str | None = None


def decide(stored: Command | None, entry: LedgerEntry | None, *, is_same_instance: bool, has_time: bool) -> Decision:
    """Return what is to be done about one command.

    Args:
        stored: the command as this server has it; None: it does not know the id.
        entry: the agent's; None: the agent has never heard of it, or no longer holds it.
        is_same_instance: the agent has forgotten nothing since it was offered the command.
        has_time: the command may still be offered."""
    if entry is None:
        return Decision() if stored is None else _decide_not_held(stored, is_same_instance, has_time)
    if stored is None:
        return Decision(answer="keep", is_orphan=True, warning="unknown here; kept as an orphan, to be looked at")
    if is_proved(stored):
        return _decide_ended(stored, entry)
    is_cancelled = stored.cancel_requested_at is not None and entry.state != "finished"
    return Decision(
        answer="keep",
        event=_HELD.get(entry.state),
        cancel="cancelled" if is_cancelled else None,
        warning="queued here and held by the agent: was this server restored from a backup?"
        if stored.status is CommandStatus.QUEUED
        else None,
    )


def _decide_not_held(stored: Command, is_same_instance: bool, has_time: bool) -> Decision:
    if stored.status in (CommandStatus.ACCEPTED, CommandStatus.RUNNING):
        # Its end may have been told and stored before this server was restored from a backup.
        return Decision(is_question=True) if is_same_instance else Decision(event=CommandEvent.GONE)
    is_unanswered = stored.status is CommandStatus.OFFERED or (
        stored.status is CommandStatus.LOST and stored.accepted_at is None
    )
    if not is_unanswered:
        return Decision()
    if not is_same_instance:
        # It may have received the offer, run it, and forgotten that with all else: offered again, it might run twice.
        return Decision(event=CommandEvent.GONE)
    if stored.cancel_requested_at is not None:
        return Decision(cancel="cancelled")
    return Decision(event=CommandEvent.NEVER_RECEIVED) if has_time else Decision(cancel="expired")


def _decide_ended(stored: Command, entry: LedgerEntry) -> Decision:
    if entry.state == "finished":
        return Decision(answer="keep")  # its result comes again, is compared with what is stored, and acknowledged
    return Decision(answer="cancel", warning=f"{stored.status} here and {entry.state} at the agent: it is stopped")
