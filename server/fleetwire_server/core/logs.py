"""Log streams: one tail on the host for each (agent, log, filter), however many viewers it has.

A tail writes what it reads into a ring of framed events (log_ring.py); the fastest viewer sets its pace, so TCP slows
the reader on the host. A viewer that falls out of the ring, or asks for lines from before it, reads the host through a
channel of its own until it meets the ring again. So a slow viewer delays nobody, and nobody loses a line."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial

from fleetwire_server.core.channels import Channels, ChannelSocket, receive_message
from fleetwire_server.core.events import frame_json, frame_text
from fleetwire_server.core.log_ring import Entry, LogEndedError, LogRing, last_cursor
from fleetwire_server.core.sessions import Sessions
from fleetwire_shared.errors import FleetwireError, PeerTimeoutError, UnavailableError, error_from_code
from fleetwire_shared.messages import ChannelMessage, End, FollowLog, LogGap, LogLines, LogOpened, LogRotated

LINGER_SECONDS = 30.0
"""How long a tail goes on after its last viewer left: a browser that reconnects finds it as it was."""

OPEN_SECONDS = 15.0
REOPEN_SECONDS = 1.0
MEET_SECONDS = 0.2
"""How long a viewer that reads by itself waits for the tail to reach the line it is at."""

ALL_LINES = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LogQuery:
    """Which lines of which log; the same query means the same tail."""

    source: str  # "journald" or "file"
    unit: str | None = None
    path: str | None = None
    priority: int | None = None
    grep: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LogStart:
    """Where a viewer begins: after `cursor`, else at `since`, else `lines` before the end."""

    lines: int = 10
    since: float | None = None
    cursor: str | None = None


def entries_of(message: ChannelMessage | bytes) -> list[Entry]:
    """Return the events that a frame of a log channel stands for.

    Raises:
        FleetwireError: the agent ended the channel, for the reason it gives."""
    match message:
        case LogLines():
            lines = zip(message.cursors, message.texts, strict=True)
            return [Entry(frame_text(text, event_id=cursor), cursor) for cursor, text in lines]
        case LogGap():
            count = "unknown" if message.count is None else message.count
            return [Entry(frame_json({"count": count, "reason": message.reason}, event="gap"), None)]
        case LogRotated():
            return [Entry(frame_json({"reason": message.reason}, event="rotated"), None)]
        case End():
            raise error_from_code(
                message.code or "unavailable", message.message or "the agent stopped following the log"
            )
    return []


class LogTail:
    """One tail on a host: its ring, and who looks at it."""

    def __init__(self) -> None:
        self.ring = LogRing()
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.viewers = 0
        self.task: asyncio.Task[None] | None = None
        self.stop: asyncio.TimerHandle | None = None

    def enter(self) -> None:
        self.viewers += 1
        if self.stop is not None:
            self.stop.cancel()
            self.stop = None

    def leave(self) -> None:
        self.viewers -= 1
        if self.viewers == 0 and self.task is not None:
            self.stop = asyncio.get_running_loop().call_later(LINGER_SECONDS, self.task.cancel)

    def place_for(self, start: LogStart) -> int | None:
        """Return where in the ring a viewer that came later begins, None when it must ask the host."""
        if start.cursor is not None:
            number = self.ring.number_of(start.cursor)
            return None if number is None else number + 1
        if start.since is not None:
            return None
        return self.ring.number_of_last_lines(start.lines)


@dataclass(slots=True)
class LogViewer:
    """One viewer of one tail: first what it asked for from before, then what comes."""

    ring: LogRing
    start: LogStart
    number: int | None  # its place in the ring, None while it reads the host by itself
    read_host: Callable[[LogStart], AsyncGenerator[list[Entry], None]]

    async def follow(self) -> AsyncGenerator[bytes, None]:
        """Yield framed events until cancelled.

        Raises:
            LogEndedError: the log cannot be followed any further."""
        start = self.start
        while True:
            if self.number is None:
                async with aclosing(self._catch_up(start)) as batches:
                    async for entries in batches:
                        yield b"".join(entry.frame for entry in entries)
                        start = _after(entries, start)
            else:
                read = await self.ring.read(self.number)
                if read is None:
                    self.number = None
                    continue
                self.number += len(read)
                start = _after(read, start)
                yield b"".join(entry.frame for entry in read)

    async def _catch_up(self, start: LogStart) -> AsyncGenerator[list[Entry], None]:
        """Yield entries from the host until they meet the ring, where `number` then is."""
        try:
            async with aclosing(self.read_host(start)) as batches:
                async for entries in batches:
                    yield entries
                    cursor = last_cursor(entries)
                    met = None if cursor is None else await self.ring.wait_for_cursor(cursor, MEET_SECONDS)
                    if met is not None:
                        self.number = met + 1
                        return
        except FleetwireError as err:
            raise LogEndedError(err.message) from err


def _after(entries: list[Entry], start: LogStart) -> LogStart:
    """Return where to go on after `entries`; `start` itself when there was no line among them."""
    cursor = last_cursor(entries)
    return start if cursor is None else LogStart(cursor=cursor)


class Logs:
    """All tails of all agents."""

    def __init__(self, *, sessions: Sessions, channels: Channels) -> None:
        self._sessions = sessions
        self._channels = channels
        self._tails: dict[tuple[str, LogQuery], LogTail] = {}
        self._group: asyncio.TaskGroup | None = None

    async def run(self) -> None:
        """Hold the tails' tasks. Runs until cancelled."""
        async with asyncio.TaskGroup() as self._group:
            await asyncio.Event().wait()

    @asynccontextmanager
    async def view(self, agent_id: str, query: LogQuery, start: LogStart) -> AsyncIterator[LogViewer]:
        """Yield a viewer of the log; the tail is started if there is none yet.

        Raises:
            FleetwireError: the agent is away or refuses, before anything was sent to the viewer."""
        self._sessions.require(agent_id)
        tail = self._tails.get((agent_id, query))
        is_new = tail is None
        if tail is None:
            tail = self._start_tail(agent_id, query, start)
        tail.enter()
        try:
            await asyncio.shield(tail.opened)
            number = 0 if is_new else tail.place_for(start)
            yield LogViewer(tail.ring, start, number, partial(self._read_host, agent_id, query))
        finally:
            tail.leave()

    def _start_tail(self, agent_id: str, query: LogQuery, start: LogStart) -> LogTail:
        if self._group is None:
            raise UnavailableError("the server is starting; try again")
        tail = self._tails[agent_id, query] = LogTail()
        tail.task = self._group.create_task(self._run_tail(agent_id, query, tail, start))
        return tail

    async def _run_tail(self, agent_id: str, query: LogQuery, tail: LogTail, start: LogStart) -> None:
        reason = "the log is not followed any more"
        try:
            async with aclosing(self._read_host(agent_id, query, start)) as batches:
                async for entries in batches:
                    if not tail.opened.done():
                        tail.opened.set_result(None)
                    await tail.ring.write(entries)
        except FleetwireError as err:
            reason = err.message
            if not tail.opened.done():
                tail.opened.set_exception(err)
                tail.opened.exception()  # looked at here, as every viewer may have left
        finally:
            if self._tails.get((agent_id, query)) is tail:
                del self._tails[agent_id, query]
            tail.opened.cancel()
            tail.ring.fail(reason)

    async def _read_host(self, agent_id: str, query: LogQuery, start: LogStart) -> AsyncGenerator[list[Entry], None]:
        """Yield what the log holds from `start` on, first an empty list when the agent opened it. When the agent goes
        away, go on from the same line as soon as it is back.

        Raises:
            FleetwireError: the agent refuses; or, before it opened the log once, it is away."""
        is_opened = False
        while True:
            try:
                async with self._open(agent_id, query, start) as socket:
                    is_opened = True
                    yield []
                    while True:
                        entries = entries_of(await socket.receive())
                        start = _after(entries, start)
                        yield entries
            except (UnavailableError, PeerTimeoutError) as err:
                if not is_opened:
                    raise
                yield [_event("waiting", {"reason": err.message})]
            await asyncio.sleep(REOPEN_SECONDS)
            await self._sessions.wait_for(agent_id)
            if start.cursor is None and start.since is None:
                # No line was seen yet. Where some of the old ones were asked for there were none, so all are new.
                if start.lines == 0:
                    yield [_event("gap", {"count": "unknown", "reason": "the agent was away"})]
                else:
                    start = LogStart(lines=ALL_LINES)

    def _open(self, agent_id: str, query: LogQuery, start: LogStart) -> AbstractAsyncContextManager[ChannelSocket]:
        return _opened(self._channels.open(self._sessions.require(agent_id), partial(_follow_log, query, start)))


@asynccontextmanager
async def _opened(channel: AbstractAsyncContextManager[ChannelSocket]) -> AsyncIterator[ChannelSocket]:
    async with channel as socket:
        await receive_message(socket, LogOpened, timeout_seconds=OPEN_SECONDS)
        yield socket


def _event(name: str, document: object) -> Entry:
    return Entry(frame_json(document, event=name), None)


def _follow_log(query: LogQuery, start: LogStart, channel_id: str) -> FollowLog:
    return FollowLog(
        channel_id=channel_id,
        source="journald" if query.source == "journald" else "file",
        unit=query.unit,
        path=query.path,
        priority=query.priority,
        grep=query.grep,
        lines=start.lines,
        since=start.since,
        cursor=start.cursor,
    )
