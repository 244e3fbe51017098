"""Logs of a host as event streams: every line once and in order, whatever happens to file, viewer, server and agent."""

import asyncio
import os
import re
import shutil
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from tests.conftest import Fleet, OpenApi, StartAgent, StartServer
from tests.support.api import Api, Event
from tests.support.eventually import eventually
from tests.support.journals import FIRST_MICROSECONDS, make_entry, write_journal
from tests.support.link import CuttableLink
from tests.support.processes import AgentProcess, ServerProcess

pytestmark = pytest.mark.on_hosts

MIB = 1024**2
MANY_LINES = 200_000

Events = AsyncGenerator[Event, None]


def line(number: int) -> str:
    return f"line {number:07} of the log"


def lines(first: int, end: int) -> list[str]:
    return [line(number) for number in range(first, end)]


def append(path: Path, texts: Iterable[str]) -> None:
    with path.open("a") as file:
        file.writelines(f"{text}\n" for text in texts)


@asynccontextmanager
async def follow(
    api: Api, agent_path: str, path: Path, *, last_event_id: str | None = None, **params: str | int
) -> AsyncIterator[Events]:
    query: dict[str, Any] = {"source": "file", "path": str(path), **params}
    async with api.sse(f"{agent_path}/stream/logs", last_event_id=last_event_id, **query) as events:
        yield events


async def collect(events: Events, last: str) -> list[Event]:
    """Return the events up to the line `last`."""
    seen = []
    async for event in events:
        seen.append(event)
        if event.event == "message" and event.data == last:
            return seen
    raise AssertionError(f"the stream ended after {seen[-3:]}")


def texts(events: Iterable[Event]) -> list[str]:
    return [event.data for event in events if event.event == "message"]


def names(events: Iterable[Event]) -> list[str]:
    """The events that are no lines."""
    return [event.event for event in events if event.event != "message"]


def open_count(agent: AgentProcess, path: Path) -> int:
    """How often the agent has the file open."""
    count = 0
    for link in Path(f"/proc/{agent.pid}/fd").iterdir():
        try:
            count += os.readlink(link) == str(path)
        except FileNotFoundError:  # closed meanwhile
            continue
    return count


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "app.log"
    path.touch()
    return path


# ---------------------------------------------------------------- many lines, many viewers


async def test_many_lines_reach_three_viewers_live_across_every_rotation(fleet: Fleet, api: Api, log: Path) -> None:
    async with asyncio.timeout(120), AsyncExitStack() as stack:
        viewers = [await stack.enter_async_context(follow(api, fleet.agent_path, log, lines=0)) for _ in range(3)]
        seen: list[list[Event]] = [[], [], []]

        async def watch(index: int, last: str) -> None:
            seen[index] += await collect(viewers[index], last)

        async def until_all_saw(last: str, write: Callable[[], None]) -> None:
            async with asyncio.TaskGroup() as group:
                group.create_task(asyncio.to_thread(write))
                for index in range(3):
                    group.create_task(watch(index, last))

        def rename_and_create() -> None:
            append(log, lines(0, 60_000))
            log.rename(log.with_name("app.log.1"))
            append(log, lines(60_000, 120_000))

        def replace() -> None:
            successor = log.with_name("next")
            append(successor, lines(120_000, 150_000))
            successor.rename(log)

        def copy_and_truncate() -> None:
            append(log, lines(150_000, 170_000))
            log.with_name("app.log.1").rename(log.with_name("app.log.2"))
            shutil.copyfile(log, log.with_name("app.log.1"))
            os.truncate(log, 0)
            append(log, lines(170_000, MANY_LINES))

        await until_all_saw(line(119_999), rename_and_create)
        assert open_count(fleet.agent, log) == 1
        await until_all_saw(line(149_999), replace)
        await until_all_saw(line(MANY_LINES - 1), copy_and_truncate)
        assert open_count(fleet.agent, log) == 1
    for events in seen:
        assert texts(events) == lines(0, MANY_LINES)
        assert names(events) == ["rotated", "rotated", "rotated"]


