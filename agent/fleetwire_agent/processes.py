"""Child processes: started without a thread each, reaped in one place, killed with all that they started.

The agent is a child subreaper, so whatever a command starts stays its descendant: an orphan is adopted by the agent
and never by init. That is what makes "nothing is left running" provable without control groups."""

import asyncio
import fcntl
import logging
import os
import signal
import subprocess
import termios
import time
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Final, NamedTuple, Self

COMMAND_ID_VARIABLE: Final = "FLEETWIRE_COMMAND_ID"
"""Marks every process of a command in its environment, also one that left the session and lost its parents."""

KILL_GRACE_SECONDS: Final = 2.0
"""Between SIGTERM and SIGKILL."""

_GIVE_UP_SECONDS: Final = 5.0  # after SIGKILL; a process in uninterruptible sleep dies when its device answers
_FIRST_SCAN_DELAY_SECONDS: Final = 0.005
_LONGEST_SCAN_DELAY_SECONDS: Final = 0.1
_PR_SET_CHILD_SUBREAPER: Final = 36  # linux/prctl.h

_log = logging.getLogger(__name__)


class Pipe:
    """The reading end of a child's stdout or stderr. Reads only when asked: a full pipe makes the child wait."""

    def __init__(self, descriptor: int) -> None:
        os.set_blocking(descriptor, False)
        self._descriptor: int | None = descriptor
        self._waiter: asyncio.Future[None] | None = None

    async def read(self, limit: int = 65536) -> bytes:
        """Return what is there, at most `limit` bytes, waiting for the first; b"" at the end or when closed.

        One reader at a time. A cancelled read has taken nothing."""
        await asyncio.sleep(0)  # a child that always has data must not keep the loop from everything else
        while self._descriptor is not None:
            try:
                return os.read(self._descriptor, limit)
            except BlockingIOError:
                await self._wait_until_readable(self._descriptor)
        return b""

    def read_rest(self) -> bytes:
        """Return what is in the pipe now, without waiting."""
        if self._descriptor is None:
            return b""
        available = array("i", [0])
        fcntl.ioctl(self._descriptor, termios.FIONREAD, available)
        return os.read(self._descriptor, available[0]) if available[0] else b""

    async def _wait_until_readable(self, descriptor: int) -> None:
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        loop.add_reader(descriptor, self._wake)
        try:
            await self._waiter
        finally:
            if self._descriptor is not None:
                loop.remove_reader(descriptor)
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def close(self) -> None:
        """Close the pipe; a waiting read returns b"". A child that writes on gets SIGPIPE. Closing twice is allowed."""
        if self._descriptor is None:
            return
        descriptor, self._descriptor = self._descriptor, None
        if self._waiter is not None:
            asyncio.get_running_loop().remove_reader(descriptor)
            self._wake()
        os.close(descriptor)


class Process:
    """A child in a session of its own. Made by `Spawner.spawn`; whoever spawned it closes it."""

    def __init__(self, pid: int, stdout: Pipe, stderr: Pipe, *, command_id: str | None) -> None:
        self.pid = pid
        self.stdout = stdout
        self.stderr = stderr
        self.command_id = command_id
        row = read_process(pid)
        self._start_ticks = row.start_ticks if row else None  # None: gone already
        self._exited = asyncio.Event()
        self._returncode = 0

    async def wait(self) -> int:
        """Return the exit status of the child itself; negative for the signal that ended it."""
        await self._exited.wait()
        return self._returncode

    async def kill(self) -> None:
        """Kill the child and all it started: SIGTERM, after the grace SIGKILL, until none is left."""
        await kill_processes([self])

    def close(self) -> None:
        """Close both pipes. The process may live on."""
        self.stdout.close()
        self.stderr.close()

    def is_in_session(self, row: "ProcessRow") -> bool:
        """Whether `row` is the child itself or stayed in its session."""
        if row.pid == self.pid:
            return row.start_ticks == self._start_ticks  # else the pid has been used again
        return row.session_id == self.pid

    def note_exit(self, returncode: int) -> None:
        """Called by the spawner once, when the child has been reaped."""
        self._returncode = returncode
        self._exited.set()


