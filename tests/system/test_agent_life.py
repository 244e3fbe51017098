"""The agent as a daemon: it waits for a server that is not there yet, stays small without one, and leaves when told."""

import asyncio
import os
import time
from pathlib import Path

from tests.conftest import OpenApi, StartAgent, StartServer
from tests.support.eventually import eventually
from tests.support.processes import AgentProcess

from fleetwire_agent.install.ending import end_agent
from fleetwire_agent.install.services import Plain
from fleetwire_agent.runners import END_COMMANDS


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


class AgentService(Plain):
    """An agent as a service, that a test starts."""

    def __init__(self, agent: AgentProcess) -> None:
        super().__init__()
        self._agent = agent

    def is_active(self) -> bool:
        return self._agent.is_running

    def end_commands(self) -> None:
        os.kill(self._agent.pid, END_COMMANDS)

    def stop(self) -> None:
        if self._agent.is_running:
            self._agent.stop()


async def test_an_agent_that_is_ended_for_good_tells_first_what_became_of_its_commands(
    start_server: StartServer, start_agent: StartAgent, open_api: OpenApi, tmp_path: Path
) -> None:
    server = start_server()
    api = await open_api(server)
    agent = await start_agent(api, environment={"FLEETWIRE_AGENT_MAX_COMMANDS_AT_ONCE": "1"})
    ran = tmp_path / "ran"

    async def submit_two() -> list[str]:
        commands = [await api.submit(agent.agent_id, text, timeout=600) for text in ("sleep 600", f"echo x >>{ran}")]
        await api.wait_for_command(agent.agent_id, commands[0], "running")
        await api.wait_for_command(agent.agent_id, commands[1], "accepted")
        return commands

    async def end() -> str:
        return await asyncio.to_thread(end_agent, AgentService(agent), agent.state_dir)

    async def read_statuses(commands: list[str]) -> list[str]:
        return [(await api.get(f"/api/agents/{agent.agent_id}/commands/{each}"))["status"] for each in commands]

    # The server is told before the agent is gone.
    commands = await submit_two()
    assert await end() == "1 running commands are ended"
    assert not agent.is_running
    assert await read_statuses(commands) == ["interrupted", "cancelled"]
    # Where it is away, the next agent with the same state tells it.
    agent.start()
    await api.wait_for_agent(agent.agent_id)
    commands = await submit_two()
    server.kill()
    assert await end() == "1 running commands are ended"
    server.start()
    server.wait_until_started()
    api = await open_api(server)
    agent.start()
    assert [(await api.wait_for_command(agent.agent_id, each))["status"] for each in commands] == [
        "interrupted",
        "cancelled",
    ]
    assert not ran.exists()
    # Where the agent does not run, what waits still waits.
    commands = await submit_two()
    agent.kill()
    assert await end() == "1 running commands are ended"
    await eventually(end, lambda ended: ended == "")  # a runner that has said all is a moment longer there
    assert not ran.exists()
    agent.start()
    assert [(await api.wait_for_command(agent.agent_id, each))["status"] for each in commands] == [
        "interrupted",
        "succeeded",
    ]


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
