"""Killing a process exactly when it asks the kernel to make a file durable."""

import shlex
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Final

import pytest

NO_STRACE: Final = "NOT TESTED: KILLS AT EVERY SYNC"
needs_strace = pytest.mark.skipif(
    shutil.which("strace") is None, reason=f"{NO_STRACE}: strace is not there: apt-get install strace"
)


def tracing(log: Path, *, kill_at: int | None = None, with_children: bool = False) -> list[str]:
    """Return what starts a program so that it is killed when one of its threads syncs for the n-th time.

    Args:
        log: gets a line for each sync, which begins with the thread's number.
        kill_at: n, from 1 on; None: only write the log.
        with_children: also count, and kill, what it starts."""
    kill = ["-e", f"inject=fsync,fdatasync:signal=SIGKILL:when={kill_at}"] if kill_at else []
    # -DDD: the program, not strace, is the child that was asked for. strace counts each thread for itself.
    alone = [] if with_children else ["-b", "execve"]
    return [
        "strace",
        "-DDD",
        "-f",
        *alone,
        "-qq",
        "-o",
        str(log),
        "-e",
        "signal=none",
        "-e",
        "trace=fsync,fdatasync",
        *kill,
    ]


def tracing_runners(directory: Path, log: Path, *, kill_at: int | None = None) -> list[str]:
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


def count_syncs(*logs: Path) -> int:
    """Return the most that one thread did."""
    return max((count for log in logs for count in _count_by_thread(log).values()), default=0)


def has_killed(*logs: Path) -> bool:
    """Whether a sync was never finished."""
    return any("sync(" in line and line.endswith("= ?") for log in logs for line in log.read_text().splitlines())


def _count_by_thread(log: Path) -> Counter[str]:
    return Counter(line.split()[0] for line in log.read_text().splitlines() if "sync(" in line)
