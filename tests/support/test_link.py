"""The bad link is as bad as it says: fault tests rest on it."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from tests.support.link import CuttableLink


@pytest.fixture
async def echo_url() -> AsyncIterator[str]:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while piece := await reader.read(65536):
                writer.write(piece)
                await writer.drain()
        except ConnectionError:
            pass
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


class Client:
    """One connection through the link."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def hears_echo(self, text: bytes = b"hello") -> bool:
        """Say `text`; tell whether it comes back soon."""
        self.writer.write(text)
        return await self.hears(text)

    async def hears(self, text: bytes) -> bool:
        try:
            async with asyncio.timeout(0.3):
                return await self.reader.readexactly(len(text)) == text
        except TimeoutError:
            return False


Connect = Callable[[CuttableLink], Awaitable[Client]]


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    clients = []

    async def open_client(link: CuttableLink) -> Client:
        client = Client(*await asyncio.open_connection("127.0.0.1", int(link.url.rpartition(":")[2])))
        clients.append(client)
        return client

    yield open_client
    for client in clients:
        client.writer.transport.abort()


async def test_bytes_pass_in_both_directions_to_the_last(echo_url: str, connect: Connect) -> None:
    async with asyncio.timeout(10), CuttableLink(echo_url) as link:
        client = await connect(link)
        sent = bytes(range(256)) * 4096

        async def send() -> None:
            client.writer.write(sent)
            client.writer.write_eof()

        async with asyncio.TaskGroup() as group:
            group.create_task(send())
            received = await client.reader.read(-1)
        assert received == sent
        assert link.bytes_forwarded == 2 * len(sent)


async def test_a_cut_link_is_silent_and_its_sockets_stay_open(echo_url: str, connect: Connect) -> None:
    async with asyncio.timeout(10), CuttableLink(echo_url) as link:
        client = await connect(link)
        assert await client.hears_echo()
        link.cut()
        assert not await client.hears_echo()
        assert not client.reader.at_eof()
        newcomer = await connect(link)
        assert not await newcomer.hears_echo(b"anyone?")


async def test_a_healed_link_takes_new_connections_and_has_lost_the_old(echo_url: str, connect: Connect) -> None:
    async with asyncio.timeout(10), CuttableLink(echo_url) as link:
        old = await connect(link)
        assert await old.hears_echo()
        link.cut()
        link.heal()
        assert not await old.hears_echo()
        assert not old.reader.at_eof()
        newcomer = await connect(link)
        assert await newcomer.hears_echo()


async def test_a_resumed_link_delivers_what_was_sent_meanwhile(echo_url: str, connect: Connect) -> None:
    async with asyncio.timeout(10), CuttableLink(echo_url) as link:
        client = await connect(link)
        link.cut()
        assert not await client.hears_echo(b"late")
        link.heal(resume=True)
        assert await client.hears(b"late")


async def test_a_reset_link_ends_its_connections(echo_url: str, connect: Connect) -> None:
    async with asyncio.timeout(10), CuttableLink(echo_url) as link:
        client = await connect(link)
        assert await client.hears_echo()
        link.reset()
        with pytest.raises(ConnectionResetError):
            await client.reader.read(1)


async def test_a_slow_link_keeps_to_its_rate(echo_url: str, connect: Connect) -> None:
    async with asyncio.timeout(10), CuttableLink(echo_url, bytes_per_second=100_000) as link:
        client = await connect(link)
        started = time.monotonic()
        client.writer.write(bytes(50_000))
        await client.reader.readexactly(50_000)
        assert time.monotonic() - started > 0.3


async def test_a_far_link_delays(echo_url: str, connect: Connect) -> None:
    async with asyncio.timeout(10), CuttableLink(echo_url, delay_seconds=0.1) as link:
        client = await connect(link)
        started = time.monotonic()
        client.writer.write(b"x")
        await client.reader.readexactly(1)
        assert time.monotonic() - started >= 0.2
