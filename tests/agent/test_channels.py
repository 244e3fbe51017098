"""Channels against a real WebSocket server on loopback, as the server side speaks."""

import asyncio
import hashlib
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
from tests.support.eventually import eventually
from tests.support.journals import JOURNAL_REMOTE, make_entry, write_journal
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection, serve

from fleetwire_agent.channels import MAX_CHANNELS, Channels
from fleetwire_agent.config import Profile
from fleetwire_agent.processes import Spawner
from fleetwire_shared.codec import decode, encode
from fleetwire_shared.limits import CHUNK_BYTES
from fleetwire_shared.messages import (
    ON_CHANNEL,
    AgentMessage,
    ChannelMessage,
    ChannelRefused,
    End,
    FileOpened,
    FileReady,
    FileWritten,
    FollowLog,
    LogLines,
    LogOpened,
    ReadFile,
    WriteFile,
)


class Host:
    """An agent's channels, and the server they dial."""

    def __init__(
        self,
        channels: Channels,
        refusals: "asyncio.Queue[AgentMessage]",
        sockets: "asyncio.Queue[ServerConnection]",
    ) -> None:
        self.channels = channels
        self.refusals = refusals
        self.sockets = sockets

    async def open(self, message: ReadFile | WriteFile | FollowLog) -> ServerConnection:
        self.channels.open(message)
        async with asyncio.timeout(5):
            return await self.sockets.get()

    async def refusal(self) -> ChannelRefused:
        async with asyncio.timeout(15):
            message = await self.refusals.get()
        assert isinstance(message, ChannelRefused)
        return message


@asynccontextmanager
async def run_host(journal_directory: Path | None = None, profile: Profile = "manage") -> AsyncIterator[Host]:
    refusals: asyncio.Queue[AgentMessage] = asyncio.Queue()
    sockets: asyncio.Queue[ServerConnection] = asyncio.Queue()
    done = asyncio.Event()

    async def accept(connection: ServerConnection) -> None:
        sockets.put_nowait(connection)
        await done.wait()

    async with serve(accept, "127.0.0.1", 0, compression=None, ping_interval=None, close_timeout=1) as server:
        port = next(iter(server.sockets)).getsockname()[1]

        def dial(channel_id: str) -> AbstractAsyncContextManager[ClientConnection]:
            return connect(
                f"ws://127.0.0.1:{port}/{channel_id}", compression=None, ping_interval=None, close_timeout=1, proxy=None
            )

        with Spawner(os.environ) as spawner:
            channels = Channels(
                dial=dial,
                send=refusals.put,
                spawn=spawner,
                journal_directory=None if journal_directory is None else str(journal_directory),
                profile=profile,
            )
            host = Host(channels, refusals, sockets)
            async with asyncio.TaskGroup() as group:
                serving = group.create_task(channels.serve())
                await asyncio.sleep(0)
                try:
                    yield host
                finally:
                    serving.cancel()
                    done.set()


@pytest.fixture
async def host() -> AsyncIterator[Host]:
    async with run_host() as host:
        yield host


async def receive(connection: ServerConnection) -> ChannelMessage | bytes:
    async with asyncio.timeout(15):
        frame = await connection.recv()
    return decode(frame, ON_CHANNEL) if isinstance(frame, str) else frame


async def receive_file(connection: ServerConnection) -> tuple[bytes, End]:
    pieces = []
    while isinstance(frame := await receive(connection), bytes):
        assert len(frame) <= CHUNK_BYTES
        pieces.append(frame)
    assert isinstance(frame, End)
    return b"".join(pieces), frame


async def receive_lines(connection: ServerConnection, count: int) -> list[str]:
    lines: list[str] = []
    while len(lines) < count:
        message = await receive(connection)
        assert isinstance(message, LogLines), message
        lines += message.texts
    return lines


