"""What happens to real hosts: reboots, power cuts, cut networks, full disks, wrong clocks. Nothing is lost."""

import asyncio
import time
from typing import Any

import pytest
from tests.e2e.conftest import BootHost
from tests.support.api import Api
from tests.support.eventually import eventually
from tests.support.hosts import Host
from tests.support.installed import install, make_form, run

CUT_SECONDS = 120.0


@pytest.mark.parametrize("release", ["bookworm", "trixie"])
async def test_a_rebooted_host_is_back_and_its_command_is_told_truly(
    release: str, boot_host: BootHost, e2e_api: Api
) -> None:
    host = boot_host(release)
    agent_id = await install(e2e_api, host)
    path = f"/api/agents/{agent_id}"
    boot_id = (await e2e_api.get(path))["agent"]["boot_id"]
    command_id = await e2e_api.submit(agent_id, "echo begun; sleep 600", timeout=900)
    await e2e_api.wait_for_command(agent_id, command_id, "running")
    rebooter = await e2e_api.submit(agent_id, "systemctl reboot; sleep 600", timeout=900)
    ended = await e2e_api.wait_for_command(agent_id, command_id, timeout_seconds=60)
    assert ended["status"] == "interrupted"  # the agent was stopped in order, and said so
    assert ended["output"] == "begun\n"
    assert (await e2e_api.wait_for_command(agent_id, rebooter))["status"] == "interrupted"
    await asyncio.to_thread(host.wait_until_up)
    detail = await eventually(
        lambda: e2e_api.get(path),
        lambda agent: agent["status"] == "online" and agent["agent"]["boot_id"] != boot_id,
        timeout_seconds=60,
    )
    assert detail["uptime_s"] is None or detail["uptime_s"] < 120
    assert (await e2e_api.run(agent_id, "echo again"))["output"] == "again\n"

    # A power cut: nobody on the host could say anything.
    command_id = await e2e_api.submit(agent_id, "sleep 600", timeout=900)
    await e2e_api.wait_for_command(agent_id, command_id, "running")
    await asyncio.to_thread(host.kill)
    await asyncio.to_thread(host.boot)
    ended = await e2e_api.wait_for_command(agent_id, command_id, timeout_seconds=90)
    assert ended["status"] in ("lost", "interrupted")
    assert (await e2e_api.run(agent_id, "echo again"))["output"] == "again\n"


@pytest.mark.timeout(450)
@pytest.mark.parametrize("release", ["bookworm", "trixie"])
async def test_a_network_that_is_cut_for_two_minutes_loses_nothing(
    release: str, boot_host: BootHost, e2e_api: Api
) -> None:
    host = boot_host(release)
    agent_id = await install(e2e_api, host)
    path = f"/api/agents/{agent_id}"
    host.write("/var/log/app.log", "line 0\n")
    writer = "for n in $(seq 1 1000000); do echo line $n >>/var/log/app.log; echo line $n; sleep 0.5; done"
    running = await e2e_api.submit(agent_id, writer, timeout=900)
    await e2e_api.wait_for_command(agent_id, running, "running")
    seen: list[str] = []
    names: list[str] = []

    async def watch(last_line: asyncio.Future[int]) -> None:
        async with e2e_api.sse(f"{path}/stream/logs", source="file", path="/var/log/app.log", lines=1) as events:
            async for event in events:
                (seen if event.event == "message" else names).append(
                    event.data if event.event == "message" else event.event
                )
                if last_line.done() and f"line {last_line.result()}" in seen:
                    return

    last_line = asyncio.get_running_loop().create_future()
    async with asyncio.timeout(400), asyncio.TaskGroup() as group:
        group.create_task(watch(last_line))
        await eventually(lambda: _length(seen), lambda length: length > 3)
        host.cut()
        cut_at = time.monotonic()
        queued = await e2e_api.submit(agent_id, "echo queued")
        stale = await eventually(
            lambda: e2e_api.get(path), lambda agent: agent["status"] != "online", timeout_seconds=90
        )
        assert stale["status"] == "stale"
        assert time.monotonic() - cut_at >= 40
        while (left := CUT_SECONDS - (time.monotonic() - cut_at)) > 0:
            assert (await e2e_api.get(path))["status"] == "stale"
            await asyncio.sleep(min(5.0, left))
        host.heal()
        await e2e_api.wait_for_agent(agent_id, timeout_seconds=90)
        done = await e2e_api.wait_for_command(agent_id, queued, timeout_seconds=60)
        assert (done["status"], done["output"]) == ("succeeded", "queued\n")
        on_host = host.exec("tail -n 1 /var/log/app.log").stdout.split()
        last_line.set_result(int(on_host[1]))
    assert "gap" not in names
    numbers = [int(text.split()[1]) for text in seen]
    assert numbers == list(range(numbers[0], numbers[-1] + 1))

    await e2e_api.call("POST", f"{path}/commands/{running}/cancel", status=202)
    ended = await e2e_api.wait_for_command(agent_id, running)
    assert ended["status"] == "cancelled"
    async with e2e_api.open("GET", f"{path}/commands/{running}/output") as response:
        lines = (await response.read()).decode().splitlines()
    assert lines == [f"line {number}" for number in range(1, len(lines) + 1)]
    assert len(lines) > 2 * CUT_SECONDS * 0.8


