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
        """Remove the group unless something still runs in it."""
        deadline = time.monotonic() + _FREE_SECONDS
        for directory, _, _ in os.walk(self._path, topdown=False):
            while not _remove_directory(directory) and time.monotonic() < deadline and not self._list_pids():
                time.sleep(0.005)

    def _list_pids(self) -> list[int]:
        pids: list[int] = []
        for directory, _, _ in os.walk(self._path):
            with suppress(OSError), open(f"{directory}/cgroup.procs", encoding="ascii") as file:  # noqa: PTH123
                pids += [int(line) for line in file if line != "0\n"]  # 0: of another pid namespace
        return pids

    def _write(self, name: str, content: str) -> None:
        descriptor = os.open(f"{self._path}/{name}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(descriptor, content.encode())
        finally:
            os.close(descriptor)


def make_control_group(name: str) -> ControlGroup | None:
    """Return a new group below that of the calling process, None where this host or this user cannot have one."""
    parent = _find_own_group()
    if parent is None:
        return None
    path = f"{parent}/{name}"
    try:
        os.mkdir(path)  # noqa: PTH102
    except OSError:  # also where it is there, and another's
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


def _remove_directory(path: str) -> bool:
    try:
        os.rmdir(path)  # noqa: PTH106
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
