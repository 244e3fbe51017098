"""The link to the server: dialled, greeted, kept alive, given up when silent, dialled again.

One task writes to the socket, fed by a bounded outbox; one reads and dispatches; one delivers what commands say.
While the server is away nothing is queued here: the ledger holds what must not be lost."""

import asyncio
import logging
import random
import re
import ssl
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Final, Protocol

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.typing import Subprotocol

from fleetwire_agent.commands import Commands
from fleetwire_agent.config import AgentConfig
from fleetwire_agent.ledger import Ledger
from fleetwire_agent.status import KEY_NOT_ACCEPTED, KEY_REVOKED, LinkState
from fleetwire_agent.tls import build_tls_context
from fleetwire_agent.version import read_version
from fleetwire_shared.codec import decode, encode
from fleetwire_shared.errors import ProtocolError
from fleetwire_shared.limits import CHUNK_BYTES, MAX_CONTROL_FRAME_BYTES, RECONNECT_MAX_SECONDS, RECONNECT_MIN_SECONDS
from fleetwire_shared.messages import (
    FROM_SERVER,
    PROTOCOL_OLDEST,
    PROTOCOL_VERSION,
    SUBPROTOCOL,
    AgentMessage,
    CommandCancel,
    CommandOffer,
    CommandStored,
    FollowLog,
    Heartbeat,
    Hello,
    HostFacts,
    ListUnits,
    MetricsReport,
    OutputStored,
    ReadFile,
    ServerMessage,
    Uninstall,
    Welcome,
    WriteFile,
)
from fleetwire_shared.pins import parse_pins

KEY_REFUSED: Final = 4001
PROTOCOL_REFUSED: Final = 4002
REPLACED: Final = 4003
"""Close codes of the server that another attempt in a moment would only meet again."""

GOING_AWAY: Final = 1001  # RFC 6455, 7.4.1

HEALTHY_SECONDS: Final = 60.0
"""A link that lasted this long ends the backoff."""

_DIAL_SECONDS: Final = 15.0  # TCP, TLS and the handshake
_WELCOME_SECONDS: Final = 20.0
_CLOSE_SECONDS: Final = 0.3  # a server that does not answer the close must not delay the agent's end
_WRITE_LIMIT_BYTES: Final = 16 * 1024  # more in the socket's buffer only delays heartbeats behind output
_OUTBOX_MESSAGES: Final = 16

_log = logging.getLogger(__name__)


# ---------------------------------------------------------------- when to dial again


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a link ended, and when to dial again."""

    reason: str
    wait_seconds: float | None = None  # None: the backoff decides
    is_hopeless: bool = False  # only somebody's action can help: wait as long as the backoff ever does


def describe_failure(error: BaseException) -> Failure | None:
    """Return what a failure of the link means, or None when it is none: a fault of the agent, not to be retried."""
    if isinstance(error, BaseExceptionGroup):
        described = [describe_failure(inner) for inner in error.exceptions]
        return None if None in described else described[0]
    if isinstance(error, InvalidStatus):
        status = error.response.status_code
        if status == 401:
            return Failure(KEY_NOT_ACCEPTED, is_hopeless=True)
        retry_after = error.response.headers.get("Retry-After", "")
        return Failure(f"the server answered HTTP {status}", float(retry_after) if retry_after.isdecimal() else None)
    if isinstance(error, ConnectionClosed):
        return _describe_close(error)
    if isinstance(error, TimeoutError):
        return Failure(str(error) or "the server was silent for too long")
    if isinstance(error, OSError | WebSocketException | ProtocolError):
        return Failure(f"{type(error).__name__}: {error}")
    return None


def _describe_close(error: ConnectionClosed) -> Failure:
    if error.rcvd is None:
        return Failure("the connection broke")
    code, reason = error.rcvd.code, error.rcvd.reason
    if code == KEY_REFUSED:
        return Failure(KEY_REVOKED, is_hopeless=True)
    if code == PROTOCOL_REFUSED:
        return Failure(f"the server speaks no protocol this agent speaks: {reason}", is_hopeless=True)
    if code == REPLACED:
        return Failure("another agent has connected with the same key", is_hopeless=True)
    named = re.fullmatch(r"retry_after=(\d{1,5}(?:\.\d{1,3})?)", reason, re.ASCII)
    return Failure(f"the server closed the connection ({code} {reason})", float(named[1]) if named else None)


def delay_before_dialling(failure: Failure, failures_in_a_row: int, jitter: Callable[[], float]) -> float:
    """Return how many seconds to wait: what the server named give or take 20 %, else full jitter over 1, 2, 4 ... 60 s.

    Args:
        failures_in_a_row: 1 after the first.
        jitter: returns 0.0 to 1.0, such as random.random."""
    if failure.wait_seconds is not None:
        return failure.wait_seconds * (0.8 + 0.4 * jitter())
    if failure.is_hopeless:
        return RECONNECT_MAX_SECONDS * (0.8 + 0.2 * jitter())
    doublings = min(failures_in_a_row - 1, 16)
    return jitter() * min(RECONNECT_MAX_SECONDS, RECONNECT_MIN_SECONDS * 2.0**doublings)


# ---------------------------------------------------------------- sockets


class _DirectConnect(connect):
    """Follows no redirect: it would carry the agent's key to whoever the redirect names."""

    def process_redirect(self, exc: Exception) -> Exception | str:
        return exc


