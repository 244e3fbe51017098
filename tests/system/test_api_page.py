"""The API's page, line by line: every field, status code and body, for every role."""

import asyncio
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from aiohttp import FormData
from tests.conftest import Fleet, OpenApi, StartAgent, StartServer
from tests.support.api import Api, Event
from tests.support.callers import expire_session
from tests.support.eventually import eventually
from tests.support.processes import ADMIN_PASSWORD, ServerProcess

from fleetwire_server.core.tokens import hash_token

UNKNOWN = "agent_0000000000000000"
REPORT = {
    "hostname": "web-01",
    "os": "Ubuntu 24.04",
    "cpu_percent": 12.4,
    "mem_percent": 45.0,
    "disk_percent": 62.0,
    "uptime_s": 86400,
}
LIST_FIELDS = {
    "id": str,
    "label": str,
    "hostname": str,
    "ip": str,
    "os": str,
    "version": str,
    "status": str,
    "last_seen": int,
    "tags": list,
}
USER_PASSWORD = "eleven purple bicycles"


def os_name() -> str:
    lines = Path("/etc/os-release").read_text().splitlines()
    return next(line.partition("=")[2].strip('"') for line in lines if line.startswith("PRETTY_NAME="))


# ---------------------------------------------------------------- list and detail


async def test_list_is_as_on_the_page(fleet: Fleet, api: Api) -> None:
    agents = await api.get("/api/agents")
    agent = next(agent for agent in agents if agent["id"] == fleet.agent_id)
    assert {name: type(value) for name, value in agent.items()} == LIST_FIELDS
    assert (agent["label"], agent["tags"], agent["status"]) == ("web-01", ["web", "production"], "online")
    assert (agent["hostname"], agent["ip"], agent["os"]) == (socket.gethostname(), "127.0.0.1", os_name())
    assert abs(agent["last_seen"] - time.time()) < 60


async def test_detail_is_the_list_item_with_metrics(fleet: Fleet, api: Api) -> None:
    agent = await eventually(lambda: api.get(fleet.agent_path), lambda agent: agent["metrics"] is not None)
    assert {name: type(agent[name]) for name in LIST_FIELDS} == LIST_FIELDS
    metrics = agent["metrics"]
    for name in ("cpu_percent", "mem_percent", "disk_percent"):
        assert 0 <= metrics[name] <= 100
    assert abs(metrics["sampled_at"] - time.time()) < 60
    assert agent["uptime_s"] == metrics["uptime_s"] > 0
    assert agent["agent"]["boot_id"] == Path("/proc/sys/kernel/random/boot_id").read_text().strip()


async def test_an_agent_that_never_came_is_pending(http_page: ServerProcess, page: Api) -> None:
    agent_id, _ = await page.enrol("never", "db")
    agent = await page.get(f"/api/agents/{agent_id}")
    assert (agent["status"], agent["last_seen"], agent["metrics"], agent["tags"]) == ("pending", None, None, ["db"])


async def test_list_is_sorted_and_can_be_filtered(page: Api) -> None:
    for label, tags in (("filter-Beta", ["f1", "f2"]), ("filter-alpha", ["f1"]), ("filter-gamma", [])):
        await page.enrol(label, *tags)

    async def labels(**query: str) -> list[str]:
        return [agent["label"] for agent in await page.call("GET", "/api/agents", params=query)]

    assert await labels(q="FILTER-") == ["filter-alpha", "filter-Beta", "filter-gamma"]
    assert await labels(tag="f1") == ["filter-alpha", "filter-Beta"]
    assert await labels(tag="f2", q="beta", status="pending") == ["filter-Beta"]
    assert await labels(tag="f1", status="online") == []
    refused = await page.call("GET", "/api/agents?status=asleep", status=400)
    assert all(word in refused["detail"] for word in ("pending", "online", "stale", "offline"))


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "", None),
        ("DELETE", "", None),
        ("PATCH", "", {"label": "x"}),
        ("POST", "/key", None),
        ("POST", "/commands", {"type": "shell", "params": {"command": "true"}}),
        ("GET", "/commands", None),
        ("GET", "/commands/cmd_00000000000000000000", None),
        ("GET", "/commands/cmd_00000000000000000000/stream", None),
        ("GET", "/commands/cmd_00000000000000000000/output", None),
        ("POST", "/commands/cmd_00000000000000000000/cancel", None),
        ("GET", "/metrics", None),
        ("GET", "/stream/metrics", None),
        ("GET", "/stream/logs?source=journald", None),
        ("GET", "/files?path=/etc/hostname", None),
    ],
)
async def test_an_unknown_agent_is_not_found(method: str, path: str, body: object, page: Api) -> None:
    problem = await page.call(method, f"/api/agents/{UNKNOWN}{path}", body, status=404)
    assert problem["code"] == "not_found"


