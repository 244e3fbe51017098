"""Other programs: which are needed, and how they are run."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from .places import HostError

PACKAGE_OF: Final = {
    "mmdebstrap": "mmdebstrap",
    "systemd-nspawn": "systemd-container",
    "ip": "iproute2",
    "bridge": "iproute2",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "setpriv": "util-linux",
    "setsid": "util-linux",
    "mount": "mount",
}
_SEARCH_PATH: Final = os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin"


def find_obstacles() -> list[str]:
    """Return why this machine can boot no test hosts, each as a sentence; nothing when it can."""
    if os.geteuid() != 0:
        return ["test hosts need root."]
    missing = sorted({package for name, package in PACKAGE_OF.items() if find_program(name) is None})
    return [f"not installed: {', '.join(missing)}."] if missing else []


def check_obstacles() -> None:
    """Raises HostError where this machine can boot no test hosts."""
    if obstacles := find_obstacles():
        raise HostError(f"this machine can boot no test hosts: {' '.join(obstacles)}")


def find_program(name: str) -> str | None:
    return shutil.which(name, path=_SEARCH_PATH)


def run(*arguments: object, content: str | None = None) -> str:
    """Run a program to its end and return its standard output. Raises HostError with what it said when it fails."""
    argv = [str(argument) for argument in arguments]
    done = try_run(*argv, content=content)
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip())[-2000:]
        raise HostError(f"{' '.join(argv)}: status {done.returncode}: {said}")
    return done.stdout


def try_run(*arguments: object, content: str | None = None) -> subprocess.CompletedProcess[str]:
    argv = [str(argument) for argument in arguments]
    return subprocess.run(
        argv, input=content or "", capture_output=True, text=True, check=False, env=_environment(), errors="replace"
    )


def spawn_detached(argv: Sequence[str], log: Path, directory: Path) -> None:
    """Start a program in a session of its own whose parent is init: nobody here waits for it."""
    with log.open("ab") as output:
        subprocess.run(
            ["setsid", "--fork", *argv],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=directory,
            env=_environment(),
            check=True,
        )


def _environment() -> dict[str, str]:
    return {**os.environ, "PATH": _SEARCH_PATH, "LC_ALL": "C.UTF-8"}
