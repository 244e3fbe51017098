"""The install script: its shell, its values, and how it fetches the agent."""

import base64
import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.support.api import Api
from tests.support.callers import Callers
from tests.support.processes import ServerProcess

from fleetwire_server.deploy.bundle import Bundle
from fleetwire_server.deploy.install_script import build_install_command, build_install_script
from fleetwire_server.deploy.python_hint import HINTS, python_command

KEY = f"agt_{'0' * 16}_{'A' * 43}"
PIN = "sha256//AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="
SHELLS = [name for name in ("dash", "bash", "busybox") if shutil.which(name)]

RELEASES = [
    ("debian", "11", ""), ("debian", "12", ""), ("debian", "13", ""), ("debian", "", ""), ("ubuntu", "20.04", "debian"),
    ("ubuntu", "22.04", "debian"), ("ubuntu", "24.04", "debian"), ("linuxmint", "22", "ubuntu debian"),
    ("raspbian", "12", "debian"), ("fedora", "42", ""), ("rocky", "9.4", "rhel centos fedora"),
    ("rhel", "10.0", "fedora"), ("amzn", "2", "centos rhel fedora"), ("amzn", "2023", "fedora"),
    ("opensuse-leap", "15.6", "suse opensuse"), ("opensuse-tumbleweed", "20260101", "opensuse suse"),
    ("alpine", "3.20.1", ""), ("arch", "", ""), ("endeavouros", "", "arch"), ("slackware", "15.0", ""),
]  # fmt: skip


def render(directory: Path, *, server_url: str = "https://fleet.example.org", tls_pin: str | None = PIN) -> Path:
    bundle = Bundle(b"", "0" * 64, "0.1.0-00000000")
    script = directory / "install.sh"
    script.write_text(build_install_script(server_url, KEY, bundle, tls_pin))
    return script


def run(*arguments: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(argument) for argument in arguments], capture_output=True, text=True, timeout=60, check=False, env=env
    )


@pytest.mark.parametrize("dialect", ["sh", "bash"])
def test_shellcheck_finds_nothing(dialect: str, tmp_path: Path) -> None:
    result = run("shellcheck", "--shell", dialect, render(tmp_path))
    assert result.returncode == 0, result.stdout


def test_the_script_in_the_shells_of_hosts(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    result = run(
        "bats",
        Path(__file__).with_name("install_script.bats"),
        env={
            "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "SCRIPT": str(render(tmp_path)),
            "SHELLS": "dash bash",
            "TMPDIR": str(tmp_path / "tmp"),
        },
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("shell", ["dash", "bash"])
def test_values_cannot_leave_their_quotes(shell: str, tmp_path: Path) -> None:
    hostile = f"""https://a'b"$(touch {tmp_path}/ran)`touch {tmp_path}/ran`;touch${{IFS}}{tmp_path}/ran"""
    script = render(tmp_path, server_url=hostile, tls_pin=f"'; touch {tmp_path}/ran; '")
    run(shell, script, "--dry-run")
    assert not (tmp_path / "ran").exists()
    line = build_install_command(hostile, KEY, f"'; touch {tmp_path}/ran; '").replace("curl", "echo", 1)
    assert hostile in run(shell, "-c", line.replace("| bash", "")).stdout
    assert not (tmp_path / "ran").exists()


def test_the_shell_and_the_server_give_the_same_advice(tmp_path: Path) -> None:
    functions = render(tmp_path).read_text().rpartition("\n{ fleetwire_main")[0]
    probe = tmp_path / "probe.sh"
    probe.write_text(
        functions + '\nif command=$(fleetwire_python_command); then echo "found:$command"; else echo none; fi\n'
    )
    answered = set()
    for os_id, version, like in RELEASES:
        release = tmp_path / "os-release"
        release.write_text(f'ID={os_id}\nVERSION_ID="{version}"\nID_LIKE="{like}"\n')
        mount = 'mount --bind "$1" "$(readlink -f /etc/os-release)" && exec dash "$2"'
        result = run("unshare", "--mount", "sh", "-c", mount, "sh", release, probe)
        expected = python_command(os_id, version, like.split())
        assert result.stdout.strip() == ("none" if expected is None else f"found:{expected}"), (os_id, version)
        answered.add(expected)
    assert answered >= {command for _, command in HINTS[:3]} | {None}


async def test_the_bundle_is_what_its_digest_says(http_server: ServerProcess) -> None:
    async with Api(http_server.url) as api:
        async with api.open("GET", "/api/agents/bundle") as response:
            assert response.status == 200
            content, tag = await response.read(), response.headers["ETag"]
        digest = hashlib.sha256(content)
        assert tag == f'"{digest.hexdigest()}"'
        assert response.headers["Repr-Digest"] == f"sha-256=:{base64.b64encode(digest.digest()).decode()}:"
        async with api.open("GET", "/api/agents/bundle", headers={"If-None-Match": tag}) as response:
            assert response.status == 304
        async with api.open("HEAD", "/api/agents/bundle") as response:
            assert int(response.headers["Content-Length"]) == len(content)


async def test_the_script_is_for_the_owner_of_the_key_only(http_server: ServerProcess, callers: Callers) -> None:
    async with Api(http_server.url) as api:
        for key in ("", "garbage", callers.admin, callers.deleted_agent_key, "$(reboot)"):
            problem = await api.get("/api/agents/install-script", status=401, key=key)
            assert problem["code"] == "unauthorized"
        assert "?key=" in (await api.get("/api/agents/install-script", status=401))["detail"]
        script = await api.call(
            "GET",
            "/api/agents/install-script",
            params={"key": callers.agent_key},
            headers={"Host": "evil.example.org", "X-Forwarded-Host": "evil.example.org"},
        )
        assert script.startswith("#!/bin/sh\n")
        assert callers.agent_key in script
        assert f"server={http_server.url}\n" in script
        assert "evil" not in script
    assert callers.agent_key not in http_server.log_text


async def test_who_listens_on_all_addresses_must_say_which_one_hosts_dial(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "server", options=["--public-url", "http://0.0.0.0:8420"]) as server:
        async with Api(server.url) as api:
            await api.login("admin", server.environment["FLEETWIRE_ADMIN_PASSWORD"])
            answer = await api.post("/api/agents", {"label": "web-01"}, status=201)
            problem = await api.get("/api/agents/install-script", status=409, key=answer["key"])
            assert "--public-url" in problem["detail"]


@pytest.mark.parametrize("tool", ["curl", "wget", "python3"])
@pytest.mark.parametrize("shell", ["dash", "bash"])
def test_the_agent_is_fetched_by_what_the_host_has(
    tool: str, shell: str, http_server: ServerProcess, callers: Callers, tmp_path: Path
) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"no {tool} on this machine")
    script = tmp_path / "install.sh"
    fetched = run("curl", "-fsS", "-o", script, f"{http_server.url}/api/agents/install-script?key={callers.agent_key}")
    assert fetched.returncode == 0, fetched.stderr
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in {tool, "cat", "id", "mktemp", "python3", "rm", "uname"}:
        (tools / name).symlink_to(Path(str(shutil.which(name))).resolve())
    (tmp_path / "tmp").mkdir()
    result = run(
        str(shutil.which(shell)), script, "--dry-run", env={"PATH": str(tools), "TMPDIR": str(tmp_path / "tmp")}
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "/opt/fleetwire-agent" in result.stdout
    assert not list((tmp_path / "tmp").iterdir())
