"""Killing a process exactly when it asks the kernel to make a file durable."""

import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import pytest

CALLS: Final = ("fsync", "fdatasync")
NO_STRACE: Final = "NOT TESTED: KILLS AT EVERY SYNC"
needs_strace = pytest.mark.usefixtures("strace")


class Sync(NamedTuple):
    """The n-th time, from 1 on, that a thread makes this system call."""

    call: str
    number: int

    def __str__(self) -> str:
        return f"{self.call}-{self.number}"


def tracing(log: Path, *, kill_at: Sync | None = None) -> list[str]:
    """Return what starts a program so that it is killed when one of its threads syncs so for the n-th time.

    Args:
        log: gets a line for each sync, which begins with the thread's number.
        kill_at: None: only write the log."""
    kill = ["-e", f"inject={kill_at.call}:signal=SIGKILL:when={kill_at.number}"] if kill_at else []
    return [
        "strace",
        "-DDD",  # the program, not strace, is the child that was asked for
        "-f",  # all threads; strace counts each of them, and each call, for itself
        "-b",  # but not what it starts
        "execve",
        "-qq",
        "-y",  # with the file's path
        "-o",
        str(log),
        "-e",
        "signal=none",
        "-e",
        f"trace={','.join(CALLS)}",
        *kill,
    ]


def tracing_runners(directory: Path, log: Path, *, kill_at: Sync | None = None) -> list[str]:
    """Return what starts an agent so that each of its runners is killed at its own n-th sync; the agent is not.

    Args:
        directory: a new one, for a Python to stand in for ours: the agent starts runners by the path it was started by.
        log: its name begins the names of files, one for each runner."""
    own = Path(sys.executable).parent.parent
    (directory / "bin").mkdir(parents=True)
    for name in ("pyvenv.cfg", "lib"):
        (directory / name).symlink_to(own / name)
    trace = shlex.join(tracing(Path("LOG"), kill_at=kill_at)).replace("LOG", f"{shlex.quote(str(log))}-$$")
    stand_in = directory / "bin/python"
    stand_in.write_text(f'#!/bin/sh\nexec {trace} {shlex.quote(sys.executable)} "$@"\n')
    stand_in.chmod(0o755)
    return ["bash", "-c", 'exec -a "$0" "$@"', str(stand_in), sys.executable]


def slowing(seconds: float, *, unseen: str, value: str) -> list[str]:
    """Return what starts a program so that each sync of it, and of all it starts, begins late, as on a slow disk.

    Args:
        unseen: a variable that the program's environment has, with this value, and that of strace has not."""
    return [
        "env",
        f"--unset={unseen}",
        "strace",
        "-DDD",
        "-f",
        "--seccomp-bpf",
        "-qq",
        "-o",
        "/dev/null",
        "-e",
        "signal=none",
        "-e",
        f"trace={','.join(CALLS)}",
        "-e",
        f"inject={','.join(CALLS)}:delay_enter={round(seconds * 1e6)}",
        "env",
        f"{unseen}={value}",
    ]


def list_syncs(*logs: Path) -> list[Sync]:
    """Return all the moments at which one thread, the one that did most, could be killed."""
    last: dict[str, int] = dict.fromkeys(CALLS, 0)
    for (_, call), count in _count(logs).items():
        last[call] = max(last[call], count)
    return [Sync(call, number) for call in CALLS for number in range(1, last[call] + 1)]


def count_syncs(*logs: Path) -> int:
    """Return how many there were: more than `list_syncs` has where a thread hides behind one that is ahead of it."""
    return _count(logs).total()


def has_killed(*logs: Path) -> bool:
    """Whether a sync was never finished."""
    return any(line.endswith("= ?") for log in logs for line in _read_syncs(log))


def read_syncs(log: Path) -> list[list[str]]:
    """Return the lines of each thread, without its number."""
    by_thread: dict[str, list[str]] = {}
    for line in _read_syncs(log):
        thread, call = line.split(maxsplit=1)
        by_thread.setdefault(thread, []).append(call)
    return list(by_thread.values())


def _count(logs: Sequence[Path]) -> Counter[tuple[str, str]]:
    """Return how often each thread made each call."""
    words = [line.split() for log in logs for line in _read_syncs(log)]
    return Counter((thread, call.partition("(")[0]) for thread, call, *_ in words)


def _read_syncs(log: Path) -> list[str]:
    return [line for line in log.read_text().splitlines() if "sync(" in line]
