"""The life of a command: submitted, offered, reported on by its agent, cancelled, expired. Every change is stored first
and announced after; what an agent reports is acknowledged only once it is stored. The changes themselves are those of
command_changes.py, settling.py and command_reports.py."""

import logging
from collections.abc import Callable, Sequence
from functools import partial

from fleetwire_server.core import command_changes, settling
from fleetwire_server.core.command_reports import CommandReport, apply_reports
from fleetwire_server.core.events import frame_json
from fleetwire_server.core.fanout import FLEET_TOPIC, Fanout, command_topic
from fleetwire_server.core.loops import run_every
from fleetwire_server.core.sessions import AgentSession, Sessions
from fleetwire_server.core.settling import MAX_QUESTIONS, Settled, make_question
from fleetwire_server.model import Command, CommandKey, CommandStatus
from fleetwire_server.storage import commands
from fleetwire_server.storage.store import Store
from fleetwire_shared.messages import (
    CommandCancel,
    CommandFinished,
    CommandOffer,
    CommandRejected,
    CommandStored,
    Hello,
    OutputStored,
)

logger = logging.getLogger(__name__)

MAX_HELD_BY_AGENT = 128
"""Commands one agent is given at a time; the others stay queued here, in order, and cannot overflow its ledger."""

EXPIRY_ROUND_SECONDS = 1.0


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
            earlier = await self._store.read(partial(command_changes.find_earlier, key=key))
            if earlier is not None:
                return earlier
        if is_connected_only:
            self._sessions.require(command.agent_id)
        session = self._reserve(command)
        stored: Command | None = None
        try:
            stored = await self._store.write(partial(command_changes.add, command=command, key=key, session=session))
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
        command = await self._store.write(
            partial(command_changes.cancel, agent_id=agent_id, command_id=command_id, now=self._now())
        )
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
        settled = await self._store.write(partial(settling.settle, agent_id=agent_id, hello=hello, now=self._now()))
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
                partial(command_changes.offer_waiting, session=session, room=room, now=self._now())
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
                session.link.send(make_question(command.id))

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
            for requeued in await self._store.write(
                partial(command_changes.requeue_unsent, unsent=unsent, now=self._now())
            ):
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
                apply_reports,
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
            expired = await self._store.write(partial(command_changes.expire, due=due, now=self._now()))
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


def _is_offered(stored: Command | None, command_id: str) -> bool:
    return stored is not None and stored.id == command_id and stored.status is CommandStatus.OFFERED
