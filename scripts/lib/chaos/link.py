"""A TCP proxy that can be a bad link: cut without a word, slow, far away."""

import asyncio
import socket
import struct
import time
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

_PIECE_BYTES = 16 * 1024


class CuttableLink:
    """Forwards a port of a server's own address to it, until told otherwise; open it with `async with`.

    cut(): nothing gets through in either direction, and nobody is told: both ends keep their sockets, as with a pulled
    cable. New connections are accepted and hear nothing either.
    heal(): connections that were cut are lost, as after a router's restart; their ends must find that out by
    themselves. New connections work. With `resume=True` the old ones go on as if packets had only been late.
    reset(): every connection ends at once with a reset.
    bytes_per_second, delay_seconds: for each connection and direction; may be changed at any time."""

    def __init__(self, target_url: str, *, bytes_per_second: float | None = None, delay_seconds: float = 0.0) -> None:
        target = urlsplit(target_url)
        assert target.hostname is not None
        assert target.port is not None
        self._target = (target.hostname, target.port)
        self.bytes_per_second = bytes_per_second
        self.delay_seconds = delay_seconds
        self.bytes_forwarded = 0
        self.connections_total = 0
        self._open = asyncio.Event()
        self._open.set()
        self._connections: set[_Connection] = set()
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        assert self._server is not None, "open it with `async with`"
        host, port = self._server.sockets[0].getsockname()
        return f"http://{host}:{port}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, self._target[0], 0, limit=_PIECE_BYTES)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        self.reset()
        await asyncio.gather(*(connection.ended.wait() for connection in self._connections))
        await self._server.wait_closed()

    @property
    def is_cut(self) -> bool:
        return not self._open.is_set()

    @property
    def is_used(self) -> bool:
        """Whether somebody is connected."""
        return bool(self._connections)

    def cut(self) -> None:
        self._open.clear()

    def heal(self, *, resume: bool = False) -> None:
        if self.is_cut and not resume:
            for connection in self._connections:
                connection.is_lost = True
        self._open.set()

    def reset(self) -> None:
        for connection in self._connections:
            connection.reset()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections_total += 1
        connection = _Connection()
        self._connections.add(connection)
        try:
            async with asyncio.TaskGroup() as group:
                watcher = group.create_task(connection.raise_when_reset())
                await self._forward_both_ways(connection, reader, writer)
                watcher.cancel()
        except* (OSError, _LinkResetError):
            _reset(writer)
        finally:
            self._connections.discard(connection)
            connection.ended.set()

    async def _forward_both_ways(
        self, connection: "_Connection", reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Return when both directions were closed in order."""
        await self._let_through(connection)
        far_reader, far_writer = await asyncio.open_connection(*self._target, limit=_PIECE_BYTES)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._forward(connection, reader, far_writer))
                group.create_task(self._forward(connection, far_reader, writer))
        except BaseException:
            _reset(far_writer)
            raise
        for each in (far_writer, writer):
            each.close()
            await each.wait_closed()

    async def _forward(
        self, connection: "_Connection", reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        while piece := await reader.read(_PIECE_BYTES):
            await self._let_through(connection)
            started = time.monotonic()
            if self.delay_seconds:
                await asyncio.sleep(self.delay_seconds)
            writer.write(piece)
            await writer.drain()
            self.bytes_forwarded += len(piece)
            if self.bytes_per_second is not None:
                await asyncio.sleep(max(0.0, len(piece) / self.bytes_per_second - (time.monotonic() - started)))
        await self._let_through(connection)
        writer.write_eof()

    async def _let_through(self, connection: "_Connection") -> None:
        """Return when the link lets bytes of this connection through; never, for one that was lost in a cut."""
        await self._open.wait()
        if connection.is_lost:
            await asyncio.Event().wait()


class _LinkResetError(Exception):
    """Ends both directions of a connection."""


class _Connection:
    def __init__(self) -> None:
        self.is_lost = False
        self.ended = asyncio.Event()
        self._is_reset = asyncio.Event()

    def reset(self) -> None:
        self._is_reset.set()

    async def raise_when_reset(self) -> None:
        await self._is_reset.wait()
        raise _LinkResetError


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close at once; the peer reads a reset, not an orderly end."""
    own: socket.socket = writer.get_extra_info("socket")
    if own.fileno() >= 0:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
