"""The agent as a daemon: it waits for a server that is not there yet, stays small without one, and leaves when told."""

import asyncio
import os
import time
from pathlib import Path

from tests.conftest import OpenApi, StartAgent, StartServer
from tests.support.eventually import eventually
from tests.support.processes import AgentProcess


def private_bytes(pid: int) -> int:
    """Return the anonymous memory of a process; shared libraries do not count."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) * 1024


async def test_an_agent_that_is_first_connects_when_the_server_comes(
    start_server: StartServer, open_api: OpenApi, tmp_path: Path
) -> None:
    server = start_server()
    async with asyncio.timeout(60):
        api = await open_api(server)
        agent_id, key = await api.enrol("early")
        server.stop()
        with AgentProcess(tmp_path / "early", server_url=server.url, agent_id=agent_id, key=key) as agent:
            await eventually(lambda: asyncio.sleep(0, "next attempt" in agent.log_text))
            server.start()
            server.wait_until_started()
            await api.wait_for_agent(agent_id)
            assert (await api.run(agent_id, "echo here"))["output"] == "here\n"


async def test_memory_stays_flat_while_the_server_is_away(
    start_server: StartServer, start_agent: StartAgent, open_api: OpenApi
) -> None:
    server = start_server()
    api = await open_api(server)
    agent = await start_agent(api)
    await api.submit(agent.agent_id, "while true; do head -c 100000 /dev/zero; sleep 0.01; done", timeout=3600)
    server.kill()
    await asyncio.sleep(3)  # the window of output that is kept for the server fills within the first second
    before = private_bytes(agent.pid)
    await asyncio.sleep(9)  # some 90 MB of output, metrics and attempts to connect
    assert private_bytes(agent.pid) - before < 2 * 1024 * 1024


async def test_the_agent_leaves_within_two_seconds_and_leaves_its_commands_running(
    start_server: StartServer, start_agent: StartAgent, open_api: OpenApi, tmp_path: Path
) -> None:
    api = await open_api(start_server())
    agent = await start_agent(api)
    pids = tmp_path / "pids"
    script = (
        f"trap '' TERM; echo $$ >> {pids}; setsid sh -c \"trap '' TERM; echo \\$\\$ >> {pids}; sleep 600\" & sleep 600"
    )
    command_id = await api.submit(agent.agent_id, script, timeout=3600)
    await eventually(lambda: asyncio.sleep(0, pids.exists() and len(pids.read_text().split()) == 2))
    started = time.monotonic()
    assert await asyncio.to_thread(agent.stop) == 0
    assert time.monotonic() - started < 2.0
    assert (await api.get(f"/api/agents/{agent.agent_id}"))["status"] == "offline"
    assert all(os.path.exists(f"/proc/{pid}") for pid in pids.read_text().split())
    # Cancelled while it is away: stopped as soon as it is back.
    await api.post(f"/api/agents/{agent.agent_id}/commands/{command_id}/cancel", status=202)
    agent.start()
    ended = await api.wait_for_command(agent.agent_id, command_id)
    assert ended["status"] == "cancelled"
    killed = {str(each["pid"]): each["signal"] for each in ended["killed"]}
    assert ended["killed_count"] == len(killed) == 4
    for pid in pids.read_text().split():
        assert killed[pid] == "KILL"
        assert not (await asyncio.to_thread(read_command_line, pid))


def read_command_line(pid: str) -> bytes:
    """Return nothing for what is dead, also when it is not yet reaped."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return b""