async def _length(items: list[str]) -> int:
    return len(items)


@pytest.mark.parametrize("release", ["bookworm", "trixie"])
async def test_a_full_disk_on_the_host(release: str, boot_host: BootHost, e2e_api: Api) -> None:
    host = boot_host(release, disk_mib=256)
    agent_id = await install(e2e_api, host)
    path = f"/api/agents/{agent_id}"
    host.exec("cat /dev/zero >/srv/filler 2>/dev/null; cat /dev/zero >/var/filler 2>/dev/null; true")
    command = await e2e_api.run(agent_id, "echo still here; head -c 100M /dev/zero >/srv/file")
    assert command["output"].startswith("still here\n")
    assert "No space left" in command["output"]
    async with e2e_api.open("POST", f"{path}/files", data=make_form("/srv/upload", bytes(1_000_000))) as response:
        assert response.status == 503
        assert "space" in (await response.json())["detail"].lower()
    assert not host.exists("/srv/upload")
    # The agent comes back on a full disk, too, and says how full it is.
    await run(host, "systemctl restart fleetwire-agent")
    detail = await eventually(
        lambda: e2e_api.get(path), lambda agent: agent["status"] == "online" and agent["metrics"] is not None
    )
    await e2e_api.wait_for_agent(agent_id)
    detail = await eventually(lambda: e2e_api.get(path), lambda agent: (agent["metrics"]["disk_percent"] or 0) > 95)
    assert detail["status"] == "online"
    host.exec("rm -f /srv/filler /var/filler")
    async with e2e_api.open("POST", f"{path}/files", data=make_form("/srv/upload", b"content")) as response:
        assert response.status == 200
    assert host.exec("cat /srv/upload").stdout == "content"


@pytest.mark.timeout(240)
@pytest.mark.parametrize("release", ["bookworm", "trixie"])
async def test_a_clock_that_is_set_back_and_forward_an_hour_changes_nothing(
    release: str, boot_host: BootHost, e2e_api: Api
) -> None:
    host = boot_host(release)
    agent_id = await install(e2e_api, host)
    path = f"/api/agents/{agent_id}"
    await _fake_clock(host)
    await e2e_api.wait_for_agent(agent_id)

    # Back, and from there forward by two hours; while it is ahead, the agent is restarted, too.
    await _run_through_a_step_of_the_clock(host, e2e_api, agent_id, "-1h", (-3700, -3500), has_restart=False)
    await _run_through_a_step_of_the_clock(host, e2e_api, agent_id, "+1h", (3500, 3700), has_restart=True)

    host.write("/var/log/app.log", "first\n")
    async with e2e_api.sse(f"{path}/stream/logs", source="file", path="/var/log/app.log") as events:
        assert (await anext(events)).data == "first"
        host.exec("echo second >>/var/log/app.log")
        assert (await anext(events)).data == "second"
    history = await e2e_api.call("GET", f"{path}/metrics", params={"from": time.time() - 120})
    assert history["points"]


async def _fake_clock(host: Host) -> None:
    """Give the agent, runners and commands a wall clock that steps as soon as /etc/faketime says so, while they run.

    Of the manager's environment, as a runner's unit has nothing of its agent's. The monotonic clocks stay as they are:
    a step of the real clock does not touch them either."""
    library = host.exec("find / -xdev -name libfaketime.so.1 | head -n 1").stdout.strip()
    assert library
    host.write("/etc/faketime", "+0\n")
    variables = (
        f"LD_PRELOAD={library}",
        "FAKETIME_TIMESTAMP_FILE=/etc/faketime",
        "FAKETIME_NO_CACHE=1",
        "FAKETIME_DONT_FAKE_MONOTONIC=1",
        "DONT_FAKE_MONOTONIC=1",
        "FLEETWIRE_AGENT_MAX_COMMANDS_AT_ONCE=3",
    )
    await run(host, f"systemctl set-environment {' '.join(variables)} && systemctl restart fleetwire-agent")