class Spawner:
    """Starts children and reaps all of the agent's, adopted orphans included. One per process, in the main thread.

    Use as a context manager around everything that spawns. Nothing else in the process may wait for children, but
    within `sharing_children`."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = dict(environment)
        self._processes: dict[int, Process] = {}
        self._sharers = 0

    def __enter__(self) -> Self:
        _set_child_subreaper(is_on=True)
        asyncio.get_running_loop().add_signal_handler(signal.SIGCHLD, self._reap)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reap()
        asyncio.get_running_loop().remove_signal_handler(signal.SIGCHLD)
        _set_child_subreaper(is_on=False)

    def spawn(self, argv: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: str = "/") -> Process:
        """Start `argv` in a session of its own, with /dev/null as stdin.

        Args:
            argv: the program and its arguments; looked up in PATH when the program holds no slash.
            env: variables added to the spawner's environment.
        Raises:
            OSError: the program cannot be started (missing, not permitted, arguments too long, no process left).
            ValueError: an argument holds a NUL byte."""
        environment = {**self._environment, **(env or {})}
        stdout_read, stdout_write = os.pipe()
        try:
            stderr_read, stderr_write = os.pipe()
        except OSError:
            os.close(stdout_read)
            os.close(stdout_write)
            raise
        try:
            child = subprocess.Popen(  # noqa: S603 - running commands is what the agent is for
                argv,
                stdin=subprocess.DEVNULL,
                stdout=stdout_write,
                stderr=stderr_write,
                env=environment,
                cwd=cwd,
                start_new_session=True,
            )
        except BaseException:
            os.close(stdout_read)
            os.close(stderr_read)
            raise
        finally:
            os.close(stdout_write)
            os.close(stderr_write)
        child.returncode = 0  # the reaper owns the child from here: Popen must never wait for this pid itself
        process = Process(
            child.pid, Pipe(stdout_read), Pipe(stderr_read), command_id=environment.get(COMMAND_ID_VARIABLE)
        )
        self._processes[process.pid] = process
        return process

    @contextmanager
    def sharing_children(self) -> Iterator[None]:
        """Let a thread start children by other means and wait for them: only those spawned here are collected while
        the block runs, and adopted orphans afterwards."""
        self._sharers += 1
        try:
            yield
        finally:
            self._sharers -= 1
            self._reap()

    def _reap(self) -> None:
        """Collect every child that ended. One SIGCHLD may stand for several."""
        if self._sharers:
            self._reap_own()
            return
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if process := self._processes.pop(pid, None):
                process.note_exit(os.waitstatus_to_exitcode(status))

    def _reap_own(self) -> None:
        for pid in list(self._processes):
            with suppress(ChildProcessError):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self._processes.pop(pid).note_exit(os.waitstatus_to_exitcode(status))


def _set_child_subreaper(*, is_on: bool) -> None:
    import ctypes  # here, as nothing else in the agent needs it

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, int(is_on), 0, 0, 0) != 0:
        error_number = ctypes.get_errno()
        raise OSError(error_number, f"prctl(PR_SET_CHILD_SUBREAPER): {os.strerror(error_number)}")


# ---------------------------------------------------------------- killing


class ProcessRow(NamedTuple):
    """A living process as /proc shows it. pid and start_ticks together are its identity: pids are used again."""

    pid: int
    parent_pid: int
    session_id: int
    start_ticks: int

    @property
    def identity(self) -> tuple[int, int]:
        return self.pid, self.start_ticks


async def kill_processes(processes: Iterable[Process], *, grace_seconds: float = KILL_GRACE_SECONDS) -> list[int]:
    """Kill these processes and all they started: SIGTERM, after the grace SIGKILL, until a scan finds none.

    Returns:
        The pids that even SIGKILL did not end within 5 s; empty in all but the strangest cases."""
    family = _Family(tuple(processes))
    kill_at = time.monotonic() + grace_seconds
    told: set[tuple[int, int]] = set()
    delay_seconds = _FIRST_SCAN_DELAY_SECONDS
    # Scans run in a thread: thousands of processes take a while, and heartbeats must not wait for that.
    while members := await asyncio.to_thread(family.read_members):
        now = time.monotonic()
        if now > kill_at + _GIVE_UP_SECONDS:
            _log.error("processes %s survived SIGKILL", sorted(row.pid for row in members))
            return sorted(row.pid for row in members)
        fresh = [row for row in members if row.identity not in told]
        if now >= kill_at:
            _signal_all(members, signal.SIGKILL)
            delay_seconds = _FIRST_SCAN_DELAY_SECONDS if fresh else delay_seconds  # outrun what forks
        else:
            _signal_all(fresh, signal.SIGTERM)
            _signal_all(fresh, signal.SIGCONT)  # a stopped process would sleep through SIGTERM
            delay_seconds = min(delay_seconds, kill_at - now)
        told |= {row.identity for row in fresh}
        await asyncio.sleep(delay_seconds)
        delay_seconds = min(delay_seconds * 2, _LONGEST_SCAN_DELAY_SECONDS)
    return []


class _Family:
    """Finds the members of some processes' families, again and again while they are being killed."""

    def __init__(self, roots: tuple[Process, ...]) -> None:
        self._roots = roots
        self._command_ids = {root.command_id for root in roots if root.command_id is not None}
        self._known: set[tuple[int, int]] = set()

    def read_members(self) -> set[ProcessRow]:
        """Return the living members: what carries a root's command id, all processes in a root's session, and of each
        member seen now or earlier the descendants and the whole session. Blocking."""
        descendants = _descendants(read_processes(), os.getpid())
        members = {row for row in descendants if self._is_seed(row)}
        while True:
            pids = {row.pid for row in members}
            sessions = {row.session_id for row in members}
            found = {row for row in descendants if row.parent_pid in pids or row.session_id in sessions}
            if found <= members:
                break
            members |= found
        self._known |= {row.identity for row in members}
        return members

    def _is_seed(self, row: ProcessRow) -> bool:
        return (
            row.identity in self._known
            or any(root.is_in_session(row) for root in self._roots)
            or (bool(self._command_ids) and read_command_id(row.pid) in self._command_ids)
        )


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


def _descendants(rows: Iterable[ProcessRow], ancestor_pid: int) -> list[ProcessRow]:
    """Return all descendants, parents before their children."""
    children: dict[int, list[ProcessRow]] = {}
    for row in rows:
        children.setdefault(row.parent_pid, []).append(row)
    found = list(children.get(ancestor_pid, ()))
    for row in found:  # grows while it is walked
        found.extend(children.get(row.pid, ()))
    return found


def _signal_all(rows: Iterable[ProcessRow], signal_number: signal.Signals) -> None:
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