def open_descriptors(is_wanted: Callable[[str], bool]) -> list[str]:
    targets = []
    for name in os.listdir("/proc/self/fd"):
        try:
            targets.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:
            continue
    return [target for target in targets if is_wanted(target)]


async def expect_no_descriptor_in(directory: Path) -> None:
    async def read() -> list[str]:
        return open_descriptors(lambda target: target.startswith(str(directory)))

    await eventually(read, lambda targets: targets == [])


def make_end(content: bytes) -> str:
    return encode(End(bytes=len(content), sha256=hashlib.sha256(content).hexdigest()))


# ---------------------------------------------------------------- reading


async def test_a_file_is_sent_with_its_digest(host: Host, tmp_path: Path) -> None:
    content = os.urandom(5_000_001)
    (tmp_path / "f").write_bytes(content)
    connection = await host.open(ReadFile(channel_id="ch_1", path=str(tmp_path / "f")))
    opened = await receive(connection)
    assert isinstance(opened, FileOpened)
    assert opened.length == len(content)
    received, end = await receive_file(connection)
    assert received == content
    assert end == End(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    await connection.close()
    await expect_no_descriptor_in(tmp_path)


async def test_what_cannot_be_read_is_refused_without_dialling(host: Host) -> None:
    for path, code in {"relative": "invalid", "/no/such": "not_found", "/dev/zero": "invalid"}.items():
        host.channels.open(ReadFile(channel_id="ch_1", path=path))
        refused = await host.refusal()
        assert (refused.channel_id, refused.code) == ("ch_1", code)
    assert host.sockets.empty()


async def test_a_file_that_shrinks_ends_with_conflict(host: Host, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.touch()
    os.truncate(path, 200_000_000)
    connection = await host.open(ReadFile(channel_id="ch_1", path=str(path)))
    await receive(connection)
    os.truncate(path, 1000)
    _, end = await receive_file(connection)
    assert end.code == "conflict"
    assert end.message is not None
    assert "became shorter" in end.message
    await connection.close()


async def test_a_slow_reader_slows_the_host_and_loses_nothing(host: Host, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.touch()
    os.truncate(path, 50_000_000)
    connection = await host.open(ReadFile(channel_id="ch_1", path=str(path)))

    def position() -> int:
        (link,) = [name for name in os.listdir("/proc/self/fd") if _target(name) == str(path)]
        return int(Path(f"/proc/self/fdinfo/{link}").read_text().split()[1])

    seen: list[int] = []

    async def read_position() -> bool:
        seen.append(position())
        return len(seen) > 4 and len(set(seen[-4:])) == 1

    await eventually(read_position)
    assert seen[-1] < 25_000_000
    await receive(connection)
    received, end = await receive_file(connection)
    assert len(received) == 50_000_000
    assert end.code is None
    await connection.close()


def _target(name: str) -> str | None:
    try:
        return os.readlink(f"/proc/self/fd/{name}")
    except FileNotFoundError:
        return None


async def test_a_channel_that_the_server_closes_ends_the_reading(host: Host, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.touch()
    os.truncate(path, 2_000_000_000)
    connection = await host.open(ReadFile(channel_id="ch_1", path=str(path)))
    await receive(connection)
    connection.transport.abort()
    await expect_no_descriptor_in(tmp_path)


# ---------------------------------------------------------------- writing


async def test_a_file_is_received_and_put_in_place(host: Host, tmp_path: Path) -> None:
    content, path = os.urandom(3_000_001), tmp_path / "é new"
    connection = await host.open(WriteFile(channel_id="ch_1", path=str(path)))
    assert await receive(connection) == FileReady()
    for start in range(0, len(content), CHUNK_BYTES):
        await connection.send(content[start : start + CHUNK_BYTES])
    await connection.send(make_end(content))
    digest = hashlib.sha256(content).hexdigest()
    assert await receive(connection) == FileWritten(path=str(path), bytes=len(content), sha256=digest)
    assert path.read_bytes() == content
    await connection.close()
    await expect_no_descriptor_in(tmp_path)


async def test_the_profile_monitor_takes_no_file(tmp_path: Path) -> None:
    async with run_host(profile="monitor") as host:
        host.channels.open(WriteFile(channel_id="c", path=str(tmp_path / "new")))
        refusal = await host.refusal()
        assert (refusal.code, "profile monitor" in refusal.message) == ("forbidden", True)
        (tmp_path / "file").write_bytes(b"read")
        connection = await host.open(ReadFile(channel_id="d", path=str(tmp_path / "file")))
        assert isinstance(await receive(connection), FileOpened)
        assert (await receive_file(connection))[0] == b"read"
        await connection.close()
    assert not (tmp_path / "new").exists()


async def test_an_empty_file_is_received(host: Host, tmp_path: Path) -> None:
    connection = await host.open(WriteFile(channel_id="ch_1", path=str(tmp_path / "f")))
    await receive(connection)
    await connection.send(make_end(b""))
    assert isinstance(await receive(connection), FileWritten)
    assert (tmp_path / "f").read_bytes() == b""
    await connection.close()


@pytest.mark.parametrize("ending", ["close", "abort", "failed", "digest", "nonsense"])
async def test_an_upload_that_fails_leaves_nothing(host: Host, tmp_path: Path, ending: str) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")
    connection = await host.open(WriteFile(channel_id="ch_1", path=str(path)))
    await receive(connection)
    for _ in range(20):
        await connection.send(b"x" * CHUNK_BYTES)
    match ending:
        case "abort":
            connection.transport.abort()
        case "failed":
            await connection.send(encode(End(code="unavailable", message="the browser went away")))
        case "digest":
            await connection.send(make_end(b"something else"))
            refused = await receive(connection)
            assert isinstance(refused, End)
            assert refused.code == "conflict"
        case "nonsense":
            await connection.send("{}")
            refused = await receive(connection)
            assert isinstance(refused, End)
            assert refused.code == "protocol"
    await connection.close()
    await expect_no_descriptor_in(tmp_path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------- logs


async def test_a_log_is_followed_until_the_server_closes(host: Host, tmp_path: Path) -> None:
    path = tmp_path / "app.log"
    path.write_text("one\ntwo\n")
    connection = await host.open(FollowLog(channel_id="ch_1", source="file", path=str(path), lines=1))
    assert await receive(connection) == LogOpened()
    assert await receive_lines(connection, 1) == ["two"]
    with path.open("a") as file:
        file.write("three\n")
    assert await receive_lines(connection, 1) == ["three"]
    await connection.close()  # while the log is idle
    await expect_no_descriptor_in(tmp_path)


async def test_many_lines_come_once_and_in_order(host: Host, tmp_path: Path) -> None:
    path = tmp_path / "app.log"
    path.write_text("".join(f"{number}\n" for number in range(50_000)))
    connection = await host.open(FollowLog(channel_id="ch_1", source="file", path=str(path), lines=50_000))
    await receive(connection)
    assert await receive_lines(connection, 50_000) == [str(number) for number in range(50_000)]
    await connection.close()


@pytest.mark.skipif(not JOURNAL_REMOTE.exists(), reason="no systemd-journal-remote")
async def test_journalctl_ends_with_its_channel(tmp_path: Path) -> None:
    write_journal(tmp_path / "a.journal", make_entry(0))
    async with run_host(tmp_path) as host:
        connection = await host.open(FollowLog(channel_id="ch_1", source="journald", unit="nginx"))
        assert await receive(connection) == LogOpened()
        (line,) = await receive_lines(connection, 1)
        assert line.endswith("nginx[12]: message 0")
        await connection.close()  # while the journal is idle

        async def read_children() -> str:
            return Path(f"/proc/self/task/{os.getpid()}/children").read_text()

        await eventually(read_children, lambda children: children == "")


@pytest.mark.skipif(not JOURNAL_REMOTE.exists(), reason="no systemd-journal-remote")
async def test_a_journal_that_fails_later_ends_with_a_reason(tmp_path: Path) -> None:
    write_journal(tmp_path / "a.journal", make_entry(0))
    async with run_host(tmp_path) as host:
        connection = await host.open(FollowLog(channel_id="ch_1", source="journald", unit="no-such-*"))
        await receive(connection)
        end = await receive(connection)
        assert isinstance(end, End)
        assert end.code == "unavailable"
        await connection.close()


async def test_a_host_without_a_journal_refuses(tmp_path: Path) -> None:
    async with run_host(tmp_path) as host:
        host.channels.open(FollowLog(channel_id="ch_1", source="journald"))
        assert (await host.refusal()).code == "unavailable"


# ---------------------------------------------------------------- together


async def test_one_failing_channel_does_not_disturb_another(host: Host, tmp_path: Path) -> None:
    (tmp_path / "log").write_text("one\n")
    log = await host.open(FollowLog(channel_id="ch_1", source="file", path=str(tmp_path / "log")))
    await receive(log)
    other = await host.open(WriteFile(channel_id="ch_2", path=str(tmp_path / "f")))
    other.transport.abort()
    host.channels.open(ReadFile(channel_id="ch_3", path="/no/such"))
    await host.refusal()
    assert await receive_lines(log, 1) == ["one"]
    await log.close()


async def test_more_than_the_allowed_channels_are_refused(host: Host, tmp_path: Path) -> None:
    (tmp_path / "log").touch()
    request = FollowLog(channel_id="ch_1", source="file", path=str(tmp_path / "log"))
    connections = [await host.open(request) for _ in range(MAX_CHANNELS)]
    host.channels.open(request)
    assert (await host.refusal()).code == "unavailable"
    await connections[0].close()

    async def is_answered() -> bool:
        return not (host.sockets.empty() and host.refusals.empty())

    async def try_again() -> bool:
        while not host.refusals.empty():
            host.refusals.get_nowait()
        host.channels.open(request)
        await eventually(is_answered)
        return not host.sockets.empty()

    await eventually(try_again)


async def test_stopping_the_agent_closes_all_channels(tmp_path: Path) -> None:
    (tmp_path / "log").touch()
    os.truncate(tmp_path / "log", 1_000_000_000)
    async with run_host() as host:
        log = await host.open(FollowLog(channel_id="ch_1", source="file", path=str(tmp_path / "log"), lines=0))
        file = await host.open(ReadFile(channel_id="ch_2", path=str(tmp_path / "log")))
        upload = await host.open(WriteFile(channel_id="ch_3", path=str(tmp_path / "new")))
        await receive(upload)
    async with asyncio.timeout(5):
        for connection in (log, file, upload):
            await connection.wait_closed()
    await expect_no_descriptor_in(tmp_path)
    assert not (tmp_path / "new").exists()


async def test_a_server_that_cannot_be_dialled_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    refusals: asyncio.Queue[AgentMessage] = asyncio.Queue()
    dialled = asyncio.Event()

    def dial(channel_id: str) -> AbstractAsyncContextManager[ClientConnection]:
        dialled.set()
        return connect(f"ws://127.0.0.1:{port}/{channel_id}", proxy=None)

    with Spawner(os.environ) as spawner:
        channels = Channels(dial=dial, send=refusals.put, spawn=spawner, journal_directory=None)
        async with asyncio.TaskGroup() as group:
            serving = group.create_task(channels.serve())
            await asyncio.sleep(0)
            channels.open(ReadFile(channel_id="ch_1", path=str(tmp_path / "f")))
            await asyncio.wait_for(dialled.wait(), 5)
            await expect_no_descriptor_in(tmp_path)
            serving.cancel()
    assert refusals.empty()
