"""Deployments by a real server to SSH servers on this machine: answers, events, records, and its end meanwhile."""

import asyncio
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import OpenApi, StartServer
from tests.server.deploy.conftest import PRETENDER, Site, generate, running_ssh_server
from tests.support.api import Api
from tests.support.eventually import eventually
from tests.support.processes import ServerProcess

SLEEPS = 'if sys.argv[1] == "install": time.sleep(60)'
REFUSES = 'if sys.argv[1] == "install": say(result="failed", reason="no_route", detail="no way", agent_id=None)'
FIELDS = {"type", "title", "status", "code", "detail", "request_id", "step", "reason"}


def write_bundle(site: Site, body: str) -> Path:
    path = site.directory / "pretended.pyz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("MANIFEST.json", json.dumps({"version": "0.1.0-pretended"}))
        archive.writestr("__main__.py", PRETENDER.format(seen=str(site.directory / "seen"), body=body))
    return path


def settings(site: Site, body: str = REFUSES, **more: str) -> dict[str, str]:
    return {
        "FLEETWIRE_AGENT_BUNDLE": str(write_bundle(site, body)),
        "FLEETWIRE_SSH_KEY_DIR": str(site.terms.key_directory),
        "FLEETWIRE_SSH_KNOWN_HOSTS": str(site.terms.known_hosts),
        "FLEETWIRE_PUBLIC_URL": "http://127.0.0.1:8420",
        **more,
    }


@pytest.fixture
def server(site: Site, start_server: StartServer) -> ServerProcess:
    """Its agent bundle never gets through to it."""
    return start_server(environment=settings(site))


@pytest.fixture
async def api(server: ServerProcess, open_api: OpenApi) -> Api:
    return await open_api(server)


def body_of(port: int, **fields: Any) -> dict[str, Any]:
    return {"host": "127.0.0.1", "ssh_port": port, "ssh_key": "id"} | fields


def leftovers() -> set[Path]:
    return set(Path("/tmp").glob("fleetwire-deploy.*"))


async def read_all(api: Api, deployment_id: str, last_event_id: str | None = None) -> list[Any]:
    async with (
        asyncio.timeout(60),
        api.sse(f"/api/deployments/{deployment_id}/stream", last_event_id=last_event_id) as events,
    ):
        return [event async for event in events]


async def test_a_failure_is_a_problem_and_leaves_a_record_and_no_agent(api: Api, site: Site) -> None:
    before = leftovers()
    key = generate()
    async with running_ssh_server([key], site.user_key) as ssh:
        problem = await api.post("/api/agents/deploy", body_of(ssh.port), status=502)
        assert set(problem) == FIELDS
        assert (problem["code"], problem["step"], problem["reason"]) == ("peer_failed", "install", "no_route")
        assert "no way" in problem["detail"]
        assert "--public-url" in problem["detail"]
    missing = await api.post("/api/agents/deploy", body_of(ssh.port, ssh_key=None), status=400)
    assert (missing["step"], missing["reason"]) == ("key", "key_missing")
    assert "there are id" in missing["detail"]
    assert (await api.post("/api/agents/deploy", body_of(ssh.port), status=502))["reason"] == "unreachable"
    assert await api.get("/api/agents") == []
    assert leftovers() == before

    listed = await api.get("/api/deployments")
    assert [(each["status"], each["hosts"], each["deployed"], each["failed"]) for each in listed] == [
        ("finished", 1, 0, 1)
    ] * 3
    stored = await api.get(f"/api/deployments/{listed[-1]['deployment_id']}")
    assert {
        "host": "127.0.0.1", "port": ssh.port, "status": "failed", "step": "install", "reason": "no_route",
        "label": "127.0.0.1", "profile": "manage", "agent_id": None, "ssh_user": "root",
    }.items() <= stored["hosts"][0].items()  # fmt: skip
    actions = [entry["action"] for entry in await api.get("/api/audit")]
    assert actions[::-1][:5] == [
        *("deployment.started", "host_key.pinned", "agent.enrolled", "agent.deleted"),
        "deployment.ended",
    ]


