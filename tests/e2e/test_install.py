"""The install script on real hosts: from one line to online, upgrades, refusals, and a host as it was before."""

import re
import shlex
import time
from pathlib import Path

import pytest
from tests.e2e.conftest import BootHost, StartE2eServer
from tests.support.api import Api
from tests.support.bundles import build_bundle
from tests.support.eventually import eventually
from tests.support.installed import blocks_of, enrol, install, make_form, run, traces, wait_for_version, with_options

RELEASES = ("bookworm", "trixie")

BREAKS_WHEN_RUN = """
async def run_agent(config):
    raise RuntimeError("broken on purpose")
"""


@pytest.mark.parametrize("shell", ["bash", "sh"])
@pytest.mark.parametrize("release", RELEASES)
async def test_one_line_from_nothing_to_online_and_back(
    release: str, shell: str, boot_host: BootHost, e2e_api: Api
) -> None:
    host = boot_host(release)
    assert traces(host) == []
    agent_id, key, line = await enrol(e2e_api, f"{release}-{shell}")
    line = line.replace("| bash", f"| {shell}")
    started_at = time.monotonic()
    said = await run(host, line)
    detail = await e2e_api.wait_for_agent(agent_id)
    assert time.monotonic() - started_at < 10
    assert f"connected to {e2e_api.url} as {agent_id}" in said.splitlines()[-1]
    assert key not in said
    assert detail["hostname"] == host.name

    modes = host.exec("stat -c '%a %U %n' /etc/fleetwire /etc/fleetwire/*").stdout.splitlines()
    assert modes == [
        "700 root /etc/fleetwire",
        "600 root /etc/fleetwire/agent.key",
        "600 root /etc/fleetwire/agent.toml",
    ]
    assert key not in host.exec("ps -eo args; systemctl show fleetwire-agent; journalctl -u fleetwire-agent").stdout
    assert (await e2e_api.run(agent_id, "id -un"))["output"] == "root\n"
    assert host.exec("systemctl is-enabled fleetwire-agent").stdout.strip() == "enabled"
    assert "connected" in await run(host, "fleetwire-agent status")
    compiled = host.exec("ls /opt/fleetwire-agent/current/fleetwire_agent/__pycache__").stdout
    assert "main.cpython-3" in compiled

    # Once more: nothing to do, and nothing is restarted.
    pid = host.exec("systemctl show -P MainPID fleetwire-agent").stdout
    assert "up to date" in await run(host, line)
    assert host.exec("systemctl show -P MainPID fleetwire-agent").stdout == pid

    # Away, but for who it is; back as the same one; and away without a trace, but for what others have there.
    host.write("/etc/fleetwire/server.toml", "# of somebody else\n")
    host.exec("chmod 2775 /usr/local/bin; chmod 755 /etc/fleetwire")
    said = await run(host, line.replace(f"| {shell}", f"| {shell} -s -- --uninstall"))
    assert traces(host) == ["/etc/fleetwire", "/var/lib/fleetwire-agent"], said
    await e2e_api.wait_for_agent(agent_id, "offline")
    await run(host, line)
    await e2e_api.wait_for_agent(agent_id)
    said = await run(host, "fleetwire-agent uninstall --purge")
    modes = host.exec("stat -c '%a %n' /usr/local/bin /etc/fleetwire /etc/fleetwire/*").stdout.splitlines()
    assert modes[:2] == ["2775 /usr/local/bin", "755 /etc/fleetwire"]
    assert [line.split()[1] for line in modes[2:]] == ["/etc/fleetwire/server.toml"]
    host.exec("rm -r /etc/fleetwire")
    assert traces(host) == [], said


async def test_what_lies_in_the_current_directory_is_not_run(boot_host: BootHost, e2e_api: Api) -> None:
    host = boot_host("bookworm")
    agent_id, _, line = await enrol(e2e_api, "planted")
    for module in ("tomllib", "hashlib", "ssl", "json", "zipfile"):
        host.write(f"/tmp/planted/{module}.py", "open('/root/ran', 'w').close()\n")
    await run(host, f"cd /tmp/planted; {line}")
    await e2e_api.wait_for_agent(agent_id)
    assert not host.exists("/root/ran")


