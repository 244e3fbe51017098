"""A runner's life: get ready, wait for the agent's word, start the shell, keep its output, write down its end.

One loop over the shell's pipes, the agent's connection and the clock; no threads. Beside it, only the disk is waited
for: for the output, and at the end as long as it takes no result."""

import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from fleetwire_agent.process_table import (
    COMMAND_DIRECTORY_VARIABLE,
    REAPED_AT_ONCE,
    Family,
    ProcessRow,
    read_process,
    set_child_subreaper,
)
from fleetwire_agent.runner.control_group import ControlGroup, choose_control_group, make_control_group
from fleetwire_agent.runner.files import (
    RESULT,
    SOCKET,
    Order,
    Result,
    ResultStatus,
    Traces,
    allocate_result,
    claim,
    read_order,
    use_reserve,
    write_result,
    write_traces,
)
from fleetwire_agent.runner.shell import OutputPipe, Shell, protect_from_oom
from fleetwire_agent.runner.spool import SpoolWriter
from fleetwire_agent.runner.stop import Stop, describe_survivors

GO_SECONDS: Final = 60.0
"""How long a runner that is ready waits for an agent; one that is connected may keep it waiting for its turn."""

BACKGROUND_OUTPUT_SECONDS: Final = 0.5
"""How long a background child may hold the output after the shell's exit."""

PATIENCE_SECONDS: Final = 10.0
"""How long a command waits for room while its agent fetches nothing: the link hangs, or the agent is stopped."""

RETRY_SECONDS: Final = 1.0
RESULT_SECONDS: Final = 3600.0
"""How long a runner tries to write down how its command ended; after that nobody knows."""

_STATE: Final = "../.."  # of the agent, seen from the command's directory
_MAX_WORD_BYTES: Final = 200
_LOOK_SECONDS: Final = 1.0  # how often a runner that waits sees whether its directory is still there
_SHUTDOWN: Final = "stopped by the service manager, as when the host shuts down"


class AgentLink:
    """The agent's connection. The newest counts: an agent that was restarted connects anew."""

    def __init__(self) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with suppress(FileNotFoundError):
            os.unlink(SOCKET)  # noqa: PTH108
        self._listener.bind(SOCKET)
        os.chmod(SOCKET, 0o600)  # noqa: PTH101
        self._listener.listen(64)  # of agents that were killed while this runner was stopped
        self._listener.setblocking(False)
        self._peer: socket.socket | None = None

    @property
    def descriptors(self) -> list[int]:
        return [self._listener.fileno(), *([self._peer.fileno()] if self._peer is not None else [])]

    @property
    def is_connected(self) -> bool:
        return self._peer is not None

    def accept(self) -> bool:
        """Take a new connection if there is one."""
        try:
            peer, _ = self._listener.accept()
        except BlockingIOError:
            return False
        if self._peer is not None:
            self._peer.close()
        peer.setblocking(False)
        self._peer = peer
        return True

    def receive(self) -> list[str]:
        """Return what the agent has said; an agent that has left is disconnected."""
        words: list[str] = []
        while self._peer is not None:
            try:
                word = self._peer.recv(_MAX_WORD_BYTES)
            except BlockingIOError:
                break
            except OSError:
                word = b""
            if not word:
                self._peer.close()
                self._peer = None
                break
            words.append(word.decode("ascii", "replace"))
        return words

    def send(self, word: str) -> bool:
        """Return whether the agent will hear it: one that does not listen loses nothing, as all is on disk."""
        if self._peer is None:
            return False
        try:
            self._peer.send(word.encode("ascii"), socket.MSG_NOSIGNAL)
        except OSError:
            return False
        return True

    def close(self) -> None:
        self._listener.close()
        if self._peer is not None:
            self._peer.close()


