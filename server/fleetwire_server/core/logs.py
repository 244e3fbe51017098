"""Log streams: one tail on the host for each (agent, log, filter), however many viewers it has.

A tail writes what it reads into a ring of framed events (log_ring.py); the fastest viewer sets its pace, so TCP slows
the reader on the host. A viewer that falls out of the ring, or asks for lines from before it, reads the host through a
channel of its own until it meets the ring again. So a slow viewer delays nobody, and nobody loses a line."""

import asyncio
import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

from fleetwire_server.core.channels import Channels, ChannelSocket, receive_message
from fleetwire_server.core.events import frame_json, frame_text
from fleetwire_server.core.log_ring import Entry, LogEndedError, LogRing, last_cursor
from fleetwire_server.core.sessions import Sessions
from fleetwire_shared.errors import FleetwireError, PeerFailedError, PeerTimeoutError, UnavailableError, error_from_code
from fleetwire_shared.messages import ChannelMessage, End, FollowLog, LogGap, LogLines, LogOpened, LogRotated

logger = logging.getLogger(__name__)

LINGER_SECONDS = 30.0
"""How long a tail goes on after its last viewer left: a browser that reconnects finds it as it was."""

OPEN_SECONDS = 15.0
REOPEN_SECONDS = 1.0
MEET_SECONDS = 0.2
"""How long a viewer that reads by itself waits for the tail to reach the line it is at."""

CURRENT_SECONDS = 1.0
"""A tail that has waited for the next line for this long has read all there is: the agent looks every 0.2 s."""

ALL_LINES = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LogQuery:
    """Which lines of which log; the same query means the same tail."""

    source: str  # "journald" or "file"
    unit: str | None = None
    path: str | None = None
    priority: int | None = None
    grep: str | None = None
    boot: str | None = None
    kernel: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LogStart:
    """Where a viewer begins: after `cursor`, else at `since`, else `lines` before the end."""

    lines: int = 10
    since: float | None = None
    cursor: str | None = None


_CURSOR = re.compile(r"[!-~]+", re.ASCII)

_TailKey: TypeAlias = tuple[str, LogQuery]
_Batches: TypeAlias = AsyncGenerator[list[Entry], None]


def entries_of(message: ChannelMessage | bytes) -> list[Entry]:
    """Return the events that a frame of a log channel stands for.

    Raises:
        FleetwireError: the agent ended the channel, for the reason it gives."""
    match message:
        case LogLines():
            return _line_entries(message)
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


def _line_entries(message: LogLines) -> list[Entry]:
    if len(message.cursors) != len(message.texts):
        raise PeerFailedError(f"the agent sent {len(message.cursors)} cursors for {len(message.texts)} lines")
    if not all(map(_CURSOR.fullmatch, message.cursors)):  # one with a newline could write events of its own
        raise PeerFailedError("the agent sent a cursor that cannot be the id of an event")
    lines = zip(message.cursors, message.texts, strict=True)
    return [Entry(frame_text(text, event_id=cursor), cursor) for cursor, text in lines]


class LogTail:
    """One tail on a host: its ring, and who looks at it."""

    def __init__(self, start: LogStart) -> None:
        self.ring = LogRing()
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.task: asyncio.Task[None] | None = None
        self.idle_since: float | None = None  # loop time; None while there is something to do
        self._start = start
        self._viewers = 0
        self._linger: asyncio.TimerHandle | None = None

    def enter(self) -> None:
        self._viewers += 1
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None

    def leave(self, linger_seconds: float, stop: Callable[[], None]) -> None:
        """Note that a viewer left; call `stop` when none has come for `linger_seconds` after the last."""
        self._viewers -= 1
        if self._viewers == 0:
            self._linger = asyncio.get_running_loop().call_later(linger_seconds, stop)

    def place_for(self, start: LogStart) -> int | None:
        """Return where in the ring a viewer that came later begins, None when it must ask the host."""
        if start.cursor is not None:
            number = self.ring.number_of(start.cursor)
            return None if number is None else number + 1
        if start.since is not None:
            return None
        if self._is_current() or start == self._start == LogStart(lines=0):
            return self.ring.number_of_last_lines(start.lines)
        return None

    def _is_current(self) -> bool:
        """Whether the newest line in the ring is the newest of the log: its last lines are the log's only then."""
        now = asyncio.get_running_loop().time()
        return self.idle_since is not None and now - self.idle_since >= CURRENT_SECONDS