class Dialer:
    """Opens WebSockets to the server, with the agent's key."""

    def __init__(self, config: AgentConfig) -> None:
        self._base_url = re.sub(r"^http", "ws", config.server)
        self._key = config.key
        self._use_proxy = config.use_proxy
        self._user_agent = f"fleetwire-agent/{read_version()}"
        self._tls: ssl.SSLContext | None = None
        if config.server.startswith("https:"):
            self._tls = build_tls_context(config.tls_ca_file, parse_pins(config.tls_pin) if config.tls_pin else ())
        self._log = logging.getLogger(f"{__name__}.websockets")
        self._log.setLevel(logging.INFO)  # below that the library logs headers, and so the key

    def control(self) -> AbstractAsyncContextManager[ClientConnection]:
        return self._connect("connect", MAX_CONTROL_FRAME_BYTES, subprotocol=SUBPROTOCOL)

    def channel(self, channel_id: str) -> AbstractAsyncContextManager[ClientConnection]:
        return self._connect(f"channels/{channel_id}", 2 * CHUNK_BYTES)

    def _connect(
        self, path: str, max_frame_bytes: int, *, subprotocol: str | None = None
    ) -> AbstractAsyncContextManager[ClientConnection]:
        return _DirectConnect(
            f"{self._base_url}/api/agents/{path}",
            additional_headers={"X-Agent-Key": self._key},
            user_agent_header=self._user_agent,
            subprotocols=[Subprotocol(subprotocol)] if subprotocol else None,
            ssl=self._tls,
            proxy=True if self._use_proxy else None,
            compression=None,
            open_timeout=_DIAL_SECONDS,
            close_timeout=_CLOSE_SECONDS,
            ping_interval=None,
            max_size=max_frame_bytes,
            max_queue=4,
            write_limit=_WRITE_LIMIT_BYTES,
            logger=self._log,
        )


# ---------------------------------------------------------------- what goes out


