"""`GET /api/agents/connect`: the control socket of one agent, from hello to the last frame."""

import asyncio
import logging
from functools import partial

from aiohttp import WSMsgType, web

from fleetwire_server.core.sessions import AgentSession
from fleetwire_server.http.outbox import Outbox
from fleetwire_server.http.requests import AGENT, CLIENT_ADDRESS
from fleetwire_server.keys import CHANNELS, DISPATCH, INGEST, NOW, REQUESTS, SESSIONS, STORE
from fleetwire_server.storage import agents
from fleetwire_server.storage.store import Connection
from fleetwire_shared import __version__
from fleetwire_shared.codec import decode, encode
from fleetwire_shared.errors import FleetwireError, ForbiddenError, InvalidError, ProtocolError
from fleetwire_shared.limits import (
    HEARTBEAT_SECONDS,
    MAX_CONTROL_FRAME_BYTES,
    METRICS_SECONDS,
    SILENCE_SECONDS,
)
from fleetwire_shared.messages import (
    FROM_AGENT,
    PROTOCOL_OLDEST,
    PROTOCOL_VERSION,
    SUBPROTOCOL,
    AgentMessage,
    ChannelRefused,
    CommandAccepted,
    CommandFinished,
    CommandOutput,
    CommandRejected,
    CommandStarted,
    Heartbeat,
    Hello,
    MetricsReport,
    RequestFailed,
    ServerMessage,
    Uninstalled,
    UnitList,
    Welcome,
)

logger = logging.getLogger(__name__)

CLOSE_KEY_REVOKED = 4001
CLOSE_PROTOCOL = 4002
CLOSE_REPLACED = 4003
CLOSE_BAD_FRAME = 1008
CLOSE_OVERLOADED = 1013

HELLO_SECONDS = 10.0
CLOSE_SECONDS = 2.0
MAX_QUEUED_FRAMES = 1000
"""Frames waiting for one agent. A link that has more no longer moves: it is closed, and its agent connects again."""

MAX_UNPROCESSED_FRAMES = 256
"""Frames read and not yet stored. Full, the socket is not read, and TCP slows the agent."""

MAX_BATCH = 64
"""Frames whose reports on commands are stored in one transaction."""


