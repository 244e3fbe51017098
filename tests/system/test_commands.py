"""Commands from the request to the result: a real server, a real agent, real processes."""

import asyncio
import math
import os
import random
import shlex
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Fleet, OpenApi, StartAgent, StartServer
from tests.support.api import Api, Event
from tests.support.commands import fetch_output, living_pids, until_alive, until_written

pytestmark = pytest.mark.on_hosts

MIB = 1024 * 1024


def command_path(agent_id: str, command_id: str) -> str:
    return f"/api/agents/{agent_id}/commands/{command_id}"


def new_marker() -> str:
    """Return an argument of `sleep` that no other process of this host has."""
    return f"7{int.from_bytes(os.urandom(6)):015d}"


# ---------------------------------------------------------------- status, exit code, output


@pytest.mark.parametrize(
    ("command", "exit_code", "output"),
    [
        ("printf 'b\\na\\nb\\n' | sort | uniq -c | tr -s ' ' | cut -d ' ' -f 2,3", 0, "1 a\n2 b\n"),
        ("""printf '%s|' "two words" 'it'"'"'s' "a \\"quote\\"" $'tab\\there' \\$HOME""", 0, None),
        ("echo 'Grüße, 世界 🚀'; echo Zürich >&2", 0, "Grüße, 世界 🚀\nZürich\n"),
        ("true", 0, ""),
        ("exit 3", 3, ""),
        ("echo before; false", 1, "before\n"),
        ("no-such-program-at-all 2>/dev/null", 127, ""),
        ("/etc/passwd 2>/dev/null", 126, ""),
        ("kill -TERM $$", 128 + 15, ""),
        ("kill -KILL $$", 128 + 9, ""),
        ("ulimit -c 0; kill -SEGV $$", 128 + 11, ""),
        ("exec >&- 2>&-; exit 4", 4, ""),
        ("cat; echo end of input", 0, "end of input\n"),
        ("for i in 1 2 3; do\n  echo $i\ndone # a comment", 0, "1\n2\n3\n"),
    ],
)
async def test_a_command_ends_as_its_shell_does(
    fleet: Fleet, api: Api, command: str, exit_code: int, output: str | None
) -> None:
    ended = await api.run(fleet.agent_id, command)
    assert (ended["status"], ended["exit_code"]) == ("succeeded" if exit_code == 0 else "failed", exit_code)
    assert ended["output"] == ('two words|it\'s|a "quote"|tab\there|$HOME|' if output is None else output)
    assert not ended["truncated"]
    assert ended["error"] is None
    assert ended["created_at"] <= ended["started_at"] <= ended["finished_at"]


async def test_both_streams_are_interleaved_and_can_be_fetched_apart(fleet: Fleet, api: Api) -> None:
    command = "for i in 1 2 3; do echo out $i; sleep 0.1; echo err $i >&2; sleep 0.1; done"
    ended = await api.run(fleet.agent_id, command)
    assert ended["output"] == "out 1\nerr 1\nout 2\nerr 2\nout 3\nerr 3\n"
    assert (ended["stdout_bytes"], ended["stderr_bytes"]) == (18, 18)
    outputs = [
        await fetch_output(api, fleet.agent_id, ended["command_id"], **params)
        for params in ({}, {"stream": "stdout"}, {"stream": "stderr"})
    ]
    assert outputs == [ended["output"].encode(), b"out 1\nout 2\nout 3\n", b"err 1\nerr 2\nerr 3\n"]


async def test_bytes_that_are_no_utf8_are_kept_as_they_are(fleet: Fleet, api: Api) -> None:
    ended = await api.run(fleet.agent_id, r"printf 'a\000\377\376\xc3(\xe4\xb8\r\n\033[1m'")
    written = b"a\0\xff\xfe\xc3(\xe4\xb8\r\n\x1b[1m"
    assert await fetch_output(api, fleet.agent_id, ended["command_id"]) == written
    assert ended["output"] == written.decode(errors="replace")
    assert ended["stdout_bytes"] == len(written)


