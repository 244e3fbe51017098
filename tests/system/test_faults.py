"""Server, agent and link fail while commands run: what the API then tells is true, and all goes on by itself."""

import asyncio
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
from aiohttp import ClientError
from tests.conftest import OpenApi, StartAgent, StartServer
from tests.support.api import Api
from tests.support.commands import fetch_output, living_pids, until_alive, until_written
from tests.support.eventually import eventually
from tests.support.link import CuttableLink
from tests.support.processes import ADMIN_PASSWORD, AgentProcess, ServerProcess


def gated(directory: Path, name: str = "command") -> str:
    """Return a command that counts its runs in `<name>.runs` and goes on when `<name>.gate` is there."""
    base = directory / name
    return f"echo begin; echo run >> {base}.runs; until [ -e {base}.gate ]; do sleep 0.05; done; echo end"


async def until_running(directory: Path, name: str = "command") -> None:
    await until_written(directory / f"{name}.runs", "run")


def open_gate(directory: Path, name: str = "command") -> None:
    (directory / f"{name}.gate").touch()


def runs(directory: Path, name: str = "command") -> int:
    return (directory / f"{name}.runs").read_text().count("run")


# ---------------------------------------------------------------- the server goes away


@pytest.mark.parametrize("how", ["killed", "stopped"])
async def test_a_command_outlives_its_server(
    start_server: StartServer, start_agent: StartAgent, open_api: OpenApi, tmp_path: Path, how: str
) -> None:
    server = start_server()
    api = await open_api(server)
    agent = await start_agent(api)
    during = await api.submit(agent.agent_id, gated(tmp_path, "during"))
    meanwhile = await api.submit(agent.agent_id, gated(tmp_path, "meanwhile"))
    for name in ("during", "meanwhile"):
        await until_running(tmp_path, name)
    await api.wait_for_command(agent.agent_id, meanwhile, "running")

    if how == "killed":
        server.kill()
    else:
        assert server.stop() == 0
    open_gate(tmp_path, "meanwhile")  # ends while nobody listens
    server.start()
    await api.wait_for_agent(agent.agent_id)  # the login outlived it too
    ended = await api.wait_for_command(agent.agent_id, meanwhile)
    assert (ended["status"], ended["output"], ended["truncated"]) == ("succeeded", "begin\nend\n", False)
    assert (await api.wait_for_command(agent.agent_id, during, "running"))["output"] == "begin\n"
    open_gate(tmp_path, "during")
    ended = await api.wait_for_command(agent.agent_id, during)
    assert (ended["status"], ended["exit_code"], ended["output"]) == ("succeeded", 0, "begin\nend\n")
    assert (runs(tmp_path, "during"), runs(tmp_path, "meanwhile")) == (1, 1)


async def test_output_that_flows_while_the_server_is_killed_arrives_whole(
    start_server: StartServer, start_agent: StartAgent, open_api: OpenApi
) -> None:
    server = start_server()
    api = await open_api(server)
    agent = await start_agent(api)
    command = "for i in $(seq 1 400); do echo line $i; echo error $i >&2; sleep 0.01; done"
    command_id = await api.submit(agent.agent_id, command, timeout=100)
    path = f"/api/agents/{agent.agent_id}/commands/{command_id}/stream"
    heard, last_id = "", None
    for _ in range(2):
        with suppress(ClientError):  # the kill breaks the stream
            async with asyncio.timeout(30), api.sse(path, last_event_id=last_id) as events:
                outputs = 0
                async for event in events:
                    if event.event == "output":
                        heard, last_id, outputs = heard + event.json()["text"], event.id, outputs + 1
                    if outputs == 20 and server.is_running:
                        server.kill()
        server.start()
    ended = await api.wait_for_command(agent.agent_id, command_id, timeout_seconds=60)
    async with asyncio.timeout(30), api.sse(path, last_event_id=last_id) as events:
        heard += "".join([event.json()["text"] async for event in events if event.event == "output"])

    assert (ended["status"], ended["truncated"]) == ("succeeded", False)
    for stream, word in (("stdout", "line"), ("stderr", "error")):
        expected = "".join(f"{word} {number}\n" for number in range(1, 401))
        kept = await fetch_output(api, agent.agent_id, command_id, stream=stream)
        assert kept.decode() == expected
        assert ended[f"{stream}_bytes"] == len(expected)
    assert heard == (await fetch_output(api, agent.agent_id, command_id)).decode()


