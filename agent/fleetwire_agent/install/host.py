"""What an installation must know of the host before it writes anything. Nothing here changes the host."""

import errno
import grp
import json
import os
import pwd
import re
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias
from urllib.parse import urlsplit

from fleetwire_agent.config import Profile
from fleetwire_agent.install.failures import InstallError, Reason
from fleetwire_agent.install.layout import PROGRAM, SETTINGS_DIRECTORY, STATE
from fleetwire_agent.install.texts import needs_quoting
from fleetwire_agent.tls import build_tls_context
from fleetwire_shared.limits import INSTALLATION_BYTES
from fleetwire_shared.pins import parse_pins

Init: TypeAlias = Literal["systemd", "openrc", "plain"]

ADMIN_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Where an administrator's programs are; a login over SSH without a terminal may lack the half of it."""

MONITOR_NEEDS_SYSTEMD: Final = 247  # LoadCredential=; before it a sandboxed agent could not read its key
REACH_SECONDS: Final = 5.0
_NEEDED_ELSEWHERE_BYTES: Final = 64 * 1024
_PROBE_SECONDS: Final = 30.0


@dataclass(frozen=True, slots=True)
class Python:
    """An interpreter that has run the bundle."""

    path: str
    version: str
    platform: str  # such as x86_64-glibc


def check_root() -> None:
    if os.geteuid() != 0:
        raise InstallError("not_root", "this must be run as root; run it again with sudo")


def find_program(name: str) -> str | None:
    """Return the path of an administrator's program, whatever PATH the installer was started with."""
    return shutil.which(name, path=ADMIN_PATH)


def find_init() -> Init:
    """Return what starts services here. What runs now counts, not what is installed: see sd_booted(3)."""
    if Path("/run/systemd/system").is_dir() and find_program("systemctl"):
        return "systemd"
    if Path("/run/openrc").is_dir() and find_program("rc-service") and find_program("supervise-daemon"):
        return "openrc"
    return "plain"


def check_profile(init: Init, profile: Profile) -> None:
    if profile != "monitor" or init != "systemd":
        return
    version = read_systemd_version()
    if version < MONITOR_NEEDS_SYSTEMD:
        raise InstallError(
            "unsupported",
            f"the profile monitor needs systemd {MONITOR_NEEDS_SYSTEMD} or later, this host has {version};"
            " use --profile manage, or upgrade the host's distribution",
        )


def read_systemd_version() -> int:
    said = run_quietly(["systemctl", "--version"])
    match = re.match(r"systemd (\d+)", said)
    return int(match[1]) if match else 0


def has_group(name: str) -> bool:
    try:
        grp.getgrnam(name)
    except KeyError:
        return False
    return True


def read_user(name: str) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam(name)
    except KeyError:
        return None


