"""What is done on a host, decided from its facts alone; and the commands that do it. No I/O."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias
from urllib.parse import urlsplit

from fleetwire_server.deploy.errors import DeployError, deploy_error
from fleetwire_server.deploy.facts import HostFacts, PythonFact
from fleetwire_server.deploy.python_hint import python_advice
from fleetwire_shared.limits import INSTALLATION_BYTES

RootBy: TypeAlias = Literal["login", "sudo", "sudo with password"]
Profile: TypeAlias = Literal["manage", "monitor"]

CHECK = "check"
"""The step at which a plan fails."""

PYTHON_MINIMUM = (3, 11)
ARCHITECTURES = ("x86_64", "aarch64")
TMP_NEEDED_BYTES = 4 * 1024 * 1024

BUNDLE_NAME = "fleetwire-agent.pyz"


@dataclass(frozen=True, slots=True)
class Plan:
    """How to install on one host."""

    root_by: RootBy
    python: str  # its path


def plan_installation(facts: HostFacts, ssh_user: str, *, has_sudo_password: bool, is_replacing: bool) -> Plan:
    """Return how to install on a host with these facts.

    Raises:
        DeployError: it cannot be done, and what would make it possible."""
    _check_platform(facts)
    root_by = _choose_root(facts, ssh_user, has_sudo_password=has_sudo_password)
    python = _choose_python(facts)
    if facts.is_managed and not is_replacing:
        raise already_managed(facts.agent_id)
    _check_space(facts)
    return Plan(root_by, python)


def already_managed(agent_id: str | None) -> DeployError:
    """Return the error of a host that has an agent, whose id is None where it could not be read."""
    known = f"the agent {agent_id}" if agent_id else "an agent"
    return deploy_error(
        CHECK,
        "already_managed",
        f"the host has {known} already: send replace true to put this one in its place, or remove that one on the host"
        " with fleetwire-agent uninstall --purge",
        **({"agent_id": agent_id} if agent_id else {}),
    )


def _check_platform(facts: HostFacts) -> None:
    if facts.kernel != "Linux":
        raise _unsupported(f"its system is {facts.kernel or 'not known'}; the agent runs on Linux")
    if facts.arch not in ARCHITECTURES or facts.long_bit == "32":
        bits = " with 32-bit programs" if facts.long_bit == "32" else ""
        raise _unsupported(f"its architecture is {facts.arch}{bits}; the agent runs on {' and '.join(ARCHITECTURES)}")


def _unsupported(problem: str) -> DeployError:
    return deploy_error(CHECK, "unsupported", f"the host cannot be managed: {problem}")


def _choose_root(facts: HostFacts, ssh_user: str, *, has_sudo_password: bool) -> RootBy:
    match facts.sudo:
        case "root":
            return "login"
        case "nopasswd":
            return "sudo"
        case "password" if has_sudo_password:
            return "sudo with password"
        case "password":
            raise deploy_error(
                CHECK,
                "sudo_password",
                f"sudo asks {ssh_user} for a password: send it as sudo_password, allow {ssh_user} sudo without one, or"
                " deploy as root",
            )
        case "missing":
            raise deploy_error(
                CHECK, "no_sudo", f"the installation needs root and the host has no sudo for {ssh_user}: deploy as root"
            )
        case _:
            raise refused_sudo(ssh_user, facts.sudo_said)


def refused_sudo(ssh_user: str, said: str) -> DeployError:
    """Return the error of a user whom sudo lets do nothing."""
    return deploy_error(
        CHECK,
        "no_sudo",
        f"sudo refuses {ssh_user}{_quoted(said)}: allow that user all commands in the host's sudoers, or deploy as"
        " another user",
    )


def wrong_sudo_password(ssh_user: str) -> DeployError:
    return deploy_error(CHECK, "sudo_password", f"sudo does not accept the sudo_password that was sent for {ssh_user}")


def judge_sudo(exit_status: int | None, said: str, ssh_user: str) -> None:
    """Raise DeployError unless sudo ran a command with the password it was given.

    Args:
        said: its standard error, in English."""
    if exit_status == 0:
        return
    lines = [line for line in said.splitlines() if line.strip()]
    if any("incorrect password" in line or "try again" in line or "Authentication failed" in line for line in lines):
        raise wrong_sudo_password(ssh_user)
    raise refused_sudo(ssh_user, lines[-1] if lines else "")


def _choose_python(facts: HostFacts) -> str:
    """Return the distribution's own python3 where that will do, else the newest."""
    usable = [python for python in facts.pythons if python.is_whole and python.version[:2] >= PYTHON_MINIMUM]
    if usable:
        own = next((python for python in usable if python.path == "/usr/bin/python3"), None)
        return (own or max(usable, key=lambda python: python.version)).path
    wanted = ".".join(map(str, PYTHON_MINIMUM))
    advice = python_advice(facts.os_id, facts.os_version, facts.os_like)
    name = f" ({facts.os_name})" if facts.os_name else ""
    if not facts.pythons:
        raise deploy_error(
            CHECK, "no_python", f"the host{name} has no python3, and the agent needs {wanted} or later: {advice}"
        )
    newest = max(facts.pythons, key=lambda python: python.version)
    if newest.version[:2] >= PYTHON_MINIMUM:
        raise deploy_error(
            CHECK, "no_python", f"{newest.path} on the host{name} lacks parts of the standard library: {advice}"
        )
    raise deploy_error(
        CHECK,
        "python_too_old",
        f"the newest Python of the host{name} is {_version(newest)}, and the agent needs {wanted} or later: {advice}",
    )


