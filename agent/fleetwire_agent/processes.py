"""The agent's own children (journalctl, systemctl, runners): started without a thread each, reaped in one place, killed
with their descendants and sessions.

The agent is a child subreaper, so whatever they start stays its descendant: an orphan is adopted by the agent and never
by init. One that left the session of its parents before they ended is a daemon by its own will, and lives on."""

import asyncio
import logging
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Final, Self

from fleetwire_agent.process_table import (
    REAPED_AT_ONCE,
    Family,
    ProcessRow,
    read_process,
    set_child_subreaper,
)
from fleetwire_agent.runner.stop import Stop, describe_survivors
from fleetwire_shared.errors import UnavailableError

KILL_GRACE_SECONDS: Final = 2.0
"""Between SIGTERM and SIGKILL."""

_STDERR_BYTES: Final = 4096

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

    def __init__(self, pid: int, stdout: Pipe, stderr: Pipe) -> None:
        self.pid = pid
        self.stdout = stdout
        self.stderr = stderr
        # Gone already: its session may have members still, and no process starts at -1.
        self.row = read_process(pid) or ProcessRow(pid, parent_pid=0, session_id=pid, start_ticks=-1)
        self._exited = asyncio.Event()
        self._returncode = 0

    async def wait(self) -> int:
        """Return the exit status of the child itself; negative for the signal that ended it."""
        await self._exited.wait()
        return self._returncode

    async def kill(self) -> None:
        """Kill the child and all it started: SIGTERM, after the grace SIGKILL, until none is left."""
        await kill_process(self)

    def close(self) -> None:
        """Close both pipes. The process may live on."""
        self.stdout.close()
        self.stderr.close()

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
        set_child_subreaper(is_on=True)
        asyncio.get_running_loop().add_signal_handler(signal.SIGCHLD, self._reap)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reap()
        asyncio.get_running_loop().remove_signal_handler(signal.SIGCHLD)
        set_child_subreaper(is_on=False)

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
        process = Process(child.pid, Pipe(stdout_read), Pipe(stderr_read))
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
        for _ in range(REAPED_AT_ONCE):
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if process := self._processes.pop(pid, None):
                process.note_exit(os.waitstatus_to_exitcode(status))
        asyncio.get_running_loop().call_soon(self._reap)

    def _reap_own(self) -> None:
        for pid in list(self._processes):
            with suppress(ChildProcessError):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self._processes.pop(pid).note_exit(os.waitstatus_to_exitcode(status))


# ---------------------------------------------------------------- killing


async def kill_process(process: Process, *, grace_seconds: float = KILL_GRACE_SECONDS) -> list[int]:
    """Kill a process, its descendants and their sessions: SIGTERM, after the grace SIGKILL, until a scan finds none.

    Returns:
        The pids that even SIGKILL did not end within 5 s; empty in all but the strangest cases."""
    family = Family([process.row], within=os.getpid())
    stop = Stop(family, None, now=time.monotonic(), grace_seconds=grace_seconds)
    # Scans run in a thread: thousands of processes take a while, and heartbeats must not wait for that.
    while not await asyncio.to_thread(stop.step, time.monotonic()):  # noqa: ASYNC110 - /proc tells of nothing by itself
        await asyncio.sleep(max(0.0, stop.next_at - time.monotonic()))
    if stop.survivors:
        _log.error("%s", describe_survivors(stop.survivors))
    return stop.survivors


async def read_output(
    spawner: Spawner,
    argv: Sequence[str],
    *,
    timeout_seconds: float,
    max_bytes: int,
    env: Mapping[str, str] | None = None,
) -> bytes:
    """Run a program of the host to its end and return what it wrote to stdout; nothing of it is left running.

    Raises:
        UnavailableError: it cannot be started, fails, writes too much or takes too long; the message says which."""
    try:
        process = spawner.spawn(argv, env=env)
    except OSError as err:
        raise UnavailableError(f"{argv[0]} cannot be started: {err.strerror}") from err
    try:
        async with asyncio.timeout(timeout_seconds):
            output = await _read_all(process, argv[0], max_bytes)
            if status := await process.wait():
                said = (await process.stderr.read(_STDERR_BYTES)).decode(errors="replace").strip()
                raise UnavailableError(f"{argv[0]} ended with status {status}: {said or 'it said nothing'}")
    except TimeoutError:
        raise UnavailableError(f"{argv[0]} did not answer within {timeout_seconds:.0f} s") from None
    finally:
        try:
            await process.kill()
        finally:
            process.close()
    return output


async def _read_all(process: Process, program: str, max_bytes: int) -> bytes:
    pieces = []
    size_bytes = 0
    while piece := await process.stdout.read():
        pieces.append(piece)
        size_bytes += len(piece)
        if size_bytes > max_bytes:
            raise UnavailableError(f"{program} wrote more than {max_bytes} bytes")
    return b"".join(pieces)
