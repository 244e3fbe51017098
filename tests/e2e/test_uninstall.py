"""Deleting an agent, with and without taking it off its host."""

import asyncio

import pytest
from tests.e2e.conftest import BootHost
from tests.support.api import Api
from tests.support.eventually import eventually
from tests.support.installed import install, run, traces


@pytest.mark.parametrize("release", ["bookworm", "trixie"])
async def test_a_deleted_agent_can_be_taken_off_its_host(release: str, boot_host: BootHost, e2e_api: Api) -> None:
    host = boot_host(release)
    agent_id = await install(e2e_api, host)
    path = f"/api/agents/{agent_id}"
    command_id = await e2e_api.submit(agent_id, "echo begun; setsid sleep 7777 & sleep 7777", timeout=900)
    await e2e_api.wait_for_command(agent_id, command_id, "running")
    host.write("/etc/systemd/system/fleetwire-agent.service.d/local.conf", "[Service]\nNice=1\n")

    answer = await e2e_api.delete(f"{path}?uninstall=true")
    assert answer == {"status": "deleted", "uninstalled": True}
    await e2e_api.get(path, status=404)

    # The agent's own process is the last to go, a moment after it has said so.
    async def look() -> list[str]:
        return await asyncio.to_thread(traces, host)

    await eventually(look, lambda found: found == [], timeout_seconds=15)
    assert not host.exists("/etc/systemd/system/fleetwire-agent.service.d")
    assert "7777" not in host.exec("ps -eo args").stdout
    log = host.exec("journalctl --no-pager -u fleetwire-agent").stdout
    assert "Traceback" not in log, log
    assert "fleetwire" not in host.exec("systemctl list-units --all --plain --no-legend --failed").stdout

    # And the host can have an agent again.
    again = await install(e2e_api, host)
    assert again != agent_id

    # Without it the program stays, and knows that its key is void.
    assert await e2e_api.delete(f"/api/agents/{again}") == {"status": "deleted"}
    await eventually(
        lambda: run(host, "fleetwire-agent status || true"), lambda said: "revoked" in said, timeout_seconds=15
    )
    assert "/opt/fleetwire-agent" in traces(host)
    await run(host, "fleetwire-agent uninstall --purge")
    assert traces(host) == []


async def test_what_could_not_be_removed_is_said_and_removed_the_next_time(boot_host: BootHost, e2e_api: Api) -> None:
    host = boot_host("bookworm")
    agent_id = await install(e2e_api, host)
    path = f"/api/agents/{agent_id}"
    host.exec("touch /opt/fleetwire-agent/held; chattr +i /opt/fleetwire-agent/held")
    problem = await e2e_api.delete(f"{path}?uninstall=true", status=503)
    assert "/opt/fleetwire-agent (held: " in problem["detail"]
    assert "in part" in problem["detail"]
    assert (await e2e_api.get(path))["status"] == "online"
    host.exec("chattr -i /opt/fleetwire-agent/held")
    # The state's directory is a disk of its own: emptied, and left.
    state = "/var/lib/fleetwire-agent"
    host.exec(f"mkdir -p {state}; mount -t tmpfs tmpfs {state}; touch {state}/x")
    assert (await e2e_api.delete(f"{path}?uninstall=true"))["uninstalled"] is True
    assert host.exec(f"ls -A {state}").stdout == ""
    host.exec(f"umount {state}; rmdir {state}")

    async def look() -> list[str]:
        return await asyncio.to_thread(traces, host)

    await eventually(look, lambda found: found == [], timeout_seconds=15)


async def test_commands_of_an_agent_with_another_state_directory_are_stopped_too(
    boot_host: BootHost, e2e_api: Api
) -> None:
    host = boot_host("bookworm")
    agent_id = await install(e2e_api, host)
    host.exec("echo 'state_dir = \"/srv/fleetwire\"' >>/etc/fleetwire/agent.toml; systemctl restart fleetwire-agent")
    command_id = await e2e_api.submit(agent_id, "setsid sleep 7779 & sleep 7779", timeout=900)
    await e2e_api.wait_for_command(agent_id, command_id, "running")
    said = await run(host, "fleetwire-agent uninstall")
    assert "1 running commands are ended" in said
    assert "/srv/fleetwire are kept" in said
    assert "7779" not in host.exec("ps -eo args").stdout
    assert (await e2e_api.wait_for_command(agent_id, command_id))["status"] == "interrupted"


async def test_an_agent_that_only_watches_refuses_to_remove_itself(boot_host: BootHost, e2e_api: Api) -> None:
    host = boot_host("bookworm")
    agent_id = await install(e2e_api, host, "--profile", "monitor")
    path = f"/api/agents/{agent_id}"
    before = traces(host)
    problem = await e2e_api.delete(f"{path}?uninstall=true", status=409)
    assert "monitor" in problem["detail"]
    assert "fleetwire-agent uninstall" in problem["detail"]
    assert (await e2e_api.get(path))["status"] == "online"
    assert traces(host) == before

    # What it is for, it does: it sees the units and reads the journal.
    units = {unit["name"]: unit for unit in (await e2e_api.get(f"{path}/units"))["units"]}
    assert units["fleetwire-agent.service"]["sub"] == "running"
    await run(host, "logger -t probe 'seen by monitor'")
    async with asyncio.timeout(30), e2e_api.sse(f"{path}/stream/logs", source="journald", grep="probe") as events:
        assert "seen by monitor" in (await anext(events)).data
    await asyncio.to_thread(host.stop)
    await e2e_api.wait_for_agent(agent_id, "offline")
    await e2e_api.delete(f"{path}?uninstall=true", status=503)
    assert (await e2e_api.get(path))["id"] == agent_id