def _version(python: PythonFact) -> str:
    return ".".join(map(str, python.version))


def check_route(server_url: str, *, is_same_machine: bool) -> None:
    """Raise DeployError where the host cannot possibly reach the server under that URL."""
    name = urlsplit(server_url).hostname or ""
    if not is_same_machine and (name == "localhost" or name.startswith("127.") or name == "::1"):
        raise deploy_error(
            CHECK,
            "no_route",
            f"the server's public URL is {server_url}, which on the host means the host itself: {_PUBLIC_URL}",
        )


def route_advice(server_url: str) -> str:
    """Return what to do when the agent on the host does not get through to the server."""
    return f"hosts dial {server_url}: see that it is right and that no firewall stands between; if not, {_PUBLIC_URL}"


_PUBLIC_URL = "start the server with --public-url and a URL under which hosts reach it"


def _check_space(facts: HostFacts) -> None:
    for place, free, needed in (
        ("/opt", facts.opt_free_bytes, INSTALLATION_BYTES),
        ("/tmp", facts.tmp_free_bytes, TMP_NEEDED_BYTES),  # noqa: S108 - named, not used
    ):
        if free is not None and free < needed:
            raise deploy_error(
                CHECK,
                "disk_full",
                f"the host's filesystem of {place} has {free // 1024} KiB left, and the installation needs"
                f" {needed // 1024}: make room there",
            )


def _quoted(said: str) -> str:
    return f" ({said.strip()[:200]})" if said.strip() else ""


# ------------------------------------------------------------ commands, for the login shell of whoever runs them


def build_root_command(root_by: RootBy, command: Sequence[str]) -> str:
    """Return the command line that runs a command as root.

    With a password, sudo reads it as the first line of standard input, always: -k makes it forget that it asked
    before, else that line would reach the command. All go through sh, so that sudo's rules treat them alike."""
    words = ["sh", "-c", 'exec "$@"', "sh", *command]
    match root_by:
        case "login":
            words = list(command)
        case "sudo":
            words = ["sudo", "-k", "-n", "--", *words]
        case "sudo with password":
            words = ["env", "LC_ALL=C", "sudo", "-k", "-S", "-p", "", "--", *words]
    return shlex.join(words)


def build_install(
    plan: Plan, directory: str, server_url: str, profile: Profile, tls_pin: str | None, *, is_replacing: bool
) -> list[str]:
    """Return the installer's command; it takes the agent's key on standard input, never as an argument."""
    command = [plan.python, "-I", f"{directory}/{BUNDLE_NAME}", "install", "--json", "--server", server_url]
    command += ["--key-file", "-", "--profile", profile, "--python", plan.python]
    if tls_pin is not None:
        command += ["--tls-pin", tls_pin]
    if is_replacing:
        command.append("--replace")
    return command


def build_clean_up(directory: str, undo: tuple[Plan, str] | None, *, is_replacing: bool) -> str:
    """Return a script for sh that leaves nothing of a deployment on the host; it says so in its last line.

    Args:
        directory: where the bundle was put.
        undo: where an installation was begun and its end is not known, the plan and the id of the agent it was for.
            The installer is ended and takes back what it did; what is there afterwards is removed, unless it belongs
            to another agent.
        is_replacing: what is there afterwards stays: the agent before it is gone, and a host that had one keeps one.
            The script says `agent=kept` then."""
    quoted = shlex.quote(directory)
    script = f"directory={quoted}\n"
    if undo is not None:
        plan, agent_id = undo
        identity = f"grep -q '^agt_{agent_id.removeprefix('agent_')}_' /etc/fleetwire/agent.key 2>/dev/null"
        if is_replacing:
            last = f'if {identity}; then echo "agent=kept"; fi'
        else:
            uninstall = f'{shlex.quote(plan.python)} -I "$directory/{BUNDLE_NAME}" uninstall --purge >/dev/null 2>&1'
            is_ours = f"{{ [ ! -e /etc/fleetwire/agent.key ] || {identity}; }}"
            last = f'if [ -e "$directory/{BUNDLE_NAME}" ] && {is_ours}; then {uninstall}; fi'
        script += f"{_END_INSTALLER.format(name=BUNDLE_NAME)}{last}\n"
    return script + f'cd / && rm -rf -- {quoted} && [ ! -e {quoted} ] && echo "clean_up=done"\n'


_END_INSTALLER = """\
installers() {{
    for file in /proc/[0-9]*/cmdline; do
        tr '\\0' '\\n' <"$file" 2>/dev/null | grep -qxF "$directory/{name}" || continue
        pid=${{file#/proc/}}; echo "${{pid%/cmdline}}"
    done
}}
pids=$(installers)
[ -z "$pids" ] || kill -TERM $pids 2>/dev/null
turn=0  # 30 s: to take back an upgrade it stops one agent, which may take 10, and starts another
while [ -n "$(installers)" ] && [ $turn -lt 60 ]; do
    sleep 0.5
    turn=$((turn + 1))
done
pids=$(installers)
[ -z "$pids" ] || kill -KILL $pids 2>/dev/null
"""