class Supervisor:
    """Watches over one shell from its start to its end."""

    def __init__(
        self, order: Order, link: AgentLink, group: ControlGroup | None, traces: Traces, result: int, wakeup: int
    ) -> None:
        self._order = order
        self._link = link
        self._group = group
        self._traces = traces
        self._directory = os.getcwd()  # noqa: PTH109
        self._result = result
        self._wakeup = wakeup
        self._spool = SpoolWriter(".", head_segments=order.head_segments, make_room=lambda: use_reserve(_STATE))
        self._pipes: list[OutputPipe] = []
        self._root = ProcessRow(pid=0, parent_pid=0, session_id=0, start_ticks=-1)  # the shell, once it runs
        self._stop: Stop | None = None
        self._stop_status: ResultStatus = "cancelled"
        self._error: str | None = None
        self._exit_code: int | None = None
        self._exited_at: float | None = None
        self._started_boottime = 0.0
        self._began = 0.0  # monotonic
        self._waits_when_full = False  # the agent is connected to its server: output waits instead of being dropped
        self._has_dead = False  # that are still to be buried
        self._blocked_since: float | None = None
        self._is_impatient = False
        self._told_position = 0
        self.is_terminated = False  # by a signal

    def note_signal(self, number: int, frame: object) -> None:  # noqa: ARG002 - as signal.signal wants it
        self.is_terminated = True

    def run(self) -> None:
        """Run the command to its end and leave its result in the directory."""
        self._started_boottime, self._began = time.clock_gettime(time.CLOCK_BOOTTIME), time.monotonic()
        environment = {**self._order.environment, COMMAND_DIRECTORY_VARIABLE: self._directory}
        try:
            shell = Shell(self._order.argv, environment, self._group, note_pid=self._note_shell)
        except OSError as err:
            self._finish("failed", error=f"the command could not be started: {err.strerror}")
            return
        self._pipes = list(shell.pipes)
        self._greet()
        while not self._is_over():
            self._wait()
            now = time.monotonic()
            self._reap(now)  # before anybody is heard: a shell that has ended is not stopped any more
            self._listen()
            self._read_pipes(now)
            self._watch_time(now)
            self._tell_output()
        for pipe in shell.pipes:
            self._drain(pipe)
        self._conclude()

    def _note_shell(self, pid: int) -> None:
        self._root = read_process(pid) or self._root._replace(pid=pid, session_id=pid)
        write_traces(".", self._traces._replace(shell=self._root.identity))

    # ------------------------------------------------------------ one round

    def _is_over(self) -> bool:
        now = time.monotonic()
        if self._stop is not None:
            return now >= self._stop.next_at and self._stop.step(now)
        if self._exited_at is None:
            return False
        return not self._pipes or self.is_terminated or now >= self._exited_at + BACKGROUND_OUTPUT_SECONDS

    def _wait(self) -> None:
        poller = select.poll()
        for descriptor in (*self._link.descriptors, self._wakeup):
            poller.register(descriptor, select.POLLIN)
        if self._blocked_since is None:
            for pipe in self._pipes:
                poller.register(pipe.descriptor, select.POLLIN)
        now = time.monotonic()
        moments = [self._began + self._order.timeout_seconds]
        if self._stop is not None:
            moments = [self._stop.next_at]
        elif self._exited_at is not None:
            moments.append(self._exited_at + BACKGROUND_OUTPUT_SECONDS)
        if self._blocked_since is not None:
            moments.append(self._blocked_since + PATIENCE_SECONDS)
        if self._has_dead:
            moments.append(now)
        poller.poll(max(0.0, min(moments) - now) * 1000 + 1)
        with suppress(BlockingIOError):  # before anybody is reaped: who dies after that wakes the next round
            os.read(self._wakeup, 512)

    def _listen(self) -> None:
        if self._link.accept():
            self._greet()
        for word in self._link.receive():
            verb, _, argument = word.partition(" ")
            if verb == "stop":
                self._begin_stop("interrupted" if argument == "interrupted" else "cancelled")
            elif verb in ("wait", "drop"):
                self._waits_when_full = verb == "wait"
                self._is_impatient = False
            elif verb == "freed":
                self._spool.recount()
                self._is_impatient = False
        if not self._link.is_connected:
            self._waits_when_full = False
        if self.is_terminated:
            self._begin_stop("interrupted", error=_SHUTDOWN)

    def _greet(self) -> None:
        self._link.send(f"started {self._started_boottime!r}")
        self._told_position = -1

    def _read_pipes(self, now: float) -> None:
        is_full = self._waits_when_full and self._spool.segments >= self._order.waiting_segments
        if not is_full or self._is_impatient:
            self._blocked_since = None
        elif self._blocked_since is None:
            self._blocked_since = now
        elif now >= self._blocked_since + PATIENCE_SECONDS:
            self._is_impatient, self._blocked_since = True, None
        if self._blocked_since is not None:
            return
        for pipe in self._pipes:
            content = pipe.read()
            if content:
                self._spool.add(pipe.stream, content)
        self._pipes = [pipe for pipe in self._pipes if pipe.is_open]

    def _reap(self, now: float) -> None:
        if self._group is not None:
            # The shell's exit status stays with the kernel, and so its pid cannot be another's while it is a root.
            if self._exited_at is None and (info := os.waitid(
                os.P_PID, self._root.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT
            )):  # fmt: skip
                is_exit = info.si_code == os.CLD_EXITED
                self._note_exit(info.si_status if is_exit else 128 + info.si_status, now)
            return
        self._has_dead = False
        for _ in range(REAPED_AT_ONCE):  # as child subreaper this process has its orphans to bury, too
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._root.pid:
                code = os.waitstatus_to_exitcode(status)
                self._note_exit(code if code >= 0 else 128 - code, now)
        self._has_dead = True

    def _note_exit(self, exit_code: int, now: float) -> None:
        self._exit_code, self._exited_at = exit_code, now

    def _watch_time(self, now: float) -> None:
        if now >= self._began + self._order.timeout_seconds:
            self._begin_stop("timed_out")

    def _begin_stop(self, status: ResultStatus, *, error: str | None = None) -> None:
        """The first reason counts, and none once the shell has ended by itself."""
        if self._stop is not None or self._exited_at is not None:
            return
        within = None if self._group is not None else os.getpid()
        family = Family([self._root], variables=[f"{COMMAND_DIRECTORY_VARIABLE}={self._directory}"], within=within)
        self._stop_status, self._error = status, error
        self._stop = Stop(family, self._group, now=time.monotonic(), grace_seconds=self._order.grace_seconds)

    def _tell_output(self) -> None:
        if self._spool.position != self._told_position and self._link.send(f"output {self._spool.position}"):
            self._told_position = self._spool.position

    def _drain(self, pipe: OutputPipe) -> None:
        """Take what is in the pipe now: the shell has ended, and nobody waits for what others still write."""
        size_bytes = 0
        while pipe.is_open and size_bytes < 1024 * 1024 and (content := pipe.read()) is not None:
            size_bytes += len(content)
            if content:
                self._spool.add(pipe.stream, content)
        if rest := pipe.take_rest():
            self._spool.add(pipe.stream, rest)

    # ------------------------------------------------------------ the end

    def _conclude(self) -> None:
        if self._stop is None:
            self._finish("succeeded" if self._exit_code == 0 else "failed", exit_code=self._exit_code)
            return
        if self._stop.survivors:
            self._error = describe_survivors(self._stop.survivors)
        self._finish(self._stop_status, error=self._error)

    def _finish(self, status: ResultStatus, *, exit_code: int | None = None, error: str | None = None) -> None:
        duration_seconds = time.monotonic() - self._began
        self._spool.close()
        if self._spool.has_failed and error is None:
            error = "the host's disk took no more of the output; some of it is missing"
        result = Result(
            status=status,
            exit_code=exit_code,
            error=error,
            ended_at=time.time(),
            ended_boottime=time.clock_gettime(time.CLOCK_BOOTTIME),
            duration_seconds=duration_seconds,
            stdout_bytes=self._spool.written_bytes["stdout"],
            stderr_bytes=self._spool.written_bytes["stderr"],
            killed=self._stop.killed if self._stop is not None else [],
            killed_count=self._stop.killed_count if self._stop is not None else 0,
        )
        deadline = time.monotonic() + RESULT_SECONDS
        while True:
            try:
                write_result(self._result, ".", result)
            except OSError:  # a disk that fails may be back; nobody else knows how this ended
                if self.is_terminated or time.monotonic() >= deadline:
                    return
                time.sleep(RETRY_SECONDS)
            else:
                break
        self._link.send("done")


