"""What happens to stored commands by what users ask for, by their turn and by time: each change within one transaction.

What may follow what is the table of command_states.py."""

import logging
from collections.abc import Iterable

from fleetwire_server.core.command_states import HOLDING, CommandEvent, next_status
from fleetwire_server.core.retention import COMMAND_KEY_SECONDS
from fleetwire_server.core.sessions import AgentSession
from fleetwire_server.model import Command, CommandKey
from fleetwire_server.storage import command_keys, commands
from fleetwire_server.storage.commands import CommandChanges
from fleetwire_server.storage.store import Connection
from fleetwire_shared.errors import ConflictError, KeyReusedError, NotFoundError

logger = logging.getLogger(__name__)

LOST_ERROR = (
    "the agent knows nothing of this command any more: its state is gone, or the command ended too long ago for it to"
    " remember; it may have run, and what it started may still run"
)
_EXPIRED_ERROR = "it was out of time before this server offered it to the agent"
_CANCELLED_ERROR = "cancelled before this server offered it to the agent"


def move(
    connection: Connection,
    stored: Command,
    event: CommandEvent,
    now: float,
    error: str | None = None,
    changes: CommandChanges | None = None,
) -> Command | None:
    """Store what the event makes of the command and return it as it is now, None where nothing is changed by it.

    The only place where a status is set."""
    status = next_status(stored, event)
    if status is None:
        return None
    if stored.is_ended_alone:
        logger.warning(
            "command %s: %s here before it was offered, and %s at the agent: was this server restored from a backup?",
            stored.id,
            stored.status,
            status,
        )
    accepted_at = stored.accepted_at
    if accepted_at is None and event in HOLDING:
        accepted_at = now
    values: CommandChanges = {
        "finished_at": now if status.is_end else None,  # unless the agent has told when
        **(changes or {}),
        "status": status,
        "accepted_at": accepted_at,
        "late": stored.late or stored.status.is_end,
        "error": error if status.is_end else None,
    }
    return commands.update_command(connection, stored.id, {stored.status}, **values)


def add(connection: Connection, *, command: Command, key: CommandKey | None, session: AgentSession | None) -> Command:
    if key is not None and (earlier := find_earlier(connection, key=key)) is not None:
        return earlier
    may_offer = session is not None and not commands.has_queued(connection, command.agent_id)
    commands.add_command(connection, command)
    if key is not None:
        command_keys.add_key(connection, key, command.id)
    if session is None or not may_offer:
        return command
    return _offer(connection, command, session, command.created_at) or command


def find_earlier(connection: Connection, *, key: CommandKey) -> Command | None:
    """Return the command that was sent under the key within the last COMMAND_KEY_SECONDS.

    Raises:
        KeyReusedError: it was sent with another body."""
    found = command_keys.get_key(connection, key, key.created_at - COMMAND_KEY_SECONDS)
    if found is None:
        return None
    body_hash, command_id = found
    if body_hash != key.body_hash:
        raise KeyReusedError(
            "Idempotency-Key: was used within the last 24 hours for another command; send each command with its own"
        )
    return commands.get_command(connection, key.agent_id, command_id)


def _offer(connection: Connection, command: Command, session: AgentSession, now: float) -> Command | None:
    return move(connection, command, CommandEvent.OFFERED, now, changes={"offered_to": session.instance_id})


def requeue(connection: Connection, command: Command, event: CommandEvent, now: float) -> Command | None:
    return move(connection, command, event, now, changes={"offered_to": None})


def requeue_unsent(connection: Connection, *, unsent: Iterable[Command], now: float) -> list[Command]:
    """Queue again what was not sent; what was cancelled meanwhile is over with that, as nobody has received it."""
    changed = []
    for command in unsent:
        requeued = requeue(connection, command, CommandEvent.UNSENT, now)
        if requeued is not None and requeued.cancel_requested_at is not None:
            requeued = move(connection, requeued, CommandEvent.CANCEL_ASKED, now, _CANCELLED_ERROR)
        if requeued is not None:
            changed.append(requeued)
    return changed


def cancel(connection: Connection, *, agent_id: str, command_id: str, now: float) -> Command:
    command = commands.get_command(connection, agent_id, command_id)
    if command is None:
        raise NotFoundError(f"there is no command {command_id} of this agent")
    asked_at = now if command.cancel_requested_at is None else command.cancel_requested_at
    changed = move(
        connection, command, CommandEvent.CANCEL_ASKED, now, _CANCELLED_ERROR, {"cancel_requested_at": asked_at}
    )
    if changed is None:
        raise ConflictError(
            f"the command is over, its status is {command.status}; only a command that is not can be cancelled"
        )
    return changed


def expire(connection: Connection, *, due: Iterable[Command], now: float) -> list[Command]:
    expired = [move(connection, command, CommandEvent.TIME_OVER, now, _EXPIRED_ERROR) for command in due]
    return [command for command in expired if command is not None]


def offer_waiting(
    connection: Connection, *, session: AgentSession, room: int, now: float
) -> tuple[list[Command], bool]:
    """Offer up to `room` queued commands; return them, and whether more are queued. Those that are out of time are
    passed over: `run_expiry` ends them."""
    due = commands.list_queued(connection, session.agent_id, now, limit=room + 1)
    offered = [_offer(connection, command, session, now) for command in due[:room]]
    return [command for command in offered if command is not None], len(due) > room