async def test_a_command_never_waits_for_an_absent_server_and_what_was_dropped_is_said(
    start_server: StartServer, start_agent: StartAgent, open_api: OpenApi, tmp_path: Path
) -> None:
    server = start_server()
    api = await open_api(server)
    agent = await start_agent(api)
    done = tmp_path / "done"
    command = f"{gated(tmp_path)}; seq 10000001 11000000; touch {done}"
    command_id = await api.submit(agent.agent_id, command)
    await until_running(tmp_path)
    await api.wait_for_command(agent.agent_id, command_id, "running")
    server.kill()
    open_gate(tmp_path)
    await until_written(done)  # 9 MB were printed to nobody
    server.start()
    ended = await api.wait_for_command(agent.agent_id, command_id)
    assert (ended["status"], ended["truncated"]) == ("succeeded", True)
    assert ended["stdout_bytes"] == 9_000_000 + len("begin\nend\n")
    assert ended["output"].endswith("10999999\n11000000\n")
    async with asyncio.timeout(30), api.sse(f"/api/agents/{agent.agent_id}/commands/{command_id}/stream") as stream:
        events = [event async for event in stream]
    missing = sum(event.json()["count"] for event in events if event.event == "gap")
    shown = sum(len(event.json()["text"]) for event in events if event.event == "output")
    assert missing > 7_000_000
    assert missing + shown == ended["stdout_bytes"]


async def test_what_the_server_stored_outlives_its_death(
    start_server: StartServer, start_agent: StartAgent, open_api: OpenApi, tmp_path: Path
) -> None:
    server = start_server()
    api = await open_api(server)
    agent = await start_agent(api)
    await api.post("/api/users", {"username": "ada", "password": ADMIN_PASSWORD, "role": "operator"}, status=201)
    finished = await api.run(agent.agent_id, "echo kept; exit 7")
    agent.stop()
    ids = [await api.submit(agent.agent_id, f"echo {number} >> {tmp_path}/ran; sleep 0.1") for number in range(5)]
    never = await api.submit(agent.agent_id, f"touch {tmp_path}/never")
    await api.post(f"/api/agents/{agent.agent_id}/commands/{never}/cancel")

    server.kill()
    server.start()
    assert (await api.get("/api/me"))["username"] == "admin"
    ada = await open_api(server, "ada")
    assert await ada.get(f"/api/agents/{agent.agent_id}/commands/{finished['command_id']}") == finished
    listed = await ada.get(f"/api/agents/{agent.agent_id}/commands")
    assert [command["status"] for command in listed] == ["cancelled"] + ["queued"] * 5 + ["failed"]
    agent.start()
    for command_id in ids:
        assert (await ada.wait_for_command(agent.agent_id, command_id))["status"] == "succeeded"
    assert sorted((tmp_path / "ran").read_text().split()) == ["0", "1", "2", "3", "4"]
    assert not (tmp_path / "never").exists()


async def test_no_command_runs_twice_however_often_the_server_is_killed(
    start_server: StartServer, start_agent: StartAgent, open_api: OpenApi, tmp_path: Path
) -> None:
    server = start_server()
    api = await open_api(server)
    agent = await start_agent(api)
    canary = tmp_path / "canary"
    accepted: list[tuple[int, str]] = []
    is_over = asyncio.Event()

    async def submit_all(first: int) -> None:
        number = first
        while not is_over.is_set():
            try:
                command_id = await api.submit(agent.agent_id, f"echo {number} >> {canary}")
                accepted.append((number, command_id))
            except (ClientError, TimeoutError):
                await asyncio.sleep(0.05)  # not answered: it may have been stored or not
            number += 4

    async def kill_some() -> None:
        for round_number in range(4):
            enough = len(accepted) + 10 + round_number

            async def has_enough(enough: int = enough) -> bool:
                return len(accepted) > enough

            await eventually(has_enough)
            server.kill()
            server.start()
        is_over.set()

    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        for first in range(4):
            group.create_task(submit_all(first))
        group.create_task(kill_some())
    for _, command_id in accepted:
        ended = await api.wait_for_command(agent.agent_id, command_id, timeout_seconds=60)
        assert ended["status"] == "succeeded"
    executions = Counter(map(int, canary.read_text().split()))
    assert {number: executions[number] for number, _ in accepted} == {number: 1 for number, _ in accepted}
    assert max(executions.values()) == 1


# ---------------------------------------------------------------- the agent goes away


