"""The life of a command: submitted, offered, reported on by its agent, cancelled, expired. Every change is stored first
and announced after; what an agent reports is acknowledged only once it is stored."""

import base64
import binascii
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

from fleetwire_server.core.command_states import OPEN, TERMINAL, is_late, sources_of
from fleetwire_server.core.events import frame_json
from fleetwire_server.core.fanout import FLEET_TOPIC, Fanout, command_topic
from fleetwire_server.core.loops import run_every
from fleetwire_server.core.sessions import AgentSession, Sessions
from fleetwire_server.model import Command, CommandStatus, OutputPiece
from fleetwire_server.storage import commands
from fleetwire_server.storage.commands import CommandChanges
from fleetwire_server.storage.store import Connection, Store
from fleetwire_shared.errors import ConflictError, FleetwireError, NotFoundError, ProtocolError
from fleetwire_shared.limits import CHUNK_BYTES, OUTPUT_KEEP_BYTES
from fleetwire_shared.messages import (
    CommandAccepted,
    CommandCancel,
    CommandFinished,
    CommandOffer,
    CommandOutput,
    CommandRejected,
    CommandStarted,
    CommandStored,
    Hello,
    LedgerEntry,
    OutputStored,
    Settlement,
)

logger = logging.getLogger(__name__)

CommandReport: TypeAlias = CommandAccepted | CommandRejected | CommandStarted | CommandOutput | CommandFinished

MAX_HELD_BY_AGENT = 128
"""Commands one agent is given at a time; the others stay queued here, in order, and cannot overflow its ledger."""

EXPIRY_ROUND_SECONDS = 1.0

_REJECTED_AS: Mapping[str, CommandStatus] = {
    "cancelled": CommandStatus.CANCELLED,
    "expired": CommandStatus.EXPIRED,
}
_LEDGER_STATUS: Mapping[str, CommandStatus] = {
    "accepted": CommandStatus.ACCEPTED,
    "running": CommandStatus.RUNNING,
}
_LOST_ERROR = (
    "the agent restarted and no longer knows this command: it may have run in part, and what it started may still run"
)


@dataclass(frozen=True, slots=True)
class Settled:
    """What a connect came to: the answers to the agent's ledger, and the commands that changed by it."""

    answers: tuple[Settlement, ...]
    changed: tuple[Command, ...]
    to_cancel: tuple[str, ...]


