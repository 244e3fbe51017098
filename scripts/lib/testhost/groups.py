"""A cgroup2 group for each host: what it started can be found and killed, whoever else has crashed."""

import errno
import os
import signal
from pathlib import Path
from typing import Final

from .places import STATE_DIR, HostError
from .processes import wait_until
from .programs import run

_PARENT: Final = "fleetwire-testhosts"
_KILL_SECONDS: Final = 20.0


def group_of(host: str) -> Path:
    return find_cgroup2() / _PARENT / host


def find_cgroup2() -> Path:
    """Return where the unified hierarchy is mounted. Mounts it where it is not, as on a machine with cgroup v1 only."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, target, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(target)
    own = STATE_DIR / "cgroup2"
    own.mkdir(parents=True, exist_ok=True)
    run("mount", "-t", "cgroup2", "cgroup2", own)
    return own


def list_processes(group: Path) -> list[int]:
    """Return the processes of the group and all groups below."""
    pids = []
    for directory, _, _ in os.walk(group):
        try:
            pids += [int(pid) for pid in (Path(directory) / "cgroup.procs").read_text().split()]
        except OSError:  # removed meanwhile
            continue
    return pids


def kill_group(group: Path) -> None:
    """Kill all of it at once and return when nothing of it is left; the group stays."""
    if not group.exists():
        return
    try:
        (group / "cgroup.kill").write_text("1")
    except FileNotFoundError:  # Linux before 5.14
        for pid in list_processes(group):
            os.kill(pid, signal.SIGKILL)
    except OSError as err:
        if err.errno != errno.ENODEV:  # removed meanwhile, so nothing was left in it
            raise
    wait_until(lambda: not list_processes(group), f"the end of all processes in {group}", _KILL_SECONDS)


def remove_group(group: Path) -> None:
    """Remove the group with those below. Raises HostError where processes are left in it."""

    def is_removed() -> bool:
        for directory, _, _ in os.walk(group, topdown=False):
            try:
                Path(directory).rmdir()
            except FileNotFoundError:
                continue
            except OSError as err:
                if err.errno != errno.EBUSY:
                    raise HostError(f"{directory} cannot be removed: {err.strerror}") from err
                return False  # the last process is no longer listed, and the kernel not yet done with it
        return True

    try:
        wait_until(is_removed, f"the end of {group}", _KILL_SECONDS)
    except HostError as err:
        raise HostError(f"{err}; it holds the processes {list_processes(group)}") from err


def remove_parent() -> None:
    """Remove what all groups are in, when the last host is gone."""
    parent = find_cgroup2() / _PARENT
    if parent.exists():
        remove_group(parent)
    own = STATE_DIR / "cgroup2"
    if own.is_mount():
        run("umount", own)
