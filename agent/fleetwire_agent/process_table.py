"""The processes of this host as /proc shows them, the family of one command among them, and signals that hit no other.

Without asyncio: a command's runner uses it too, and has no loop."""

import os
import signal
from collections.abc import Iterable
from contextlib import suppress
from typing import Final, NamedTuple

COMMAND_ID_VARIABLE: Final = "FLEETWIRE_COMMAND_ID"
"""Marks every process of a command in its environment, also one that left the session and lost its parents."""
_PR_SET_CHILD_SUBREAPER: Final = 36  # linux/prctl.h


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
        self, roots: Iterable[ProcessRow], *, command_ids: Iterable[str] = (), within: int | None = None
    ) -> None:
        """`within`: look only among the descendants of this process, a child subreaper, which no orphan leaves."""
        self._roots = tuple(roots)
        self._command_ids = frozenset(command_ids)
        self._within = within
        self._known: set[tuple[int, int]] = set()

    def read_members(self) -> set[ProcessRow]:
        """Return the living members: what carries a root's command id, all processes in a root's session, and of each
        member seen now or earlier the descendants and the whole session. Blocking."""
        rows = read_processes()
        candidates = rows if self._within is None else descendants_of(rows, self._within)
        candidates = [row for row in candidates if row.pid != os.getpid()]
        members = {row for row in candidates if self._is_seed(row)}
        while True:
            pids = {row.pid for row in members}
            sessions = {row.session_id for row in members}
            found = {row for row in candidates if row.parent_pid in pids or row.session_id in sessions}
            if found <= members:
                break
            members |= found
        self._known |= {row.identity for row in members}
        return members

    def _is_seed(self, row: ProcessRow) -> bool:
        return (
            row.identity in self._known
            or any(_is_in_session(row, root) for root in self._roots)
            or (bool(self._command_ids) and read_command_id(row.pid) in self._command_ids)
        )


def _is_in_session(row: ProcessRow, root: ProcessRow) -> bool:
    """Whether `row` is the root itself or stayed in its session."""
    if row.pid == root.pid:
        return row.start_ticks == root.start_ticks  # else the pid has been used again
    return row.session_id == root.pid


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


def read_command_id(pid: int) -> str | None:
    """Return the command id in the environment the process was started with, if any."""
    try:
        environment = _read_proc_file(f"/proc/{pid}/environ")
    except OSError:
        return None
    prefix = f"{COMMAND_ID_VARIABLE}=".encode()
    for variable in environment.split(b"\0"):
        if variable.startswith(prefix):
            return variable[len(prefix) :].decode(errors="replace")
    return None


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
    found = list(children.get(ancestor_pid, ()))
    for row in found:  # grows while it is walked
        found.extend(children.get(row.pid, ()))
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