async def test_a_changed_key_is_refused_until_an_admin_removes_the_old_one(api: Api, site: Site) -> None:
    first, second = generate(), generate()
    async with running_ssh_server([first], site.user_key) as ssh:
        await api.post("/api/agents/deploy", body_of(ssh.port), status=502)
    (pinned,) = await api.get("/api/host-keys")
    assert (pinned["host"], pinned["port"], pinned["pinned_by"]) == ("127.0.0.1", ssh.port, "admin")
    assert pinned["fingerprint"] == first.get_fingerprint()
    async with running_ssh_server([second], site.user_key, port=ssh.port) as ssh:
        problem = await api.post("/api/agents/deploy", body_of(ssh.port), status=409)
        assert set(problem) == FIELDS | {"expected_fingerprint", "shown_fingerprint"}
        assert (problem["step"], problem["reason"]) == ("host_key", "host_key_changed")
        assert problem["expected_fingerprint"] == first.get_fingerprint()
        assert problem["shown_fingerprint"] == second.get_fingerprint()
        assert ssh.logins == []
        path = f"/api/host-keys/127.0.0.1/{ssh.port}"
        assert path in problem["detail"]
        await api.delete(path)
        await api.delete(path, status=404)
        await api.delete("/api/host-keys/127.0.0.1/ssh", status=404)
        assert (await api.post("/api/agents/deploy", body_of(ssh.port), status=502))["reason"] == "no_route"


async def test_many_hosts_are_followed_from_the_first_step_on(api: Api, site: Site) -> None:
    async with (
        running_ssh_server([generate()], site.user_key) as one,
        running_ssh_server([generate()], site.user_key) as two,
    ):
        hosts = [
            {"host": "127.0.0.1", "ssh_port": one.port, "label": "one"},
            {"host": "LOCALHOST", "ssh_port": two.port, "ssh_user": "ops", "profile": "monitor"},
            {"host": "no-such-host.invalid"},
            {"host": "127.0.0.1", "ssh_port": 1, "ssh_key": "absent"},
        ]
        twice = {"ssh_key": "id", "hosts": [{"host": "a"}, {"host": "A", "ssh_port": 22}]}
        assert "a port 22" in (await api.post("/api/deployments", twice, status=400))["detail"]
        await api.post("/api/deployments", {"hosts": []}, status=400)
        await api.post("/api/deployments", {"hosts": [{"host": "a"}] * 201}, status=400)
        started = await api.post("/api/deployments", {"ssh_key": "id", "hosts": hosts}, status=202)
        assert [host["status"] for host in started["hosts"]] == ["waiting"] * 4
        assert started["hosts"][1]["host"] == "localhost"
        deployment_id = started["deployment_id"]
        live = await read_all(api, deployment_id)
    kinds = [event.event for event in live]
    assert kinds[0] == "deployment"
    assert kinds[-1] == "end"
    assert kinds.count("host") == 4
    assert set(kinds) == {"deployment", "step", "host", "end"}
    assert live[-1].json() == {"reason": "finished"}
    reasons = {event.json()["host"]: event.json()["reason"] for event in live if event.event == "host"}
    assert reasons["no-such-host.invalid"] == "unreachable"
    assert reasons["localhost"] == "no_route"
    steps = [event.json()["step"] for event in live if event.event == "step" and event.json()["port"] == one.port]
    assert steps == ["key", "connect", "login", "facts", "check", "upload", "enrol", "install"]

    late = await read_all(api, deployment_id)
    assert [event.data for event in late[1:]] == [event.data for event in live[1:]]
    assert late[0].json()["status"] == "finished"
    rest = await read_all(api, deployment_id, last_event_id=live[-3].id)
    assert [event.data for event in rest[1:]] == [event.data for event in live[-2:]]
    await api.get("/api/deployments/dep_unknown", status=404)
    await api.get("/api/deployments/dep_unknown/stream", status=404)
    assert await api.get("/api/agents") == []


async def test_a_host_is_deployed_to_once_at_a_time_and_a_stop_cleans_up(
    site: Site, start_server: StartServer, open_api: OpenApi
) -> None:
    before = leftovers()
    server = start_server(environment=settings(site, SLEEPS))
    api = await open_api(server)
    async with running_ssh_server([generate()], site.user_key) as ssh:
        hosts = {"ssh_key": "id", "hosts": [{"host": "127.0.0.1", "ssh_port": ssh.port}]}
        started = await api.post("/api/deployments", hosts, status=202)
        path = f"/api/deployments/{started['deployment_id']}"
        await eventually(lambda: asyncio.to_thread(lambda: "stdin" in site.seen))
        problem = await api.post("/api/agents/deploy", body_of(ssh.port), status=409)
        assert problem["reason"] == "busy"
        assert len(await api.get("/api/agents")) == 1
        began = asyncio.get_running_loop().time()
        async with api.sse(f"{path}/stream") as events:
            assert (await anext(events)).event == "deployment"
            assert await asyncio.to_thread(server.stop) == 0
        assert asyncio.get_running_loop().time() - began < 12
        assert "uninstall --purge" in site.seen
        assert leftovers() == before
        server.start()
        again = await open_api(server)
        stored = await again.get(path)
        assert (stored["status"], stored["hosts"][0]["status"]) == ("interrupted", "interrupted")
        assert stored["hosts"][0]["step"] == "install"
        assert await again.get("/api/agents") == []
        shown = await read_all(again, started["deployment_id"])
        assert [event.event for event in shown] == ["deployment", "host", "end"]


