"""Processes by number and start time: a number alone may meanwhile be another process."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from .places import HostError

T = TypeVar("T")

_POLL_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class ProcessId:
    pid: int
    started_ticks: int  # since this machine's boot; /proc/PID/stat, field 22

    @property
    def is_alive(self) -> bool:
        """Whether it still runs; one that has ended and is not yet reaped does not."""
        fields = _read_stat(self.pid)
        return fields is not None and fields[0] != "Z" and int(fields[19]) == self.started_ticks


def identify_process(pid: int) -> ProcessId:
    """Raises HostError when there is no such process."""
    fields = _read_stat(pid)
    if fields is None:
        raise HostError(f"there is no process {pid}")
    return ProcessId(pid, int(fields[19]))


def _read_stat(pid: int) -> list[str] | None:
    """Return the fields from the third on, `state`; the second may hold spaces."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def wait_until(read: Callable[[], T], what: str, timeout_seconds: float) -> T:
    """Return the first true value of `read`. Raises HostError that names `what` when none comes in time.

    Polls: it waits for other processes' state in /proc and the cgroup filesystem, which tells nobody of changes."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        value = read()
        if value:
            return value
        if time.monotonic() > deadline:
            raise HostError(f"{what}: not within {timeout_seconds:.0f} s")
        time.sleep(_POLL_SECONDS)