async def test_it_says_what_it_would_do_and_does_nothing(boot_host: BootHost, e2e_api: Api) -> None:
    host = boot_host("bookworm")
    _, _, line = await enrol(e2e_api, "dry")
    for words in (("--dry-run",), ("--dry-run", "--profile", "monitor")):
        said = await run(host, with_options(line, *words))
        assert "/opt/fleetwire-agent/versions/" in said
        assert "/etc/systemd/system/fleetwire-agent.service" in said
        assert ("useradd" in said or "user fleetwire-agent" in said) == ("monitor" in words)
        assert [trace for trace in traces(host) if "lock" not in trace] == []


async def test_who_may_use_sudo_installs_it_and_who_may_not_is_told(boot_host: BootHost, e2e_api: Api) -> None:
    host = boot_host("bookworm")
    agent_id, _, line = await enrol(e2e_api, "by-ops")
    said = await run(host, f"su nosudo -c {shlex.quote(line)} </dev/null", expect=None)
    assert "sudo" in said
    assert traces(host) == []
    await run(host, f"su ops -c {shlex.quote(line)}")
    await e2e_api.wait_for_agent(agent_id)
    assert traces(host) != []


# ---------------------------------------------------------------- upgrades


@pytest.mark.parametrize("release", RELEASES)
async def test_an_upgrade_keeps_who_it_is_and_a_failed_one_goes_back(
    release: str, boot_host: BootHost, start_e2e_server: StartE2eServer, tmp_path: Path
) -> None:
    served = tmp_path / "served.pyz"
    old = build_bundle(served, version="0.0.1")
    server = start_e2e_server(environment={"FLEETWIRE_AGENT_BUNDLE": str(served)})
    host = boot_host(release)
    async with Api(server.url) as api:
        await api.login("admin", server.admin_password)
        agent_id = await install(api, host)
        await wait_for_version(api, agent_id, old)
        assert (await api.run(agent_id, "echo before"))["output"] == "before\n"

        async def serve_another(**change: str) -> str:
            version = build_bundle(served, **change)
            server.stop()
            server.start()
            await eventually(lambda: _status_of(api, agent_id), lambda status: status == "online", timeout_seconds=90)
            return version

        # As the documentation has it: the key is on the host.
        line = f'curl -fsSL "{server.url}/api/agents/install-script?key=$(cat /etc/fleetwire/agent.key)" | bash'
        new = await serve_another(version="0.0.2")
        said = await run(host, line)
        await wait_for_version(api, agent_id, new)
        assert new in said
        assert [agent["id"] for agent in await api.get("/api/agents")] == [agent_id]
        assert (await api.get(f"/api/agents/{agent_id}/commands"))[0]["output"] == "before\n"

        # One that cannot connect: it says why, and what ran before runs again.
        broken = await serve_another(version="0.0.3", main_end=BREAKS_WHEN_RUN)
        said = await run(host, line, expect=1)
        assert "broken on purpose" in said
        assert f"version {new} is connected again" in said
        await wait_for_version(api, agent_id, new)
        versions = host.exec("ls /opt/fleetwire-agent/versions").stdout.split()
        assert broken not in versions
        assert new in versions
        assert host.exec("readlink /opt/fleetwire-agent/current").stdout.strip().endswith(new)


async def _status_of(api: Api, agent_id: str) -> str:
    try:
        return str((await api.get(f"/api/agents/{agent_id}"))["status"])
    except OSError:
        return "no server"


# ---------------------------------------------------------------- refusals


async def test_what_stands_in_the_way_is_said_and_leaves_the_host_as_it_was(
    boot_host: BootHost, e2e_api: Api, start_e2e_server: StartE2eServer
) -> None:
    host = boot_host("bookworm")
    agent_id, key, line = await enrol(e2e_api, "refused")

    # The server cannot be reached from the host: here its public URL is one of the host's own, where nobody listens.
    elsewhere = start_e2e_server(options=["--public-url", "http://127.0.0.1:9"])
    async with Api(elsewhere.url) as api:
        await api.login("admin", elsewhere.admin_password)
        _, _, lost = await enrol(api, "lost")
    lost = lost.replace("http://127.0.0.1:9", elsewhere.url)
    said = await run(host, lost, expect=None)
    assert "http://127.0.0.1:9/api/agents/bundle" in said
    assert traces(host) == []

    # The key is void when the agent uses it.
    script = host.exec(line.replace("| bash", "> /root/install.sh"))
    assert script.returncode == 0
    await e2e_api.delete(f"/api/agents/{agent_id}")
    said = await run(host, "bash /root/install.sh; status=$?; rm /root/install.sh; exit $status", expect=1)
    assert "does not accept" in said
    assert key not in said
    assert traces(host) == []

    # No room on the disk.
    small = boot_host("bookworm", disk_mib=64)
    _, _, line = await enrol(e2e_api, "full")
    small.exec("dd if=/dev/zero of=/opt/filler bs=64k 2>/dev/null; true")
    said = await run(small, line, expect=None)
    assert re.search("[Nn]o space left|there is room for", said)
    small.exec("rm /opt/filler")
    assert traces(small) == []
    await run(small, line)
    assert traces(small) != []