def run() -> None:
    """Run the command whose order is in the directory that is the last argument, and exit."""
    status = _run(sys.argv[-1])
    sys.stderr.flush()
    os._exit(status)  # all is on disk and closed: taking the interpreter apart would cost a fifth of its start


def _run(directory: str) -> int:
    os.chdir(directory)
    tell_ready = _become_daemon() if "NOTIFY_SOCKET" not in os.environ else _notify_manager
    try:
        order = read_order(".")
        path = choose_control_group(order.command_id)
        traces = Traces(os.getpid(), path, shell=None)
        try:
            result = allocate_result(".")
            write_traces(".", traces)
        except OSError:
            if not use_reserve(_STATE):
                raise
            with suppress(FileNotFoundError):
                os.unlink(RESULT)  # noqa: PTH108
            result = allocate_result(".")
            write_traces(".", traces)
        link = AgentLink()
        group = None if path is None else make_control_group(path)
    except OSError as err:
        tell_ready(str(err))
        return 1
    wakeup = _route_signals()
    protect_from_oom()
    if group is None:
        set_child_subreaper(is_on=True)
    supervisor = Supervisor(order, link, group, traces, result, wakeup)
    signal.signal(signal.SIGTERM, supervisor.note_signal)
    tell_ready("")
    try:
        if await_go(link, is_terminated=lambda: supervisor.is_terminated) and claim(".", "runner"):
            supervisor.run()
    finally:
        link.close()
        if group is not None:
            _bury_shell()
            group.remove()
    return 0


