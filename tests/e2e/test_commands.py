"""Commands on real hosts: they outlive the agent, end as a whole when they are stopped, and are told of truly."""

import asyncio
from pathlib import Path

import pytest
from tests.e2e.conftest import BootHost, StartE2eServer
from tests.support.api import Api
from tests.support.bundles import build_bundle
from tests.support.commands import fetch_output
from tests.support.eventually import eventually
from tests.support.hosts import Host
from tests.support.installed import install, run, wait_for_version

LINES = 400
MIB = 1024 * 1024


@pytest.mark.parametrize("release", ["bookworm", "trixie"])
async def test_a_command_outlives_a_restart_and_an_upgrade_of_its_agent(
    release: str, boot_host: BootHost, start_e2e_server: StartE2eServer, tmp_path: Path
) -> None:
    served = tmp_path / "served.pyz"
    build_bundle(served, version="0.0.1")
    server = start_e2e_server(environment={"FLEETWIRE_AGENT_BUNDLE": str(served)})
    host = boot_host(release)
    async with Api(server.url) as api:
        await api.login("admin", server.admin_password)
        agent_id = await install(api, host)
        counting = f"for n in $(seq {LINES}); do echo $$ $n; sleep 0.05; done"
        text = f"echo run >>/root/runs; {counting}; until [ -e /root/gate ]; do sleep 0.1; done; exit 7"
        command_id = await api.submit(agent_id, text, timeout=600)
        await api.wait_for_command(agent_id, command_id, "running")
        units = host.exec("systemctl list-units --plain --no-legend 'fleetwire-cmd-*'").stdout
        assert command_id.replace("_", "-") in units
        assert host.exec("systemctl show -P TasksMax 'fleetwire-cmd-*'").stdout.split() == ["4096"]

        agent_pid = host.exec("systemctl show -P MainPID fleetwire-agent").stdout
        host.exec("systemctl restart fleetwire-agent")
        assert host.exec("systemctl show -P MainPID fleetwire-agent").stdout != agent_pid
        await api.wait_for_agent(agent_id)
        host.exec("kill -9 $(systemctl show -P MainPID fleetwire-agent)")
        await asyncio.sleep(1)

        new = build_bundle(served, version="0.0.2")
        server.stop()
        server.start()
        server.wait_until_started()
        await run(
            host, f'curl -fsSL "{server.url}/api/agents/install-script?key=$(cat /etc/fleetwire/agent.key)" | bash'
        )
        await wait_for_version(api, agent_id, new)
        assert (await api.get(f"/api/agents/{agent_id}/commands/{command_id}"))["status"] == "running"
        host.exec("touch /root/gate")
        ended = await api.wait_for_command(agent_id, command_id, timeout_seconds=60)
        assert (ended["status"], ended["exit_code"], ended["late"]) == ("failed", 7, False)
        lines = (await fetch_output(api, agent_id, command_id)).decode().splitlines()
        pid = lines[0].split()[0]
        assert lines == [f"{pid} {number}" for number in range(1, LINES + 1)]
        assert host.exec("cat /root/runs").stdout == "run\n"
        assert command_id.replace("_", "-") not in host.exec("systemctl list-units --all 'fleetwire-cmd-*'").stdout


@pytest.mark.parametrize("release", ["bookworm", "trixie"])
async def test_a_stopped_command_leaves_nothing_and_the_result_says_what_was_killed(
    release: str, boot_host: BootHost, e2e_api: Api
) -> None:
    host = boot_host(release)
    agent_id = await install(e2e_api, host)
    # Orphans in sessions of their own, with no trace of the command in their environment.
    escaping = "nohup setsid env -i /bin/sh -c '(/bin/sleep 7777 &) ; /bin/sleep 7777' >/dev/null 2>&1 & "
    ended = await e2e_api.run(agent_id, f"{escaping} sleep 0.5; echo ready; sleep 7777", timeout=3)
    assert (ended["status"], ended["output"]) == ("timed_out", "ready\n")
    assert host.exec("pgrep -f 'sleep 777[7]'", check=False).stdout == ""
    assert [each["command"] for each in ended["killed"]].count("/bin/sleep 7777") == 2
    assert ended["killed_count"] == len(ended["killed"])

    # The same where nobody is left to stop it: the unit's main process is its runner.
    orphan = "(setsid env -i /bin/sleep 7777 >/dev/null 2>&1 &)"
    command_id = await e2e_api.submit(agent_id, f"{orphan}; {escaping} echo ready; sleep 7777", timeout=60)
    await e2e_api.wait_for_command(agent_id, command_id, "running")
    await eventually(
        lambda: asyncio.to_thread(host.exec, "pgrep -cx sleep", check=False),
        lambda said: int(said.stdout) >= 4,
        timeout_seconds=30,
    )
    host.exec("kill -9 $(systemctl show -P MainPID 'fleetwire-cmd-*')")
    ended = await e2e_api.wait_for_command(agent_id, command_id, timeout_seconds=30)
    assert (ended["status"], ended["output"]) == ("interrupted", "ready\n")
    assert host.exec("pgrep -f 'sleep 777[7]'", check=False).stdout == ""
    groups = "find /sys/fs/cgroup -name 'fleetwire-cmd*'"
    await eventually(lambda: asyncio.to_thread(host.exec, groups), lambda said: said.stdout == "", timeout_seconds=15)

    # A fork bomb, within a limit of its own: this machine's kernel limits the tasks of no unit in a container.
    bomb = "ulimit -u 1500; :(){ :|:& }; : 2>/dev/null; sleep 7778"
    command_id = await e2e_api.submit(
        agent_id, f"setpriv --reuid 4242 --regid 4242 --clear-groups bash -c {bomb!r}", timeout=60
    )
    await eventually(lambda: asyncio.to_thread(count_bombs, host), lambda count: count > 200, timeout_seconds=30)
    await e2e_api.call("POST", f"/api/agents/{agent_id}/commands/{command_id}/cancel", status=202)
    ended = await e2e_api.wait_for_command(agent_id, command_id, timeout_seconds=60)
    assert ended["status"] == "cancelled"
    assert ended["killed_count"] >= 100
    assert len(ended["killed"]) == 100
    assert count_bombs(host) == 0
    assert (await e2e_api.run(agent_id, "echo well"))["output"] == "well\n"