def run_program(
    command: Sequence[str], *, seconds: float, if_hung: str = "try again"
) -> subprocess.CompletedProcess[str]:
    """Run an administrator's program to its end, and return how it ended and what it said, in English.

    Args:
        if_hung: what to do, or to look at, where it does not end.

    Raises:
        InstallError: there is none of that name, or it did not end."""
    program = find_program(command[0])
    if program is None:
        raise InstallError("unsupported", f"there is no {command[0]} on this host")
    try:
        return subprocess.run(  # noqa: S603 - a fixed program
            [program, *command[1:]],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
            env={"PATH": ADMIN_PATH, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired as err:
        problem = f"{' '.join(command)} did not end within {seconds:.0f} seconds"
        raise InstallError("failed", f"{problem}; {if_hung}") from err


def describe_failure(command: Sequence[str], result: subprocess.CompletedProcess[str]) -> InstallError:
    """Return what a program that failed means to whoever installs."""
    said = (result.stderr or result.stdout).strip()
    reason: Reason = "disk_full" if "No space left" in said else "failed"
    return InstallError(reason, f"{' '.join(command)} failed: {said or f'status {result.returncode}'}")


def run_quietly(command: Sequence[str], *, seconds: float = 30.0) -> str:
    """Run an administrator's program and return what it wrote; "" when it failed."""
    try:
        result = run_program(command, seconds=seconds)
    except (InstallError, OSError):
        return ""
    return result.stdout if result.returncode == 0 else ""


# ---------------------------------------------------------------- Python


def choose_python(requested: str | None, root: Path, profile: Profile) -> Python:
    """Return the interpreter the agent is to run with: the one asked for; else the distribution's, else this one.

    Args:
        root: of the bundle, which each candidate must be able to run.
    Raises:
        InstallError: none can; the message says why."""
    candidates = [requested] if requested else ["/usr/bin/python3", sys.executable]
    problems = []
    for candidate in dict.fromkeys(candidates):
        try:
            python = probe_python(candidate, root)
            _check_place(python.path, profile)
        except InstallError as err:
            problems.append(err.message)
        else:
            return python
    raise InstallError("unsupported", "; ".join(problems))


def probe_python(path: str, root: Path) -> Python:
    """Return what this interpreter is, after it has imported all the agent needs. Raises InstallError."""
    if not os.access(path, os.X_OK):
        raise InstallError("unsupported", f"{path} is no program that can be run")
    try:
        result = subprocess.run(  # noqa: S603 - the caller's choice
            [path, "-I", str(root), "self-check"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PROBE_SECONDS,
            check=False,
        )
        answer = json.loads(result.stdout)
        return Python(str(answer["python"]), str(answer["python_version"]), str(answer["platform"]))
    except subprocess.TimeoutExpired as err:
        raise InstallError("unsupported", f"{path} did not run the agent within {_PROBE_SECONDS:.0f} seconds") from err
    except OSError as err:
        raise InstallError("unsupported", f"{path}: {err.strerror}") from err
    except (ValueError, KeyError) as err:
        said = result.stderr.strip().splitlines()[-1:] or [f"it ended with status {result.returncode}"]
        raise InstallError("unsupported", f"{path} cannot run the agent: {said[0]}") from err


def _check_place(path: str, profile: Profile) -> None:
    if needs_quoting(path):
        raise InstallError("unsupported", f"the path {path!r} cannot stand in a unit; name another with --python")
    if profile == "monitor" and str(Path(path).resolve()).startswith(("/home/", "/root/", "/run/user/", "/tmp/")):  # noqa: S108
        raise InstallError(
            "unsupported",
            f"{path} lies in a home directory, which the profile monitor hides; name another with --python",
        )


# ---------------------------------------------------------------- room


def check_room() -> None:
    """Raises InstallError with `disk_full` where an installation would run out of space half-way."""
    for directory, needed in (
        (PROGRAM, INSTALLATION_BYTES),
        (SETTINGS_DIRECTORY, _NEEDED_ELSEWHERE_BYTES),
        (STATE, _NEEDED_ELSEWHERE_BYTES),
    ):
        place = _existing(directory)
        figures = os.statvfs(place)
        free = figures.f_bavail * figures.f_frsize
        is_out_of_inodes = figures.f_files > 0 and figures.f_favail < 16
        if free < needed or is_out_of_inodes:
            what = "no more files" if is_out_of_inodes else f"{free // 1024:,} KiB"
            raise InstallError(
                "disk_full", f"there is room for {what} at {place}; {directory} needs {needed // 1024:,} KiB there"
            )


def is_full(directory: Path) -> bool:
    """Whether not even a small file can be written there."""
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(bytes(4096))
    except OSError as err:
        return err.errno in (errno.ENOSPC, errno.EDQUOT)
    return False


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


# ---------------------------------------------------------------- the way to the server


def check_reach(server: str, *, tls_pin: str | None, ca_file: str | None) -> str:
    """Return the address at which the server can be connected to from here.

    Raises:
        InstallError: `no_route`, or `tls`; the message says what to do."""
    parts = urlsplit(server)
    host, is_tls = parts.hostname or "", parts.scheme == "https"
    port = parts.port or (443 if is_tls else 80)
    connection = _connect(host, port)
    with connection:
        address = connection.getpeername()[0]
        if is_tls:
            _shake_hands(connection, host, port, tls_pin=tls_pin, ca_file=ca_file)
    return str(address)


def _connect(host: str, port: int) -> socket.socket:
    advice = (
        "let the firewalls of the host and of its network pass it, or start the server with --public-url and a URL"
        " that can be reached from here"
    )
    try:
        places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as err:
        reason = err.strerror if isinstance(err, OSError) else str(err)
        raise InstallError(
            "no_route",
            f"the name {host} of the server cannot be resolved here: {reason}; correct the host's DNS,"
            " or start the server with --public-url and a URL that hosts can reach",
        ) from err
    problems: dict[str, None] = {}
    for family, kind, protocol, _, address in places:
        connection = socket.socket(family, kind, protocol)
        connection.settimeout(REACH_SECONDS)
        try:
            connection.connect(address)
        except OSError as err:
            connection.close()
            said = "no answer" if isinstance(err, TimeoutError) else (err.strerror or str(err))
            problems[f"{address[0]}: {said}"] = None
        else:
            return connection
    raise InstallError(
        "no_route", f"this host cannot connect to the server at {host} port {port} ({'; '.join(problems)}): {advice}"
    )


def _shake_hands(connection: socket.socket, host: str, port: int, *, tls_pin: str | None, ca_file: str | None) -> None:
    context = build_tls_context(ca_file, parse_pins(tls_pin) if tls_pin else ())
    try:
        with context.wrap_socket(connection, server_hostname=host):
            pass
    except ssl.SSLCertVerificationError as err:
        said = err.verify_message if getattr(err, "verify_message", "") else str(err)
        advice = (
            "the server's key has changed, or somebody stands in between: fetch the install line anew from the server"
            if tls_pin
            else "install its authority's certificate on this host, or give --tls-pin"
        )
        raise InstallError("tls", f"the certificate of {host} port {port} is not trusted: {said}; {advice}") from err
    except (OSError, ValueError) as err:
        raise InstallError("tls", f"no TLS with {host} port {port}: {err}; is it an https:// server?") from err
