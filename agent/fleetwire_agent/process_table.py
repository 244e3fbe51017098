"""The processes of this host as /proc shows them, the family of one command among them, and signals that hit no other.

Without asyncio: a command's runner uses it too, and has no loop."""

import os
import signal
from collections.abc import Iterable, Set
from contextlib import suppress
from typing import Final, NamedTuple

COMMAND_ID_VARIABLE: Final = "FLEETWIRE_COMMAND_ID"
COMMAND_DIRECTORY_VARIABLE: Final = "FLEETWIRE_COMMAND_DIRECTORY"
"""Marks every process of a command in its environment, also one that left the session and lost its parents. The
directory is one of this agent's alone, whatever other agents the host has, and of one attempt."""
REAPED_AT_ONCE: Final = 200
"""Children that ended, collected before a subreaper looks at its other work: what only forks may add them as fast."""

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


class ProcessRow(NamedTuple):
    """A living process as /proc shows it. pid and start_ticks together are its identity: pids are used again."""

    pid: int
    parent_pid: int
    session_id: int
    start_ticks: int

    @property
    def identity(self) -> tuple[int, int]:
        return self.pid, self.start_ticks


class Family:
    """Finds all that a command started, again and again while it is being killed."""

    def __init__(
        self, roots: Iterable[ProcessRow], *, variables: Iterable[str] = (), within: int | None = None
    ) -> None:
        """Describe a family.

        Args:
            variables: each is NAME=VALUE; whatever was started with one of them in its environment is a member.
            within: look only among the descendants of this process, a child subreaper, which no orphan leaves."""
        self._roots = {root.pid: root.start_ticks for root in roots}
        self._variables = frozenset(os.fsencode(variable) for variable in variables)
        self._within = within
        self._known: set[tuple[int, int]] = set()

    def read_members(self) -> set[ProcessRow]:
        """Return the living members: what carries one of the variables, the roots and all in their sessions, and of
        each member seen now or earlier the descendants and the whole session. Blocking."""
        rows = read_processes()
        candidates = rows if self._within is None else descendants_of(rows, self._within)
        candidates = [row for row in candidates if row.pid != os.getpid()]
        # A root whose pid has been used again has no session any more: its id would not have been free otherwise.
        used_again = {row.pid for row in rows if self._roots.get(row.pid, row.start_ticks) != row.start_ticks}
        sessions = self._roots.keys() - used_again
        members = {row for row in candidates if self._is_seed(row, sessions)}
        self._add_relatives(members, candidates)
        self._known |= {row.identity for row in members}
        return members

    def _is_seed(self, row: ProcessRow, sessions: Set[int]) -> bool:
        return (
            row.identity in self._known
            or row.pid in sessions
            or row.session_id in sessions
            or (bool(self._variables) and not self._variables.isdisjoint(read_environment(row.pid)))
        )

    def _add_relatives(self, members: set[ProcessRow], candidates: list[ProcessRow]) -> None:
        """Add the descendants of the members and their sessions, looking at each process once."""
        children: dict[int, list[ProcessRow]] = {}
        sessions: dict[int, list[ProcessRow]] = {}
        for row in candidates:
            children.setdefault(row.parent_pid, []).append(row)
            sessions.setdefault(row.session_id, []).append(row)
        sessions.pop(0, None)  # of the kernel, and of whatever came from outside this pid namespace
        waiting = list(members)
        while waiting:
            row = waiting.pop()
            relatives = children.pop(row.pid, []) + sessions.pop(row.session_id, [])
            fresh = [relative for relative in relatives if relative not in members]
            members.update(fresh)
            waiting += fresh


def read_process(pid: int) -> ProcessRow | None:
    """Return the process, or None when it is gone or only its exit status is left. Source: /proc/PID/stat."""
    try:
        text = _read_proc_file(f"/proc/{pid}/stat")
    except OSError:
        return None
    fields = text[text.rfind(b")") + 2 :].split()  # the name before it may hold spaces and parentheses
    if fields[0] in (b"Z", b"X"):
        return None
    return ProcessRow(pid, parent_pid=int(fields[1]), session_id=int(fields[3]), start_ticks=int(fields[19]))


def read_processes() -> list[ProcessRow]:
    """Return all living processes of the host. Not one moment's picture: processes come and go meanwhile."""
    rows = (read_process(int(name)) for name in os.listdir("/proc") if name.isdigit())  # noqa: PTH208 - plain names
    return [row for row in rows if row]


def read_environment(pid: int) -> list[bytes]:
    """Return the environment the process was started with, each variable as NAME=VALUE; empty where it is not shown."""
    try:
        return _read_proc_file(f"/proc/{pid}/environ").split(b"\0")
    except OSError:
        return []


def _read_proc_file(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        pieces = []
        while piece := os.read(descriptor, 65536):
            pieces.append(piece)
        return b"".join(pieces)
    finally:
        os.close(descriptor)


def descendants_of(rows: Iterable[ProcessRow], ancestor_pid: int) -> list[ProcessRow]:
    """Return all descendants of a process, parents before their children."""
    children: dict[int, list[ProcessRow]] = {}
    for row in rows:
        children.setdefault(row.parent_pid, []).append(row)
    found = children.pop(ancestor_pid, [])
    for row in found:  # grows while it is walked; each pid once: one that is used again meanwhile may close a circle
        found.extend(children.pop(row.pid, ()))
    return found


def signal_all(rows: Iterable[ProcessRow], signal_number: signal.Signals) -> None:
    # Parents first: a shell whose child is signalled before it would go on to its next command.
    for row in sorted(rows, key=lambda row: (row.start_ticks, row.pid)):
        with suppress(ProcessLookupError, PermissionError):
            _signal(row, signal_number)


def _signal(row: ProcessRow, signal_number: signal.Signals) -> None:
    """Signal exactly this process, not a later one of the same pid."""
    try:
        descriptor = os.pidfd_open(row.pid)
    except ProcessLookupError:
        return
    except OSError:  # a kernel before 5.3, a seccomp filter that does not know it, or no descriptor is left
        descriptor = None
    try:
        now = read_process(row.pid)
        if now is None or now.start_ticks != row.start_ticks:
            return
        if descriptor is None:
            os.kill(row.pid, signal_number)
        else:
            signal.pidfd_send_signal(descriptor, signal_number)
    finally:
        if descriptor is not None:
            os.close(descriptor)


def set_child_subreaper(*, is_on: bool) -> None:
    """Adopt the orphans among this process's descendants instead of leaving them to init, or no longer."""
    import ctypes  # here, as nothing else in the agent needs it, and runners with a control group never do

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, int(is_on), 0, 0, 0) != 0:
        error_number = ctypes.get_errno()
        raise OSError(error_number, f"prctl(PR_SET_CHILD_SUBREAPER): {os.strerror(error_number)}")
