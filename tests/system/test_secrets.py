"""No secret is left where somebody could find it: logs at their most talkative, the database, the process list."""

import asyncio
import os
import sqlite3
from contextlib import closing
from pathlib import Path

from tests.conftest import OpenApi, StartAgent, StartServer
from tests.support.api import Api
from tests.support.eventually import eventually
from tests.support.processes import ADMIN_PASSWORD, AgentProcess, ServerProcess
from tests.support.raw_http import open_socket, send_raw

USER_PASSWORD = "eleven-purple-bicycles"
MISTYPED_PASSWORD = "eleven-purple-bicycle5"
REFUSED_PASSWORD = "twelve-purple-bicycles"


async def live_through_a_day(server: ServerProcess, api: Api, agent: AgentProcess) -> set[str]:
    """Use each secret in each way it is used; return all there were."""
    path = f"/api/agents/{agent.agent_id}"
    key = agent.key_file.read_text().strip()
    assert api.token is not None
    secrets = {ADMIN_PASSWORD, USER_PASSWORD, MISTYPED_PASSWORD, REFUSED_PASSWORD, api.token, key}
    user = {"username": "eve", "password": USER_PASSWORD, "role": "operator"}
    await api.post("/api/users", user, status=201)
    await api.post("/api/users", user | {"password": REFUSED_PASSWORD, "role": "king"}, status=400)
    async with Api(server.url) as eve:
        secrets.add(await eve.login("eve", USER_PASSWORD))
        await eve.post("/api/login", {"username": "eve", "password": MISTYPED_PASSWORD}, status=401, token=None)
        ticket = (await eve.post("/api/stream-tickets"))["ticket"]
        secrets.add(ticket)
        assert eve.token is not None
    async with Api(server.url) as anyone:
        for query in ({"token": eve.token}, {"ticket": ticket}):
            async with asyncio.timeout(20), anyone.sse(f"{path}/stream/metrics", **query) as events:
                await anext(events)
        await anyone.get("/api/agents", status=401, token=api.token)  # at the wrong place
    command = await api.run(agent.agent_id, "env; cat /proc/$PPID/cmdline /proc/*/cmdline 2>/dev/null | tr '\\0' ' '")
    assert key not in command["output"]
    secrets.add((await api.post(f"{path}/key"))["key"])
    report = {"X-Agent-Key": key}
    await api.call("POST", f"{path}/report", {"hostname": "x"}, headers=report, status=400, token=None)
    await asyncio.to_thread(send_broken_requests, server, api.token, key)
    return secrets


def send_broken_requests(server: ServerProcess, token: str, key: str) -> None:
    send_raw(server, "GET", f"/api/nothing?token={token}&key={key}", {})
    for head in (f"GET /api/agents?token={token} HTTP/9.9", f"GET / HTTP/1.1\r\nX-Agent-Key {key}"):
        with open_socket(server) as connection:
            connection.sendall(head.encode() + b"\r\n\r\n")
            connection.recv(4096)


async def break_the_database(server: ServerProcess, api: Api, agent: AgentProcess) -> set[str]:
    """Let requests fail inside of the server, with secrets in their hands; return those of them that are new."""
    spoil(server, "ALTER TABLE stream_tickets RENAME TO lost")
    spoil(server, "UPDATE agents SET facts = 'no JSON'")
    async with Api(server.url) as anyone:
        await anyone.get("/api/events", status=503, ticket="a-ticket-to-be-lost-on-the-way")
        await api.post("/api/stream-tickets", status=503)
        problem = await api.get(f"/api/agents/{agent.agent_id}", status=500)
        assert problem["detail"] == "internal error; the server's log has more under this request id"
        assert f"request {problem['request_id']} failed" in server.log_text
        spoil(server, "UPDATE users SET role = 'king'")
        await anyone.post("/api/login", {"username": "admin", "password": ADMIN_PASSWORD}, status=500)
        await anyone.get("/api/events", status=500, token=api.token or "")
        await api.get("/api/me", status=500)
    assert "Traceback" in server.log_text
    return {"a-ticket-to-be-lost-on-the-way"}


def spoil(server: ServerProcess, statement: str) -> None:
    with closing(sqlite3.connect(server.data_dir / "fleetwire.db", timeout=10)) as connection, connection:
        connection.execute(statement)


def found_in(content: bytes, secrets: set[str]) -> set[str]:
    return {secret for secret in secrets if secret.encode() in content}


def stored_bytes(directory: Path) -> bytes:
    return b"".join(path.read_bytes() for path in directory.rglob("*") if path.is_file())


def command_lines() -> bytes:
    lines = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            lines.append((process / "cmdline").read_bytes())
        except OSError:
            continue  # it has ended meanwhile
    return b"\n".join(lines)


async def test_no_secret_is_left_behind(start_server: StartServer, start_agent: StartAgent, open_api: OpenApi) -> None:
    server = start_server(environment={"FLEETWIRE_LOG_LEVEL": "debug"})
    api = await open_api(server)
    agent = await start_agent(api, environment={"FLEETWIRE_AGENT_LOG_LEVEL": "debug"})
    await eventually(lambda: api.get(f"/api/agents/{agent.agent_id}"), lambda detail: detail["metrics"] is not None)
    secrets = await live_through_a_day(server, api, agent)
    assert found_in(stored_bytes(server.data_dir), secrets) == set()
    secrets |= await break_the_database(server, api, agent)
    key = agent.key_file.read_text().strip()
    assert found_in(command_lines(), secrets) == set()
    assert key.encode() not in Path(f"/proc/{agent.pid}/environ").read_bytes()
    for process in (server, agent):
        assert agent.agent_id in process.log_text
        assert found_in(process.log.read_bytes(), secrets) == set()
        assert "$argon2" not in process.log_text
    agent.stop()
    server.stop()
    assert found_in(stored_bytes(server.data_dir), secrets) == set()
    assert found_in(stored_bytes(agent.state_dir), secrets) == set()
    assert found_in(server.log.read_bytes() + agent.log.read_bytes(), secrets) == set()


async def test_what_holds_secrets_is_for_its_owner_only(start_server: StartServer) -> None:
    server = start_server()
    for path in (server.data_dir, *server.data_dir.rglob("*")):
        assert os.stat(path).st_mode & 0o077 == 0, path