async def test_many_lines_reach_three_viewers_from_before(fleet: Fleet, api: Api, log: Path) -> None:
    append(log, lines(0, MANY_LINES))
    status = log.stat()
    first_id = f"{status.st_dev}:{status.st_ino}:0"

    async def watch() -> None:
        async with follow(api, fleet.agent_path, log, last_event_id=first_id) as events:
            seen = await collect(events, line(MANY_LINES - 1))
            assert texts(seen) == lines(1, MANY_LINES)
            assert names(seen) == []

    async with asyncio.timeout(120), asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(watch())


async def test_viewers_of_one_log_share_its_tail(fleet: Fleet, api: Api, log: Path) -> None:
    append(log, lines(0, 100))
    async with asyncio.timeout(30), AsyncExitStack() as stack:
        for count in (10, 3, 100, 10):
            events = await stack.enter_async_context(follow(api, fleet.agent_path, log, lines=count))
            assert texts(await collect(events, line(99))) == lines(100 - count, 100)
        append(log, [line(100)])
        await collect(events, line(100))
        await eventually(lambda: asyncio.sleep(0, open_count(fleet.agent, log)), lambda count: count == 1)


# ---------------------------------------------------------------- a viewer that stops reading


@pytest.mark.here_only(reason="half a minute that is between the server and its viewers")
async def test_a_viewer_that_stops_reading_is_closed_and_the_others_notice_nothing(
    start_server: StartServer, open_api: OpenApi, start_agent: StartAgent, log: Path
) -> None:
    """Takes as long as the server bears with such a viewer, 30 s."""
    server = start_server()
    api = await open_api(server)
    agent = await start_agent(api)
    path = f"/api/agents/{agent.agent_id}"
    async with asyncio.timeout(150), AsyncExitStack() as stack:
        events = await stack.enter_async_context(follow(api, path, log, lines=0))
        append(log, lines(0, 50_000))
        await collect(events, line(49_999))
        server.reset_peak_rss()
        idle_bytes = server.peak_rss_bytes()
        for _ in range(5):
            stack.enter_context(stuck_viewer(server, api, path, log))
        await eventually(lambda: read_gauge(api, "fleetwire_streams_open"), lambda count: count == 6)
        for start in range(50_000, 400_000, 50_000):
            append(log, lines(start, start + 50_000))
            assert texts(await collect(events, line(start + 49_999))) == lines(start, start + 50_000)
        assert server.peak_rss_bytes() - idle_bytes < 16 * MIB
        await eventually(
            lambda: read_gauge(api, "fleetwire_streams_open"), lambda count: count == 1, timeout_seconds=90
        )
        append(log, [line(400_000)])
        assert texts(await collect(events, line(400_000))) == [line(400_000)]
    assert "Traceback" not in server.log_text


async def read_gauge(api: Api, name: str) -> float:
    match = re.search(rf"^{name} (\S+)$", await api.get("/metrics"), re.MULTILINE)
    assert match is not None
    return float(match[1])


def stuck_viewer(server: ServerProcess, api: Api, agent_path: str, log: Path) -> socket.socket:
    """Return a socket that asked for the stream and never reads."""
    own = socket.socket()
    own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    own.connect((server.listen_host, server.port))
    target = f"{agent_path}/stream/logs?{urlencode({'source': 'file', 'path': log, 'lines': 10_000})}"
    own.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {api.token}\r\n\r\n".encode())
    return own


# ---------------------------------------------------------------- what a line can be, and which are wanted


