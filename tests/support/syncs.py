"""Killing a process exactly when it asks the kernel to make a file durable."""

import shutil
from collections import Counter
from pathlib import Path

import pytest

needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not there: apt-get install strace")


def tracing(log: Path, *, kill_at: int | None = None, with_children: bool = False) -> list[str]:
    """Return what starts a program so that it is killed when one of its threads syncs for the n-th time.

    Args:
        log: gets a line for each sync, which begins with the thread's number.
        kill_at: n, from 1 on; None: only write the log.
        with_children: also count, and kill, what it starts."""
    kill = ["-e", f"inject=fsync,fdatasync:signal=SIGKILL:when={kill_at}"] if kill_at else []
    # -D: the program, not strace, is the child that was asked for. strace counts each thread for itself.
    alone = [] if with_children else ["-b", "execve"]
    return [
        "strace",
        "-D",
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


def count_syncs(log: Path) -> int:
    """Return the most that one thread did."""
    threads = Counter(line.split()[0] for line in log.read_text().splitlines() if "sync(" in line)
    return max(threads.values(), default=0)
