"""Files to and from a host: any name, any size, whole or a range, and never a part that looks like the whole."""

import asyncio
import contextlib
import hashlib
import io
import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import ClientPayloadError, FormData
from tests.conftest import Fleet, OpenApi, Place, StartAgent, StartServer
from tests.support.api import Api
from tests.support.eventually import eventually
from tests.support.link import CuttableLink

pytestmark = pytest.mark.on_hosts

GIB = 1024**3
MIB = 1024**2
SERVER_BYTES = 16 * MIB
AGENT_BYTES = 8 * MIB


async def download(api: Api, agent_path: str, path: Path | str, **headers: str) -> tuple[int, bytes, Any]:
    """Return status, body and headers."""
    wanted = api.session.get(f"{agent_path}/files", params={"path": str(path)}, headers=api.headers | headers)
    async with wanted as response:
        return response.status, await response.read(), response.headers


async def upload(
    api: Api, agent_path: str, dest: Path | str, content: Any, *, file_first: bool = False
) -> tuple[int, Any]:
    """Return status and answer."""
    if isinstance(content, bytes):
        content = io.BytesIO(content)
    form = FormData(quote_fields=False, default_to_multipart=True)
    fields = [("dest", str(dest), {}), ("file", content, {"filename": "f", "content_type": "application/octet-stream"})]
    for name, value, options in reversed(fields) if file_first else fields:
        form.add_field(name, value, **options)
    async with api.session.post(f"{agent_path}/files", data=form, headers=api.headers) as response:
        return response.status, await response.json()


def sparse_file(path: Path, size: int) -> Path:
    """Make a file of zeros with a few marks, so that a lost or doubled piece changes the digest."""
    with path.open("wb") as file:
        file.truncate(size)
        for offset in range(0, size, 64 * MIB + 4097):
            file.seek(offset)
            file.write(b"mark at %d" % offset)
    return path


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- download


@pytest.mark.parametrize("name", ["plain", "two words", "line\nbreak", "é ü 漢字", "100%", "a;b'c\"d", "-rf"])
async def test_any_name_can_be_downloaded(fleet: Fleet, api: Api, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"content of " + name.encode())
    status, body, headers = await download(api, fleet.agent_path, tmp_path / name)
    assert (status, body) == (200, b"content of " + name.encode())
    assert headers["Content-Type"] == "application/octet-stream"
    assert "attachment" in headers["Content-Disposition"]
    assert "\n" not in headers["Content-Disposition"]


