"""Deployment over SSH to real hosts: many at once, each way to fail, and what is left after it: nothing."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.conftest import BootHost, E2eServer, StartE2eServer
from tests.support.api import Api
from tests.support.hosts import PASSWORDS, SSH_KEY, Host
from tests.support.installed import run, traces

from fleetwire_server.deploy.plan import Plan, build_clean_up


def settings(tmp_path: Path, **more: str) -> dict[str, str]:
    """The server's settings: the key directory is that of the hosts' key, and no known_hosts of this machine counts."""
    return {
        "FLEETWIRE_SSH_KEY_DIR": str(SSH_KEY.parent),
        "FLEETWIRE_SSH_KNOWN_HOSTS": str(tmp_path / "known_hosts"),
        **more,
    }


@pytest.fixture
def server(start_e2e_server: StartE2eServer, tmp_path: Path) -> E2eServer:
    return start_e2e_server(environment=settings(tmp_path))


@pytest.fixture
async def api(server: E2eServer) -> AsyncIterator[Api]:
    async with Api(server.url, timeout_seconds=150) as client:
        await client.login("admin", server.admin_password)
        yield client


def order(host: Host, ssh_user: str = "root", **more: Any) -> dict[str, Any]:
    return {"host": host.address, "ssh_user": ssh_user, "ssh_key": str(SSH_KEY), "label": host.name, **more}


async def refused(api: Api, body: dict[str, Any], status: int, reason: str, *words: str) -> dict[str, Any]:
    """Deploy, which must fail so; return the problem. No agent is left on the server."""
    problem = await api.post("/api/agents/deploy", body, status=status)
    assert problem["reason"] == reason, problem
    assert problem["step"], problem
    for word in words:
        assert word in problem["detail"], problem
    assert await api.get("/api/agents") == []
    return dict(problem)


def rests(host: Host) -> list[str]:
    """What a deployment might leave on a host."""
    return traces(host) + host.exec("ls -d /tmp/fleetwire* /root/fleetwire* 2>/dev/null || true").stdout.split()


async def test_five_hosts_at_once(boot_host: BootHost, server: E2eServer, api: Api) -> None:
    hosts = [boot_host("bookworm") for _ in range(3)] + [boot_host("trixie") for _ in range(2)]
    orders = [
        order(hosts[0]),
        order(hosts[1], "ops"),
        order(hosts[2], "opspw", sudo_password=PASSWORDS["opspw"]),
        order(hosts[3], "ops", profile="monitor"),
        order(hosts[4], "root", tags=["production", "db"]),
    ]
    started_at = time.monotonic()
    body = {"hosts": [{key: one[key] for key in one if key != "ssh_key"} for one in orders], "ssh_key": str(SSH_KEY)}
    started = await api.post("/api/deployments", body, status=202)
    path = f"/api/deployments/{started['deployment_id']}"
    async with asyncio.timeout(100), api.sse(f"{path}/stream") as events:
        seen = [event async for event in events]
    assert time.monotonic() - started_at < 60
    assert seen[0].event == "deployment"
    assert seen[-1].json() == {"reason": "finished"}
    ended = [event.json() for event in seen if event.event == "host"]
    assert {one["status"] for one in ended} == {"deployed"}, ended
    assert {event.json()["host"] for event in seen if event.event == "step"} == {host.address for host in hosts}
    agents = {agent["label"]: agent for agent in await api.get("/api/agents")}
    assert set(agents) == {host.name for host in hosts}
    assert {agent["status"] for agent in agents.values()} == {"online"}
    assert agents[hosts[4].name]["tags"] == ["production", "db"]
    assert (await api.run(agents[hosts[1].name]["id"], "id -un"))["output"] == "root\n"
    assert (await api.run(agents[hosts[3].name]["id"], "id -un"))["status"] == "rejected"
    detail = await api.get(path)
    assert {host["agent_id"] for host in detail["hosts"]} == {agent["id"] for agent in agents.values()}
    pinned = {key["host"]: key["fingerprint"] for key in await api.get("/api/host-keys")}
    assert pinned == {host["host"]: host["host_key"] for host in detail["hosts"]}
    for host in hosts:
        assert host.exec("ls -d /tmp/fleetwire* 2>/dev/null || true").stdout == ""
        assert PASSWORDS["opspw"] not in host.exec("journalctl --no-pager; cat /etc/fleetwire/*").stdout
    actions = [entry["action"] for entry in await api.get("/api/audit")]
    assert actions.count("host_key.pinned") == 5
    assert actions.count("agent.enrolled") == 5
    assert PASSWORDS["opspw"] not in server.log_text

    # Once more to one of them: it has an agent already. Its key is refused nowhere: it is the pinned one.
    problem = await api.post("/api/agents/deploy", order(hosts[0]), status=409)
    assert problem["reason"] == "already_managed"
    assert problem["agent_id"] == agents[hosts[0].name]["id"]
    assert len(await api.get("/api/agents")) == 5
    assert (await api.get(f"/api/agents/{agents[hosts[0].name]['id']}"))["status"] == "online"


async def test_one_host_as_on_the_page(boot_host: BootHost, api: Api) -> None:
    host = boot_host("bookworm")
    body = {"host": host.address, "ssh_user": "ops", "ssh_port": 22, "ssh_key": str(SSH_KEY), "label": "db-01"}
    answer = await api.post("/api/agents/deploy", body)
    assert set(answer) == {"agent_id", "key", "status", "deployment_id", "host_key"}
    assert answer["status"] == "deployed"
    agent = await api.get(f"/api/agents/{answer['agent_id']}")
    assert (agent["label"], agent["status"]) == ("db-01", "online")
    assert host.exec("cat /etc/fleetwire/agent.key").stdout.strip() == answer["key"]
    offered = host.exec("ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub").stdout
    assert answer["host_key"] in offered


async def test_each_failure_is_told_and_leaves_nothing(boot_host: BootHost, api: Api, tmp_path: Path) -> None:
    host = boot_host("bookworm")
    other_key = SSH_KEY.with_name(f"other-{host.name}")
    await run_here("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(other_key))
    try:
        # Of the request.
        await refused(api, order(host) | {"ssh_key": str(SSH_KEY) + "-missing"}, 400, "key_missing")
        await refused(api, order(host) | {"ssh_key": "/etc/shadow"}, 400, "key_refused", str(SSH_KEY.parent))
        # Of the way there.
        nobody = order(host) | {"host": "10.213.255.250"}
        await refused(api, nobody, 502, "unreachable", "10.213.255.250")
        await refused(api, order(host, ssh_port=9), 502, "unreachable")
        await refused(api, order(host) | {"host": "no-such-host.invalid"}, 502, "unreachable", "no-such-host.invalid")
        problem = await refused(api, order(host) | {"ssh_key": str(other_key)}, 502, "ssh_auth", "root")
        assert "authorized_keys" in problem["detail"]
        # Of the rights there.
        await refused(api, order(host, "nosudo"), 400, "sudo_password", "deploy as root")
        without = order(host, "nosudo", sudo_password=PASSWORDS["nosudo"])
        await refused(api, without, 502, "no_sudo", "nosudo")
        await refused(api, order(host, "opspw"), 400, "sudo_password")
        await refused(api, order(host, "opspw", sudo_password="wrong"), 400, "sudo_password")
        assert rests(host) == []
        # Of what is there.
        bare = boot_host("bookworm", python=False)
        await refused(api, order(bare, "ops"), 502, "no_python", "apt-get install -y python3")
        old = boot_host("bullseye")
        await refused(api, order(old), 502, "python_too_old", "3.9", "3.11")
        small = boot_host("bookworm", disk_mib=64)
        small.exec("dd if=/dev/zero of=/opt/filler bs=64k 2>/dev/null; true")
        await refused(api, order(small), 502, "disk_full")
        small.exec("rm /opt/filler")
        for one in (bare, old, small):
            assert rests(one) == []
        # And then it works.
        answer = await api.post("/api/agents/deploy", order(host, "opspw", sudo_password=PASSWORDS["opspw"]))
        assert answer["status"] == "deployed"
    finally:
        other_key.unlink()
        other_key.with_suffix(".pub").unlink(missing_ok=True)


async def test_host_keys_are_pinned_and_a_changed_one_is_refused(
    boot_host: BootHost, api: Api, start_e2e_server: StartE2eServer, tmp_path: Path
) -> None:
    host = boot_host("bookworm")
    shown = host.exec("ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub").stdout.split()[1]
    # Named beforehand, and wrong.
    wrong = "SHA256:" + "A" * 43
    problem = await refused(api, order(host, host_key=wrong), 409, "host_key_changed", wrong, shown)
    # Seen once, and pinned even though what came next failed.
    await refused(api, order(host, "nosudo"), 400, "sudo_password")
    assert [key["fingerprint"] for key in await api.get("/api/host-keys")] == [shown]
    host.exec(
        "rm /etc/ssh/ssh_host_*; ssh-keygen -q -t ed25519 -N '' -f /etc/ssh/ssh_host_ed25519_key; systemctl restart ssh"
    )
    changed = host.exec("ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub").stdout.split()[1]
    problem = await refused(api, order(host), 409, "host_key_changed", shown, changed)
    assert (problem["expected_fingerprint"], problem["shown_fingerprint"]) == (shown, changed)
    assert rests(host) == []
    await api.delete(f"/api/host-keys/{host.address}/22")
    answer = await api.post("/api/agents/deploy", order(host, host_key=changed))
    assert answer["host_key"] == changed
    await api.delete(f"/api/agents/{answer['agent_id']}?uninstall=true")

    # A server that accepts known hosts only.
    strict = start_e2e_server("strict", environment=settings(tmp_path, FLEETWIRE_DEPLOY_HOST_KEYS="pinned"))
    async with Api(strict.url, timeout_seconds=100) as client:
        await client.login("admin", strict.admin_password)
        await refused(client, order(host), 409, "host_key_unknown", changed)
        line = host.exec("cat /etc/ssh/ssh_host_ed25519_key.pub").stdout
        (tmp_path / "known_hosts").write_text(f"{host.address} {line}")
        assert (await client.post("/api/agents/deploy", order(host)))["status"] == "deployed"


async def test_one_agent_takes_the_place_of_another_only_when_it_is_asked_to(boot_host: BootHost, api: Api) -> None:
    host = boot_host("trixie")
    first = (await api.post("/api/agents/deploy", order(host, label="first")))["agent_id"]
    problem = await api.post("/api/agents/deploy", order(host, label="second"), status=409)
    assert (problem["reason"], problem["agent_id"]) == ("already_managed", first)
    second = (await api.post("/api/agents/deploy", order(host, label="second", replace=True)))["agent_id"]
    await api.wait_for_agent(second)
    await api.wait_for_agent(first, "offline")
    # Taking back a deployment whose end is not known never leaves a host without the agent it had.
    undo = (Plan("login", "/usr/bin/python3"), second)
    script = build_clean_up("/tmp/nothing", undo, is_replacing=True)
    assert host.exec(["sh"], input=script).stdout.splitlines() == ["agent=kept", "clean_up=done"]
    other = (Plan("login", "/usr/bin/python3"), first)
    for is_replacing in (True, False):
        script = build_clean_up("/tmp/nothing", other, is_replacing=is_replacing)
        assert host.exec(["sh"], input=script).stdout == "clean_up=done\n"
    assert (await api.get(f"/api/agents/{second}"))["status"] == "online"


async def test_a_host_without_a_way_back_is_left_as_it_was(
    boot_host: BootHost, start_e2e_server: StartE2eServer, tmp_path: Path
) -> None:
    host = boot_host("trixie")
    # Hosts have no route to this address.
    lost = start_e2e_server(options=["--public-url", "http://10.214.0.1:8420"], environment=settings(tmp_path))
    async with Api(lost.url, timeout_seconds=100) as client:
        await client.login("admin", lost.admin_password)
        problem = await refused(client, order(host, "ops"), 502, "no_route", "http://10.214.0.1:8420")
        assert "--public-url" in problem["detail"]
    assert rests(host) == []


async def test_a_host_that_hangs_is_given_up(boot_host: BootHost, api: Api) -> None:
    host = boot_host("bookworm")
    host.exec("systemctl kill --kill-who=main -s STOP ssh; true")
    started_at = time.monotonic()
    await refused(api, order(host), 502, "unreachable")
    assert time.monotonic() - started_at < 45
    host.exec("systemctl kill --kill-who=main -s CONT ssh; true")
    assert rests(host) == []
    await run(host, "true")


async def run_here(*argv: str) -> None:
    process = await asyncio.create_subprocess_exec(*argv)
    assert await process.wait() == 0
