"""The life of a command: submitted, offered, reported on by its agent, cancelled, expired. Every change is stored first
and announced after; what an agent reports is acknowledged only once it is stored. What may follow what is the table of
command_states.py, what a connect comes to is decided by resync.py: here is what they say carried out."""

import base64
import binascii
import logging
import re
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

from fleetwire_server.core.command_states import (
    ADOPTED_AS,
    ENDS,
    HOLDING,
    REFUSALS,
    CommandEvent,
    is_proved,
    next_status,
)
from fleetwire_server.core.events import frame_json
from fleetwire_server.core.fanout import FLEET_TOPIC, Fanout, command_topic
from fleetwire_server.core.loops import run_every
from fleetwire_server.core.resync import Decision, decide
from fleetwire_server.core.retention import COMMAND_KEY_SECONDS
from fleetwire_server.core.sessions import AgentSession, Sessions
from fleetwire_server.model import AuditEntry, Command, CommandKey, CommandStatus, KilledProcess, OutputPiece
from fleetwire_server.storage import audit, command_keys, commands
from fleetwire_server.storage.commands import CommandChanges
from fleetwire_server.storage.store import Connection, Store
from fleetwire_shared.errors import ConflictError, KeyReusedError, NotFoundError, ProtocolError
from fleetwire_shared.limits import (
    CHUNK_BYTES,
    COMMAND_ID_PATTERN,
    COMMAND_PREVIEW_CHARACTERS,
    MAX_KILLED_LISTED,
    OUTPUT_KEEP_BYTES,
)
from fleetwire_shared.messages import (
    NO_KIND,
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

MAX_ORPHANS = 1000
"""Commands this server does not know that are taken over from one agent: an agent that invents some must not fill the
database. Those beyond it are ended as they are told of, and not stored."""

MAX_QUESTIONS = 256
"""Commands one agent is asked about at a time, well below what may wait to be sent to it; the others are asked about
when it has answered, or at its next connect."""

MAX_POSITION = 1 << 62
"""Of output; what is added to it still is an integer of 64 bits."""

EXPIRY_ROUND_SECONDS = 1.0

_LOST_ERROR = (
    "the agent knows nothing of this command any more: its state is gone, or the command ended too long ago for it to"
    " remember; it may have run, and what it started may still run"
)
_EXPIRED_ERROR = "it was out of time before this server offered it to the agent"
_CANCELLED_ERROR = "cancelled before this server offered it to the agent"

_COMMAND_ID = re.compile(COMMAND_ID_PATTERN, re.ASCII)


@dataclass(slots=True)
class Settled:
    """What a connect came to."""

    answers: list[Settlement] = field(default_factory=list)  # to the agent's ledger
    changed: list[Command] = field(default_factory=list)
    cancels: list[CommandCancel] = field(default_factory=list)  # to be sent after the welcome
    questions: list[CommandOffer] = field(default_factory=list)  # likewise
    orphan_ids: list[str] = field(default_factory=list)

    @property
    def reportable_ids(self) -> set[str]:
        """The commands that the agent may report on from now on."""
        kept = {answer.command_id for answer in self.answers if answer.action == "keep"}
        return kept | {cancel.command_id for cancel in self.cancels} | self.asked_ids

    @property
    def asked_ids(self) -> set[str]:
        return {question.command_id for question in self.questions}


class Dispatch:
    def __init__(self, *, store: Store, sessions: Sessions, fanout: Fanout, now: Callable[[], float]) -> None:
        self._store = store
        self._sessions = sessions
        self._fanout = fanout
        self._now = now

    # ------------------------------------------------------------ what users ask for

    async def submit(
        self, command: Command, *, key: CommandKey | None = None, is_connected_only: bool = False
    ) -> Command:
        """Store a new command and offer it to its agent if that is connected.

        Args:
            key: return the command that was sent under this key before, if one was.
            is_connected_only: refuse when the agent is away, unless the command was sent before.
        Raises:
            NotFoundError: there is no such agent. UnavailableError: it is away.
            KeyReusedError: what was sent under the key was something else."""
        if key is not None:
            earlier = await self._store.read(partial(_find_earlier, key=key))
            if earlier is not None:
                return earlier
        if is_connected_only:
            self._sessions.require(command.agent_id)
        session = self._reserve(command)
        stored: Command | None = None
        try:
            stored = await self._store.write(partial(_add, command=command, key=key, session=session))
        finally:
            if session is not None and not _is_offered(stored, command.id):
                session.command_ids.discard(command.id)
        if stored.id != command.id:
            return stored
        self._announce(stored)
        if session is not None and stored.status is CommandStatus.OFFERED:
            await self._deliver(session, [stored])
        elif (present := self._sessions.get(command.agent_id)) is not None:
            await self.offer_waiting(present)
        return stored

    def _reserve(self, command: Command) -> AgentSession | None:
        """Return the session that is to be offered the command at once, None where it must wait its turn."""
        session = self._sessions.get(command.agent_id)
        if session is None:
            return None
        if session.has_queued or session.offering.locked() or len(session.command_ids) >= MAX_HELD_BY_AGENT:
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
        if session is None:
            return command
        if command.status.is_end:
            await self.ask_about_ended(session)
        elif command_id not in session.asked_ids:  # else it is not held there, and the answer will be its end
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
        """Offer the commands that wait for this agent, oldest first, as many as there is room for.

        One call at a time: two would offer twice what there is room for. What a call before this one has offered
        already is not looked for again."""
        session.has_queued = True  # perhaps; without room, looked at when one of those it holds has ended
        async with session.offering:
            room = MAX_HELD_BY_AGENT - len(session.command_ids)
            if not session.has_queued or room <= 0:
                return
            session.has_queued = False
            offered, has_more = await self._store.write(
                partial(_offer_waiting, session=session, room=room, now=self._now())
            )
            session.has_queued |= has_more
            for command in offered:
                self._announce(command)
            await self._deliver(session, offered)

    async def ask_about_ended(self, session: AgentSession) -> None:
        """Ask the agent what it remembers of commands that were ended here without its word.

        The answer is that it has never heard of them, unless this server was restored from a backup."""
        if session.asked_ids:
            return  # goes on when these are answered
        ended = await self._store.read(
            partial(commands.list_ended_alone, agent_id=session.agent_id, limit=MAX_QUESTIONS)
        )
        for command in ended:
            if command.id not in session.command_ids:
                session.command_ids.add(command.id)
                session.asked_ids.add(command.id)
                session.link.send(_make_question(command.id))

    async def _deliver(self, session: AgentSession, offered: Sequence[Command]) -> None:
        """Send what is stored as offered to this session; where it is gone meanwhile, its successor is offered it."""
        present = self._sessions.get(session.agent_id)
        if present is session:
            for command in offered:
                self._send_offer(session, command)
            return
        known = present.command_ids if present is not None else frozenset[str]()
        unsent = [command for command in offered if command.id not in known]
        if unsent:
            for requeued in await self._store.write(partial(_requeue_unsent, unsent=unsent, now=self._now())):
                self._announce(requeued)
            if present is not None:
                await self.offer_waiting(present)

    async def receive(self, session: AgentSession, reports: Sequence[CommandReport]) -> None:
        """Store what the agent reports, in order and in one transaction; then announce and acknowledge it.

        Reports on what this agent was not given, or has told the end of already (its answer to a cancel may cross the
        end itself), are dropped; an end is acknowledged all the same, so that the agent forgets it.

        Raises:
            ProtocolError: a report that makes no sense."""
        known = [report for report in reports if report.command_id in session.command_ids]
        changed = await self._store.write(
            partial(
                _apply_reports,
                agent_id=session.agent_id,
                instance_id=session.instance_id,
                asked_ids=frozenset(session.asked_ids),
                reports=known,
                now=self._now(),
            )
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
        answered = session.asked_ids.intersection(report.command_id for report in known)
        session.asked_ids -= answered
        if answered:
            await self.ask_about_ended(session)

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
            expired = await self._store.write(partial(_expire, due=due, now=self._now()))
            for command in expired:
                self._announce(command)
            for agent_id in {command.agent_id for command in expired}:
                if (session := self._sessions.get(agent_id)) is not None:
                    await self.ask_about_ended(session)

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


def _move(
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
        **(changes or {}),
        "status": status,
        "accepted_at": accepted_at,
        "late": stored.late or stored.status.is_end,
        "finished_at": now if status.is_end else None,
        "error": error if status.is_end else None,
    }
    return commands.update_command(connection, stored.id, {stored.status}, **values)


def _add(connection: Connection, *, command: Command, key: CommandKey | None, session: AgentSession | None) -> Command:
    if key is not None and (earlier := _find_earlier(connection, key=key)) is not None:
        return earlier
    may_offer = session is not None and not commands.has_queued(connection, command.agent_id)
    commands.add_command(connection, command)
    if key is not None:
        command_keys.add_key(connection, key, command.id)
    if session is None or not may_offer:
        return command
    return _offer(connection, command, session, command.created_at) or command


def _is_offered(stored: Command | None, command_id: str) -> bool:
    return stored is not None and stored.id == command_id and stored.status is CommandStatus.OFFERED


def _find_earlier(connection: Connection, *, key: CommandKey) -> Command | None:
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
    return _move(connection, command, CommandEvent.OFFERED, now, changes={"offered_to": session.instance_id})


def _requeue(connection: Connection, command: Command, event: CommandEvent, now: float) -> Command | None:
    return _move(connection, command, event, now, changes={"offered_to": None})


def _requeue_unsent(connection: Connection, *, unsent: Iterable[Command], now: float) -> list[Command]:
    """Queue again what was not sent; what was cancelled meanwhile is over with that, as nobody has received it."""
    changed = []
    for command in unsent:
        requeued = _requeue(connection, command, CommandEvent.UNSENT, now)
        if requeued is not None and requeued.cancel_requested_at is not None:
            requeued = _move(connection, requeued, CommandEvent.CANCEL_ASKED, now, _CANCELLED_ERROR)
        if requeued is not None:
            changed.append(requeued)
    return changed


def _cancel(connection: Connection, *, agent_id: str, command_id: str, now: float) -> Command:
    command = commands.get_command(connection, agent_id, command_id)
    if command is None:
        raise NotFoundError(f"there is no command {command_id} of this agent")
    asked_at = now if command.cancel_requested_at is None else command.cancel_requested_at
    changed = _move(
        connection, command, CommandEvent.CANCEL_ASKED, now, _CANCELLED_ERROR, {"cancel_requested_at": asked_at}
    )
    if changed is None:
        raise ConflictError(
            f"the command is over, its status is {command.status}; only a command that is not can be cancelled"
        )
    return changed


def _expire(connection: Connection, *, due: Iterable[Command], now: float) -> list[Command]:
    expired = [_move(connection, command, CommandEvent.TIME_OVER, now, _EXPIRED_ERROR) for command in due]
    return [command for command in expired if command is not None]


def _offer_waiting(
    connection: Connection, *, session: AgentSession, room: int, now: float
) -> tuple[list[Command], bool]:
    """Offer up to `room` queued commands; return them, and whether more are queued. Those that are out of time are
    passed over: `run_expiry` ends them."""
    due = commands.list_queued(connection, session.agent_id, now, limit=room + 1)
    offered = [_offer(connection, command, session, now) for command in due[:room]]
    return [command for command in offered if command is not None], len(due) > room


# -------------------------------------------------------------------- at a connect


def _settle(connection: Connection, *, agent_id: str, hello: Hello, now: float) -> Settled:
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
        detail = {"command_ids": settled.orphan_ids, "agent_instance": hello.instance_id[:100]}
        audit.add_entry(
            connection,
            AuditEntry(at=now, actor="server", action="commands.adopted", subject=agent_id, detail=detail),
        )
    return settled


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
        settled.questions.append(_make_question(stored.id))
    if decision.cancel is not None:
        settled.cancels.append(CommandCancel(command_id=stored.id, reason=decision.cancel))
    if decision.event is CommandEvent.NEVER_RECEIVED:
        changed = _requeue(connection, stored, decision.event, now)
    elif decision.event is not None and decision.event in HOLDING:
        changed = _move(connection, stored, decision.event, now, changes={"offered_to": instance_id})
    elif decision.event is not None:
        changed = _move(connection, stored, decision.event, now, _LOST_ERROR)
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
    """Store a command that only the agent knows. One that cannot be stored is ended instead: nobody could see it, its
    output would be taken by nobody, and it would stand still as soon as that fills the agent's window."""
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
    return Decision(answer="forget" if entry.state == "finished" else "cancel", warning=f"not known here: {problem}")


def _make_question(command_id: str) -> CommandOffer:
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


# -------------------------------------------------------------------- reports


def _apply_reports(
    connection: Connection,
    *,
    agent_id: str,
    instance_id: str,
    asked_ids: Set[str],
    reports: Sequence[CommandReport],
    now: float,
) -> list[Command | int | None]:
    changes: list[Command | int | None] = []
    for report in reports:
        if isinstance(report, CommandRejected) and report.command_id in asked_ids:
            changes.append(_apply_ignorance(connection, agent_id, instance_id, report, now))
        else:
            changes.append(_apply(connection, agent_id, report, now))
    return changes


def _apply_ignorance(
    connection: Connection, agent_id: str, instance_id: str, report: CommandRejected, now: float
) -> Command | None:
    """Store the answer to a question that is no result: the agent has not run the command, or does not remember it."""
    stored = commands.get_command(connection, agent_id, report.command_id)
    if stored is None:
        return None
    if stored.is_ended_alone:
        # As proved as it will ever be: it is not asked about again.
        commands.update_command(connection, stored.id, {stored.status}, offered_to=instance_id)
        return None
    is_remembered = report.reason in ("cancelled", "expired") and stored.status is CommandStatus.ACCEPTED
    if is_remembered:
        return _apply_rejection(connection, stored, report, now)
    return _move(connection, stored, CommandEvent.GONE, now, _LOST_ERROR)


def _apply(connection: Connection, agent_id: str, report: CommandReport, now: float) -> Command | int | None:
    """Store one report.

    Returns:
        The command as it is now; for output the position up to which it is stored; None where nothing changed."""
    if isinstance(report, CommandOutput):
        return _apply_output(connection, _piece(report), report.command_id)
    stored = commands.get_command(connection, agent_id, report.command_id)
    if stored is None:
        return None
    match report:
        case CommandAccepted():
            return _move(connection, stored, CommandEvent.ACCEPTED, now)
        case CommandStarted():
            return _move(connection, stored, CommandEvent.STARTED, now, changes={"started_at": now})
        case CommandRejected():
            return _apply_rejection(connection, stored, report, now)
        case CommandFinished():
            return _apply_result(connection, stored, report, now)


def _apply_output(connection: Connection, piece: OutputPiece, command_id: str) -> int | None:
    known = commands.get_output_ends(connection, command_id, piece.stream)
    if known is None:
        return None
    output_end, stream_end = known
    if piece.end > output_end and piece.offset + max(output_end - piece.position, 0) < stream_end:
        # The quota is counted in offsets: output that all had the same would never fall out of it.
        raise ProtocolError(
            "command_output.offset", f"is {piece.offset} at position {piece.position}, after byte {stream_end} was sent"
        )
    return commands.add_output(connection, command_id, [piece], OUTPUT_KEEP_BYTES)


def _apply_rejection(connection: Connection, stored: Command, report: CommandRejected, now: float) -> Command | None:
    event = REFUSALS[report.reason]
    if event is CommandEvent.REFUSED_FULL and stored.cancel_requested_at is not None:
        event = CommandEvent.REFUSED_CANCELLED
    _compare(stored, event)
    if next_status(stored, event) is CommandStatus.QUEUED:
        return _requeue(connection, stored, event, now)
    return _move(connection, stored, event, now, report.message)


def _apply_result(connection: Connection, stored: Command, report: CommandFinished, now: float) -> Command | None:
    event = CommandEvent(report.status)
    _compare(stored, event)
    changes: CommandChanges = {
        "exit_code": report.exit_code,
        "stdout_bytes": report.stdout_bytes,
        "stderr_bytes": report.stderr_bytes,
        "truncated": stored.truncated or stored.output_end < report.stdout_bytes + report.stderr_bytes,
        "started_at": min(stored.started_at or now, now - report.duration_seconds),
        "killed": tuple(
            KilledProcess(pid=each.pid, command=each.command[:COMMAND_PREVIEW_CHARACTERS], signal=each.signal)
            for each in report.killed[:MAX_KILLED_LISTED]
        ),
        "killed_count": max(report.killed_count, len(report.killed)),
    }
    return _move(connection, stored, event, now, report.error, changes)


def _compare(stored: Command, event: CommandEvent) -> None:
    """Say so where the agent tells another end than the one that is proved. The stored one stays."""
    if is_proved(stored) and ENDS[event] is not stored.status:
        logger.warning("command %s: %s here, and %s at the agent", stored.id, stored.status, ENDS[event])


def _piece(report: CommandOutput) -> OutputPiece:
    try:
        data = base64.b64decode(report.base64, validate=True)
    except (binascii.Error, ValueError) as err:
        raise ProtocolError("command_output.base64", f"is not base64: {err}") from err
    if len(data) > CHUNK_BYTES:
        raise ProtocolError("command_output.base64", f"holds {len(data)} bytes, at most {CHUNK_BYTES} are allowed")
    if not 0 <= report.offset <= report.position <= MAX_POSITION:
        raise ProtocolError(
            "command_output.position", f"must be the offset or more, and at most {MAX_POSITION}, got {report.position}"
        )
    return OutputPiece(position=report.position, stream=report.stream, offset=report.offset, data=data)