async def test_every_byte_value_survives_in_bulk(fleet: Fleet, api: Api, tmp_path: Path) -> None:
    content = os.urandom(3 * MIB + 17)
    source = tmp_path / "random"
    source.write_bytes(content)
    ended = await api.run(fleet.agent_id, f"cat {source}")
    assert await fetch_output(api, fleet.agent_id, ended["command_id"]) == content
    assert ended["stdout_bytes"] == len(content)
    assert ended["truncated"]  # of the output in this answer only the last 64 KiB are


async def test_100_mb_of_output_are_counted_exactly_and_kept_at_both_ends(fleet: Fleet, api: Api) -> None:
    await api.run(fleet.agent_id, "seq 100000")  # what is allocated once is not counted
    before = {process: process.rss_bytes() for process in (fleet.server, fleet.agent)}
    for process in before:
        process.reset_peak_rss()
    command_id = await api.submit(fleet.agent_id, "echo begin >&2; seq 100000001 110485760; echo end >&2", timeout=100)
    ended = await api.wait_for_command(fleet.agent_id, command_id, timeout_seconds=100)

    assert ended["status"] == "succeeded"
    assert (ended["stdout_bytes"], ended["stderr_bytes"], ended["truncated"]) == (100 * MIB, len("begin\nend\n"), True)
    kept = await fetch_output(api, fleet.agent_id, command_id, stream="stdout")
    assert 15 * MIB < len(kept) <= 17 * MIB
    assert kept[: 8 * MIB - 64 * 1024] == seq(100000001, 8 * MIB - 64 * 1024)
    assert kept.endswith(seq(110485761 - 800_000, 8_000_000))
    assert await fetch_output(api, fleet.agent_id, command_id, stream="stderr") == b"begin\nend\n"
    grown = [(process.peak_rss_bytes() - before[process]) / MIB for process in (fleet.server, fleet.agent)]
    assert grown[0] < 32, grown
    assert grown[1] < 8, grown