async def test_long_and_binary_lines(fleet: Fleet, api: Api, log: Path) -> None:
    log.write_bytes(
        b"first\n" + b"x" * MIB + b"\n" + b"\xff\xfe\x00\x80 bin\rary\x1b[0m\n" + "é漢\n".encode() + b"\nlast\n"
    )
    async with asyncio.timeout(20), follow(api, fleet.agent_path, log, lines=10) as events:
        first, long, binary, text, empty, last = texts(await collect(events, "last"))
    assert (first, text, empty, last) == ("first", "é漢", "", "last")
    assert long.startswith("xxx")
    assert long.endswith(f" … [cut, {MIB} bytes in all]")
    assert 64_000 < len(long) < 66_000
    assert binary == "\ufffd\ufffd\ufffd\ufffd bin\nary\x1b[0m"


async def test_lines_and_grep_choose_what_comes(fleet: Fleet, api: Api, log: Path) -> None:
    append(log, [f"{'error' if number % 10 == 0 else 'info'} {number}" for number in range(1000)])
    async with asyncio.timeout(20):
        async with follow(api, fleet.agent_path, log) as events:
            assert texts(await collect(events, "info 999"))[0] == "error 990"
        async with follow(api, fleet.agent_path, log, lines=3, grep="error") as events:
            assert texts(await collect(events, "error 990")) == ["error 970", "error 980", "error 990"]
            append(log, ["info 1000", "error 1001", "inf"])
            assert texts(await collect(events, "error 1001")) == ["error 1001"]
        async with follow(api, fleet.agent_path, log, lines=0) as events:
            append(log, ["new"])
            assert texts(await collect(events, "new")) == ["new"]
        async with follow(api, fleet.agent_path, log, lines=10_000) as events:
            assert len(texts(await collect(events, "new"))) == 1003 + 1


async def test_what_cannot_be_followed_is_a_status(fleet: Fleet, api: Api, tmp_path: Path) -> None:
    stream = f"{fleet.agent_path}/stream/logs"

    async def code(status: int, **params: str | int) -> str:
        return str((await api.get(stream, status=status, **params))["code"])

    async with asyncio.timeout(20):
        assert await code(404, source="file", path=str(tmp_path / "missing")) == "not_found"
        assert await code(400, source="file", path=str(tmp_path)) == "invalid"
        assert await code(400, source="file", path="/dev/zero") == "invalid"
        assert await code(400, source="file", path="relative") == "invalid"
        assert await code(400, source="file") == "invalid"
        assert await code(400, source="file", path="/x", unit="nginx") == "invalid"
        assert await code(400, source="file", path="/x", lines=-1) == "invalid"
        assert await code(400, source="journald", path="/x") == "invalid"
        assert await code(400, source="nothing") == "invalid"
    async with asyncio.timeout(20):
        (tmp_path / "log").touch()
        answer = await api.call(
            "GET",
            stream,
            params={"source": "file", "path": str(tmp_path / "log")},
            headers={"Last-Event-ID": "no cursor"},
            status=400,
        )
        assert "cursor" in answer["detail"]


async def test_a_log_that_the_agent_may_not_read_is_403(
    fleet: Fleet, api: Api, start_agent: StartAgent, log: Path
) -> None:
    agent = await start_agent(api)
    if os.geteuid() == 0:  # root reads everything, unless it is without these two capabilities
        agent.stop()
        agent.arguments[:0] = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
        agent.start()
        await api.wait_for_agent(agent.agent_id)
    log.chmod(0)
    stream = f"/api/agents/{agent.agent_id}/stream/logs"
    assert (await api.get(stream, source="file", path=str(log), status=403))["code"] == "forbidden"
    await api.delete(f"/api/agents/{agent.agent_id}")


async def test_an_agent_that_is_away_or_has_no_journal_is_503(
    fleet: Fleet, api: Api, start_agent: StartAgent, tmp_path: Path
) -> None:
    agent = await start_agent(api, environment={"FLEETWIRE_AGENT_JOURNAL_DIRECTORY": str(tmp_path)})
    stream = f"/api/agents/{agent.agent_id}/stream/logs"
    answer = await api.get(stream, source="journald", status=503)
    assert "journal" in answer["detail"]
    agent.stop()
    await api.wait_for_agent(agent.agent_id, "offline")
    assert (await api.get(stream, source="file", path="/etc/hostname", status=503))["code"] == "unavailable"
    await api.delete(f"/api/agents/{agent.agent_id}")


