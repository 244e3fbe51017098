"""Connections before and between requests, which aiohttp leaves without a limit: how long a peer may take to send a
request's head, and how many connections one address may hold."""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from fleetwire_server.config import ServerConfig

logger = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 75.0


class ConnectionGuard:
    """Makes the protocols of a listening socket; the middleware tells it when a request begins and ends."""

    def __init__(self, config: ServerConfig) -> None:
        self._head_seconds = config.header_timeout_seconds
        self._max_per_address = config.max_connections_per_address
        self._is_exempt = config.is_trusted_proxy
        self._open: Counter[str] = Counter()
        self._by_handler: dict[RequestHandler, GuardedConnection] = {}

    def protocol_factory(self, server: Callable[[], RequestHandler]) -> Callable[[], asyncio.Protocol]:
        return lambda: GuardedConnection(self, server())

    def request_began(self, request: web.Request) -> None:
        connection = self._by_handler.get(request.protocol)
        if connection is not None:
            connection.stop_waiting()

    def request_ended(self, request: web.Request) -> None:
        connection = self._by_handler.get(request.protocol)
        if connection is not None:
            connection.wait_for_request(KEEP_ALIVE_SECONDS)

    def admit(self, connection: "GuardedConnection") -> bool:
        """Register a new connection; False when its address has too many."""
        address = connection.address
        if self._open[address] >= self._max_per_address and not self._is_exempt(address):
            logger.warning("refused a connection from %s, which has %d open", address, self._open[address])
            return False
        self._open[address] += 1
        self._by_handler[connection.handler] = connection
        connection.wait_for_request(self._head_seconds)
        return True

    def release(self, connection: "GuardedConnection") -> None:
        if self._by_handler.pop(connection.handler, None) is not None:
            self._open[connection.address] -= 1
            if not self._open[connection.address]:
                del self._open[connection.address]

    def __len__(self) -> int:
        return len(self._by_handler)


class GuardedConnection(asyncio.Protocol):
    """aiohttp's protocol of one connection with a timer that closes it while no request comes."""

    def __init__(self, guard: ConnectionGuard, handler: RequestHandler) -> None:
        self._guard = guard
        self.handler = handler
        self.address = ""
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None

    def wait_for_request(self, seconds: float) -> None:
        self.stop_waiting()
        if self._transport is not None:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._transport.abort)

    def stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - only stream sockets are listened on
        self._transport = transport
        peer = transport.get_extra_info("peername")
        self.address = str(peer[0]) if peer else ""
        if self._guard.admit(self):
            self.handler.connection_made(transport)
        else:
            self._transport = None
            transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._transport is not None:
            self.handler.data_received(data)

    def eof_received(self) -> bool | None:
        if self._transport is not None:
            self.handler.eof_received()
        return None

    def pause_writing(self) -> None:
        self.handler.pause_writing()

    def resume_writing(self) -> None:
        self.handler.resume_writing()

    def connection_lost(self, exc: BaseException | None) -> None:
        self.stop_waiting()
        if self._transport is not None:
            self._guard.release(self)
            self.handler.connection_lost(exc)


CONNECTIONS: web.AppKey[ConnectionGuard] = web.AppKey("connections", ConnectionGuard)
