"""The journal of real hosts: filters, boots, units, and a flood of which every entry is accounted for, whatever happens
to reader, journald and files meanwhile."""

import asyncio
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from tests.e2e.conftest import BootHost
from tests.support.api import Api, Event
from tests.support.hosts import Host
from tests.support.installed import install, run
from tests.support.journals import make_entry, write_journal

RELEASES = pytest.mark.parametrize("release", ["bookworm", "trixie"])
FLOOD = 100_000

# Over journald's own socket: nothing between that could drop a line. A full socket makes it wait.
WRITER = """
import socket, sys
first, end, identifier = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
journald = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
journald.connect("/run/systemd/journal/socket")
for number in range(first, end):
    journald.send(f"MESSAGE=number {number}\\nSYSLOG_IDENTIFIER={identifier}\\nPRIORITY=6\\n".encode())
"""


@dataclass
class Seen:
    """What a viewer of the whole journal was shown, checked against journald's own numbers of its entries."""

    numbers: list[int] = field(default_factory=list)  # of the flood
    gaps: list[tuple[int, int]] = field(default_factory=list)  # count, and entries missing by journald's numbers
    names: set[str] = field(default_factory=set)  # events that are neither lines nor gaps
    last_id: str | None = None
    _unexplained: int | None = None

    def add(self, event: Event) -> None:
        if event.event == "gap":
            count = event.json()["count"]
            assert isinstance(count, int), event.data
            assert self._unexplained is None, "two gaps in a row"
            self._unexplained = count
        elif event.event == "message":
            assert event.id is not None
            missing = 0 if self.last_id is None else number_of(event.id) - number_of(self.last_id) - 1
            assert missing == (self._unexplained or 0), f"{missing} entries are missing before {event}"
            if self._unexplained is not None:
                self.gaps.append((self._unexplained, missing))
                self._unexplained = None
            self.last_id = event.id
            if match := re.search(r" flood(?:\[\d+\])?: number (\d+)$", event.data):
                self.numbers.append(int(match[1]))
        else:
            self.names.add(event.event)

    async def read_to(self, events: AsyncGenerator[Event, None], number: int) -> None:
        """Read up to this number of the flood."""
        async for event in events:
            self.add(event)
            if self.numbers and self.numbers[-1] >= number:
                return
        raise AssertionError("the stream ended")

    def missing(self, first: int, end: int) -> int:
        """Return how many of these numbers were not seen; each was seen at most once, and in order."""
        assert self.numbers == sorted(set(self.numbers))
        return end - first - sum(first <= number < end for number in self.numbers)


def number_of(cursor: str) -> int:
    """journald's number of an entry."""
    match = re.search(r";i=([0-9a-f]+);", cursor)
    assert match
    return int(match[1], 16)