class Dispatch:
    def __init__(self, *, store: Store, sessions: Sessions, fanout: Fanout, now: Callable[[], float]) -> None:
        self._store = store
        self._sessions = sessions
        self._fanout = fanout
        self._now = now

    # ------------------------------------------------------------ what users ask for

    async def submit(self, command: Command) -> Command:
        """Store a new command and offer it to its agent if that is connected.

        Raises:
            NotFoundError: there is no such agent."""
        session = self._reserve(command)
        try:
            stored = await self._store.write(partial(_add, command=command, session=session))
        except FleetwireError:
            if session is not None:
                session.command_ids.discard(command.id)
            raise
        self._announce(stored)
        present = self._sessions.get(command.agent_id)
        if session is not None and present is session:
            self._send_offer(session, stored)
            return stored
        if session is not None:  # it left before it could be sent the offer
            await self._store.write(partial(_requeue, command_id=stored.id))
        if present is not None:
            await self.offer_waiting(present)
        return stored

    def _reserve(self, command: Command) -> AgentSession | None:
        """Return the session that is to be offered the command at once, None where it must wait its turn."""
        session = self._sessions.get(command.agent_id)
        if session is None:
            return None
        if session.has_queued or len(session.command_ids) >= MAX_HELD_BY_AGENT:
            session.has_queued = True
            return None
        session.command_ids.add(command.id)  # counts from now on, as others may be submitted meanwhile
        return session

    async def cancel(self, agent_id: str, command_id: str) -> Command:
        """Cancel a command that is not over. One that its agent may hold is over only when the agent says so.

        Raises:
            NotFoundError: no such command of that agent. ConflictError: it is over."""
        command = await self._store.write(partial(_cancel, agent_id=agent_id, command_id=command_id, now=self._now()))
        self._announce(command)
        session = self._sessions.get(agent_id)
        if session is not None and command.status in OPEN:
            session.command_ids.add(command_id)
            session.link.send(CommandCancel(command_id=command_id))
        return command

    # ------------------------------------------------------------ what agents say

    async def settle(self, agent_id: str, hello: Hello) -> Settled:
        """Compare what the agent holds with what is stored, and settle each difference (docs/protocol.md)."""
        settled = await self._store.write(partial(_settle, agent_id=agent_id, hello=hello, now=self._now()))
        for command in settled.changed:
            self._announce(command)
        return settled

    async def offer_waiting(self, session: AgentSession) -> None:
        """Offer the commands that wait for this agent, oldest first; those that waited too long expire."""
        room = MAX_HELD_BY_AGENT - len(session.command_ids)
        if room <= 0:
            return
        changed, session.has_queued = await self._store.write(
            partial(_offer_waiting, session=session, room=room, now=self._now())
        )
        for command in changed:
            self._announce(command)
            if command.status is CommandStatus.OFFERED:
                self._send_offer(session, command)

    async def receive(self, session: AgentSession, reports: Sequence[CommandReport]) -> None:
        """Store what the agent reports, in order and in one transaction; then announce and acknowledge it.

        Reports on what this agent was not given, or has told the end of already (its answer to a cancel may cross the
        end itself), are dropped; an end is acknowledged all the same, so that the agent forgets it.

        Raises:
            ProtocolError: a report that makes no sense."""
        known = [report for report in reports if report.command_id in session.command_ids]
        changed = await self._store.write(
            partial(_apply_reports, agent_id=session.agent_id, reports=known, now=self._now())
        )
        for report, change in zip(known, changed, strict=True):
            self._announce_report(session, report, change)
        for report in reports:
            if isinstance(report, CommandFinished | CommandRejected):
                session.command_ids.discard(report.command_id)
                session.link.send(CommandStored(command_id=report.command_id))
        may_offer = session.has_queued
        # What the agent refused as full waits for its next end or connect: offered now, it would be refused again.
        session.has_queued |= any(
            isinstance(change, Command) and change.status is CommandStatus.QUEUED for change in changed
        )
        if may_offer:
            await self.offer_waiting(session)

    def _announce_report(self, session: AgentSession, report: CommandReport, change: Command | int | None) -> None:
        if isinstance(change, Command):
            self._announce(change)
        elif change is not None:
            session.link.send(OutputStored(command_id=report.command_id, position=change))
            self._fanout.publish(command_topic(report.command_id), b"")

    # ------------------------------------------------------------ what time does

    async def run_expiry(self) -> None:
        """End commands that waited for their agent too long. Runs until cancelled."""
        await run_every(EXPIRY_ROUND_SECONDS, self._expire_due, "expiring commands")

    async def _expire_due(self) -> None:
        due = await self._store.read(partial(commands.list_expirable, now=self._now()))
        if due:
            for command in await self._store.write(partial(_expire, due=due, now=self._now())):
                self._announce(command)

    # ------------------------------------------------------------ telling others

    def _send_offer(self, session: AgentSession, command: Command) -> None:
        session.command_ids.add(command.id)
        session.link.send(
            CommandOffer(
                command_id=command.id,
                kind=command.type,
                command=str(command.params["command"]),
                timeout_seconds=command.timeout_seconds,
                remaining_seconds=max(0.0, command.expires_at - self._now()),
            )
        )

    def _announce(self, command: Command) -> None:
        self._fanout.publish(command_topic(command.id), b"")
        document = {"command_id": command.id, "agent_id": command.agent_id, "status": command.status}
        self._fanout.publish(FLEET_TOPIC, frame_json(document, event="command"))