async def test_another_identity_and_a_foreign_unit_are_not_overwritten(boot_host: BootHost, e2e_api: Api) -> None:
    host = boot_host("trixie")
    first = await install(e2e_api, host, label="first")
    second, _, line = await enrol(e2e_api, "second")
    said = await run(host, line, expect=1)
    assert first in said
    assert "--replace" in said
    await e2e_api.wait_for_agent(first)
    await run(host, with_options(line, "--replace"))
    await e2e_api.wait_for_agent(second)
    await run(host, "fleetwire-agent uninstall --purge")
    host.write("/etc/systemd/system/fleetwire-agent.service", "[Service]\nExecStart=/bin/sleep infinity\n")
    _, _, line = await enrol(e2e_api, "third")
    said = await run(host, line, expect=1)
    assert "/etc/systemd/system/fleetwire-agent.service" in said
    assert host.exec("cat /etc/systemd/system/fleetwire-agent.service").stdout.startswith("[Service]")


async def test_a_host_without_python_is_told_how_to_come_by_it(boot_host: BootHost, e2e_api: Api) -> None:
    host = boot_host("bookworm", python=False)
    _, _, line = await enrol(e2e_api, "no-python")
    said = await run(host, line, expect=1)
    assert "no python3" in said
    assert "apt-get install -y python3" in said
    assert traces(host) == []


async def test_a_host_with_python_3_9_only_is_told_how_to_come_by_a_newer_one(
    boot_host: BootHost, e2e_api: Api
) -> None:
    host = boot_host("bullseye")
    _, _, line = await enrol(e2e_api, "old-python")
    said = await run(host, line, expect=1)
    assert "Python 3.9" in said
    assert "3.11" in said
    assert traces(host) == []


# ---------------------------------------------------------------- profiles


@pytest.mark.parametrize("release", RELEASES)
async def test_monitor_cannot_do_what_its_user_cannot(release: str, boot_host: BootHost, e2e_api: Api) -> None:
    host = boot_host(release)
    host.write("/home/ops/secret.txt", "secret\n")
    host.exec("echo public >/srv/public.txt; echo hidden >/srv/hidden.txt")
    host.exec("chmod 644 /home/ops/secret.txt /srv/public.txt; chmod 600 /srv/hidden.txt")
    agent_id = await install(e2e_api, host, "--profile", "monitor")
    path = f"/api/agents/{agent_id}"
    detail = await eventually(lambda: e2e_api.get(path), lambda agent: agent["metrics"] is not None)
    assert detail["metrics"]["failures"] == []
    assert host.exec("ps -o user= -p $(systemctl show -P MainPID fleetwire-agent)").stdout.strip().startswith("fleetwi")

    assert (await e2e_api.get(f"{path}/files", path="/srv/public.txt")) == "public\n"
    own_key = "/run/credentials/fleetwire-agent.service/agent-key"  # which its user can read, and hands to nobody
    host.exec(f"ln -s {own_key} /srv/link-to-key")
    for hidden in (
        "/srv/hidden.txt",
        "/etc/shadow",
        "/etc/fleetwire/agent.key",
        "/root/.bashrc",
        "/home/ops/secret.txt",
        own_key,
        f"/proc/self/root{own_key}",
        "/srv/link-to-key",
    ):
        if "key" not in hidden.rpartition("/")[2]:
            assert host.exec(f"test -e {hidden}", check=False).returncode == 0
        async with e2e_api.open("GET", f"{path}/files", params={"path": hidden}) as response:
            assert response.status in (403, 404), hidden
        async with e2e_api.open("GET", f"{path}/stream/logs", params={"source": "file", "path": hidden}) as response:
            assert response.status in (403, 404), hidden

    command = await e2e_api.run(agent_id, "id")
    assert command["status"] == "rejected"
    assert "monitor" in command["error"]
    form = make_form("/var/lib/fleetwire-agent/upload", b"content")
    async with e2e_api.open("POST", f"{path}/files", data=form) as response:
        assert response.status == 403
        assert "monitor" in (await response.json())["detail"]
    async with e2e_api.sse(f"{path}/stream/logs", source="journald", unit="fleetwire-agent", lines=1) as events:
        assert "fleetwire" in (await anext(events)).data

    # manage, and monitor again: the user comes and goes with it. What it leaves for root to follow is not followed.
    line = f'curl -fsSL "{e2e_api.url}/api/agents/install-script?key=$(cat /etc/fleetwire/agent.key)" | bash'
    state = "/var/lib/fleetwire-agent"
    host.exec(f"mkdir -p /srv/victim/kept; rm -r {state}/commands {state}/ledger.1")
    host.exec(f"ln -s /srv/victim {state}/commands; ln -s /srv/public.txt {state}/ledger.1")
    host.exec(f"chown -h fleetwire-agent: {state}/commands {state}/ledger.1")
    await run(host, with_options(line, "--profile", "manage"))
    assert (await e2e_api.run(agent_id, "id -un"))["output"] == "root\n"
    assert host.exec("getent passwd fleetwire-agent", check=False).stdout == ""
    assert host.exec("ls /srv/victim; cat /srv/public.txt").stdout == "kept\npublic\n"
    command_id = await e2e_api.submit(agent_id, "setsid sleep 7780 & sleep 7780", timeout=900)
    await e2e_api.wait_for_command(agent_id, command_id, "running")
    await run(host, with_options(line, "--profile", "monitor"))
    assert (await e2e_api.wait_for_command(agent_id, command_id))["status"] == "interrupted"
    assert "7780" not in host.exec("ps -eo args").stdout
    assert host.exec(f"find {state} ! -user fleetwire-agent; ls {state}/commands").stdout == ""
    assert (await e2e_api.run(agent_id, "id"))["status"] == "rejected"
    await run(host, line)  # without saying which: the profile stays
    assert (await e2e_api.run(agent_id, "id"))["status"] == "rejected"
    await run(host, "fleetwire-agent uninstall --purge")
    assert traces(host) == []