async def test_a_command_of_a_killed_agent_is_lost_and_the_next_one_works(
    start_server: StartServer, start_agent: StartAgent, open_api: OpenApi, tmp_path: Path
) -> None:
    api = await open_api(start_server())
    agent = await start_agent(api)
    command_id = await api.submit(agent.agent_id, gated(tmp_path))
    await until_running(tmp_path)
    await api.wait_for_command(agent.agent_id, command_id, "running")
    agent.kill()
    await api.wait_for_agent(agent.agent_id, "offline")
    waiting = await api.submit(agent.agent_id, "echo waited")
    agent.start()
    lost = await api.wait_for_command(agent.agent_id, command_id)
    assert (lost["status"], lost["exit_code"], lost["output"]) == ("lost", None, "begin\n")
    assert lost["stdout_bytes"] == len("begin\n")
    assert "restarted" in lost["error"]
    assert (await api.wait_for_command(agent.agent_id, waiting))["output"] == "waited\n"
    assert (await api.run(agent.agent_id, "echo works"))["output"] == "works\n"
    open_gate(tmp_path)
    assert runs(tmp_path) == 1


async def test_an_agent_that_is_stopped_ends_its_commands_and_says_so(
    start_server: StartServer, start_agent: StartAgent, open_api: OpenApi
) -> None:
    api = await open_api(start_server())
    agent = await start_agent(api)
    marker = f"8{time.time_ns()}"
    command_id = await api.submit(agent.agent_id, f"trap '' TERM; echo begun; setsid sleep {marker}; sleep {marker}")
    await until_alive(f"sleep\0{marker}")
    await api.wait_for_command(agent.agent_id, command_id, "running")
    assert agent.stop() == 0
    assert living_pids(marker) == []
    ended = await api.get(f"/api/agents/{agent.agent_id}/commands/{command_id}")
    assert (ended["status"], ended["exit_code"], ended["output"]) == ("interrupted", None, "begun\n")
    assert "stopped" in ended["error"]
    await api.wait_for_agent(agent.agent_id, "offline")
    agent.start()
    assert (await api.run(agent.agent_id, "echo works"))["output"] == "works\n"


async def test_a_frozen_agent_goes_on_where_it_was(
    start_server: StartServer, start_agent: StartAgent, open_api: OpenApi, tmp_path: Path
) -> None:
    api = await open_api(start_server())
    agent = await start_agent(api)
    running = await api.submit(agent.agent_id, gated(tmp_path))
    await until_running(tmp_path)
    agent.pause()
    offered = await api.submit(agent.agent_id, "echo offered")
    cancelled = await api.submit(agent.agent_id, f"sleep 1; touch {tmp_path}/never")
    await api.post(f"/api/agents/{agent.agent_id}/commands/{cancelled}/cancel", status=202)
    open_gate(tmp_path)
    assert (await api.get(f"/api/agents/{agent.agent_id}/commands/{offered}"))["status"] == "offered"
    agent.resume()
    assert (await api.wait_for_command(agent.agent_id, running))["output"] == "begin\nend\n"
    assert (await api.wait_for_command(agent.agent_id, offered))["output"] == "offered\n"
    assert (await api.wait_for_command(agent.agent_id, cancelled))["status"] == "cancelled"
    assert not (tmp_path / "never").exists()


# ---------------------------------------------------------------- the link breaks


@pytest.mark.parametrize("how", ["reset", "late"])
async def test_a_command_outlives_a_link_that_breaks(
    start_server: StartServer, start_agent: StartAgent, open_api: OpenApi, tmp_path: Path, how: str
) -> None:
    server = start_server()
    api = await open_api(server)
    async with CuttableLink(server.url) as link:
        agent = await start_agent(api, server_url=link.url)
        running = await api.submit(agent.agent_id, gated(tmp_path))
        await until_running(tmp_path)
        link.cut()
        offered = await api.submit(agent.agent_id, f"echo run >> {tmp_path}/offered.runs; echo offered")
        open_gate(tmp_path)
        if how == "reset":
            link.reset()
            link.heal()
        else:
            link.heal(resume=True)
        assert (await api.wait_for_command(agent.agent_id, running))["output"] == "begin\nend\n"
        assert (await api.wait_for_command(agent.agent_id, offered))["output"] == "offered\n"
        assert (runs(tmp_path), runs(tmp_path, "offered")) == (1, 1)
        agent.stop()


@pytest.mark.timeout(240)
async def test_a_link_that_falls_silent_is_found_and_replaced(
    start_server: StartServer, start_agent: StartAgent, open_api: OpenApi, tmp_path: Path
) -> None:
    """Takes the 60 s of silence that the protocol allows."""
    server = start_server()
    api = await open_api(server)
    async with CuttableLink(server.url) as link:
        agent = await start_agent(api, server_url=link.url)
        running = await api.submit(agent.agent_id, gated(tmp_path), timeout=600)
        await until_running(tmp_path)
        await api.wait_for_command(agent.agent_id, running, "running")
        link.cut()
        offered = await api.submit(agent.agent_id, f"echo run >> {tmp_path}/offered.runs; echo offered")
        open_gate(tmp_path)
        assert (await api.get(f"/api/agents/{agent.agent_id}/commands/{running}"))["status"] == "running"
        await api.wait_for_agent(agent.agent_id, "stale", timeout_seconds=100)
        link.heal()
        await api.wait_for_agent(agent.agent_id, "online", timeout_seconds=100)
        assert (await api.wait_for_command(agent.agent_id, running))["output"] == "begin\nend\n"
        assert (await api.wait_for_command(agent.agent_id, offered))["output"] == "offered\n"
        assert (runs(tmp_path), runs(tmp_path, "offered")) == (1, 1)
        agent.stop()