# -------------------------------------------------------------------- changes, each within one transaction


def _add(connection: Connection, *, command: Command, session: AgentSession | None) -> Command:
    commands.add_command(connection, command)
    if session is None:
        return command
    return _offer(connection, command, session) or command


def _offer(connection: Connection, command: Command, session: AgentSession) -> Command | None:
    return commands.update_command(
        connection,
        command.id,
        sources_of(CommandStatus.OFFERED),
        status=CommandStatus.OFFERED,
        offered_to=session.instance_id,
    )


def _requeue(connection: Connection, *, command_id: str) -> Command | None:
    return commands.update_command(
        connection, command_id, {CommandStatus.OFFERED}, status=CommandStatus.QUEUED, offered_to=None
    )


def _end(
    connection: Connection, command: Command, status: CommandStatus, now: float, error: str | None
) -> Command | None:
    return commands.update_command(
        connection, command.id, sources_of(status), status=status, finished_at=now, error=error
    )


def _cancel(connection: Connection, *, agent_id: str, command_id: str, now: float) -> Command:
    command = commands.get_command(connection, agent_id, command_id)
    if command is None:
        raise NotFoundError(f"there is no command {command_id} of this agent")
    if command.status in TERMINAL:
        raise ConflictError(
            f"the command is over, its status is {command.status}; only a command that is not can be cancelled"
        )
    if command.status is CommandStatus.QUEUED:
        changed = _end(
            connection, command, CommandStatus.CANCELLED, now, "cancelled before it was offered to the agent"
        )
    else:
        changed = commands.update_command(
            connection, command_id, OPEN, cancel_requested_at=command.cancel_requested_at or now
        )
    return changed or command


def _expire(connection: Connection, *, due: Iterable[Command], now: float) -> list[Command]:
    error = "the agent could not be offered the command before it expired; it has not been run"
    return [
        changed
        for command in due
        if command.status is CommandStatus.QUEUED
        and (changed := commands.update_command(
            connection, command.id, {CommandStatus.QUEUED}, status=CommandStatus.EXPIRED, finished_at=now, error=error
        ))
    ]  # fmt: skip


def _offer_waiting(
    connection: Connection, *, session: AgentSession, room: int, now: float
) -> tuple[list[Command], bool]:
    """Offer up to `room` queued commands; return those that changed, and whether some are still queued."""
    queued = [
        command
        for command in commands.list_open(connection, session.agent_id)
        if command.status is CommandStatus.QUEUED
    ]
    expired = _expire(connection, due=[command for command in queued if command.expires_at <= now], now=now)
    due = [command for command in queued if command.expires_at > now]
    offered = [_offer(connection, command, session) for command in due[:room]]
    return expired + [command for command in offered if command is not None], len(due) > room


def _settle(connection: Connection, *, agent_id: str, hello: Hello, now: float) -> Settled:
    answers, changed, to_cancel = [], [], []
    for entry in hello.ledger:
        stored = commands.get_command(connection, agent_id, entry.command_id)
        answers.append(_answer_entry(entry, stored))
        if answers[-1].action == "keep" and stored is not None:
            adopted = _adopt(connection, entry, stored)
            changed.append(adopted or stored)
            if stored.cancel_requested_at is not None:
                to_cancel.append(stored.id)
    held = {entry.command_id for entry in hello.ledger}
    for command in commands.list_open(connection, agent_id):
        if command.id not in held and command.status is not CommandStatus.QUEUED:
            settled = _settle_unknown(connection, command, hello.instance_id, now)
            if settled is not None:
                changed.append(settled)
    return Settled(tuple(answers), tuple(changed), tuple(to_cancel))


def _answer_entry(entry: LedgerEntry, stored: Command | None) -> Settlement:
    if stored is None:
        logger.warning("agent holds a command this server does not know: %s (%s)", entry.command_id, entry.state)
        return Settlement(command_id=entry.command_id, action="forget" if entry.state == "finished" else "cancel")
    if stored.status in TERMINAL and not is_late(stored.status):
        return Settlement(command_id=entry.command_id, action="forget" if entry.state == "finished" else "cancel")
    return Settlement(command_id=entry.command_id, action="keep", output_position=stored.output_end)