async def test_upload_to_an_unknown_agent_is_not_found(page: Api) -> None:
    form = FormData({"dest": "/tmp/x"})
    form.add_field("file", b"x", filename="x")
    async with page.open("POST", f"/api/agents/{UNKNOWN}/files", data=form) as response:
        assert response.status == 404


# ---------------------------------------------------------------- report


async def test_a_report_makes_its_agent_online(page: Api) -> None:
    agent_id, key = await page.enrol("reporting")
    await page.submit(agent_id, "true")
    report = f"/api/agents/{agent_id}/report"
    answer = await page.call("POST", report, REPORT, headers={"X-Agent-Key": key}, token=None)
    assert answer == {"status": "ok", "pending_commands": 1}
    agent = await page.get(f"/api/agents/{agent_id}")
    assert (agent["status"], agent["hostname"], agent["os"]) == ("online", "web-01", "Ubuntu 24.04")
    assert {name: agent["metrics"][name] for name in REPORT if name in agent["metrics"]} == {
        name: value for name, value in REPORT.items() if name not in ("hostname", "os")
    }


async def test_a_report_needs_the_key_of_its_agent(page: Api) -> None:
    agent_id, key = await page.enrol("reported")
    _, other_key = await page.enrol("other")
    report = f"/api/agents/{agent_id}/report"
    wrong = key[:-1] + ("A" if key[-1] != "A" else "B")
    await page.call("POST", report, REPORT, status=401, token=None)
    await page.call("POST", report, REPORT, status=401)  # an admin is no agent
    await page.call("POST", report, REPORT, status=401, headers={"X-Agent-Key": wrong}, token=None)
    await page.call("POST", report, REPORT, status=403, headers={"X-Agent-Key": other_key}, token=None)
    assert (await page.get(f"/api/agents/{agent_id}"))["status"] == "pending"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cpu_percent", 101),
        ("mem_percent", -1),
        ("disk_percent", "62"),
        ("uptime_s", 1.5),
        ("hostname", None),
        ("os", "x" * 256),
    ],
)
async def test_a_report_out_of_bounds_is_refused(field: str, value: object, page: Api) -> None:
    agent_id, key = await page.enrol("odd")
    body = REPORT | {field: value}
    headers = {"X-Agent-Key": key}
    problem = await page.call("POST", f"/api/agents/{agent_id}/report", body, status=400, headers=headers, token=None)
    assert problem["detail"].startswith(field)


# ---------------------------------------------------------------- commands


async def test_command_is_queued_run_and_listed(fleet: Fleet, api: Api) -> None:
    body = {"type": "shell", "params": {"command": "df -h", "timeout": 30}}
    answer = await api.post(f"{fleet.agent_path}/commands", body)
    assert set(answer) == {"command_id", "status"}
    assert answer["status"] == "queued"
    command = await api.wait_for_command(fleet.agent_id, answer["command_id"])
    assert (command["status"], command["exit_code"], command["params"]) == ("succeeded", 0, body["params"])
    assert command["created_by"] == "admin"
    listed = (await api.get(f"{fleet.agent_path}/commands"))[0]
    assert (listed["command_id"], listed["status"], listed["output"]) == (
        answer["command_id"],
        "succeeded",
        command["output"],
    )
    assert "Filesystem" in listed["output"]