async def _run_through_a_step_of_the_clock(
    host: Host, api: Api, agent_id: str, step: str, expected_seconds: tuple[float, float], *, has_restart: bool
) -> None:
    path = f"/api/agents/{agent_id}"

    async def submit(command: str, timeout: float, expires_in: int = 3600) -> str:
        body = {"type": "shell", "params": {"command": command, "timeout": timeout}, "expires_in": expires_in}
        return str((await api.post(f"{path}/commands", body))["command_id"])

    # Three take all places, three wait for one.
    running = await submit("date +%s; sleep 15; date +%s; echo done", timeout=60)
    overdue = await submit("sleep 3600", timeout=20)
    gated = await submit("until [ -e /root/gate ]; do sleep 0.1; done", timeout=300)
    for command_id in (running, overdue, gated):
        await api.wait_for_command(agent_id, command_id, "running")
    waiting = await submit("date +%s; echo waited", timeout=60, expires_in=120)
    expiring = await submit("touch /root/never", timeout=60, expires_in=6)
    limited = await submit("sleep 3600", timeout=2, expires_in=120)
    for command_id in (waiting, expiring, limited):
        await api.wait_for_command(agent_id, command_id, "accepted")
    runner = host.exec(f"systemctl show -P MainPID fleetwire-{running.replace('_', '-')}.1").stdout.strip()
    assert "libfaketime" in host.exec(f"cat /proc/{runner}/maps").stdout
    pid = host.exec("systemctl show -P MainPID fleetwire-agent").stdout

    host.write("/etc/faketime", f"{step}\n")
    if has_restart:
        await run(host, "systemctl restart fleetwire-agent")
    after = await submit("date +%s; echo after", timeout=60, expires_in=120)

    def is_shifted(agent: dict[str, Any]) -> bool:
        metrics, (least, most) = agent["metrics"], expected_seconds
        is_online = agent["status"] == "online" and metrics is not None
        return is_online and least < metrics["sampled_at"] - metrics["received_at"] < most

    detail = await eventually(lambda: api.get(path), is_shifted, timeout_seconds=30)
    assert abs(detail["last_seen"] - time.time()) < 30
    assert (host.exec("systemctl show -P MainPID fleetwire-agent").stdout == pid) is not has_restart

    ends = {
        name: await api.wait_for_command(agent_id, command_id, timeout_seconds=60)
        for name, command_id in {
            "running": running, "overdue": overdue, "expiring": expiring, "waiting": waiting, "limited": limited,
            "after": after,
        }.items()
    }  # fmt: skip
    assert {name: end["status"] for name, end in ends.items()} == {
        "running": "succeeded", "overdue": "timed_out", "expiring": "expired", "waiting": "succeeded",
        "limited": "timed_out", "after": "succeeded",
    }  # fmt: skip
    begun, ended, *said = ends["running"]["output"].split()
    assert said == ["done"]
    assert abs(int(ended) - int(begun)) > 3000, "the clock of what runs was not set"
    assert not host.exists("/root/never")
    least, most = expected_seconds
    for name in ("waiting", "after"):
        shown, word = ends[name]["output"].split()
        assert word == {"waiting": "waited", "after": "after"}[name]
        assert least - 60 < int(shown) - time.time() < most + 60
    for name, seconds in {"running": 15, "overdue": 20, "waiting": 0, "limited": 2, "after": 0}.items():
        end = ends[name]
        assert seconds - 0.1 <= end["finished_at"] - end["started_at"] < seconds + 10, name
        assert end["created_at"] - 0.1 <= end["started_at"] <= end["finished_at"] <= time.time() + 0.1, name
    expired = ends["expiring"]
    assert 5 < expired["finished_at"] - expired["created_at"] < 13
    assert (await api.get(f"{path}/commands/{gated}"))["status"] == "running"

    # What ends unheard ended when it did, whatever the host's clock says.
    submitted_at = time.time()
    unheard = await submit("sleep 4", timeout=60)
    await api.wait_for_command(agent_id, unheard, "running")
    await run(host, "systemctl stop fleetwire-agent")
    await asyncio.sleep(8)
    await run(host, "systemctl start fleetwire-agent")
    assert 4 <= (await api.wait_for_command(agent_id, unheard))["finished_at"] - submitted_at < 7
    host.exec("touch /root/gate")
    assert (await api.wait_for_command(agent_id, gated))["status"] == "succeeded"
    host.exec("rm /root/gate")