async def test_empty_linked_and_kernel_files(fleet: Fleet, api: Api, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    status, body, headers = await download(api, fleet.agent_path, tmp_path / "empty")
    assert (status, body, headers["Content-Length"]) == (200, b"", "0")
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    assert (await download(api, fleet.agent_path, tmp_path / "link"))[:2] == (200, b"")
    (tmp_path / "dir").mkdir()
    assert (await download(api, fleet.agent_path, tmp_path / "dir" / ".." / "empty"))[:2] == (200, b"")
    status, body, headers = await download(api, fleet.agent_path, "/proc/cpuinfo")
    assert status == 200
    assert body.startswith(b"processor")
    assert headers["Accept-Ranges"] == "none", "its size is known only when it was read"


async def test_what_is_no_file_is_refused_in_good_time(place: Place, fleet: Fleet, api: Api, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    read_kernel_messages()
    async with asyncio.timeout(15):
        for path, status, word in (
            (tmp_path, 400, "directory"),
            (tmp_path / "fifo", 400, "FIFO"),
            ("/dev/zero", 400, "device"),
            ("/proc/kmsg", 400, "stream" if place.name == "here" else "FIFO"),  # nspawn puts one there
            (tmp_path / "missing", 404, "No such file"),
            ("etc/hosts", 400, "absolute"),
            ("/" + "x" * 5000, 400, ""),
        ):
            answered, body, headers = await download(api, fleet.agent_path, path)
            assert (answered, headers["Content-Type"]) == (status, "application/problem+json"), (path, body)
            assert word in body.decode(), body


def read_kernel_messages() -> None:
    """Read what /proc/kmsg holds, so that who reads next has to wait; each message is there for one reader only."""
    if os.geteuid() != 0:
        return
    descriptor = os.open("/proc/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    try:
        with contextlib.suppress(BlockingIOError):
            while os.read(descriptor, 65536):
                pass
    finally:
        os.close(descriptor)


async def test_ranges(fleet: Fleet, api: Api, tmp_path: Path) -> None:
    path = tmp_path / "digits"
    path.write_bytes(b"0123456789")
    for asked, status, body, content_range in (
        ("bytes=0-3", 206, b"0123", "bytes 0-3/10"),
        ("bytes=5-", 206, b"56789", "bytes 5-9/10"),
        ("bytes=-3", 206, b"789", "bytes 7-9/10"),
        ("bytes=8-100", 206, b"89", "bytes 8-9/10"),
        ("bytes=0-1,4-5", 200, b"0123456789", None),
        ("nonsense", 200, b"0123456789", None),
        ("bytes=10-", 416, None, "bytes */10"),
        ("bytes=500-600", 416, None, "bytes */10"),
    ):
        answered, received, headers = await download(api, fleet.agent_path, path, Range=asked)
        assert (answered, headers.get("Content-Range")) == (status, content_range), (asked, received)
        assert body is None or received == body


async def test_a_resumed_download_is_of_the_same_version(fleet: Fleet, api: Api, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"first version")
    etag = (await download(api, fleet.agent_path, path))[2]["ETag"]
    assert (await download(api, fleet.agent_path, path, **{"If-None-Match": etag}))[:2] == (304, b"")
    resume = {"Range": "bytes=6-", "If-Range": etag}
    assert (await download(api, fleet.agent_path, path, **resume))[:2] == (206, b"version")
    path.write_bytes(b"another version")
    assert (await download(api, fleet.agent_path, path, **resume))[:2] == (200, b"another version")


async def test_head_tells_the_size_without_the_file(fleet: Fleet, api: Api, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 1000)
    wanted = api.session.head(f"{fleet.agent_path}/files", params={"path": str(tmp_path / "file")}, headers=api.headers)
    async with wanted as response:
        assert (response.status, response.headers["Content-Length"]) == (200, "1000")


async def test_a_growing_file_is_sent_as_it_was_when_opened(fleet: Fleet, api: Api, tmp_path: Path) -> None:
    path = tmp_path / "growing"
    path.write_bytes(b"a" * 32 * MIB)
    wanted = api.session.get(f"{fleet.agent_path}/files", params={"path": str(path)}, headers=api.headers)
    async with wanted as response:
        with path.open("ab") as file:
            file.write(b"b" * 1000)
        assert await response.read() == b"a" * 32 * MIB


async def test_a_file_that_shrinks_meanwhile_breaks_the_download(fleet: Fleet, api: Api, tmp_path: Path) -> None:
    path = sparse_file(tmp_path / "shrinking", 256 * MIB)
    wanted = api.session.get(f"{fleet.agent_path}/files", params={"path": str(path)}, headers=api.headers)
    async with wanted as response:
        os.truncate(path, MIB)
        with pytest.raises(ClientPayloadError):
            await response.read()


async def test_one_gibibyte_down_and_up_in_constant_memory(
    start_server: StartServer, start_agent: StartAgent, open_api: OpenApi, tmp_path: Path
) -> None:
    server = start_server()
    api = await open_api(server)
    agent = await start_agent(api)
    agent_path = f"/api/agents/{agent.agent_id}"
    await download(api, agent_path, "/etc/hostname")  # what the first transfer loads stays, and is not of its size
    path = sparse_file(tmp_path / "big", GIB)
    expected = sha256_of(path)
    idle = server.rss_bytes(), agent.rss_bytes()

    def check_memory() -> None:
        assert server.peak_rss_bytes() - idle[0] <= SERVER_BYTES
        assert agent.peak_rss_bytes() - idle[1] <= AGENT_BYTES
        server.reset_peak_rss()
        agent.reset_peak_rss()

    server.reset_peak_rss()
    agent.reset_peak_rss()
    digest = hashlib.sha256()
    no_limit = aiohttp.ClientTimeout(total=None)
    wanted = api.session.get(f"{agent_path}/files", params={"path": str(path)}, headers=api.headers, timeout=no_limit)
    async with wanted as response:
        assert response.content_length == GIB
        async for chunk in response.content.iter_any():
            digest.update(chunk)
    assert digest.hexdigest() == expected
    check_memory()

    for field_order in (["dest={}", "file=@{}"], ["file=@{}", "dest={}"]):
        dest = tmp_path / f"uploaded-{field_order[0][:4]}"
        fields = [field.format(dest if field.startswith("dest") else path) for field in field_order]
        command = ["curl", "-sS", "-H", f"Authorization: Bearer {api.token}", f"{api.url}{agent_path}/files"]
        curl = await asyncio.to_thread(
            subprocess.run, [*command, "-F", fields[0], "-F", fields[1]], capture_output=True, check=True, text=True
        )
        assert f'"sha256":"{expected}"' in curl.stdout, curl.stdout
        assert dest.stat().st_size == GIB
        dest.unlink()
        check_memory()


# ---------------------------------------------------------------- upload


@pytest.mark.parametrize("file_first", [False, True], ids=["dest first", "file first"])
@pytest.mark.parametrize("content", [b"", b"short", bytes(range(256)) * 20_000], ids=["empty", "short", "5 MB"])
async def test_upload_in_either_order(
    fleet: Fleet, api: Api, tmp_path: Path, content: bytes, *, file_first: bool
) -> None:
    dest = tmp_path / "ein Ziel é"
    status, answer = await upload(api, fleet.agent_path, dest, content, file_first=file_first)
    assert status == 200, answer
    assert answer == {"path": str(dest), "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert dest.read_bytes() == content
    assert os.listdir(tmp_path) == [dest.name]


async def test_owner_and_mode_of_a_replaced_file_are_kept(fleet: Fleet, api: Api, tmp_path: Path) -> None:
    dest = tmp_path / "script"
    dest.write_text("old")
    dest.chmod(0o751)
    if os.geteuid() == 0:
        os.chown(dest, 1234, 2345)
    before = dest.stat()
    assert (await upload(api, fleet.agent_path, dest, b"new"))[0] == 200
    after = dest.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert dest.read_text() == "new"


async def test_a_reader_never_sees_half_an_upload(fleet: Fleet, api: Api, tmp_path: Path) -> None:
    dest = tmp_path / "config"
    versions = [letter * 3_000_000 for letter in (b"a", b"b", b"c", b"d")]
    dest.write_bytes(versions[0])
    seen = set()

    async def read_all_the_time() -> None:
        while True:
            seen.add(await asyncio.to_thread(lambda: hashlib.sha256(dest.read_bytes()).digest()))

    async with asyncio.TaskGroup() as group:
        reading = group.create_task(read_all_the_time())
        for version in versions[1:]:
            await upload(api, fleet.agent_path, dest, version)
        reading.cancel()
    assert seen <= {hashlib.sha256(version).digest() for version in versions}


async def test_two_uploads_to_one_place_leave_one_of_them(fleet: Fleet, api: Api, tmp_path: Path) -> None:
    dest = tmp_path / "contended"
    contents = [b"a" * 5_000_000, b"b" * 5_000_000]
    answers = await asyncio.gather(*(upload(api, fleet.agent_path, dest, content) for content in contents))
    assert [status for status, _ in answers] == [200, 200]
    assert dest.read_bytes() in contents
    assert os.listdir(tmp_path) == ["contended"]


async def test_wrong_destinations_and_bodies_are_refused(fleet: Fleet, api: Api, tmp_path: Path) -> None:
    for dest, status, word in (
        (tmp_path / "missing" / "file", 404, "make it first"),
        (tmp_path, 400, "directory"),
        ("relative", 400, "absolute"),
        ("/dev/null", 400, "device"),
    ):
        for file_first in (False, True):
            answered, answer = await upload(api, fleet.agent_path, dest, b"x", file_first=file_first)
            assert (answered, answer["status"]) == (status, status), answer
            assert word in answer["detail"]
    only_dest, only_file, twice = FormData(), FormData(), FormData()
    for form, names in ((only_dest, ["dest"]), (only_file, ["file"]), (twice, ["dest", "dest", "file"])):
        for name in names:
            form.add_field(name, str(tmp_path / "f"), content_type="text/plain")
        async with api.session.post(f"{fleet.agent_path}/files", data=form, headers=api.headers) as response:
            assert response.status == 400, await response.text()
    async with api.session.post(f"{fleet.agent_path}/files", data=b"{}", headers=api.headers) as response:
        assert (response.status, "multipart" in await response.text()) == (400, True)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("size", [10, 100_000])
@pytest.mark.parametrize(
    "rest",
    [
        b"",
        b"\r\n--B",
        b"\r\n--B\r\n",
        b'\r\n--B\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\nsecond\r\n--B--\r\n',
        b'\r\n--B\r\nContent-Disposition: form-data; name="dest"\r\n\r\n/tmp/other\r\n--B--\r\n',
    ],
)
async def test_a_form_that_is_refused_after_its_file_leaves_nothing(
    fleet: Fleet, api: Api, tmp_path: Path, size: int, rest: bytes
) -> None:
    dest = tmp_path / "dest"
    dest.write_text("untouched")
    parts = (
        b'--B\r\nContent-Disposition: form-data; name="dest"\r\n\r\n%s\r\n' % os.fsencode(dest),
        b'--B\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n',
        b"x" * size,
        rest,
    )
    headers = api.headers | {"Content-Type": "multipart/form-data; boundary=B"}
    async with api.session.post(f"{fleet.agent_path}/files", data=b"".join(parts), headers=headers) as response:
        assert response.status == 400, await response.text()
    assert dest.read_text() == "untouched"
    await eventually(lambda: asyncio.sleep(0, os.listdir(tmp_path) == ["dest"]))


async def test_an_upload_that_is_given_up_leaves_nothing(fleet: Fleet, api: Api, tmp_path: Path) -> None:
    dest = tmp_path / "dest"
    dest.write_text("untouched")
    started = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 100_000
            started.set()
            await asyncio.sleep(0.001)

    async with asyncio.TaskGroup() as group:
        sending = group.create_task(upload(api, fleet.agent_path, dest, endless()))
        await started.wait()
        await asyncio.sleep(0.2)
        sending.cancel()
    assert dest.read_text() == "untouched"
    await eventually(lambda: asyncio.sleep(0, os.listdir(tmp_path) == ["dest"]))


@pytest.mark.here_only(reason="its mount is not seen on a host; e2e fills a host's own disk")
async def test_a_full_disk_on_the_host_is_said_and_leaves_nothing(fleet: Fleet, api: Api, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small filesystem")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], check=True)
    try:
        status, answer = await upload(api, fleet.agent_path, tmp_path / "f", b"x" * 5_000_000)
        assert (status, answer["code"]) == (503, "unavailable"), answer
        assert "space" in answer["detail"]
        assert os.listdir(tmp_path) == []
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize("victim", ["server", "agent", "link"])
async def test_a_transfer_that_breaks_is_seen_and_works_again(
    victim: str, start_server: StartServer, start_agent: StartAgent, open_api: OpenApi, tmp_path: Path
) -> None:
    server = start_server()
    api = await open_api(server)
    async with CuttableLink(server.url) as link:
        agent = await start_agent(api, server_url=link.url)
        agent_path = f"/api/agents/{agent.agent_id}"
        path = sparse_file(tmp_path / "big", GIB)
        (tmp_path / "up").mkdir()
        dest = tmp_path / "up" / "dest"
        dest.write_text("untouched")
        wanted = api.session.get(f"{agent_path}/files", params={"path": str(path)}, headers=api.headers)
        async with wanted as response:
            await response.content.readexactly(MIB)
            async with asyncio.TaskGroup() as group:
                sending = group.create_task(_broken_upload(api, agent_path, dest))
                await asyncio.sleep(0.3)
                if victim == "link":
                    link.reset()
                else:
                    (server if victim == "server" else agent).kill()
                with pytest.raises(aiohttp.ClientError):
                    await response.read()
                assert await sending != 200
        assert dest.read_text() == "untouched"
        if victim == "server":
            server.start()
            server.wait_until_started()
        if victim == "agent":
            agent.start()
        await eventually(lambda: asyncio.sleep(0, os.listdir(tmp_path / "up") == ["dest"]), timeout_seconds=70)
        await api.wait_for_agent(agent.agent_id, timeout_seconds=60)
        status, body, _ = await download(api, agent_path, path, Range=f"bytes={GIB - 5}-")
        assert (status, body) == (206, path.read_bytes()[-5:] if path.stat().st_size < MIB else b"\0" * 5)
        assert (await upload(api, agent_path, dest, b"now"))[0] == 200
        assert dest.read_text() == "now"


async def _broken_upload(api: Api, agent_path: str, dest: Path) -> int:
    """Upload without end; return the status it was answered with, 0 when the connection broke."""

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 65536
            await asyncio.sleep(0.002)

    try:
        return (await upload(api, agent_path, dest, endless()))[0]
    except (aiohttp.ClientError, TimeoutError):
        return 0


@pytest.mark.here_only(reason="a minute of silence in a proxy on this machine; e2e cuts a host's own cable")
async def test_transfers_over_a_link_that_fell_silent_are_given_up(
    start_server: StartServer, start_agent: StartAgent, open_api: OpenApi, tmp_path: Path
) -> None:
    """Takes as long as a transfer may stand still, 60 s: no reset tells either side that the other is gone."""
    api = await open_api(start_server())
    async with CuttableLink(api.url) as link, asyncio.timeout(150):
        agent = await start_agent(api, server_url=link.url)
        agent_path = f"/api/agents/{agent.agent_id}"
        path = sparse_file(tmp_path / "big", GIB)
        (tmp_path / "up").mkdir()
        dest = tmp_path / "up" / "dest"
        dest.write_text("untouched")
        async with Api(api.url, token=api.token, timeout_seconds=120) as patient:  # noqa: SIM117
            async with patient.open("GET", f"{agent_path}/files", params={"path": str(path)}) as response:
                await response.content.readexactly(MIB)
                async with asyncio.TaskGroup() as group:
                    sending = group.create_task(_broken_upload(patient, agent_path, dest))
                    await asyncio.sleep(0.3)
                    link.cut()
                    with pytest.raises(aiohttp.ClientError):
                        await response.read()
                assert sending.result() != 200
        link.heal()
        await api.wait_for_agent(agent.agent_id, timeout_seconds=60)
        await eventually(lambda: asyncio.sleep(0, os.listdir(tmp_path / "up") == ["dest"]), timeout_seconds=30)
        assert dest.read_text() == "untouched"
        assert (await upload(api, agent_path, dest, b"now"))[0] == 200


async def test_header_bytes_that_are_no_text_are_refused_and_the_link_stays(fleet: Fleet, api: Api) -> None:
    paths = {
        "If-Range": f"{fleet.agent_path}/files?path=/etc/hostname",
        "Last-Event-ID": f"{fleet.agent_path}/stream/logs?source=file&path=/etc/hostname",
    }
    for name, path in paths.items():
        reader, writer = await asyncio.open_connection(fleet.server.listen_host, fleet.server.port)
        head = f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {api.token}\r\n{name}: ".encode()
        writer.write(head + b"\xff\r\n\r\n")
        async with asyncio.timeout(10):
            assert b" 400 " in await reader.readline(), name
        writer.close()
        await writer.wait_closed()
    assert (await api.get(fleet.agent_path))["status"] == "online"


async def test_deleting_an_agent_ends_its_transfers(
    fleet: Fleet, api: Api, start_agent: StartAgent, tmp_path: Path
) -> None:
    agent = await start_agent(api, "deleted")
    agent_path = f"/api/agents/{agent.agent_id}"
    path = sparse_file(tmp_path / "big", GIB)
    async with asyncio.timeout(30), api.open("GET", f"{agent_path}/files", params={"path": str(path)}) as response:
        await response.content.readexactly(MIB)
        assert await api.delete(agent_path) == {"status": "deleted"}
        with pytest.raises(ClientPayloadError):
            await response.read()