# ---------------------------------------------------------------- other ways to start it


@pytest.mark.parametrize("init", ["openrc", "none"])
async def test_hosts_without_systemd(init: str, boot_host: BootHost, e2e_api: Api) -> None:
    host = boot_host("bookworm", init=init)
    agent_id, _, line = await enrol(e2e_api, init)
    said = await run(host, line)
    await e2e_api.wait_for_agent(agent_id)
    assert ("OpenRC" if init == "openrc" else "@reboot") in said
    assert (await e2e_api.run(agent_id, "echo hello"))["output"] == "hello\n"

    async def agent_pid() -> str:
        return str(host.exec("pgrep -of 'fleetwire-agent/current run'", check=False).stdout.strip())

    before = await agent_pid()
    host.exec(f"kill -9 {before}")
    await eventually(agent_pid, lambda pid: pid not in ("", before))
    await e2e_api.wait_for_agent(agent_id)
    await run(host, line)
    command_id = await e2e_api.submit(agent_id, "setsid sleep 7781 & sleep 7781", timeout=900)
    await e2e_api.wait_for_command(agent_id, command_id, "running")
    await run(host, "fleetwire-agent uninstall --purge")
    assert traces(host) == []
    assert (await e2e_api.wait_for_command(agent_id, command_id))["status"] == "interrupted"


# ---------------------------------------------------------------- TLS


async def test_a_self_signed_certificate_is_pinned(
    boot_host: BootHost, start_e2e_server: StartE2eServer, tmp_path: Path
) -> None:
    server = start_e2e_server(is_self_signed=True)
    host = boot_host("trixie")
    async with Api(server.url, tls=server.client_tls) as api:
        await api.login("admin", server.admin_password)
        agent_id, _, line = await enrol(api, host.name)
        assert line.startswith("curl -fsSk --pinnedpubkey sha256//")
        said = await run(host, line.replace("sha256//", "sha256//AAAA"))  # bash is given nothing
        assert "does not match pinned public key" in said
        assert traces(host) == []
        await run(host, line)
        await api.wait_for_agent(agent_id)
        assert "tls_pin" in host.exec("cat /etc/fleetwire/agent.toml").stdout
        # The upgrade, as documented for such servers.
        said = await run(host, f"set -eu; URL={server.url}\n{blocks_of('docs/operations.md')['pinned']}")
        assert "up to date" in said
