"""Server, agent and link fail while commands run: what the API then tells is true, and all goes on by itself."""

import asyncio
import os
import signal
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientError
from tests.conftest import OpenApi, StartAgent, StartServer
from tests.support.api import Api
from tests.support.commands import fetch_output, living_pids, until_alive, until_written
from tests.support.eventually import eventually
from tests.support.link import CuttableLink
from tests.support.processes import ADMIN_PASSWORD, AgentProcess, ServerProcess

from fleetwire_server.storage.backup import write_backup


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
    gates = [tmp_path / name for name in ("small", "large")]
    for gate in gates:
        gate.mkdir()
    printing = ("seq 10000001 11000000", "seq 100000001 110000000")  # 9 MB and 100 MB
    commands = [
        await api.submit(agent.agent_id, f"{gated(gate)}; {text}; touch {gate}/done")
        for gate, text in zip(gates, printing, strict=True)
    ]
    for gate, command_id in zip(gates, commands, strict=True):
        await until_running(gate)
        await api.wait_for_command(agent.agent_id, command_id, "running")
    server.kill()
    for gate in gates:
        open_gate(gate)
        await until_written(gate / "done")  # all of it was printed to nobody
    server.start()
    small, large = [await api.wait_for_command(agent.agent_id, command_id) for command_id in commands]

    frame = len("begin\nend\n")
    assert (small["status"], small["stdout_bytes"]) == ("succeeded", 9_000_000 + frame)
    whole = await fetch_output(api, agent.agent_id, small["command_id"])  # it waited on the host's disk
    assert whole == b"begin\nend\n" + b"".join(b"%d\n" % number for number in range(10_000_001, 11_000_001))

    assert (large["status"], large["truncated"]) == ("succeeded", True)
    assert large["stdout_bytes"] == 100_000_000 + frame
    assert large["output"].endswith("109999999\n110000000\n")
    path = f"/api/agents/{agent.agent_id}/commands/{large['command_id']}/stream"
    async with asyncio.timeout(30), api.sse(path) as stream:
        events = [event async for event in stream]
    missing = sum(event.json()["count"] for event in events if event.event == "gap")
    shown = sum(len(event.json()["text"]) for event in events if event.event == "output")
    assert missing > 60_000_000
    assert missing + shown == large["stdout_bytes"]


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


@pytest.mark.parametrize("how", ["killed", "stopped"])
async def test_a_command_outlives_its_agent(
    start_server: StartServer, start_agent: StartAgent, open_api: OpenApi, tmp_path: Path, how: str
) -> None:
    api = await open_api(start_server())
    agent = await start_agent(api)
    command_id = await api.submit(agent.agent_id, f"echo $$; {gated(tmp_path)}; echo $$; exit 3")
    await until_running(tmp_path)
    await api.wait_for_command(agent.agent_id, command_id, "running")
    if how == "killed":
        agent.kill()
    else:
        assert agent.stop() == 0
    await api.wait_for_agent(agent.agent_id, "offline")
    waiting = await api.submit(agent.agent_id, "echo waited")
    assert (await api.get(f"/api/agents/{agent.agent_id}/commands/{command_id}"))["status"] == "running"
    agent.start()
    assert (await api.wait_for_command(agent.agent_id, waiting))["output"] == "waited\n"
    assert (await api.get(f"/api/agents/{agent.agent_id}/commands/{command_id}"))["status"] == "running"
    open_gate(tmp_path)
    ended = await api.wait_for_command(agent.agent_id, command_id)
    pid = ended["output"].split("\n")[0]
    assert (ended["status"], ended["exit_code"]) == ("failed", 3)
    assert ended["output"] == f"{pid}\nbegin\nend\n{pid}\n"  # one process, and all it said
    assert not ended["late"]
    assert runs(tmp_path) == 1


async def test_a_command_that_ends_while_its_agent_is_away_is_told_of_afterwards(
    start_server: StartServer, start_agent: StartAgent, open_api: OpenApi, tmp_path: Path
) -> None:
    api = await open_api(start_server())
    agent = await start_agent(api)
    command_id = await api.submit(agent.agent_id, f"{gated(tmp_path)}; seq 100000; touch {tmp_path}/done")
    await until_running(tmp_path)
    agent.kill()
    open_gate(tmp_path)
    await until_written(tmp_path / "done")
    agent.start()
    ended = await api.wait_for_command(agent.agent_id, command_id)
    assert (ended["status"], ended["stdout_bytes"]) == ("succeeded", len("begin\nend\n") + 588_895)
    assert not ended["late"]
    assert runs(tmp_path) == 1