def seq(first: int, size_bytes: int) -> bytes:
    """Return that many bytes of what `seq` prints from a number of nine digits on."""
    return b"".join(b"%d\n" % number for number in range(first, first + size_bytes // 10 + 1))[:size_bytes]


async def test_the_history_shows_the_last_100_commands_newest_first(fleet: Fleet, api: Api) -> None:
    ids = [(await api.run(fleet.agent_id, f"echo {number}; exit {number}"))["command_id"] for number in range(3)]
    history = await api.get(f"{fleet.agent_path}/commands")
    assert [command["command_id"] for command in history[:3]] == ids[::-1]
    assert [(command["exit_code"], command["output"]) for command in history[:3]] == [
        (2, "2\n"),
        (1, "1\n"),
        (0, "0\n"),
    ]
    assert len(history) <= 100


# ---------------------------------------------------------------- stop means stopped

# Each leaves processes with {marker} in their command line that do not go by themselves, and prints "ready" at the end.
STUBBORN = {
    "a plain child": "echo ready; sleep {marker}",
    "a child that ignores SIGTERM": "trap '' TERM; echo ready; sleep {marker}; sleep {marker}",
    "a child in a session of its own": "setsid sleep {marker} & echo ready; wait",
    "an orphan in a session of its own": (
        "(setsid sh -c 'trap \"\" TERM; sleep {marker}; sleep {marker}' &) ; sleep 0.2; echo ready; sleep 100"
    ),
    "a child behind a pipe": "sleep {marker} | cat; echo no; sleep {marker}",
    "a stopped child": "sleep {marker} & sleep 0.1; kill -STOP $!; echo ready; wait",
    "a child that closed its output": "sleep {marker} >&- 2>&- & echo ready; exec sleep {marker} >&- 2>&-",
    "a shell that starts another when one is killed": (
        "trap '' TERM; echo ready; while :; do setsid sleep {marker}; done"
    ),
}


@pytest.mark.parametrize("name", STUBBORN)
async def test_cancel_leaves_nothing_running(fleet: Fleet, api: Api, name: str) -> None:
    marker = new_marker()
    command_id = await api.submit(fleet.agent_id, STUBBORN[name].format(marker=marker))
    await until_alive(f"sleep\0{marker}")
    cancelled = await api.post(f"{command_path(fleet.agent_id, command_id)}/cancel", status=202)
    assert cancelled["cancel_requested_at"] is not None
    ended = await api.wait_for_command(fleet.agent_id, command_id)
    assert (ended["status"], ended["exit_code"]) == ("cancelled", None)
    assert living_pids(marker) == []


async def test_a_timeout_leaves_nothing_running(fleet: Fleet, api: Api) -> None:
    markers = {new_marker(): command for command in STUBBORN.values()}
    submitted = [
        await api.submit(fleet.agent_id, command.format(marker=marker), timeout=1)
        for marker, command in markers.items()
    ]
    for command_id in submitted:
        ended = await api.wait_for_command(fleet.agent_id, command_id)
        assert (ended["status"], ended["exit_code"]) == ("timed_out", None)
        assert ended["finished_at"] - ended["started_at"] >= 1
    assert {marker: living_pids(marker) for marker in markers} == {marker: [] for marker in markers}


async def test_what_was_printed_before_a_timeout_is_there(fleet: Fleet, api: Api) -> None:
    ended = await api.run(fleet.agent_id, "printf 'half a line'; sleep 100", timeout=1)
    assert (ended["status"], ended["output"]) == ("timed_out", "half a line")


async def test_a_daemon_that_a_command_leaves_behind_does_not_hold_it(fleet: Fleet, api: Api) -> None:
    marker = new_marker()
    ended = await api.run(fleet.agent_id, f"setsid sleep {marker} & echo started")
    assert (ended["status"], ended["output"]) == ("succeeded", "started\n")
    assert living_pids(marker) != []
    await api.run(fleet.agent_id, f"kill $(pgrep -f 'sleep {marker[:-1]}[{marker[-1]}]')")


async def test_a_command_that_is_over_cannot_be_cancelled(fleet: Fleet, api: Api) -> None:
    ended = await api.run(fleet.agent_id, "true")
    problem = await api.post(f"{command_path(fleet.agent_id, ended['command_id'])}/cancel", status=409)
    assert problem["code"] == "conflict"
    assert "succeeded" in problem["detail"]


async def test_cancel_at_the_moment_of_the_end_breaks_nothing(fleet: Fleet, api: Api) -> None:
    """Both may be under way at once; whichever is first, the link stays and the command has one end."""

    async def run_and_cancel(delay_seconds: float) -> None:
        command_id = await api.submit(fleet.agent_id, "sleep 0.1; seq 5000")
        await asyncio.sleep(delay_seconds)
        path = command_path(fleet.agent_id, command_id)
        for _ in range(2):
            async with api.open("POST", f"{path}/cancel") as response:
                assert response.status in (200, 202, 409)
        ended = await api.wait_for_command(fleet.agent_id, command_id)
        if ended["status"] == "succeeded":
            assert ended["stdout_bytes"] == len(await fetch_output(api, fleet.agent_id, command_id))
        else:
            assert ended["status"] == "cancelled"

    links = fleet.server.log_text.count("connected from")
    for round_number in range(4):
        await asyncio.gather(*(run_and_cancel(0.05 + (round_number * 10 + step) * 0.004) for step in range(10)))
    assert fleet.server.log_text.count("connected from") == links


# ---------------------------------------------------------------- many at once


async def test_thirty_two_commands_run_at_once_and_the_next_waits_for_a_place(
    fleet: Fleet, api: Api, tmp_path: Path
) -> None:
    """By the setting that an agent has when it is told nothing."""

    async def submit_slow(number: int) -> str:
        gate = tmp_path / ("first gate" if number == 0 else "gate")
        return await api.submit(
            fleet.agent_id, f"touch {tmp_path}/{number}; until [ -e '{gate}' ]; do sleep 0.3; done", timeout=120
        )

    async def read_statuses(ids: list[str]) -> list[str]:
        return [(await api.get(command_path(fleet.agent_id, each)))["status"] for each in ids]

    slow = [await submit_slow(number) for number in range(31)]
    for number in range(31):
        await until_written(tmp_path / str(number))  # each runs though none before it has ended
    quick = await api.run(fleet.agent_id, "echo quick")
    assert quick["output"] == "quick\n"
    slow += [await submit_slow(number) for number in (31, 32)]
    await until_written(tmp_path / "31")
    await api.wait_for_command(fleet.agent_id, slow[32], "accepted")
    await asyncio.sleep(1)  # in which it would start, had it a place
    assert await read_statuses(slow) == ["running"] * 32 + ["accepted"]
    assert not (tmp_path / "32").exists()
    (tmp_path / "first gate").touch()
    await until_written(tmp_path / "32")
    assert await read_statuses(slow[1:]) == ["running"] * 32
    (tmp_path / "gate").touch()
    for each in slow:
        assert (await api.wait_for_command(fleet.agent_id, each))["status"] == "succeeded"


async def test_a_flood_of_output_does_not_delay_another_command(fleet: Fleet, api: Api) -> None:
    flood = await api.submit(fleet.agent_id, "yes", timeout=60)
    await api.wait_for_command(fleet.agent_id, flood, "running")
    quick = await api.run(fleet.agent_id, "echo quick")
    assert quick["output"] == "quick\n"
    assert (await api.get(command_path(fleet.agent_id, flood)))["status"] == "running"
    await api.post(f"{command_path(fleet.agent_id, flood)}/cancel", status=202)
    assert (await api.wait_for_command(fleet.agent_id, flood))["status"] == "cancelled"


# ---------------------------------------------------------------- the live stream


async def collect(api: Api, path: str, last_event_id: str | None = None) -> list[Event]:
    """Return all events of a command's stream, from that id to its end."""
    async with asyncio.timeout(30), api.sse(f"{path}/stream", last_event_id=last_event_id) as events:
        return [event async for event in events]


def text_of(events: list[Event]) -> str:
    return "".join(event.json()["text"] for event in events if event.event == "output")


async def test_the_stream_shows_a_command_from_its_offer_to_its_end(fleet: Fleet, api: Api, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    command = f"echo first; echo problem >&2; until [ -e {gate} ]; do sleep 0.05; done; echo last; exit 2"
    command_id = await api.submit(fleet.agent_id, command)
    seen: list[Event] = []
    path = command_path(fleet.agent_id, command_id)
    async with asyncio.timeout(20), api.sse(f"{path}/stream") as events:
        async for event in events:
            seen.append(event)
            if "problem" in text_of(seen):
                gate.touch()
    assert [event.event for event in seen if event.event not in ("status", "output")] == ["end"]
    assert seen[0].event == "status"
    statuses = [event.json() for event in seen if event.event == "status"]
    assert statuses[-1]["status"] == "failed"
    assert statuses[-1]["exit_code"] == 2
    assert seen[-1].json() == {"reason": "failed"}
    by_stream = {"stdout": "", "stderr": ""}
    for event in seen:
        if event.event == "output":
            by_stream[event.json()["stream"]] += event.json()["text"]
    assert by_stream == {"stdout": "first\nlast\n", "stderr": "problem\n"}
    assert [event.id for event in seen if event.event == "output"][-1] == str(len("first\nproblem\nlast\n"))


async def test_the_stream_resumes_at_any_byte(fleet: Fleet, api: Api) -> None:
    ended = await api.run(fleet.agent_id, "seq 100001 140000; sleep 0.2; seq 140001 150000")
    path = command_path(fleet.agent_id, ended["command_id"])
    whole = await fetch_output(api, fleet.agent_id, ended["command_id"])
    assert len(whole) == 350_000
    for position in (0, 1, 7, 65_536, 65_540, 123_457, 279_999, 280_000, 349_999):
        events = await collect(api, path, str(position))
        assert text_of(events) == whole[position:].decode(), position
        assert [event.id for event in events if event.event == "output"][-1] == "350000"
        assert [event.event for event in events if event.event not in ("output",)] == ["status", "end"]
    for beyond in ("350000", "999999999"):
        assert [event.event for event in await collect(api, path, beyond)] == ["status", "end"]
    for problem in ("x", "-1", "1.5", "9" * 19, "١"):
        async with api.sse(f"{path}/stream", last_event_id=problem, status=400):
            pass


async def test_the_stream_resumes_at_any_byte_at_any_time_while_it_runs(fleet: Fleet, api: Api, tmp_path: Path) -> None:
    """Also within a character: what is left of it is shown as one that is none, and the positions stay exact."""
    gate, lines = tmp_path / "gate", 300
    whole = "".join(f"Zeile {number:03} für 世界\n" for number in range(1, lines + 1)).encode()
    text = f"for i in $(seq {lines}); do printf 'Zeile %03d für 世界\\n' $i; sleep 0.01; done"
    command_id = await api.submit(fleet.agent_id, f"{text}; until [ -e {gate} ]; do sleep 0.1; done", timeout=120)
    path = command_path(fleet.agent_id, command_id)
    chance = random.Random(17)
    within = [position for position in range(len(whole)) if whole[position] & 0xC0 == 0x80]
    of_two_bytes = [position for position in within if whole[position - 1 : position + 1] == "ü".encode()]
    positions = [chance.randrange(1, len(whole)) for _ in range(16)]
    positions += chance.sample(within, 4) + chance.sample(of_two_bytes, 4)
    reached, to_join = asyncio.Condition(), len(positions)
    end = 0

    async def lead() -> None:
        nonlocal end
        async with api.sse(f"{path}/stream") as events:
            async for event in events:
                if event.event == "output":
                    async with reached:
                        end = int(event.id or "")
                        reached.notify_all()

    async def resume(position: int) -> None:
        nonlocal to_join
        async with reached:
            await reached.wait_for(lambda: end >= position)
        async with api.sse(f"{path}/stream", last_event_id=str(position)) as events:
            seen = [await anext(events)]
            assert seen[0].json()["status"] == "running"
            to_join -= 1
            if not to_join:
                gate.touch()
            seen += [event async for event in events]
        assert_is_rest(seen, position)

    def assert_is_rest(seen: list[Event], position: int) -> None:
        outputs = [event for event in seen if event.event == "output"]
        assert {event.event for event in seen} - {"output"} == {"status", "end"}
        for event in outputs:
            next_position = int(event.id or "")
            assert event.json()["text"] == whole[position:next_position].decode(errors="replace"), position
            position = next_position
        assert position == len(whole)

    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        group.create_task(lead())
        for position in positions:
            group.create_task(resume(position))
    assert (await api.wait_for_command(fleet.agent_id, command_id))["status"] == "succeeded"
    for position in positions:
        assert_is_rest(await collect(api, path, str(position)), position)


async def test_a_viewer_that_reconnects_while_it_runs_loses_nothing(fleet: Fleet, api: Api) -> None:
    command_id = await api.submit(fleet.agent_id, "for i in $(seq 60); do echo line $i; sleep 0.02; done")
    path = command_path(fleet.agent_id, command_id)
    heard, last_id, connections = "", None, 0
    async with asyncio.timeout(30):
        while not heard.endswith("line 60\n"):
            connections += 1
            async with api.sse(f"{path}/stream", last_event_id=last_id) as events:
                outputs = 0
                async for event in events:
                    if event.event == "output":
                        heard, last_id, outputs = heard + event.json()["text"], event.id, outputs + 1
                    if outputs == 5:
                        break
    assert heard == "".join(f"line {number}\n" for number in range(1, 61))
    assert connections > 1


async def test_two_viewers_and_a_late_one_see_the_same(fleet: Fleet, api: Api) -> None:
    command_id = await api.submit(fleet.agent_id, "for i in $(seq 20); do echo $i; sleep 0.02; done; echo ü >&2")
    path = command_path(fleet.agent_id, command_id)
    first, second = await asyncio.gather(collect(api, path), collect(api, path))
    late = await collect(api, path)
    expected = "".join(f"{number}\n" for number in range(1, 21)) + "ü\n"
    assert [text_of(events) for events in (first, second, late)] == [expected] * 3
    assert late[-1].json() == first[-1].json() == {"reason": "succeeded"}


async def test_the_stream_says_what_was_not_kept(fleet: Fleet, api: Api) -> None:
    ended = await api.run(fleet.agent_id, "seq 100000001 103000000")  # 30 MB, of which 16 MiB are kept
    path = command_path(fleet.agent_id, ended["command_id"])
    position, gaps = 0, []
    for event in await collect(api, path):
        if event.event == "gap":
            gaps.append(event.json())
            position += event.json()["count"]
        elif event.event == "output":
            position += len(event.json()["text"])
            assert event.id == str(position)
    assert position == 30_000_000
    assert len(gaps) == 1
    assert gaps[0]["reason"]


# ---------------------------------------------------------------- agents that are away


async def test_commands_wait_for_an_agent_that_is_away_and_keep_their_order(
    start_server: StartServer, start_agent: StartAgent, open_api: OpenApi, tmp_path: Path
) -> None:
    api = await open_api(start_server())
    agent = await start_agent(api, environment={"FLEETWIRE_AGENT_MAX_COMMANDS_AT_ONCE": "1"})
    agent.stop()
    await api.wait_for_agent(agent.agent_id, "offline")
    ran, never = tmp_path / "ran", tmp_path / "never"
    ids = [await api.submit(agent.agent_id, f"echo {number} >> {ran}") for number in range(20)]
    cancelled = await api.submit(agent.agent_id, f"touch {never}")
    expiring = await send(api, agent.agent_id, f"touch {never}", expires_in=1)

    answer = await api.post(f"{command_path(agent.agent_id, cancelled)}/cancel", status=200)
    assert (answer["status"], answer["started_at"]) == ("cancelled", None)
    await api.post(f"{command_path(agent.agent_id, cancelled)}/cancel", status=409)
    expired = await api.wait_for_command(agent.agent_id, expiring)
    assert (expired["status"], expired["exit_code"]) == ("expired", None)
    assert "out of time before this server offered it" in expired["error"]
    problem = await send(api, agent.agent_id, f"touch {never}", on_offline="fail", status=503)
    assert problem["code"] == "unavailable"
    assert [command["status"] for command in await api.get(f"/api/agents/{agent.agent_id}/commands")][2:] == [
        "queued"
    ] * 20

    agent.start()
    for command_id in ids:
        assert (await api.wait_for_command(agent.agent_id, command_id))["status"] == "succeeded"
    assert ran.read_text().split() == [str(number) for number in range(20)]
    assert not never.exists()
    assert (await send(api, agent.agent_id, "true", on_offline="fail"))["status"] == "queued"


@pytest.mark.parametrize("away", ["server", "agent"])
async def test_the_history_shows_when_a_command_ran_that_nobody_heard_of(
    start_server: StartServer, start_agent: StartAgent, open_api: OpenApi, tmp_path: Path, away: str
) -> None:
    server = start_server()
    api = await open_api(server)
    agent = await start_agent(api, environment={"FLEETWIRE_AGENT_MAX_COMMANDS_AT_ONCE": "1"})
    gate, date = tmp_path / "gate", "date +%s.%N"
    first = await api.submit(agent.agent_id, f"until [ -e {gate} ]; do sleep 0.1; done; {date}")
    second = await api.submit(agent.agent_id, f"{date}; sleep 2; {date}")
    await api.wait_for_command(agent.agent_id, first, "running")
    await api.wait_for_command(agent.agent_id, second, "accepted")
    gone = server if away == "server" else agent
    gone.kill()
    gate.touch()
    await asyncio.sleep(8)  # how long ago it was, when somebody hears of it
    gone.start()
    gone.wait_until_started()
    ends = [await api.wait_for_command(agent.agent_id, command_id) for command_id in (first, second)]
    assert [end["status"] for end in ends] == ["succeeded"] * 2
    ended, *printed = [float(line) for end in ends for line in end["output"].split()]
    assert ends[0]["finished_at"] == pytest.approx(ended, abs=1)
    assert [ends[1]["started_at"], ends[1]["finished_at"]] == pytest.approx(printed, abs=1)


# ---------------------------------------------------------------- requests that are wrong


async def send(api: Api, agent_id: str, command: str, *, status: int = 200, **fields: Any) -> Any:
    """Send a command with further fields beside its params. Return its id, or the problem when one is expected."""
    body = {"type": "shell", "params": {"command": command}, **fields}
    answer = await api.post(f"/api/agents/{agent_id}/commands", body, status=status)
    return answer["command_id"] if status == 200 and "on_offline" not in fields else answer


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({}, ["command"]),
        ({"command": ""}, ["params.command", "1"]),
        ({"command": "a\0b"}, ["params.command"]),
        ({"command": "x" * 131_072}, ["params.command", "131071"]),
        ({"command": "ü" * 70_000}, ["params.command", "131072"]),
        ({"command": ["ls"]}, ["params.command"]),
        ({"command": None}, ["params.command"]),
        ({"command": "ls", "timeout": 0}, ["params.timeout", "1"]),
        ({"command": "ls", "timeout": -5}, ["params.timeout", "1"]),
        ({"command": "ls", "timeout": 86_401}, ["params.timeout", "86400"]),
        ({"command": "ls", "timeout": "x"}, ["params.timeout"]),
        ({"command": "ls", "timeout": None}, ["params.timeout"]),
        ({"command": "ls", "timeout": True}, ["params.timeout"]),
        ({"command": "ls", "timeout": math.nan}, ["JSON"]),
        ({"command": "ls", "timeout": math.inf}, ["JSON"]),
        ("ls", ["params"]),
        (None, ["params"]),
    ],
)
async def test_a_wrong_command_is_refused_and_says_what_would_be_right(
    fleet: Fleet, api: Api, params: object, words: list[str]
) -> None:
    problem = await api.post(f"{fleet.agent_path}/commands", {"type": "shell", "params": params}, status=400)
    assert problem["code"] == "invalid"
    assert [word for word in words if word not in problem["detail"]] == [], problem["detail"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"type": "python"}, ["type", "shell"]),
        ({"expires_in": 0}, ["expires_in", "1"]),
        ({"expires_in": "soon"}, ["expires_in"]),
        ({"on_offline": "queue"}, ["on_offline", "wait", "fail"]),
    ],
)
async def test_a_wrong_field_beside_the_params_is_refused(
    fleet: Fleet, api: Api, fields: dict[str, object], words: list[str]
) -> None:
    problem = await send(api, fleet.agent_id, "true", status=400, **fields)
    assert [word for word in words if word not in problem["detail"]] == [], problem["detail"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"type":"shell"}',
        b'{"type":"shell","params":{"command":"\\ud800"}}',
        b"\xff",
        b"[" * 9999,
    ],
)
async def test_a_body_that_is_no_command_is_refused(fleet: Fleet, api: Api, body: bytes) -> None:
    async with api.open("POST", f"{fleet.agent_path}/commands", data=body) as response:
        assert response.status == 400, await response.text()
        assert response.content_type == "application/problem+json"
        assert (await response.json(content_type=None))["detail"]