@dataclass(slots=True)
class LogViewer:
    """One viewer of one tail: first what it asked for from before, then what comes."""

    ring: LogRing
    start: LogStart
    number: int | None  # its place in the ring, None while it reads the host by itself
    read_host: Callable[[LogStart], _Batches]
    opened: _Batches | None = None  # the host's own channel for this viewer, when it was opened at once

    @asynccontextmanager
    async def open(self) -> AsyncIterator["LogViewer"]:
        """Open the host for a viewer that begins outside of the ring: what comes from now on will not be missed.

        Raises:
            FleetwireError: the agent is away or refuses."""
        if self.number is not None:
            yield self
            return
        async with aclosing(self.read_host(self.start)) as batches:
            await anext(batches)
            self.opened = batches
            yield self

    async def follow(self) -> AsyncGenerator[bytes, None]:
        """Yield framed events until cancelled.

        Raises:
            LogEndedError: the log cannot be followed any further."""
        while True:
            source = self._catch_up() if self.number is None else self._read_ring(self.number)
            async with aclosing(source) as batches:
                async for entries in batches:
                    self.start = _after(entries, self.start)
                    yield b"".join(entry.frame for entry in entries)

    async def _read_ring(self, number: int) -> _Batches:
        """Yield what the tail brings, until this viewer is so slow that its place was overwritten."""
        with self.ring.reading() as place:
            while (entries := await self.ring.read(number, place)) is not None:
                number += len(entries)
                yield entries
        self.number = None

    async def _catch_up(self) -> _Batches:
        """Yield entries from the host until they meet the ring, where `number` then is."""
        before: str | None = None
        opened, self.opened = self.opened, None
        try:
            async with aclosing(opened or self.read_host(self.start)) as batches:
                async for entries in batches:
                    if not entries:
                        continue
                    yield entries
                    cursor = last_cursor(entries)
                    if cursor is None:
                        continue
                    met = await self._meet(entries, cursor, before)
                    if met is not None:
                        self.number = met + 1
                        return
                    before = cursor
        except FleetwireError as err:
            raise LogEndedError(err.message) from err

    async def _meet(self, entries: list[Entry], cursor: str, before: str | None) -> int | None:
        """Return the number in the ring of the last of `entries`; wait for it if the tail is just a little behind."""
        number = self.ring.number_of(cursor)
        if number is not None:
            return number
        newest = self.ring.newest_cursor
        if newest is None or (newest != before and all(entry.cursor != newest for entry in entries)):
            return None
        return await self.ring.wait_for_cursor(cursor, MEET_SECONDS)


def _after(entries: list[Entry], start: LogStart) -> LogStart:
    """Return where to go on after `entries`; `start` itself when there was no line among them."""
    cursor = last_cursor(entries)
    return start if cursor is None else LogStart(cursor=cursor)


class Logs:
    """All tails of all agents."""

    def __init__(self, *, sessions: Sessions, channels: Channels, linger_seconds: float = LINGER_SECONDS) -> None:
        self._sessions = sessions
        self._channels = channels
        self._linger_seconds = linger_seconds
        self._tails: dict[_TailKey, LogTail] = {}
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
        key = agent_id, query
        tail, number = await self._enter(key, start)
        try:
            async with LogViewer(tail.ring, start, number, partial(self._read_host, key)).open() as viewer:
                yield viewer
        finally:
            self._leave(key, tail)

    async def _enter(self, key: _TailKey, start: LogStart) -> tuple[LogTail, int | None]:
        """Return a tail that is open and counts this viewer, and the viewer's place in its ring."""
        while True:
            self._sessions.require(key[0])
            tail = self._tails.get(key)
            is_new = tail is None
            if tail is None:
                tail = self._start_tail(key, start)
            tail.enter()
            try:
                await asyncio.shield(tail.opened)
            except BaseException as err:
                self._leave(key, tail)
                if is_new or not isinstance(err, FleetwireError):
                    raise
                continue  # what was refused may be another viewer's cursor
            return tail, 0 if is_new else tail.place_for(start)

    def _leave(self, key: _TailKey, tail: LogTail) -> None:
        tail.leave(self._linger_seconds, partial(self._stop_tail, key, tail))

    def _start_tail(self, key: _TailKey, start: LogStart) -> LogTail:
        if self._group is None:
            raise UnavailableError("the server is starting; try again")
        tail = self._tails[key] = LogTail(start)
        tail.task = self._group.create_task(self._run_tail(key, tail, start))
        return tail

    def _stop_tail(self, key: _TailKey, tail: LogTail) -> None:
        if self._tails.get(key) is tail:
            del self._tails[key]
        if tail.task is not None:
            tail.task.cancel()

    async def _run_tail(self, key: _TailKey, tail: LogTail, start: LogStart) -> None:
        loop = asyncio.get_running_loop()
        failure: FleetwireError = UnavailableError("the log is not followed any more")
        try:
            async with aclosing(self._read_host(key, start)) as batches:
                async for entries in batches:
                    tail.idle_since = None
                    if not tail.opened.done():
                        tail.opened.set_result(None)
                    await tail.ring.write(entries)
                    tail.idle_since = loop.time()
        except FleetwireError as err:
            failure = err
        except Exception:  # the border of one tail: whatever it is, the others go on
            logger.exception("the tail of %s on agent %s failed", key[1], key[0])
        finally:
            if self._tails.get(key) is tail:
                del self._tails[key]
            if not tail.opened.done():
                tail.opened.set_exception(failure)
                tail.opened.exception()  # looked at here, as every viewer may have left
            tail.ring.fail(failure.message)

    async def _read_host(self, key: _TailKey, start: LogStart) -> _Batches:
        """Yield what the log holds from `start` on, an empty list each time the agent has opened it. When the agent
        goes away, say so once and go on from the same line as soon as it is back.

        Raises:
            FleetwireError: the agent refuses; or, before it opened the log once, it is away."""
        agent_id, query = key
        is_opened = is_waiting = False
        while True:
            try:
                async with self._open(agent_id, query, start) as socket:
                    is_opened, is_waiting = True, False
                    yield []
                    while True:
                        entries = entries_of(await socket.receive())
                        start = _after(entries, start)
                        yield entries
            except (UnavailableError, PeerTimeoutError) as err:
                if not is_opened:
                    raise
                if not is_waiting:
                    is_waiting = True
                    yield [_event("waiting", {"reason": err.message})]
                    if start == LogStart(lines=0):
                        yield [_event("gap", {"count": "unknown", "reason": "the agent was away"})]
            await asyncio.sleep(REOPEN_SECONDS)
            await self._sessions.wait_for(agent_id)
            if start.cursor is None and start.since is None and start.lines:
                # Some of the old lines were asked for and there were none, so all there are now are new.
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
        boot=query.boot,
        kernel=query.kernel,
    )