async def test_what_a_killed_server_left_is_put_right_at_its_next_start(
    site: Site, start_server: StartServer, open_api: OpenApi
) -> None:
    server = start_server(environment=settings(site, SLEEPS))
    api = await open_api(server)
    async with running_ssh_server([generate()], site.user_key) as ssh:
        hosts = [{"host": "127.0.0.1", "ssh_port": ssh.port}, {"host": "127.0.0.1", "ssh_port": 1}]
        started = await api.post("/api/deployments", {"ssh_key": "id", "hosts": hosts}, status=202)
        await eventually(lambda: asyncio.to_thread(lambda: "stdin" in site.seen))
        await asyncio.to_thread(server.kill)
    server.start()
    again = await open_api(server)
    stored = await eventually(
        lambda: again.get(f"/api/deployments/{started['deployment_id']}"), lambda found: found["status"] != "running"
    )
    assert stored["status"] == "interrupted"
    assert [(host["status"], host["agent_id"]) for host in stored["hosts"]] == [("interrupted", None), ("failed", None)]
    assert await again.get("/api/agents") == []
    newest = (await again.get("/api/audit", limit=1))[0]
    assert (newest["actor"], newest["action"]) == ("server", "agent.deleted")
    for path in leftovers():  # nobody was there to remove them
        for file in path.iterdir():
            file.unlink()
        path.rmdir()


async def test_secrets_are_in_no_log_and_no_record(api: Api, server: ServerProcess, site: Site) -> None:
    async with running_ssh_server([generate()], site.user_key) as ssh:
        await api.post("/api/agents/deploy", body_of(ssh.port, sudo_password="hunter2-hunter2"), status=502)
    (key,) = [line.removeprefix("stdin ") for line in site.seen.splitlines() if line.startswith("stdin")]
    private = (site.terms.key_directory / "id").read_text().splitlines()[1]
    (deployment,) = await api.get("/api/deployments")
    shown = json.dumps([await api.get("/api/audit"), await api.get(f"/api/deployments/{deployment['deployment_id']}")])
    stored = b"".join(path.read_bytes() for path in server.data_dir.glob("fleetwire.db*")).decode(errors="replace")
    events = "".join(event.data for event in await read_all(api, deployment["deployment_id"]))
    for secret in ("hunter2-hunter2", key, private):
        assert secret not in server.log_text + shown + stored + events


async def test_the_audit_tells_who_did_what(api: Api, server: ServerProcess) -> None:
    agent_id, _ = await api.enrol("web-01")
    await api.post(f"/api/agents/{agent_id}/key")
    await api.delete(f"/api/agents/{agent_id}")
    await api.delete(f"/api/agents/{agent_id}", status=404)
    user = {"username": "eve", "password": "long enough", "role": "viewer"}
    await api.post("/api/users", user, status=201)
    await api.post("/api/users", user, status=409)
    await api.patch("/api/users/eve", {"role": "operator"})
    await api.delete("/api/users/eve")
    entries = await api.get("/api/audit")
    assert [(entry["action"], entry["subject"]) for entry in entries[::-1]] == [
        ("agent.enrolled", agent_id),
        ("agent.key_rotated", agent_id),
        ("agent.deleted", agent_id),
        ("user.added", "eve"),
        ("user.changed", "eve"),
        ("user.removed", "eve"),
    ]
    assert {entry["actor"] for entry in entries} == {"admin"}
    assert entries[-1]["detail"] == {"label": "web-01"}
    assert await api.get("/api/audit", limit=2, before=entries[1]["id"]) == entries[2:4]
    await api.get("/api/audit", limit=0, status=400)
    assert "long enough" not in json.dumps(entries)