async def test_limits_themselves_are_allowed(fleet: Fleet, api: Api) -> None:
    for timeout in (1, 86_400, 1.5):
        ended = await api.run(fleet.agent_id, "true", timeout=timeout)
        assert (ended["status"], ended["params"]["timeout"]) == ("succeeded", timeout)
    command = ": " + "x" * (131_071 - 2)
    assert (await api.run(fleet.agent_id, command))["status"] == "succeeded"
    quoted = "printf %s " + shlex.quote("'\"\n" * 100)
    assert (await api.run(fleet.agent_id, quoted))["output"] == "'\"\n" * 100


async def test_unknown_agents_and_commands_are_not_found(fleet: Fleet, api: Api) -> None:
    other = "agent_0000000000000000"
    await api.get(f"/api/agents/{other}/commands", status=404)
    await api.post(f"/api/agents/{other}/commands", {"type": "shell", "params": {"command": "true"}}, status=404)
    ended = await api.run(fleet.agent_id, "true")
    for agent_id, command_id in ((fleet.agent_id, "cmd_" + "0" * 20), (other, ended["command_id"])):
        path = command_path(agent_id, command_id)
        await api.get(path, status=404)
        await api.get(f"{path}/output", status=404)
        await api.post(f"{path}/cancel", status=404)
        async with api.sse(f"{path}/stream", status=404):
            pass