class Outbox:
    """Messages on their way to the one writer. Holds at most 16; a full outbox makes senders wait.

    While it is closed (the server is away) messages are dropped: what must arrive is in the ledger. Of metrics only the
    newest report is kept, at all times."""

    def __init__(self) -> None:
        self._messages: deque[AgentMessage] = deque()
        self._report: MetricsReport | None = None
        self._is_open = False
        self._has_message = asyncio.Event()
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._is_written = asyncio.Event()  # nothing waits and nothing is being written
        self._is_writing = False

    @property
    def is_open(self) -> bool:
        return self._is_open

    def open(self) -> None:
        self._messages.clear()
        self._is_open = True
        self._is_writing = False
        self._update()

    def close(self) -> None:
        """Drop everything but the newest report; let all who wait for room go."""
        self._messages.clear()
        self._is_open = False
        self._update()

    async def send(self, message: AgentMessage) -> None:
        while not self._has_room.is_set():
            await self._has_room.wait()
        if self._is_open:
            self._messages.append(message)
            self._update()

    def put_report(self, report: MetricsReport) -> None:
        """Replace the report that has not been written yet."""
        self._report = report
        self._update()

    async def flush(self) -> bool:
        """Wait until the writer has written all that was sent; False when the link was lost before."""
        await self._is_written.wait()
        return self._is_open

    async def take(self) -> AgentMessage:
        """Return the next message; the one before has been written then. A report goes first: it is small, and output
        may keep the queue full."""
        self._is_writing = False
        self._update()
        await self._has_message.wait()
        self._is_writing = True
        message: AgentMessage
        if self._report:
            message, self._report = self._report, None
        else:
            message = self._messages.popleft()
        self._update()
        return message

    def _update(self) -> None:
        _set_if(self._has_message, bool(self._messages or self._report))
        _set_if(self._is_written, not self._is_open or not (self._messages or self._is_writing))
        _set_if(self._has_room, not self._is_open or len(self._messages) < _OUTBOX_MESSAGES)


def _set_if(event: asyncio.Event, condition: bool) -> None:
    if condition:
        event.set()
    else:
        event.clear()


# ---------------------------------------------------------------- the session


class OnStatus(Protocol):
    """Is told what the link does now; must return at once. `detail`: why it is not connected."""

    def __call__(self, state: LinkState, *, agent_id: str | None = None, detail: str | None = None) -> None: ...


def ignore_status(state: LinkState, *, agent_id: str | None = None, detail: str | None = None) -> None:
    """Tell nobody."""


