"""What is decided on the facts of a host, as hosts told them; and what the commands made of it do in a real shell."""

import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fleetwire_server.deploy.errors import DeployError
from fleetwire_server.deploy.facts import FACTS_SCRIPT, IDENTITY_SCRIPT, parse_facts, parse_identity
from fleetwire_server.deploy.plan import (
    Plan,
    build_clean_up,
    build_install,
    build_root_command,
    check_route,
    judge_sudo,
    plan_installation,
)

RECORDED = sorted((Path(__file__).parent / "facts").glob("*.json"))


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_facts_lead_to_a_plan_or_to_what_is_to_be_done(path: Path) -> None:
    case: dict[str, Any] = json.loads(path.read_text())
    facts = parse_facts("\n".join(case["output"]) + "\n")
    assert facts is not None
    asked = {name: case[name] for name in ("has_sudo_password", "is_replacing")}
    if "plan" in case:
        plan = plan_installation(facts, case["ssh_user"], **asked)
        assert plan == Plan(**case["plan"])
        return
    with pytest.raises(DeployError) as caught:
        plan_installation(facts, case["ssh_user"], **asked)
    assert (caught.value.step, caught.value.reason) == ("check", case["error"]["reason"])
    for words in case["error"]["says"]:
        assert words in caught.value.message
    assert caught.value.more == case["error"].get("more", {})


@pytest.mark.parametrize("output", ["", "This account is not available.\n", "begin=facts\nuid=0\n", "end=facts\n"])
def test_a_script_that_did_not_run_to_its_end_tells_nothing(output: str) -> None:
    assert parse_facts(output) is None


@pytest.mark.parametrize("shell", ["dash", "bash"])
def test_the_script_tells_of_this_machine_and_writes_nothing_else(shell: str) -> None:
    ran = subprocess.run([shell, "-s"], input=FACTS_SCRIPT, capture_output=True, text=True, check=True, timeout=30)
    assert ran.stderr == ""
    facts = parse_facts(ran.stdout)
    assert facts is not None
    assert facts.uid == os.getuid()
    assert (facts.kernel, facts.arch) == ("Linux", os.uname().machine)
    assert facts.opt_free_bytes is not None
    identity = subprocess.run([shell, "-c", IDENTITY_SCRIPT], capture_output=True, text=True, check=True, timeout=30)
    assert identity.stdout.endswith("end=identity\n")


def test_the_identity_is_read_from_what_root_printed() -> None:
    assert parse_identity("agent_id=agent_0123456789abcdef\nend=identity\n") == "agent_0123456789abcdef"
    assert parse_identity("agent_id=agent_x; rm\nend=identity\n") is None
    assert parse_identity("end=identity\n") is None


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("Sorry, try again.\nsudo: no password was provided\nsudo: 1 incorrect password attempt\n", "sudo_password"),
        ("nosudo is not in the sudoers file.\n", "no_sudo"),
        ("Sorry, user ops is not allowed to execute '/bin/sh' as root on web-01.\n", "no_sudo"),
        ("", "no_sudo"),
    ],
)
def test_what_sudo_says_to_a_password_is_told_apart(said: str, reason: str) -> None:
    judge_sudo(0, said, "ops")
    with pytest.raises(DeployError) as caught:
        judge_sudo(1, said, "ops")
    assert caught.value.reason == reason


def test_a_url_that_means_the_host_itself_is_no_route() -> None:
    for url in ("http://127.0.0.1:8420", "http://localhost:8420", "http://[::1]:8420"):
        check_route(url, is_same_machine=True)
        with pytest.raises(DeployError, match="--public-url") as caught:
            check_route(url, is_same_machine=False)
        assert caught.value.reason == "no_route"
    check_route("https://fleet.example.org", is_same_machine=False)


def test_commands_are_words_for_any_shell_and_hold_no_key() -> None:
    plan = Plan("sudo", "/usr/bin/python3")
    install = build_install(
        plan, "/tmp/d", "https://f.example/a b'c", "monitor", "sha256//x;sha256//y", is_replacing=True
    )
    assert install == [
        *("/usr/bin/python3", "-I", "/tmp/d/fleetwire-agent.pyz", "install", "--json"),
        *("--server", "https://f.example/a b'c"),
        *("--key-file", "-", "--profile", "monitor", "--python", "/usr/bin/python3"),
        *("--tls-pin", "sha256//x;sha256//y", "--replace"),
    ]
    assert shlex.split(build_root_command("login", install)) == install
    assert shlex.split(build_root_command("sudo", install))[:4] == ["sudo", "-k", "-n", "--"]
    with_password = shlex.split(build_root_command("sudo with password", install))
    assert with_password[2:8] == ["sudo", "-k", "-S", "-p", "", "--"]
    assert with_password[8:] == ["sh", "-c", 'exec "$@"', "sh", *install]


@pytest.mark.parametrize("is_undoing", [False, True])
def test_cleaning_up_ends_the_installer_and_removes_its_directory(tmp_path: Path, *, is_undoing: bool) -> None:
    directory = tmp_path / "fleetwire deploy"
    directory.mkdir()
    bundle = directory / "fleetwire-agent.pyz"
    bundle.write_text("import sys, time\nif sys.argv[1] == 'install': time.sleep(60)\n")
    with subprocess.Popen(["python3", str(bundle), "install"]) as installer:
        undo = (Plan("login", "python3"), "agent_0123456789abcdef") if is_undoing else None
        script = build_clean_up(str(directory), undo, is_replacing=False)
        ran = subprocess.run(["sh", "-s"], input=script, capture_output=True, text=True, check=True, timeout=30)
        assert ran.stdout == "clean_up=done\n"
        assert not directory.exists()
        if not is_undoing:
            assert installer.poll() is None
            installer.kill()
        assert installer.wait(5) == (-15 if is_undoing else -9)