def write_kernel_message(host: Host, text: str) -> None:
    """Write an entry as journald makes them of the kernel's messages.

    A test host may not read the kernel's log (that takes CAP_SYSLOG), so its journald never has one."""
    machine, boot, uptime = host.exec(
        "cat /etc/machine-id /proc/sys/kernel/random/boot_id /proc/uptime"
    ).stdout.split()[:3]
    entry = make_entry(
        0,
        __REALTIME_TIMESTAMP=str(time.time_ns() // 1000),
        __MONOTONIC_TIMESTAMP=str(int(float(uptime) * 1e6)),
        _BOOT_ID=boot.replace("-", ""),
        _MACHINE_ID=machine,
        _TRANSPORT="kernel",
        SYSLOG_IDENTIFIER="kernel",
        MESSAGE=text,
    )
    write_journal(host.root / "var/log/journal" / machine / "kernel.journal", entry)


async def flood(host: Host, first: int, end: int, identifier: str = "flood") -> None:
    await asyncio.to_thread(host.exec, ["python3", "-c", WRITER, str(first), str(end), identifier], timeout=120)


@asynccontextmanager
async def follow(
    api: Api, agent_id: str, *, last_event_id: str | None = None, **params: Any
) -> AsyncIterator[AsyncGenerator[Event, None]]:
    path = f"/api/agents/{agent_id}/stream/logs"
    async with api.sse(path, last_event_id=last_event_id, source="journald", **params) as events:
        yield events


async def first_lines(api: Api, agent_id: str, count: int, **params: Any) -> list[str]:
    """Return the messages of the first lines, without their time and host."""
    async with asyncio.timeout(30), follow(api, agent_id, **params) as events:
        return [(await anext(events)).data.split(" ", 2)[2] for _ in range(count)]


async def cursor_of_last(api: Api, agent_id: str) -> str:
    async with asyncio.timeout(30), follow(api, agent_id, lines=1) as events:
        cursor = (await anext(events)).id
        assert cursor is not None
        return cursor


# ---------------------------------------------------------------- filters


@RELEASES
async def test_entries_are_filtered_by_all_that_the_journal_knows(
    release: str, boot_host: BootHost, e2e_api: Api
) -> None:
    host = boot_host(release)
    agent_id = await install(e2e_api, host)
    path = f"/api/agents/{agent_id}"
    stamp = time.time_ns()

    # Unit, with what systemd says of it; while it runs and when it is gone. By one stream, which journald knows to be
    # the unit's: of a `logger` that has ended before journald looks, it cannot tell the unit.
    await run(host, "systemd-run --quiet --wait --unit=probe sh -c 'echo one; echo two; echo \"<3>three\"'")
    wanted = ("one", "two", "three")
    lines = await first_lines(e2e_api, agent_id, 5, unit="probe", lines=100)
    assert [text for text in (line.rpartition(": ")[2] for line in lines) if text in wanted] == list(wanted)
    (urgent,) = await first_lines(e2e_api, agent_id, 1, unit="probe", priority=3, lines=100)
    assert urgent.endswith(": three")
    units = await e2e_api.get(f"{path}/units")
    states = {unit["name"]: (unit["load"], unit["active"], unit["sub"]) for unit in units["units"]}
    assert states["fleetwire-agent.service"] == ("loaded", "active", "running")
    assert states["systemd-journald.service"] == ("loaded", "active", "running")
    assert states["probe.service"] == ("not-loaded", "inactive", "dead")
    assert "auditd.service" not in states  # others name it; it does not exist
    assert list(states) == sorted(states)
    assert units["truncated"] is False
    sockets = await e2e_api.get(f"{path}/units", type="socket", q="journal")
    assert {unit["name"] for unit in sockets["units"]} >= {"systemd-journald.socket"}

    # Text, time.
    await run(host, f"logger -t probe 'needle {stamp} a'; logger -t probe haystack")
    await asyncio.sleep(1.1)
    moment = time.time()
    await run(host, f"logger -t probe 'needle {stamp} b'")
    found = await first_lines(e2e_api, agent_id, 2, grep=f"needle {stamp}")
    assert [line.rpartition(" ")[2] for line in found] == ["a", "b"]
    (found_b,) = await first_lines(e2e_api, agent_id, 1, grep=f"needle {stamp}", since=moment)
    assert found_b.endswith(" b")

    # The kernel, live.
    write_kernel_message(host, f"before {stamp}")
    async with asyncio.timeout(30), follow(e2e_api, agent_id, kernel="true", lines=1) as events:
        assert (await anext(events)).data.endswith(f"before {stamp}")
        await run(host, f"logger -t kernel 'not of the kernel {stamp}'")
        write_kernel_message(host, f"after {stamp}")
        assert (await anext(events)).data.endswith(f"after {stamp}")
    await e2e_api.get(f"{path}/stream/logs", source="journald", kernel="true", unit="probe", status=400)
    await e2e_api.get(f"{path}/stream/logs", source="file", path="/var/log/x", boot="0", status=400)
    await e2e_api.get(f"{path}/stream/logs", source="journald", boot="1", status=400)

    # Boots, and a viewer that stays through a reboot: of the end of the first boot nothing is missing.
    first_boot = host.exec("tr -d - </proc/sys/kernel/random/boot_id").stdout.strip()
    seen = Seen()
    await run(host, "logger -t probe 'journald numbers this one'")
    async with asyncio.timeout(90), follow(e2e_api, agent_id, lines=1) as events:
        seen.add(await anext(events))
        await asyncio.to_thread(host.reboot)
        await e2e_api.wait_for_agent(agent_id)
        await flood(host, 0, 1)
        await seen.read_to(events, 0)
    assert seen.gaps == []
    assert seen.names == {"waiting"}
    second_boot = host.exec("tr -d - </proc/sys/kernel/random/boot_id").stdout.strip()
    for boot in ("-1", first_boot):
        found = await first_lines(e2e_api, agent_id, 2, grep=f"needle {stamp}", boot=boot)
        assert [line.rpartition(" ")[2] for line in found] == ["a", "b"]
    assert (await first_lines(e2e_api, agent_id, 1, grep=": number 0", boot="0"))[0].endswith("number 0")
    problem = await e2e_api.get(f"{path}/stream/logs", source="journald", boot="-7", status=404)
    assert f"0 ({second_boot}), -1 ({first_boot})" in problem["detail"]


# ---------------------------------------------------------------- a flood


@RELEASES
async def test_each_entry_of_a_flood_is_seen_once_and_in_order(release: str, boot_host: BootHost, e2e_api: Api) -> None:
    host = boot_host(release)
    agent_id = await install(e2e_api, host)
    live, late = Seen(), Seen()
    start = await cursor_of_last(e2e_api, agent_id)
    async with (
        asyncio.timeout(110),
        follow(e2e_api, agent_id, last_event_id=start) as events,
        asyncio.TaskGroup() as group,
    ):
        group.create_task(live.read_to(events, FLOOD - 1))
        group.create_task(flood(host, 0, FLOOD))
        await asyncio.sleep(1)
        for command in (  # all of it while it pours
            "journalctl --rotate",
            "systemctl restart systemd-journald",
            "systemctl restart fleetwire-agent",
            "pkill -KILL journalctl; journalctl --rotate",
        ):
            await run(host, command)
            await asyncio.sleep(0.5)
    assert live.missing(0, FLOOD) == 0
    assert live.gaps == []
    async with asyncio.timeout(60), follow(e2e_api, agent_id, last_event_id=start) as events:
        await late.read_to(events, FLOOD - 1)
    assert late.missing(0, FLOOD) == 0
    assert (late.gaps, late.names) == ([], set())


@RELEASES
async def test_what_is_cleared_before_it_was_read_is_a_gap_with_its_count(
    release: str, boot_host: BootHost, e2e_api: Api
) -> None:
    host = boot_host(release)
    host.write("/etc/systemd/journald.conf.d/90-small.conf", "[Journal]\nSystemMaxFileSize=1M\n")
    host.exec("systemctl restart systemd-journald")
    agent_id = await install(e2e_api, host)
    pid = host.exec("systemctl show -P MainPID fleetwire-agent").stdout.strip()
    seen = Seen()
    async with asyncio.timeout(110), follow(e2e_api, agent_id, lines=1) as events:
        seen.add(await anext(events))
        await flood(host, 0, 2000)
        await seen.read_to(events, 1999)

        # Cleared while nothing was left to read: no gap.
        await run(host, "journalctl --rotate; journalctl --vacuum-files=1; journalctl --vacuum-time=1s")
        await flood(host, 2000, 3000)
        await seen.read_to(events, 2999)
        assert seen.gaps == []

        # A reader that is held up.
        await run(host, f"kill -STOP {pid}")
        await flood(host, 3000, 40_000)
        await run(host, "journalctl --rotate; journalctl --vacuum-size=4M")
        await flood(host, 40_000, 41_000)
        await run(host, f"kill -CONT {pid}")
        await seen.read_to(events, 40_999)
        (first_gap,) = seen.gaps
        missing = seen.missing(0, 41_000)
        assert 1000 < missing <= first_gap[0] <= missing + 200  # beside the flood journald itself has something to say

        # A reader that is away.
        await run(host, "systemctl stop fleetwire-agent")
        await flood(host, 41_000, 60_000)
        await run(host, "journalctl --rotate; journalctl --vacuum-files=3; systemctl start fleetwire-agent")
        await flood(host, 60_000, 60_100)
        await seen.read_to(events, 60_099)
        assert len(seen.gaps) == 2
        assert seen.missing(0, 41_000) == missing

    # A viewer that comes back with the cursor of an entry that is gone; and with a filter, where nobody can count.
    (*_, gap) = await _events_after(e2e_api, agent_id, gone_cursor(seen), 1)
    assert gap.event == "gap"
    assert isinstance(gap.json()["count"], int)
    gap, _ = await _events_after(e2e_api, agent_id, gone_cursor(seen), 2, priority=6)
    assert gap.json()["count"] == "unknown"

    # A cursor of the future, as after a restored backup: said, and new entries come.
    future = re.sub(
        r"s=[0-9a-f]+;i=[0-9a-f]+(.*);t=[0-9a-f]+",
        r"s=" + "f" * 32 + r";i=ffffff\1;t=7ffffffffffff",
        seen.last_id or "",
    )
    future = re.sub(r"b=[0-9a-f]+", "b=" + "e" * 32, future)
    async with asyncio.timeout(30), follow(e2e_api, agent_id, last_event_id=future) as events:
        assert (await anext(events)).event == "gap"
        await asyncio.sleep(1)
        await flood(host, 70_000, 70_001)
        while not (await anext(events)).data.endswith(": number 70000"):
            pass


def gone_cursor(seen: Seen) -> str:
    """Return the cursor of the first entry ever, as it would have been."""
    assert seen.last_id is not None
    return re.sub(r";i=[0-9a-f]+;", ";i=1;", seen.last_id)


async def _events_after(api: Api, agent_id: str, cursor: str, count: int, **params: Any) -> list[Event]:
    async with asyncio.timeout(30), follow(api, agent_id, last_event_id=cursor, **params) as events:
        return [await anext(events) for _ in range(count)]