async def test_history_has_the_last_hundred_newest_first(page: Api) -> None:
    agent_id, _ = await page.enrol("busy")
    ids = [await page.submit(agent_id, f"echo {number}") for number in range(103)]
    assert [command["command_id"] for command in await page.get(f"/api/agents/{agent_id}/commands")] == ids[:2:-1]


# ---------------------------------------------------------------- streams


async def test_metrics_come_at_once_and_every_five_seconds(fleet: Fleet, api: Api) -> None:
    await eventually(lambda: api.get(fleet.agent_path), lambda agent: agent["metrics"] is not None)
    async with Api(fleet.server.url) as anyone, asyncio.timeout(40):
        started = time.monotonic()
        async with anyone.sse(f"{fleet.agent_path}/stream/metrics", token=fleet.token) as events:
            snapshots = [(await anext(events)).json()]
            assert time.monotonic() - started < 4
            snapshots += [(await anext(events)).json() for _ in range(2)]
    times = [snapshot["sampled_at"] for snapshot in snapshots]
    assert 3 < times[2] - times[1] < 15  # by the agent's clock
    assert all({"cpu_percent", "mem_percent", "disk_percent", "uptime_s"} <= set(snapshot) for snapshot in snapshots)


async def test_log_stream_opens_with_the_token_of_the_page(fleet: Fleet, tmp_path: Path) -> None:
    log = tmp_path / "app.log"
    log.write_text("one\ntwo\n")
    async with Api(fleet.server.url) as anyone, asyncio.timeout(20):
        path = f"{fleet.agent_path}/stream/logs"
        async with anyone.open(
            "GET", path, params={"source": "file", "path": str(log), "token": fleet.token}
        ) as response:
            assert response.status == 200
            assert response.content_type == "text/event-stream"
            await response.content.readuntil(b"data: two\n")


async def test_a_ticket_opens_one_stream_once(page: Api, http_page: ServerProcess) -> None:
    answer = await page.post("/api/stream-tickets")
    assert answer == {"ticket": answer["ticket"], "expires_in": 60}
    async with Api(http_page.url) as anyone:
        await anyone.get("/api/agents", status=401, ticket=answer["ticket"])  # is not used up by what is no stream
        async with anyone.sse("/api/events", ticket=answer["ticket"]):
            pass
        await anyone.get("/api/events", status=401, ticket=answer["ticket"])


async def test_a_ticket_is_good_for_a_minute(page: Api, http_page: ServerProcess) -> None:
    ticket = (await page.post("/api/stream-tickets"))["ticket"]
    with closing(sqlite3.connect(http_page.data_dir / "fleetwire.db", timeout=10)) as connection:
        (expires_at,) = connection.execute(
            "SELECT expires_at FROM stream_tickets WHERE ticket_hash = ?", (hash_token(ticket),)
        ).fetchone()
        assert abs(expires_at - time.time() - 60) < 30
        connection.execute("UPDATE stream_tickets SET expires_at = ?", (time.time() - 1,))
        connection.commit()
    async with Api(http_page.url) as anyone:
        await anyone.get("/api/events", status=401, ticket=ticket)


# ---------------------------------------------------------------- files


async def test_a_file_comes_down_and_goes_up(fleet: Fleet, api: Api, tmp_path: Path) -> None:
    source, dest = tmp_path / "down", tmp_path / "up"
    source.write_bytes(bytes(range(256)) * 1000)
    async with api.open("GET", f"{fleet.agent_path}/files", params={"path": str(source)}) as response:
        assert (response.status, response.content_type) == (200, "application/octet-stream")
        assert await response.read() == source.read_bytes()
    form = FormData()
    form.add_field("file", source.read_bytes(), filename="x")
    form.add_field("dest", str(dest))
    async with api.open("POST", f"{fleet.agent_path}/files", data=form) as response:
        assert response.status == 200
        assert set(await response.json()) == {"path", "bytes", "sha256"}
    assert dest.read_bytes() == source.read_bytes()


# ---------------------------------------------------------------- delete


