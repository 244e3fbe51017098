"""A connect of an agent: what it holds and what is stored are brought in line, in one transaction. What a difference
comes to is decided by resync.py; here that is carried out."""

import logging
import re
from dataclasses import dataclass, field

from fleetwire_server.core.command_changes import LOST_ERROR, move, requeue
from fleetwire_server.core.command_states import ADOPTED_AS, HOLDING, CommandEvent
from fleetwire_server.core.resync import Decision, decide
from fleetwire_server.model import AuditEntry, Command
from fleetwire_server.storage import audit, commands
from fleetwire_server.storage.store import Connection
from fleetwire_shared.limits import COMMAND_ID_PATTERN, COMMAND_PREVIEW_CHARACTERS
from fleetwire_shared.messages import NO_KIND, CommandCancel, CommandOffer, Hello, LedgerEntry, Settlement

logger = logging.getLogger(__name__)

MAX_ORPHANS = 1000
"""Commands this server does not know that are taken over from one agent: an agent that invents some must not fill the
database. Those beyond it are not stored; the audit names them."""

MAX_AUDITED_IDS = 256
"""Of what a connect brought and nobody adopted; no agent of ours holds more commands at a time."""

MAX_QUESTIONS = 256
"""Commands one agent is asked about at a time, well below what may wait to be sent to it; the others are asked about
when it has answered, or at its next connect."""

_COMMAND_ID = re.compile(COMMAND_ID_PATTERN, re.ASCII)


@dataclass(slots=True)
class Settled:
    """What a connect came to."""

    answers: list[Settlement] = field(default_factory=list)  # to the agent's ledger
    changed: list[Command] = field(default_factory=list)
    cancels: list[CommandCancel] = field(default_factory=list)  # to be sent after the welcome
    questions: list[CommandOffer] = field(default_factory=list)  # likewise
    orphan_ids: list[str] = field(default_factory=list)
    refused_ids: list[str] = field(default_factory=list)  # that are not known here, and cannot be adopted

    @property
    def reportable_ids(self) -> set[str]:
        """The commands that the agent may report on from now on."""
        kept = {answer.command_id for answer in self.answers if answer.action == "keep"}
        return kept | {cancel.command_id for cancel in self.cancels} | self.asked_ids

    @property
    def asked_ids(self) -> set[str]:
        return {question.command_id for question in self.questions}


def settle(connection: Connection, *, agent_id: str, hello: Hello, now: float) -> Settled:
    settled = Settled()
    for entry in hello.ledger:
        stored = commands.get_command(connection, agent_id, entry.command_id)
        decision = _decide(stored, entry, hello, now)
        if stored is None:
            decision = _adopt_orphan(connection, agent_id, entry, decision, hello, settled, now)
        _carry_out(connection, decision, stored, entry, hello.instance_id, settled, now)
    held = {entry.command_id for entry in hello.ledger}
    for command in commands.list_unsettled(connection, agent_id, hello.instance_id):
        if command.id not in held:
            decision = _decide(command, None, hello, now)
            _carry_out(connection, decision, command, None, hello.instance_id, settled, now)
    if settled.orphan_ids:
        _audit(connection, "commands.adopted", agent_id, hello, now, command_ids=settled.orphan_ids)
    if refused := settled.refused_ids:
        named = refused[:MAX_AUDITED_IDS]
        _audit(connection, "commands.not_adopted", agent_id, hello, now, command_ids=named, count=len(refused))
    return settled


def _audit(
    connection: Connection, action: str, agent_id: str, hello: Hello, now: float, **detail: list[str] | int
) -> None:
    whole = {**detail, "agent_instance": hello.instance_id[:100]}
    audit.add_entry(connection, AuditEntry(at=now, actor="server", action=action, subject=agent_id, detail=whole))


def _decide(stored: Command | None, entry: LedgerEntry | None, hello: Hello, now: float) -> Decision:
    return decide(
        stored,
        entry,
        is_same_instance=stored is not None and stored.offered_to == hello.instance_id,
        has_time=stored is not None and stored.expires_at > now,
    )


def _carry_out(
    connection: Connection,
    decision: Decision,
    stored: Command | None,
    entry: LedgerEntry | None,
    instance_id: str,
    settled: Settled,
    now: float,
) -> None:
    if entry is not None and decision.answer is not None:
        position = stored.output_end if stored is not None and decision.answer == "keep" else 0
        settled.answers.append(
            Settlement(command_id=entry.command_id, action=decision.answer, output_position=position)
        )
    if decision.warning is not None and entry is not None:
        logger.warning("command %s: %s", entry.command_id[:100], decision.warning)
    if stored is None:
        return
    if decision.is_question and len(settled.questions) < MAX_QUESTIONS:
        settled.questions.append(make_question(stored.id))
    if decision.cancel is not None:
        settled.cancels.append(CommandCancel(command_id=stored.id, reason=decision.cancel))
    if decision.event is CommandEvent.NEVER_RECEIVED:
        changed = requeue(connection, stored, decision.event, now)
    elif decision.event is not None and decision.event in HOLDING:
        changed = move(connection, stored, decision.event, now, changes={"offered_to": instance_id})
    elif decision.event is not None:
        changed = move(connection, stored, decision.event, now, LOST_ERROR)
    else:
        changed = None
    if changed is not None:
        settled.changed.append(changed)


def _adopt_orphan(
    connection: Connection,
    agent_id: str,
    entry: LedgerEntry,
    decision: Decision,
    hello: Hello,
    settled: Settled,
    now: float,
) -> Decision:
    """Store a command that only the agent knows. One that cannot be stored the agent is to keep to itself: what runs is
    not killed, as it may be half done, nor does it wait for room in a window that nobody empties."""
    if not _COMMAND_ID.fullmatch(entry.command_id) or commands.is_known(connection, entry.command_id):
        problem = "is of another agent, or its id is none of this server's"
    elif len(settled.orphan_ids) + commands.count_orphans(connection, agent_id) >= MAX_ORPHANS:
        problem = f"this agent has {MAX_ORPHANS} orphans already"
    else:
        command = _make_orphan(agent_id, entry, hello.instance_id, now)
        commands.add_command(connection, command)
        settled.orphan_ids.append(command.id)
        settled.changed.append(command)
        return decision
    settled.refused_ids.append(entry.command_id[:100])
    return Decision(answer="forget", warning=f"not known here, {entry.state} at the agent, and not adopted: {problem}")


def make_question(command_id: str) -> CommandOffer:
    """Return an offer that no agent takes: it says what it holds or remembers of the id, or refuses the kind."""
    return CommandOffer(command_id=command_id, kind=NO_KIND, command="", timeout_seconds=0.0, remaining_seconds=0.0)


def _make_orphan(agent_id: str, entry: LedgerEntry, instance_id: str, now: float) -> Command:
    return Command(
        id=entry.command_id,
        agent_id=agent_id,
        type="shell",
        params={"command": entry.command[:COMMAND_PREVIEW_CHARACTERS], "timeout": entry.timeout_seconds},
        status=ADOPTED_AS[entry.state],
        timeout_seconds=entry.timeout_seconds,
        created_at=now,
        created_by="",
        expires_at=now,
        offered_to=instance_id,
        accepted_at=now,
        is_orphan=True,
    )