class Session:
    """Keeps one control link to the server, for as long as `run` runs."""

    def __init__(
        self,
        *,
        dial: Callable[[], AbstractAsyncContextManager[ClientConnection]],
        read_host: Callable[[], HostFacts],
        outbox: Outbox,
        ledger: Ledger,
        commands: Commands,
        open_channel: Callable[[ReadFile | WriteFile | FollowLog], None],
        open_request: Callable[[ListUnits | Uninstall], None],
        on_status: OnStatus = ignore_status,
        agent_version: str | None = None,
        jitter: Callable[[], float] = random.random,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._dial = dial
        self._read_host = read_host
        self._outbox = outbox
        self._ledger = ledger
        self._commands = commands
        self._open_channel = open_channel
        self._open_request = open_request
        self._on_status = on_status
        self._agent_version = agent_version or read_version()
        self._jitter = jitter
        self._sleep = sleep
        self._clock = clock
        self._welcomed_at: float | None = None  # monotonic, of this link
        self.metrics_seconds: float | None = None  # how often the server wants a report; None before the first welcome
        self.is_welcomed = asyncio.Event()

    async def run(self) -> None:
        """Dial, serve the link, wait, dial again; until cancelled."""
        failures_in_a_row = 0
        while True:
            self._on_status("connecting")
            failure = await self._run_link()
            self._on_status("connecting", detail=failure.reason)
            failures_in_a_row = 1 if self._was_healthy() else failures_in_a_row + 1
            delay_seconds = delay_before_dialling(failure, failures_in_a_row, self._jitter)
            level = logging.ERROR if failure.is_hopeless else logging.WARNING
            _log.log(level, "no connection: %s; next attempt in %.1f s", failure.reason, delay_seconds)
            await self._sleep(delay_seconds)

    async def _run_link(self) -> Failure:
        """Dial once and serve the link to its end; return why it ended."""
        self._welcomed_at = None
        try:
            async with self._dial() as socket:
                try:
                    await self._serve_link(socket)
                except asyncio.CancelledError:
                    await socket.close(GOING_AWAY, "the agent is stopping")
                    raise
        except Exception as err:  # a border: judged by describe_failure, raised when it is no failure of the link
            if failure := describe_failure(err):
                return failure
            raise
        finally:
            self._leave()
        return Failure("the connection ended")

    def _was_healthy(self) -> bool:
        return self._welcomed_at is not None and self._clock() - self._welcomed_at >= HEALTHY_SECONDS

    async def _serve_link(self, socket: ClientConnection) -> None:
        """Greet, then read, write and deliver until the link ends, which always is an exception."""
        welcome = await self._greet(socket)
        _log.info("connected as %s to server %s", welcome.agent_id, welcome.server_version)
        self._on_status("connected", agent_id=welcome.agent_id)
        self._welcomed_at = self._clock()
        self.metrics_seconds = welcome.metrics_seconds
        self.is_welcomed.set()
        self._outbox.open()
        self._commands.settle(welcome.ledger)
        self._commands.connect()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._write(socket, welcome))
            group.create_task(self._commands.deliver(self._outbox.send))
            await self._read(socket, welcome)

    def _leave(self) -> None:
        self.is_welcomed.clear()
        self._outbox.close()
        self._commands.disconnect()

    async def _greet(self, socket: ClientConnection) -> Welcome:
        hello = Hello(
            protocol_oldest=PROTOCOL_OLDEST,
            protocol_newest=PROTOCOL_VERSION,
            agent_version=self._agent_version,
            instance_id=self._ledger.instance_id,
            host=await asyncio.to_thread(self._read_host),
            ledger=self._ledger.list_entries(),
        )
        async with _deadline(_WELCOME_SECONDS, "the server did not answer the hello"):
            await socket.send(encode(hello))
            welcome = decode(await _receive_text(socket), FROM_SERVER)
        if not isinstance(welcome, Welcome):
            raise ProtocolError("type", f"the first frame must be welcome, got {welcome.type}")
        if not PROTOCOL_OLDEST <= welcome.protocol <= PROTOCOL_VERSION:
            await socket.close(PROTOCOL_REFUSED, f"protocol {PROTOCOL_OLDEST} to {PROTOCOL_VERSION} is spoken here")
            problem = f"must be {PROTOCOL_OLDEST} to {PROTOCOL_VERSION}, got {welcome.protocol}"
            raise ProtocolError("welcome.protocol", problem)
        return welcome

    async def _write(self, socket: ClientConnection, welcome: Welcome) -> None:
        message: AgentMessage
        while True:
            try:
                async with asyncio.timeout(welcome.heartbeat_seconds):
                    message = await self._outbox.take()
            except TimeoutError:
                message = Heartbeat()
            async with _deadline(welcome.silence_seconds, "the server reads nothing any more"):
                await socket.send(encode(message))

    async def _read(self, socket: ClientConnection, welcome: Welcome) -> None:
        while True:
            async with _deadline(welcome.silence_seconds, f"nothing arrived for {welcome.silence_seconds:g} s"):
                text = await _receive_text(socket)
            try:
                message = decode(text, FROM_SERVER)
            except ProtocolError as err:  # of a newer server, perhaps: the rest of the link is still of use
                _log.warning("ignored a frame: %s", err)
                continue
            self._dispatch(message)

    def _dispatch(self, message: ServerMessage) -> None:
        """Never waits: a cancel is heard at once, whatever the disk does about the offers before it."""
        match message:
            case CommandOffer():
                self._commands.offer(message)
            case CommandCancel():
                self._commands.cancel(message)
            case OutputStored():
                self._commands.note_output_stored(message.command_id, message.position)
            case CommandStored():
                self._ledger.note_stored(message.command_id)
            case ReadFile() | WriteFile() | FollowLog():
                self._open_channel(message)
            case ListUnits() | Uninstall():
                self._open_request(message)
            case Welcome():
                raise ProtocolError("type", "welcome is only the first frame")
            case _:  # a heartbeat has done its work by arriving
                pass


async def _receive_text(socket: ClientConnection) -> str:
    frame = await socket.recv()
    if isinstance(frame, bytes):
        raise ProtocolError("frame", "must be text on the control socket")
    return frame


@asynccontextmanager
async def _deadline(seconds: float, problem: str) -> AsyncIterator[None]:
    """asyncio.timeout, with an error that says what was waited for."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as err:
        raise TimeoutError(problem) from err
