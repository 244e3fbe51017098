"""Channels: one socket for each file or log, dialled when the server asks. None of them disturbs another."""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, suppress
from functools import partial
from typing import Final, Protocol, TypeAlias, TypeVar

from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed, WebSocketException

from fleetwire_agent.config import Profile
from fleetwire_agent.files import BATCH_BYTES, FileReader, FileWriter
from fleetwire_agent.journal import JournalFollower
from fleetwire_agent.logs import POLL_SECONDS, FileFollower
from fleetwire_agent.processes import Spawner
from fleetwire_shared.codec import decode, encode
from fleetwire_shared.errors import FleetwireError, ForbiddenError, ProtocolError, RangeError, UnavailableError
from fleetwire_shared.limits import CHUNK_BYTES
from fleetwire_shared.messages import (
    ON_CHANNEL,
    AgentMessage,
    ChannelMessage,
    ChannelRefused,
    End,
    FileReady,
    FollowLog,
    LogOpened,
    ReadFile,
    WriteFile,
)

MAX_CHANNELS: Final = 64
OPEN_SECONDS: Final = 10.0
"""A path on a dead network filesystem does not answer; its thread waits on, the server is told."""

MONITOR_WRITES_NOTHING: Final = (
    "this host's agent was installed with the profile monitor, which writes no files;"
    " install it with --profile manage to allow it"
)

_CLOSE_SECONDS: Final = 1.0
_LAST_FRAME_SECONDS: Final = 300.0
"""For the server to take the rest and close. It may read slowly: as slowly as who downloads."""

_MAX_REFUSALS: Final = 64

_log = logging.getLogger(__name__)

OpenChannel: TypeAlias = ReadFile | WriteFile | FollowLog
Dial: TypeAlias = Callable[[str], AbstractAsyncContextManager[ClientConnection]]
Send: TypeAlias = Callable[[AgentMessage], Awaitable[None]]
T = TypeVar("T")


class Closable(Protocol):
    def close(self) -> None: ...


C = TypeVar("C", bound=Closable)