# ---------------------------------------------------------------- keys


async def test_deleting_an_agent_closes_its_socket_and_refuses_its_key(
    start_server: StartServer, start_agent: StartAgent, open_api: OpenApi, tmp_path: Path
) -> None:
    api = await open_api(start_server())
    agent = await start_agent(api)
    other = await start_agent(api, "web-02")
    command_id = await api.submit(agent.agent_id, gated(tmp_path))
    await until_running(tmp_path)
    path = f"/api/agents/{agent.agent_id}"
    async with asyncio.timeout(20), api.sse(f"{path}/commands/{command_id}/stream") as events:
        assert (await anext(events)).event == "status"
        assert await api.delete(path) == {"status": "deleted"}
        assert [event async for event in events][-1].event == "end"
    await until_written(agent.log, "revoked the agent's key")
    await api.get(path, status=404)
    await api.get(f"{path}/commands/{command_id}", status=404)
    key = agent.key_file.read_text().strip()
    await api.call("GET", "/api/agents/connect", status=401, headers={"X-Agent-Key": key}, token=None)
    agent.stop()
    agent.start()
    await until_written(agent.log, "HTTP 401")
    open_gate(tmp_path)
    assert (await api.run(other.agent_id, "echo works"))["output"] == "works\n"


async def test_a_key_is_rotated_without_downtime(
    start_server: StartServer, start_agent: StartAgent, open_api: OpenApi
) -> None:
    api = await open_api(start_server())
    agent = await start_agent(api)
    path = f"/api/agents/{agent.agent_id}"
    old = agent.key_file.read_text().strip()
    new = (await api.post(f"{path}/key"))["key"]
    assert new != old
    assert (await api.run(agent.agent_id, "echo old"))["output"] == "old\n"
    agent.kill()
    agent.start()  # the old key still lets it in
    assert (await api.run(agent.agent_id, "echo old"))["output"] == "old\n"
    agent.key_file.write_text(new)
    agent.stop()
    agent.start()
    assert (await api.run(agent.agent_id, "echo new"))["output"] == "new\n"
    await api.call("GET", "/api/agents/connect", status=401, headers={"X-Agent-Key": old}, token=None)


async def test_of_two_agents_with_one_key_the_newer_counts_and_they_do_not_fight(
    start_server: StartServer, start_agent: StartAgent, open_api: OpenApi, tmp_path: Path
) -> None:
    server = start_server()
    api = await open_api(server)
    first = await start_agent(api)
    command_id = await api.submit(first.agent_id, gated(tmp_path))
    await until_running(tmp_path)
    key = first.key_file.read_text().strip()
    with AgentProcess(tmp_path / "second", server_url=api.url, agent_id=first.agent_id, key=key) as second:
        await until_written(first.log, "another agent has connected with the same key")
        assert (await api.wait_for_command(first.agent_id, command_id))["status"] == "lost"
        for number in range(5):
            assert (await api.run(first.agent_id, f"echo {number} >> {tmp_path}/ran; echo $PPID"))["output"] == (
                f"{second.pid}\n"
            )
        assert connections(server, first) == 2
    assert (tmp_path / "ran").read_text().split() == ["0", "1", "2", "3", "4"]
    open_gate(tmp_path)
    first.stop()
    assert runs(tmp_path) == 1


def connections(server: ServerProcess, agent: AgentProcess) -> int:
    return server.log_text.count(f"agent {agent.agent_id} connected from")


async def test_the_history_of_metrics_outlives_the_server(
    start_server: StartServer, start_agent: StartAgent, open_api: OpenApi
) -> None:
    server = start_server()
    api = await open_api(server)
    agent = await start_agent(api)

    async def history(client: Api) -> list[dict[str, float]]:
        points: list[dict[str, float]] = (await client.get(f"/api/agents/{agent.agent_id}/metrics"))["points"]
        return points

    assert await eventually(lambda: history(api))
    agent.stop()
    server.stop()
    server.start()
    after = await history(api)
    assert after
    assert 0 <= after[-1]["cpu_percent"] <= 100