def _adopt(connection: Connection, entry: LedgerEntry, stored: Command) -> Command | None:
    """Take over the agent's state of a command that both hold; a finished one is stored when its result comes."""
    status = _LEDGER_STATUS.get(entry.state)
    if status is None or status is stored.status:
        return None
    return commands.update_command(
        connection,
        stored.id,
        sources_of(status),
        status=status,
        late=stored.late or is_late(stored.status),
        finished_at=None,
        error=None,
    )


def _settle_unknown(connection: Connection, command: Command, instance_id: str, now: float) -> Command | None:
    """Settle a command that the agent was offered and does not hold."""
    was_never_received = command.status is CommandStatus.OFFERED and command.offered_to == instance_id
    if not was_never_received:
        return _end(connection, command, CommandStatus.LOST, now, _LOST_ERROR)
    if command.cancel_requested_at is not None:
        return _end(connection, command, CommandStatus.CANCELLED, now, "cancelled before the agent received it")
    return _requeue(connection, command_id=command.id)


def _apply_reports(
    connection: Connection, *, agent_id: str, reports: Sequence[CommandReport], now: float
) -> list[Command | int | None]:
    return [_apply(connection, agent_id, report, now) for report in reports]


def _apply(connection: Connection, agent_id: str, report: CommandReport, now: float) -> Command | int | None:
    """Store one report.

    Returns:
        The command as it is now; for output the position up to which it is stored; None where nothing changed."""
    if isinstance(report, CommandOutput):
        return commands.add_output(connection, report.command_id, [_piece(report)], OUTPUT_KEEP_BYTES)
    stored = commands.get_command(connection, agent_id, report.command_id)
    if stored is None:
        return None
    late = stored.late or is_late(stored.status)
    if isinstance(report, CommandAccepted):
        return _move(connection, stored, CommandStatus.ACCEPTED, {"late": late})
    if isinstance(report, CommandStarted):
        return _move(connection, stored, CommandStatus.RUNNING, {"late": late, "started_at": now})
    if isinstance(report, CommandRejected) and report.reason == "full" and stored.cancel_requested_at is None:
        return _requeue(connection, command_id=stored.id)
    if isinstance(report, CommandRejected):
        status = _REJECTED_AS.get(report.reason, CommandStatus.REJECTED)
        return _move(connection, stored, status, {"late": late, "finished_at": now, "error": report.message})
    changes: CommandChanges = {
        "late": late,
        "exit_code": report.exit_code,
        "stdout_bytes": report.stdout_bytes,
        "stderr_bytes": report.stderr_bytes,
        "truncated": stored.truncated or stored.output_end < report.stdout_bytes + report.stderr_bytes,
        "started_at": min(stored.started_at or now, now - report.duration_seconds),
        "finished_at": now,
        "error": report.error,
    }
    return _move(connection, stored, CommandStatus(report.status), changes)


def _move(connection: Connection, stored: Command, status: CommandStatus, changes: CommandChanges) -> Command | None:
    changes["status"] = status
    return commands.update_command(connection, stored.id, sources_of(status), **changes)


def _piece(report: CommandOutput) -> OutputPiece:
    try:
        data = base64.b64decode(report.base64, validate=True)
    except (binascii.Error, ValueError) as err:
        raise ProtocolError("command_output.base64", f"is not base64: {err}") from err
    if len(data) > CHUNK_BYTES:
        raise ProtocolError("command_output.base64", f"holds {len(data)} bytes, at most {CHUNK_BYTES} are allowed")
    if report.position < 0 or report.offset < 0:
        raise ProtocolError("command_output.position", "must not be negative")
    return OutputPiece(position=report.position, stream=report.stream, offset=report.offset, data=data)