async def test_a_command_whose_runner_is_killed_is_interrupted_and_leaves_nothing(
    start_server: StartServer, start_agent: StartAgent, open_api: OpenApi
) -> None:
    api = await open_api(start_server())
    agent = await start_agent(api)
    marker = f"8{time.time_ns()}"
    command_id = await api.submit(agent.agent_id, f"trap '' TERM; echo begun; setsid sleep {marker}; sleep {marker}")
    await until_alive(f"sleep\0{marker}")
    await api.wait_for_command(agent.agent_id, command_id, "running")
    (runner,) = living_pids(f"/{command_id}.1")  # its command line names the command's directory
    os.kill(runner, signal.SIGKILL)
    ended = await api.wait_for_command(agent.agent_id, command_id)
    assert (ended["status"], ended["exit_code"], ended["output"]) == ("interrupted", None, "begun\n")
    assert "watched over the command was killed" in ended["error"]
    assert living_pids(marker) == []
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


# ---------------------------------------------------------------- the server is restored from a backup


async def test_what_ended_after_the_backup_is_told_as_it_was(
    start_server: StartServer, start_agent: StartAgent, open_api: OpenApi, tmp_path: Path
) -> None:
    server = start_server()
    api = await open_api(server)
    agent = await start_agent(api)

    async def submit(name: str, end: str = "", **fields: float) -> str:
        command = f"echo run >> {tmp_path}/{name}.runs; echo {name}{end}"
        body = {"type": "shell", "params": {"command": command}, **fields}
        return str((await api.post(f"/api/agents/{agent.agent_id}/commands", body))["command_id"])

    async def show(command_id: str) -> Any:
        return await api.get(f"/api/agents/{agent.agent_id}/commands/{command_id}")

    running = await api.submit(agent.agent_id, f"{gated(tmp_path)}; exit 3", timeout=100)
    await api.wait_for_command(agent.agent_id, running, "running")
    agent.stop()
    waiting = await submit("waiting")
    cancelled = await submit("cancelled")
    expiring = await submit("expiring", expires_in=20)
    write_backup(f"sqlite:///{server.data_dir}/fleetwire.db", tmp_path / "copy.db")

    agent.start()
    open_gate(tmp_path)
    assert (await api.wait_for_command(agent.agent_id, running))["exit_code"] == 3
    for command_id in (waiting, cancelled, expiring):
        assert (await api.wait_for_command(agent.agent_id, command_id))["status"] == "succeeded"
    agent.stop()
    server.stop()
    for suffix in ("", "-wal", "-shm"):
        (server.data_dir / f"fleetwire.db{suffix}").unlink(missing_ok=True)
    (tmp_path / "copy.db").rename(server.data_dir / "fleetwire.db")
    server.start()

    assert (await show(running))["status"] == "running"  # as far as is known without the agent
    never = await submit("never")
    for command_id in (cancelled, never):
        answer = await api.post(f"/api/agents/{agent.agent_id}/commands/{command_id}/cancel", status=200)
        assert (answer["status"], answer["late"]) == ("cancelled", False)
    assert (await api.wait_for_command(agent.agent_id, expiring))["status"] == "expired"
    agent.start()
    ended = await api.wait_for_command(agent.agent_id, running)
    assert (ended["status"], ended["exit_code"], ended["late"]) == ("failed", 3, False)
    assert (ended["stdout_bytes"], ended["truncated"]) == (len("begin\nend\n"), True)
    assert (await api.wait_for_command(agent.agent_id, waiting))["status"] == "succeeded"
    for command_id in (cancelled, expiring):
        late = await eventually(partial(show, command_id), lambda command: bool(command["late"]))
        assert (late["status"], late["exit_code"], late["error"]) == ("succeeded", 0, None)
    assert ((await show(never))["status"], (await show(never))["late"]) == ("cancelled", False)
    assert "was this server restored from a backup?" in server.log_text
    assert [runs(tmp_path, name) for name in ("command", "waiting", "cancelled", "expiring")] == [1, 1, 1, 1]
    assert not (tmp_path / "never.runs").exists()


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
    with AgentProcess(tmp_path / "second", server_url=api.url, agent_id=first.agent_id, key=key):
        await until_written(first.log, "another agent has connected with the same key")
        assert (await api.wait_for_command(first.agent_id, command_id))["status"] == "lost"
        for number in range(5):
            done = await api.run(first.agent_id, f"echo {number} >> {tmp_path}/ran")
            assert done["status"] == "succeeded"
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