def tables_with_rows(server: ServerProcess, agent_id: str, command_id: str) -> set[str]:
    """Return the tables that still know the agent or its command."""
    with closing(sqlite3.connect(server.data_dir / "fleetwire.db", timeout=10)) as connection:
        names = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {
            name
            for name in names
            for row in connection.execute(f"SELECT * FROM {name}")
            if {agent_id, command_id} & {value for value in row if isinstance(value, str)}
        }


AUDITED = {"audit"}
"""Who enrolled and who deleted the agent stays known."""


async def test_delete_removes_everything(start_server: StartServer, start_agent: StartAgent, open_api: OpenApi) -> None:
    server = start_server()
    api = await open_api(server)
    agent = await start_agent(api)
    path = f"/api/agents/{agent.agent_id}"
    command = await api.run(agent.agent_id, "echo hello")
    known = tables_with_rows(server, agent.agent_id, command["command_id"])
    assert {"agents", "agent_keys", "commands", "command_output"} <= known
    async with asyncio.timeout(20), api.sse(f"{path}/stream/metrics") as events:
        assert await api.delete(path) == {"status": "deleted"}
        assert [event async for event in events][-1].json() == {"reason": "the agent was deleted"}
    assert tables_with_rows(server, agent.agent_id, command["command_id"]) == AUDITED
    assert await api.get("/api/agents") == []
    await api.delete(path, status=404)
    key = agent.key_file.read_text().strip()
    await api.call("POST", f"{path}/report", REPORT, headers={"X-Agent-Key": key}, status=401, token=None)
    server.stop()  # what memory still held of the agent is stored now, if anything is
    assert tables_with_rows(server, agent.agent_id, command["command_id"]) == AUDITED


# ---------------------------------------------------------------- logins and users


async def test_login_answers_with_token_role_and_name(page: Api, http_page: ServerProcess) -> None:
    async with Api(http_page.url) as anyone:
        answer = await anyone.post("/api/login", {"username": "admin", "password": ADMIN_PASSWORD})
        assert (answer["role"], answer["username"]) == ("admin", "admin")
        assert abs(answer["expires_at"] - time.time() - 24 * 3600) < 60
        await anyone.post("/api/login", {"username": "admin", "password": "wrong"}, status=401)
        await anyone.post("/api/login", {"username": "nobody", "password": "wrong"}, status=401)
        anyone.token = answer["token"]
        me = await anyone.get("/api/me")
        assert me == {"username": "admin", "role": "admin", "expires_at": answer["expires_at"]}
        await anyone.post("/api/logout")
        await anyone.get("/api/me", status=401)
    await page.get("/api/me")  # another login of the same user


async def test_users_are_added_listed_changed_and_removed(page: Api, http_page: ServerProcess) -> None:
    body = {"username": "eve", "password": USER_PASSWORD, "role": "viewer"}
    added = await page.post("/api/users", body, status=201)
    assert {name: added[name] for name in ("username", "role")} == {"username": "eve", "role": "viewer"}
    assert "password" not in str(await page.get("/api/users"))
    await page.post("/api/users", body, status=409)
    async with Api(http_page.url) as eve:
        await eve.login("eve", USER_PASSWORD)
        assert (await page.patch("/api/users/eve", {"role": "operator"}))["role"] == "operator"
        await eve.get("/api/me", status=401)
        await eve.login("eve", USER_PASSWORD)
        await page.patch("/api/users/eve", {"password": "twelve purple bicycles"})
        await eve.get("/api/me", status=401)
        await eve.post("/api/login", {"username": "eve", "password": USER_PASSWORD}, status=401)
    await page.delete("/api/users/eve")
    await page.delete("/api/users/eve", status=404)
    await page.patch("/api/users/eve", {"role": "viewer"}, status=404)


async def test_the_last_admin_is_kept(page: Api) -> None:
    assert (await page.delete("/api/users/admin", status=409))["code"] == "conflict"
    assert (await page.patch("/api/users/admin", {"role": "viewer"}, status=409))["code"] == "conflict"