def count_bombs(host: Host) -> int:
    """Return how many live; one that is dead and waits for init to bury it does not."""
    return int(host.exec("ps -U 4242 -o stat= | grep -vc Z", check=False).stdout)


@pytest.mark.timeout(450)
async def test_a_gigabyte_of_output_costs_little_memory_and_disk_everywhere(
    boot_host: BootHost, start_e2e_server: StartE2eServer
) -> None:
    server = start_e2e_server()
    host = boot_host()
    async with Api(server.url) as api:
        await api.login("admin", server.admin_password)
        agent_id = await install(api, host)
        await api.run(agent_id, "seq 100000")  # what is allocated once is not counted
        agent_pid = int(host.exec("systemctl show -P MainPID fleetwire-agent").stdout)
        host.exec(f"echo 5 >/proc/{agent_pid}/clear_refs")
        server.reset_peak_rss()
        before = (server.rss_bytes(), memory_of(host, agent_pid, "VmRSS"))
        text = "head -c 1073741824 /dev/zero; echo end >&2; until [ -e /root/gate ]; do sleep 0.1; done"
        command_id = await api.submit(agent_id, text, timeout=400)
        path = f"/api/agents/{agent_id}/commands/{command_id}"
        most_on_disk: dict[str, int] = {"host": 0, "server": 0}

        async def read_output_bytes() -> tuple[int, int]:
            sizes = await asyncio.gather(
                asyncio.to_thread(measure_disk, host.root / "var/lib/fleetwire-agent/commands"),
                asyncio.to_thread(measure_disk, server.data_dir),
            )
            for place, size_bytes in zip(most_on_disk, sizes, strict=True):
                most_on_disk[place] = max(most_on_disk[place], size_bytes)
            command = await api.get(path)
            return command["stdout_bytes"], command["stderr_bytes"]

        await eventually(read_output_bytes, lambda sizes: sizes == (1 << 30, 4), timeout_seconds=300)
        runner_pid = int(host.exec(f"systemctl show -P MainPID fleetwire-{command_id.replace('_', '-')}.1").stdout)
        runner_bytes = memory_of(host, runner_pid, "VmHWM")
        grown_bytes = (server.peak_rss_bytes() - before[0], memory_of(host, agent_pid, "VmHWM") - before[1])
        host.exec("touch /root/gate")
        ended = await api.wait_for_command(agent_id, command_id, timeout_seconds=60)
        assert (ended["status"], ended["truncated"]) == ("succeeded", True)
        assert (ended["stdout_bytes"], ended["stderr_bytes"]) == (1 << 30, 4)
        assert ended["output"].endswith("end\n")
        assert host.exec("ls /var/lib/fleetwire-agent/commands").stdout == ""

    figures = {
        "runner": runner_bytes // MIB,
        "server grown": grown_bytes[0] // MIB,
        "agent grown": grown_bytes[1] // MIB,
        "disk of the host": most_on_disk["host"] // MIB,
        "disk of the server": most_on_disk["server"] // MIB,
    }
    assert runner_bytes < 20 * MIB, figures
    assert grown_bytes[0] < 32 * MIB, figures
    assert grown_bytes[1] < 8 * MIB, figures
    assert most_on_disk["host"] < 34 * MIB, figures
    assert most_on_disk["server"] < 48 * MIB, figures


def memory_of(host: Host, pid: int, name: str) -> int:
    """Return one of the sizes in /proc/PID/status of a process on the host, in bytes."""
    return int(host.exec(["grep", f"^{name}:", f"/proc/{pid}/status"]).stdout.split()[1]) * 1024


def measure_disk(directory: Path) -> int:
    """Return the bytes that the files below a directory take on disk, while they come and go."""
    size_bytes = 0
    for path in directory.rglob("*"):
        try:
            size_bytes += path.stat(follow_symlinks=False).st_blocks * 512
        except FileNotFoundError:
            continue
    return size_bytes


@pytest.mark.timeout(240)
async def test_a_closed_output_and_a_command_that_restarts_its_host(boot_host: BootHost, e2e_api: Api) -> None:
    host = boot_host()
    agent_id = await install(e2e_api, host)
    path = f"/api/agents/{agent_id}"
    closed = await e2e_api.run(agent_id, "echo said; exec >&- 2>&-; sleep 1; echo unheard; exit 5")
    assert (closed["status"], closed["exit_code"], closed["output"]) == ("failed", 5, "said\n")

    rebooter = await e2e_api.submit(agent_id, "echo going; systemctl reboot")
    ended = await e2e_api.wait_for_command(agent_id, rebooter, timeout_seconds=90)
    # Its shell ended by itself, or was ended on the way down: either is told as it was. systemctl may complain of that.
    assert ended["status"] in ("succeeded", "interrupted")
    assert ended["output"].startswith("going\n")
    await asyncio.to_thread(host.wait_until_up)
    await eventually(lambda: e2e_api.get(path), lambda agent: agent["status"] == "online", timeout_seconds=60)
    assert (await e2e_api.run(agent_id, "echo again"))["output"] == "again\n"