class Channels:
    """All open channels of the agent. They outlive the control connection that asked for them, not the agent."""

    def __init__(
        self, *, dial: Dial, send: Send, spawn: Spawner, journal_directory: str | None, profile: Profile = "manage"
    ) -> None:
        """Prepare; `serve` does the work.

        Args:
            dial: connects the channel of this id.
            send: sends on the control socket.
            journal_directory: where the journal files are; None for the system's own.
            profile: `monitor` refuses to write files."""
        self._dial = dial
        self._send = send
        self._spawner = spawn
        self._journal_directory = journal_directory
        self._profile = profile
        self._group: asyncio.TaskGroup | None = None
        self._open_count = 0
        self._refusal_count = 0
        # Threads of their own: paths that never answer must not take those that sample the metrics.
        self._threads = ThreadPoolExecutor(max_workers=MAX_CHANNELS, thread_name_prefix="channel")

    async def serve(self) -> None:
        """Carry the channels until cancelled; then all of them are closed."""
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                await asyncio.Event().wait()
        finally:
            self._group = None
            self._threads.shutdown(wait=False, cancel_futures=True)

    def open(self, message: OpenChannel) -> None:
        """Start to answer `message`; call while `serve` runs. With MAX_CHANNELS open, more are refused, and requests
        that come faster than refusals can be sent are dropped: the server's own timeout ends those."""
        if self._group is None:
            _log.warning("channel %s asked for while the agent stops", message.channel_id)
        elif self._open_count < MAX_CHANNELS:
            self._open_count += 1
            self._group.create_task(self._carry(message))
        elif self._refusal_count < _MAX_REFUSALS:
            self._refusal_count += 1
            self._group.create_task(self._refuse_as_full(message))
        else:
            _log.warning("channel %s dropped: too many at once", message.channel_id)

    async def _refuse_as_full(self, message: OpenChannel) -> None:
        try:
            reason = f"the agent has {MAX_CHANNELS} files and logs open already; try again when one has ended"
            await self._refuse(message, UnavailableError(reason))
        except (OSError, WebSocketException):
            _log.info("channel %s: the control link is away", message.channel_id)
        finally:
            self._refusal_count -= 1

    async def _carry(self, message: OpenChannel) -> None:
        try:
            await self._answer(message)
        except (OSError, TimeoutError, WebSocketException) as err:
            _log.info("channel %s lost: %s", message.channel_id, err or type(err).__name__)
        except Exception:  # noqa: BLE001 - the border of a channel: whatever it is, the others go on
            _log.exception("channel %s failed", message.channel_id)
        finally:
            self._open_count -= 1

    async def _answer(self, message: OpenChannel) -> None:
        match message:
            case ReadFile():
                await self._with(message, self._in_time(partial(FileReader, message)), self._send_file)
            case WriteFile() if self._profile == "monitor":
                await self._refuse(message, ForbiddenError(MONITOR_WRITES_NOTHING))
            case WriteFile():
                await self._with(message, self._in_time(partial(FileWriter, message)), self._receive_file)
            case FollowLog(source="file"):
                await self._with(message, self._in_time(partial(FileFollower, message)), self._follow_file)
            case FollowLog():
                await self._with(message, self._open_journal(message), self._follow_journal)

    async def _with(
        self, message: OpenChannel, opening: Awaitable[C], work: Callable[[ClientConnection, C], Awaitable[None]]
    ) -> None:
        """Open what is asked for or refuse; then dial and do the work. Its failure is the channel's last frame."""
        try:
            subject = await opening
        except FleetwireError as err:
            await self._refuse(message, err)
            return
        except Exception:
            await self._send(
                ChannelRefused(channel_id=message.channel_id, code="internal", message="the agent failed; see its log")
            )
            raise
        try:
            async with self._dial(message.channel_id) as connection:
                _notice_dead_peer(connection)
                try:
                    await work(connection, subject)
                except FleetwireError as err:
                    await self._close(subject)  # before waiting: a file that failed gives its space back now
                    await connection.send(encode(End(code=err.code, message=_printable(err.message))))
                await _wait_until_closed(connection)
        finally:
            await self._close(subject)

    async def _close(self, subject: Closable) -> None:
        """Close what may be closed already. Waits for the call that runs on it; one that hangs closes it later."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self._in_thread(subject.close)

    async def _refuse(self, message: OpenChannel, err: FleetwireError) -> None:
        size_bytes = err.size_bytes if isinstance(err, RangeError) else None
        text = _printable(err.message)
        await self._send(
            ChannelRefused(channel_id=message.channel_id, code=err.code, message=text, size_bytes=size_bytes)
        )

    # ------------------------------------------------------------ files

    async def _send_file(self, connection: ClientConnection, reader: FileReader) -> None:
        await connection.send(encode(reader.opened))
        batch = await self._in_thread(reader.read_batch)
        while batch:
            following = self._threads.submit(reader.read_batch)  # while this one is sent
            for piece in batch:
                await connection.send(piece)
            batch = await asyncio.wrap_future(following)
        await connection.send(encode(reader.end()))

    async def _receive_file(self, connection: ClientConnection, writer: FileWriter) -> None:
        await connection.send(encode(FileReady()))
        while True:
            pieces, end = await _receive_batch(connection)
            if pieces:
                await self._in_thread(writer.write_batch, pieces)
            if end is not None:
                break
        if end.code is None:
            await connection.send(encode(await self._in_thread(writer.commit, end)))

    # ------------------------------------------------------------ logs

    async def _open_journal(self, message: FollowLog) -> "_Unclosed":
        make = partial(JournalFollower, message, spawner=self._spawner, directory=self._journal_directory)
        unclosed = await self._in_time(lambda: _Unclosed(make()))
        await unclosed.follower.find_boot()
        return unclosed

    async def _follow_journal(self, connection: ClientConnection, journal: "_Unclosed") -> None:
        async def send(event: ChannelMessage) -> None:
            await connection.send(encode(event))

        await connection.send(encode(LogOpened()))
        await _while_open(connection, partial(journal.follower.run, send))

    async def _follow_file(self, connection: ClientConnection, follower: FileFollower) -> None:
        await connection.send(encode(LogOpened()))
        await _while_open(connection, partial(self._send_lines, connection, follower))

    async def _send_lines(self, connection: ClientConnection, follower: FileFollower) -> None:
        while True:
            events = await self._in_thread(follower.read)
            if events is None:
                await asyncio.sleep(POLL_SECONDS)
                continue
            for event in events:
                await connection.send(encode(event))

    # ------------------------------------------------------------ threads

    async def _in_thread(self, call: Callable[..., T], *arguments: object) -> T:
        return await asyncio.wrap_future(self._threads.submit(call, *arguments))

    async def _in_time(self, open_it: Callable[[], C]) -> C:
        future = self._threads.submit(open_it)
        try:
            async with asyncio.timeout(OPEN_SECONDS):
                return await asyncio.wrap_future(future)
        except TimeoutError:
            future.add_done_callback(_close_result)
            raise UnavailableError(f"the host's filesystem did not answer within {OPEN_SECONDS:.0f} seconds") from None
        except asyncio.CancelledError:
            future.add_done_callback(_close_result)
            raise


class _Unclosed:
    """A journal follower where something to close is expected: it holds nothing open between two runs."""

    def __init__(self, follower: JournalFollower) -> None:
        self.follower = follower

    def close(self) -> None:
        """Nothing to do."""


def _close_result(future: Future[C]) -> None:
    if not future.cancelled() and future.exception() is None:
        future.result().close()


async def _receive_batch(connection: ClientConnection) -> tuple[list[bytes], End | None]:
    """Return data of about BATCH_BYTES, and the end if it came."""
    pieces: list[bytes] = []
    received_bytes = 0
    while received_bytes < BATCH_BYTES:
        frame = await connection.recv()
        if isinstance(frame, str):
            message = decode(frame, ON_CHANNEL)
            if not isinstance(message, End):
                raise ProtocolError("type", f"must be end while a file is received, got {message.type}")
            return pieces, message
        if len(frame) > CHUNK_BYTES:
            raise ProtocolError("frame", f"must be at most {CHUNK_BYTES} bytes, got {len(frame)}")
        pieces.append(frame)
        received_bytes += len(frame)
    return pieces, None


async def _while_open(connection: ClientConnection, work: Callable[[], Awaitable[None]]) -> None:
    """Run `work` until it fails or the server closes the channel, which an idle log would not notice by itself."""
    failure: list[FleetwireError] = []

    async def run() -> None:
        try:
            await work()
        except FleetwireError as err:
            failure.append(err)
        except ConnectionClosed:
            pass

    async with asyncio.TaskGroup() as group:
        tasks = {group.create_task(run()), group.create_task(connection.wait_closed())}
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
    if failure:
        raise failure[0]


async def _wait_until_closed(connection: ClientConnection) -> None:
    """Leave closing to the server: closing first would cut off what a slow reader has not taken yet."""
    with suppress(TimeoutError, ConnectionClosed):
        async with asyncio.timeout(_LAST_FRAME_SECONDS):
            async for _ in connection:  # what was on its way when this side failed; unread it would block the close
                pass


def _notice_dead_peer(connection: ClientConnection) -> None:
    """Let the kernel end an idle channel a minute after its peer went without a word; there are no heartbeats."""
    transport_socket = connection.transport.get_extra_info("socket")
    for level, option, value in (
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    ):
        transport_socket.setsockopt(level, option, value)


def _printable(text: str) -> str:
    """A path in the message may hold bytes that are no UTF-8; such text could not be sent."""
    return text.encode(errors="backslashreplace").decode()