async def test_sessions_outlive_the_server(start_server: StartServer, open_api: OpenApi) -> None:
    server = start_server()
    api = await open_api(server)
    server.stop()
    server.start()
    assert (await api.get("/api/me"))["username"] == "admin"
    server.kill()
    server.start()
    assert (await api.get("/api/me"))["username"] == "admin"


async def test_failed_logins_are_limited_by_address_and_by_account(start_server: StartServer) -> None:
    server = start_server(
        environment={"FLEETWIRE_LOGIN_FAILURES_PER_MINUTE": "3", "FLEETWIRE_TRUSTED_PROXIES": "127.0.0.1"}
    )

    async def log_in(address: str, username: str, password: str = "wrong") -> tuple[int, str | None]:
        body = {"username": username, "password": password}
        headers = {"X-Forwarded-For": address}
        async with Api(server.url) as api, api.open("POST", "/api/login", json=body, headers=headers) as response:
            return response.status, response.headers.get("Retry-After")

    for _ in range(3):
        assert await log_in("192.0.2.1", "bob") == (401, None)
    status, retry_after = await log_in("192.0.2.1", "admin", ADMIN_PASSWORD)  # the address is not heard
    assert status == 429
    assert retry_after is not None
    assert 1 <= int(retry_after) <= 60
    assert (await log_in("192.0.2.2", "bob"))[0] == 429  # nor the account, from anywhere
    assert (await log_in("192.0.2.2", "admin", ADMIN_PASSWORD))[0] == 200


async def watch(api: Api, opened: asyncio.Event) -> tuple[Event, float]:
    """Follow the fleet until the stream ends; return its last event and when it came."""
    async with api.sse("/api/events") as events:
        opened.set()
        seen = [event async for event in events]
        return seen[-1], time.monotonic()


@pytest.mark.parametrize("how", ["removed", "demoted", "removed by the command line", "expired"])
async def test_who_loses_a_role_loses_sessions_and_streams(how: str, page: Api, http_page: ServerProcess) -> None:
    name = how.replace(" ", "-")
    await page.post("/api/users", {"username": name, "password": USER_PASSWORD, "role": "operator"}, status=201)
    opened = asyncio.Event()
    async with Api(http_page.url) as user, asyncio.timeout(40), asyncio.TaskGroup() as group:
        token = await user.login(name, USER_PASSWORD)
        watching = group.create_task(watch(user, opened))
        await opened.wait()
        match how:
            case "removed":
                await page.delete(f"/api/users/{name}")
            case "demoted":
                await page.patch(f"/api/users/{name}", {"role": "viewer"})
            case "expired":
                expire_session(http_page, token)
            case _:
                command: list[str | Path] = [Path(sys.executable).parent / "fleetwire-server", "user", "remove", name]
                command += ["--data-dir", http_page.data_dir]
                await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True, timeout=30)
        lost_at = time.monotonic()
        await user.get("/api/me", status=401)
        last, ended_at = await watching
        assert (last.event, last.json()) == ("end", {"reason": "the login is over"})
        assert ended_at - lost_at < 5


# ---------------------------------------------------------------- coming and going


async def test_an_agent_that_leaves_is_offline(
    start_server: StartServer, start_agent: StartAgent, open_api: OpenApi
) -> None:
    api = await open_api(start_server())
    agent = await start_agent(api)
    agent.stop()
    gone = await api.wait_for_agent(agent.agent_id, "offline")
    assert abs(gone["last_seen"] - time.time()) < 60
    agent.start()
    await api.wait_for_agent(agent.agent_id, "online")


@pytest.fixture(scope="module")
def http_page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server without agents, for all that needs none."""
    environment = {"FLEETWIRE_LOGIN_FAILURES_PER_MINUTE": "10000"}
    with ServerProcess(tmp_path_factory.mktemp("page"), environment=environment) as server:
        yield server


@pytest.fixture
async def page(http_page: ServerProcess) -> AsyncIterator[Api]:
    async with Api(http_page.url) as api:
        await api.login("admin", ADMIN_PASSWORD)
        yield api