class LinkEndedError(Exception):
    """Why the socket is closed; `code` is None where the peer closed it or it broke."""

    def __init__(self, code: int | None, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class AgentConnection:
    """The socket of one agent: one task reads, one stores, one writes, whichever ends first ends all."""

    def __init__(self, ws: web.WebSocketResponse, request: web.Request) -> None:
        self._ws = ws
        self._app = request.app
        self._agent_id = request[AGENT].agent_id
        self._key_hash = request[AGENT].key_hash
        self._ip = request[CLIENT_ADDRESS]
        self._outgoing = Outbox(MAX_QUEUED_FRAMES)
        self._incoming: asyncio.Queue[AgentMessage] = asyncio.Queue(MAX_UNPROCESSED_FRAMES)
        self._ending: asyncio.Future[LinkEndedError] = asyncio.get_running_loop().create_future()

    # ------------------------------------------------------------ core.sessions.AgentLink

    def send(self, message: ServerMessage) -> None:
        try:
            self._outgoing.put(message)
        except asyncio.QueueFull:
            self.close(CLOSE_OVERLOADED, "too many frames wait for the agent")

    def close(self, code: int, reason: str) -> None:
        if not self._ending.done():
            self._ending.set_result(LinkEndedError(code, reason))

    # ------------------------------------------------------------ life

    async def run(self) -> None:
        """Speak with the agent until either side ends it."""
        try:
            session = await self._begin()
        except FleetwireError as err:
            logger.warning("agent %s was not let in: %s", self._agent_id, err.message)
            await self._close_socket(LinkEndedError(CLOSE_OVERLOADED, "retry_after=5"))
            return
        except LinkEndedError as err:
            logger.warning("agent %s was not let in: %s", self._agent_id, err.reason)
            await self._close_socket(err)
            return
        ended = LinkEndedError(None, "the handler ended")
        try:
            await self._enter(session)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._read())
                group.create_task(self._process(session))
                group.create_task(self._write())
                group.create_task(self._await_end())
        except* FleetwireError as faults:  # not stored: the agent will say it again
            logger.error("agent %s: %s", self._agent_id, faults.exceptions[0])
            ended = LinkEndedError(CLOSE_OVERLOADED, "retry_after=5")
        except* LinkEndedError as errors:
            ended = next(err for err in errors.exceptions if isinstance(err, LinkEndedError))
        finally:
            await self._finish(session, ended)

    async def _begin(self) -> AgentSession:
        hello = await self._receive_hello()
        protocol = min(PROTOCOL_VERSION, hello.protocol_newest)
        if protocol < max(PROTOCOL_OLDEST, hello.protocol_oldest):
            raise LinkEndedError(
                CLOSE_PROTOCOL,
                f"protocols {PROTOCOL_OLDEST} to {PROTOCOL_VERSION} are spoken here, the agent speaks "
                f"{hello.protocol_oldest} to {hello.protocol_newest}; update the older side",
            )
        session = AgentSession(
            agent_id=self._agent_id,
            instance_id=hello.instance_id,
            link=self,
            host=hello.host,
            agent_version=hello.agent_version,
            ip=self._ip,
            connected_at=self._app[NOW](),
        )
        await self._app[STORE].write(partial(self._record_arrival, session))
        settled = await self._app[DISPATCH].settle(self._agent_id, hello)
        session.command_ids.update(settled.reportable_ids)
        session.asked_ids.update(settled.asked_ids)
        self.send(
            Welcome(
                protocol=protocol,
                protocol_oldest=PROTOCOL_OLDEST,
                protocol_newest=PROTOCOL_VERSION,
                agent_id=self._agent_id,
                server_version=__version__,
                heartbeat_seconds=HEARTBEAT_SECONDS,
                silence_seconds=SILENCE_SECONDS,
                metrics_seconds=METRICS_SECONDS,
                ledger=tuple(settled.answers),
            )
        )
        for cancel in settled.cancels:
            self.send(cancel)
        for question in settled.questions:
            self.send(question)
        return session

    async def _enter(self, session: AgentSession) -> None:
        """Make this the agent's present connection, and give it what waits for it."""
        replaced = self._app[SESSIONS].add(session)
        if replaced is not None:
            replaced.link.close(CLOSE_REPLACED, "the agent connected again")
            # Its channels go the way of the link that failed: one that was cut off would stay silent for ever.
            await self._app[CHANNELS].close_agent(self._agent_id)
        # A key that was revoked while its agent was being let in: whoever revoked it found no session to close.
        by_key = partial(agents.get_agent_by_key, key_hash=self._key_hash, now=self._app[NOW]())
        if await self._app[STORE].read(by_key) is None:
            self.close(CLOSE_KEY_REVOKED, "the agent's key was revoked")
            return
        logger.info("agent %s connected from %s, version %s", self._agent_id, self._ip, session.agent_version)
        self._app[INGEST].announce_agent(self._agent_id, "online")
        await self._app[DISPATCH].offer_waiting(session)
        await self._app[DISPATCH].ask_about_ended(session)

    def _record_arrival(self, session: AgentSession, connection: Connection) -> None:
        agents.retire_other_keys(connection, self._agent_id, self._key_hash)
        host = session.host
        agents.record_seen(
            connection,
            self._agent_id,
            hostname=host.hostname,
            ip=session.ip,
            os=host.os,
            version=session.agent_version,
            facts={
                "kernel": host.kernel,
                "architecture": host.architecture,
                "boot_id": host.boot_id,
                "cpu_count": host.cpu_count,
                "memory_bytes": host.memory_bytes,
                "python": host.python,
            },
            last_seen=session.connected_at,
        )

    async def _finish(self, session: AgentSession, ended: LinkEndedError) -> None:
        sessions = self._app[SESSIONS]
        self._app[REQUESTS].end_session(session)
        if sessions.remove(session, said_goodbye=ended.code is None):
            logger.info("agent %s disconnected: %s", self._agent_id, ended.reason)
            self._app[INGEST].announce_agent(self._agent_id, sessions.status(self._agent_id, None))
            await self._app[CHANNELS].close_agent(self._agent_id)
        await self._close_socket(ended)

    async def _close_socket(self, ended: LinkEndedError) -> None:
        await self._ws.close(code=ended.code or 1000, message=ended.reason.encode()[:120])

    # ------------------------------------------------------------ reading

    async def _receive_hello(self) -> Hello:
        message = await self._receive(HELLO_SECONDS)
        if not isinstance(message, Hello):
            raise LinkEndedError(CLOSE_BAD_FRAME, f"the first frame must be hello, got {message.type}")
        return message

    async def _receive(self, timeout_seconds: float) -> AgentMessage:
        try:
            async with asyncio.timeout(timeout_seconds):
                frame = await self._ws.receive()
        except TimeoutError as err:
            raise LinkEndedError(CLOSE_OVERLOADED, f"nothing arrived for {timeout_seconds:.0f} s") from err
        if frame.type is WSMsgType.TEXT:
            try:
                return decode(frame.data, FROM_AGENT)
            except ProtocolError as err:
                raise LinkEndedError(CLOSE_BAD_FRAME, err.message) from err
        if frame.type is WSMsgType.BINARY:
            raise LinkEndedError(CLOSE_BAD_FRAME, "binary frames belong on channels")
        if frame.type is WSMsgType.ERROR:
            raise LinkEndedError(CLOSE_BAD_FRAME, f"the frame could not be read: {frame.data}")
        raise LinkEndedError(None, "the agent closed the link")

    async def _read(self) -> None:
        sessions = self._app[SESSIONS]
        while True:
            message = await self._receive(SILENCE_SECONDS)
            sessions.heard(self._agent_id)
            match message:
                case Heartbeat():
                    pass
                case MetricsReport():
                    self._app[INGEST].receive_metrics(self._agent_id, message)
                case ChannelRefused():
                    self._app[CHANNELS].refuse(self._agent_id, message)
                case UnitList() | Uninstalled() | RequestFailed():
                    self._app[REQUESTS].receive(self._agent_id, message)
                case Hello():
                    raise LinkEndedError(CLOSE_BAD_FRAME, "hello is the first frame only")
                case _:
                    await self._incoming.put(message)

    async def _process(self, session: AgentSession) -> None:
        """Store reports on commands, those that came while the last ones were stored in one transaction."""
        dispatch = self._app[DISPATCH]
        while True:
            batch = [await self._incoming.get()]
            while len(batch) < MAX_BATCH and not self._incoming.empty():
                batch.append(self._incoming.get_nowait())
            reports = [
                message
                for message in batch
                if isinstance(
                    message, CommandAccepted | CommandRejected | CommandStarted | CommandOutput | CommandFinished
                )
            ]
            try:
                await dispatch.receive(session, reports)
            except ProtocolError as err:
                raise LinkEndedError(CLOSE_BAD_FRAME, err.message) from err
            except FleetwireError as err:  # not stored, so not acknowledged: the agent will say it again
                raise LinkEndedError(CLOSE_OVERLOADED, "retry_after=5") from err

    # ------------------------------------------------------------ writing

    async def _write(self) -> None:
        while True:
            try:
                async with asyncio.timeout(HEARTBEAT_SECONDS):
                    message = await self._outgoing.take()
            except TimeoutError:
                message = Heartbeat()
            try:
                async with asyncio.timeout(SILENCE_SECONDS):
                    await self._ws.send_str(encode(message))
            except (ConnectionError, TimeoutError) as err:
                raise LinkEndedError(None, f"the link broke: {err}") from err

    async def _await_end(self) -> None:
        raise await self._ending


async def connect_agent(request: web.Request) -> web.StreamResponse:
    if "Origin" in request.headers:
        raise ForbiddenError("browsers do not connect here: a request with an Origin header is refused")
    if SUBPROTOCOL not in request.headers.get("Sec-WebSocket-Protocol", ""):
        raise InvalidError(f"connect by WebSocket and offer the subprotocol {SUBPROTOCOL}")
    ws = web.WebSocketResponse(
        protocols=(SUBPROTOCOL,),
        timeout=CLOSE_SECONDS,
        compress=False,
        max_msg_size=MAX_CONTROL_FRAME_BYTES,
        writer_limit=16384,
    )
    await ws.prepare(request)
    await AgentConnection(ws, request).run()
    return ws