async def test_the_journal_is_followed_with_its_filters(
    fleet: Fleet, api: Api, start_agent: StartAgent, tmp_path: Path
) -> None:
    journal = tmp_path / "journal" / "system.journal"
    journal.parent.mkdir()
    write_journal(
        journal,
        *(make_entry(number) for number in range(20)),
        *(make_entry(number, _SYSTEMD_UNIT="ssh.service", PRIORITY="3") for number in range(20, 30)),
    )
    agent = await start_agent(api, environment={"FLEETWIRE_AGENT_JOURNAL_DIRECTORY": str(journal.parent)})
    stream = f"/api/agents/{agent.agent_id}/stream/logs"

    async def numbers(last: int, *, last_event_id: str | None = None, **params: Any) -> list[int]:
        async with api.sse(stream, last_event_id=last_event_id, source="journald", **params) as events:
            return await journal_numbers(events, last)

    async with asyncio.timeout(60):
        assert await numbers(29) == list(range(20, 30))
        assert await numbers(19, unit="nginx", lines=3) == [17, 18, 19]
        assert await numbers(29, priority=3, lines=2) == [28, 29]
        assert await numbers(29, since=FIRST_MICROSECONDS // 1_000_000 + 15) == list(range(15, 30))
        assert await numbers(7, grep="message 7") == [7]
        async with api.sse(stream, source="journald", lines=5) as events:
            third = [await anext(events) for _ in range(3)][-1]
        assert third.data == "2023-11-14T22:13:47.000000+00:00 web-01 nginx[12]: message 27"
        assert third.id is not None
        async with api.sse(stream, last_event_id=third.id, source="journald", lines=5) as events:
            assert await journal_numbers(events, 29) == [28, 29]
            await asyncio.to_thread(write_journal, journal, make_entry(30))
            assert await journal_numbers(events, 30) == [30]
    await api.delete(f"/api/agents/{agent.agent_id}")


async def journal_numbers(events: Events, last: int) -> list[int]:
    seen = []
    async for event in events:
        assert event.event == "message", event
        seen.append(int(event.data.rpartition(" ")[2]))
        if seen[-1] == last:
            break
    return seen


# ---------------------------------------------------------------- going on after a break


async def test_a_viewer_comes_back_in_the_middle(fleet: Fleet, api: Api, log: Path) -> None:
    append(log, lines(0, 1000))
    async with asyncio.timeout(60):
        async with follow(api, fleet.agent_path, log, lines=1000) as events:
            middle = (await collect(events, line(499)))[-1]
        append(log, lines(1000, 1500))
        async with follow(api, fleet.agent_path, log, last_event_id=middle.id) as events:
            assert texts(await collect(events, line(1499))) == lines(500, 1500)
            # Much more than the ring holds: the id is known to the host only.
            append(log, lines(1500, 60_000))
            await collect(events, line(59_999))
        log.rename(log.with_name("app.log.1"))
        append(log, lines(60_000, 60_100))
        async with follow(api, fleet.agent_path, log, last_event_id=middle.id) as events:
            seen = await collect(events, line(60_099))
    assert texts(seen) == lines(500, 60_100)
    assert names(seen) == ["rotated"]


async def test_a_viewer_goes_on_after_the_server_was_killed(
    start_server: StartServer, open_api: OpenApi, start_agent: StartAgent, log: Path
) -> None:
    server = start_server()
    api = await open_api(server)
    agent = await start_agent(api)
    path = f"/api/agents/{agent.agent_id}"
    append(log, lines(0, 100))
    async with asyncio.timeout(60):
        async with follow(api, path, log, lines=100) as events:
            last = (await collect(events, line(99)))[-1]
            server.kill()
            append(log, lines(100, 200))
            with pytest.raises(Exception, match=r"not completed|reset|closed"):  # the stream breaks, it does not end
                await collect(events, line(199))
        server.start()
        await api.wait_for_agent(agent.agent_id)
        async with follow(api, path, log, last_event_id=last.id) as events:
            assert texts(await collect(events, line(199))) == lines(100, 200)
        assert (await api.run(agent.agent_id, "echo well"))["output"] == "well\n"


@pytest.mark.parametrize("count", [0, 50])
async def test_viewers_stay_while_the_agent_is_killed_and_started(
    fleet: Fleet, api: Api, start_agent: StartAgent, log: Path, count: int
) -> None:
    agent = await start_agent(api)
    path = f"/api/agents/{agent.agent_id}"
    append(log, lines(0, 50))
    async with asyncio.timeout(60), AsyncExitStack() as stack:
        viewers = [await stack.enter_async_context(follow(api, path, log, lines=count)) for _ in range(2)]
        append(log, lines(50, 100))
        seen = [await collect(events, line(99)) for events in viewers]
        agent.kill()
        append(log, lines(100, 30_000))
        log.rename(log.with_name("app.log.1"))
        append(log, lines(30_000, 40_000))
        agent.start()
        for index, events in enumerate(viewers):
            seen[index] += await collect(events, line(39_999))
        append(log, lines(40_000, 40_010))
        for index, events in enumerate(viewers):
            seen[index] += await collect(events, line(40_009))
    for each in seen:
        assert texts(each) == lines(50 - count, 40_010)
        assert names(each) == ["waiting", "rotated"]
    await api.delete(path)


async def test_viewers_stay_while_the_link_breaks(fleet: Fleet, api: Api, start_agent: StartAgent, log: Path) -> None:
    async with asyncio.timeout(90), CuttableLink(fleet.server.url) as link:
        agent = await start_agent(api, server_url=link.url)
        async with follow(api, f"/api/agents/{agent.agent_id}", log, lines=0) as events:
            append(log, lines(0, 1000))
            seen = await collect(events, line(999))
            link.bytes_per_second = 200_000
            append(log, lines(1000, 20_000))
            seen += await collect(events, line(3000))
            link.reset()
            link.bytes_per_second = None
            seen += await collect(events, line(19_999))
        assert texts(seen) == lines(0, 20_000)
        assert names(seen) == ["waiting"]
        await api.delete(f"/api/agents/{agent.agent_id}")


@pytest.mark.here_only(reason="a minute of silence in a proxy on this machine; e2e cuts a host's own cable")
async def test_viewers_stay_while_the_link_is_silent_for_so_long_that_it_is_given_up(
    fleet: Fleet, api: Api, start_agent: StartAgent, log: Path
) -> None:
    """Takes as long as both sides bear with silence, 60 s, and the agent's next attempt."""
    async with asyncio.timeout(200), CuttableLink(fleet.server.url) as link:
        agent = await start_agent(api, server_url=link.url)
        async with follow(api, f"/api/agents/{agent.agent_id}", log, lines=0) as events:
            append(log, lines(0, 1000))
            seen = await collect(events, line(999))
            link.cut()
            append(log, lines(1000, 50_000))
            seen.append(await anext(events))
            assert seen[-1].event == "waiting"
            link.heal()
            seen += await collect(events, line(49_999))
        assert texts(seen) == lines(0, 50_000)
        assert names(seen) == ["waiting"]
        await api.delete(f"/api/agents/{agent.agent_id}")


async def test_deleting_an_agent_ends_its_streams(fleet: Fleet, api: Api, start_agent: StartAgent, log: Path) -> None:
    agent = await start_agent(api)
    async with asyncio.timeout(20), follow(api, f"/api/agents/{agent.agent_id}", log) as events:
        await api.delete(f"/api/agents/{agent.agent_id}")
        assert [event.event async for event in events][-1] == "end"
