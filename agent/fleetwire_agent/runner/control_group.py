"""A control group (version 2) for one command: everything it starts stays in it, whatever it does to leave its session
and its parents, and can be ended as a whole."""

import os
import time
from contextlib import suppress
from typing import Final

from fleetwire_agent.process_table import ProcessRow, read_process

_FREE_SECONDS: Final = 0.2  # the kernel lets go of a group a moment after its last process


class ControlGroup:
    def __init__(self, path: str) -> None:
        self._path = path

    def enter(self) -> None:
        """Move the calling process into the group. Raises OSError."""
        self._write("cgroup.procs", "0")

    def is_larger_than(self, count: int) -> bool:
        return len(self._list_pids()) > count

    def read_members(self, *, limit: int | None = None) -> set[ProcessRow]:
        rows = (read_process(pid) for pid in self._list_pids()[:limit])
        return {row for row in rows if row}

    def kill(self) -> None:
        """Send SIGKILL to all, also to what is being forked meanwhile."""
        try:
            self._write("cgroup.kill", "1")
        except OSError:  # Linux before 5.14: what is frozen cannot fork, and is killed all the same
            with suppress(OSError):
                self._write("cgroup.freeze", "1")
            for pid in self._list_pids():
                with suppress(ProcessLookupError):
                    os.kill(pid, 9)

    def remove(self) -> None:
        """Remove the group: nobody would when what still runs in it has ended. That goes on in the group above."""
        deadline = time.monotonic() + _FREE_SECONDS
        for directory, _, _ in os.walk(self._path, topdown=False):
            while not _remove_directory(directory) and time.monotonic() < deadline:
                for pid in _read_pids(directory):
                    with suppress(OSError):  # it has ended
                        _write(f"{directory}/../cgroup.procs", str(pid))
                time.sleep(0.005)

    def _list_pids(self) -> list[int]:
        return [pid for directory, _, _ in os.walk(self._path) for pid in _read_pids(directory)]

    def _write(self, name: str, content: str) -> None:
        _write(f"{self._path}/{name}", content)


def choose_control_group(command_id: str) -> str | None:
    """Return where to make a group for an attempt at a command, below the group of the calling process: a path that no
    other attempt has. None where this host has no groups of version 2."""
    parent = _find_own_group()
    return None if parent is None else f"{parent}/fleetwire-{command_id}-{os.urandom(8).hex()}"


def make_control_group(path: str) -> ControlGroup | None:
    """Make the group; return None where this user may not."""
    try:
        os.mkdir(path)  # noqa: PTH102
    except OSError:
        return None
    try:
        probe = os.open(f"{path}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        with suppress(OSError):
            os.rmdir(path)  # noqa: PTH106
        return None
    os.close(probe)
    return ControlGroup(path)


def _find_own_group() -> str | None:
    try:
        with open("/proc/self/cgroup", encoding="utf-8") as file:  # noqa: PTH123
            own = next((line.rstrip("\n")[3:] for line in file if line.startswith("0::/")), None)
        with open("/proc/self/mounts", encoding="utf-8") as file:  # noqa: PTH123
            mounts = [line.split(" ") for line in file]
    except OSError:
        return None
    mountpoint = next((fields[1] for fields in mounts if fields[2] == "cgroup2"), None)
    if own is None or mountpoint is None or own.startswith("/.."):
        return None
    return f"{mountpoint}{own}".rstrip("/")


def _read_pids(directory: str) -> list[int]:
    """Return the processes of this one group; none where it is gone."""
    try:
        with open(f"{directory}/cgroup.procs", encoding="ascii") as file:  # noqa: PTH123
            return [int(line) for line in file if line != "0\n"]  # 0: of another pid namespace
    except OSError:
        return []


def _write(path: str, content: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, content.encode())
    finally:
        os.close(descriptor)


def _remove_directory(path: str) -> bool:
    try:
        os.rmdir(path)  # noqa: PTH106
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