def await_go(link: AgentLink, *, is_terminated: Callable[[], bool], alone_seconds: float = GO_SECONDS) -> bool:
    """Wait for the agent to connect and say go. It says stop, or leaves without go, when it has changed its mind; where
    it was killed before it connected, the next one removes the directory and has another runner started."""
    deadline = time.monotonic() + alone_seconds
    has_met = False
    while (link.is_connected or time.monotonic() < deadline) and not is_terminated():
        readable, _, _ = select.select(link.descriptors, [], [], _LOOK_SECONDS)
        if not os.path.exists(SOCKET):  # noqa: PTH110 - another has been ordered, or the command was given up
            return False
        if readable:
            has_met = link.accept() or has_met
            words = link.receive()
            if any(word.startswith("stop") for word in words):  # also one that follows upon go: so it has not run
                return False
            if "go" in words:
                return True
            if has_met and not link.is_connected:
                return False
    return False


def _bury_shell() -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _route_signals() -> int:
    """Return a descriptor that can be read when a signal came."""
    reading, writing = os.pipe()
    for descriptor in (reading, writing):
        os.set_blocking(descriptor, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, _ignore_signal)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return reading


def _ignore_signal(number: int, frame: object) -> None:
    """The loop is woken by the descriptor; a signal that is ignored outright would wake nobody."""


def _become_daemon() -> Callable[[str], None]:
    """Leave the caller's session; return the function that lets the caller go, with a problem or without."""
    reading, writing = os.pipe()
    if os.fork() > 0:
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            problem = pipe.read()
        if problem != b"\n":
            sys.stderr.write(problem.decode("utf-8", "replace") or "the runner ended")
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    os.close(reading)
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)

    def tell_ready(problem: str) -> None:
        os.write(writing, (problem or "\n").encode())
        os.close(writing)

    return tell_ready


def _notify_manager(problem: str) -> None:
    """Tell systemd that this unit is up (sd_notify(3)), or why not."""
    if problem:
        sys.stderr.write(f"{problem}\n")
        return
    address = os.environ["NOTIFY_SOCKET"]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.sendto(b"READY=1", "\0" + address[1:] if address.startswith("@") else address)
