"""What happens to real hosts: reboots, power cuts, cut networks, full disks, wrong clocks. Nothing is lost."""

import asyncio
import time
from pathlib import Path

import pytest
from tests.e2e.conftest import BootHost
from tests.support.api import Api
from tests.support.eventually import eventually
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


@pytest.mark.parametrize("release", ["bookworm", "trixie"])
async def test_a_clock_that_is_an_hour_behind_changes_nothing(release: str, boot_host: BootHost, e2e_api: Api) -> None:
    host = boot_host(release)
    agent_id = await install(e2e_api, host)
    path = f"/api/agents/{agent_id}"
    library = host.exec("find / -xdev -name libfaketime.so.1 | head -n 1").stdout.strip()
    assert library
    drop_in = "/etc/systemd/system/fleetwire-agent.service.d/clock.conf"
    host.exec(f"mkdir -p {Path(drop_in).parent}")
    # Only the wall clock: a step of the clock does not touch the monotonic one. Read anew at each look at it, so that
    # it steps while the agent runs.
    host.write("/etc/faketime", "+0\n")
    variables = (
        f"LD_PRELOAD={library}",
        "FAKETIME_TIMESTAMP_FILE=/etc/faketime",
        "FAKETIME_NO_CACHE=1",
        "FAKETIME_DONT_FAKE_MONOTONIC=1",
        "DONT_FAKE_MONOTONIC=1",
    )
    host.write(drop_in, "[Service]\n" + "".join(f"Environment={variable}\n" for variable in variables))
    await run(host, "systemctl daemon-reload && systemctl restart fleetwire-agent")
    await e2e_api.wait_for_agent(agent_id)
    running = await e2e_api.submit(agent_id, "sleep 12; echo done", timeout=60)
    await e2e_api.wait_for_command(agent_id, running, "running")
    pid = host.exec("systemctl show -P MainPID fleetwire-agent").stdout
    host.write("/etc/faketime", "-1h\n")

    def is_behind(agent: dict[str, object]) -> bool:
        metrics = agent["metrics"]
        return (
            isinstance(metrics, dict)
            and agent["status"] == "online"
            and 3500 < metrics["received_at"] - metrics["sampled_at"] < 3700
        )

    detail = await eventually(lambda: e2e_api.get(path), is_behind, timeout_seconds=30)
    assert host.exec("systemctl show -P MainPID fleetwire-agent").stdout == pid
    assert abs(detail["last_seen"] - time.time()) < 30
    over = await e2e_api.wait_for_command(agent_id, running)
    assert (over["status"], over["output"]) == ("succeeded", "done\n")
    assert 11 < over["finished_at"] - over["started_at"] < 20
    command = await e2e_api.run(agent_id, "echo on time; sleep 1")
    assert command["status"] == "succeeded"
    assert command["created_at"] <= command["started_at"] + 0.1
    assert 0.9 <= command["finished_at"] - command["started_at"] < 5
    timed_out = await e2e_api.run(agent_id, "sleep 60", timeout=2)
    assert timed_out["status"] == "timed_out"
    expired = await e2e_api.post(
        f"{path}/commands", {"type": "shell", "params": {"command": "echo in time"}, "expires_in": 30}
    )
    assert (await e2e_api.wait_for_command(agent_id, expired["command_id"]))["status"] == "succeeded"
    host.write("/var/log/app.log", "first\n")
    async with e2e_api.sse(f"{path}/stream/logs", source="file", path="/var/log/app.log") as events:
        assert (await anext(events)).data == "first"
        host.exec("echo second >>/var/log/app.log")
        assert (await anext(events)).data == "second"
    history = await e2e_api.call("GET", f"{path}/metrics", params={"from": time.time() - 120})
    assert history["points"]
