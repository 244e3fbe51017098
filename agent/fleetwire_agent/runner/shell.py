"""The shell of a command as a child of its runner: started, read, waited for."""

import errno
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Final, NoReturn

from fleetwire_agent.runner.control_group import ControlGroup
from fleetwire_agent.runner.spool import MAX_PIECE_BYTES, Stream

_RESET_SIGNALS: Final = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
"""All that can be set: a shell cannot trap what was ignored when it began, be it by Python, by the runner or by whoever
started the agent."""


class OutputPipe:
    """The reading end of stdout or stderr; its pieces never end within a UTF-8 character."""

    def __init__(self, descriptor: int, stream: Stream) -> None:
        os.set_blocking(descriptor, False)
        self.descriptor = descriptor
        self.stream = stream
        self.is_open = True
        self._rest = b""  # the start of a character whose end has not come yet

    def read(self) -> bytes | None:
        """Return what is there now, b"" where that is no whole character yet, None where nothing is."""
        try:
            content = os.read(self.descriptor, MAX_PIECE_BYTES - len(self._rest))
        except BlockingIOError:
            return None
        if not content:
            self.is_open = False
            return self.take_rest()
        content, self._rest = split_incomplete_character(self._rest + content)
        return content

    def take_rest(self) -> bytes:
        rest, self._rest = self._rest, b""
        return rest


class Shell:
    """A running shell, in a session and, where there is one, a control group of its own."""

    def __init__(
        self,
        argv: list[str],
        environment: dict[str, str],
        group: ControlGroup | None,
        *,
        note_pid: Callable[[int], None],
    ) -> None:
        """Start the shell.

        Args:
            note_pid: called with its pid before it may run: what was not noted never ran.
        Raises:
            OSError: it cannot be started, or `note_pid` raised that."""
        stdout_read, stdout_write = os.pipe()
        stderr_read, stderr_write = os.pipe()
        error_read, error_write = os.pipe()  # closed by a successful exec
        go_read, go_write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(go_write)  # whose end, should this runner be killed now, is the end of the child
            _become_shell(argv, environment, group, go_read, (stdout_write, stderr_write, error_write))
        for descriptor in (go_read, stdout_write, stderr_write, error_write):
            os.close(descriptor)
        try:
            note_pid(self.pid)
            os.write(go_write, b"g")
        except OSError:
            os.close(go_write)
            os.waitpid(self.pid, 0)
            raise
        os.close(go_write)
        with os.fdopen(error_read, "rb") as pipe:
            problem = pipe.read()
        if problem:
            os.waitpid(self.pid, 0)
            number, _, text = problem.decode("utf-8", "replace").partition(" ")
            raise OSError(int(number), text)
        self.pipes = (OutputPipe(stdout_read, "stdout"), OutputPipe(stderr_read, "stderr"))


def _become_shell(
    argv: list[str], environment: dict[str, str], group: ControlGroup | None, go: int, writers: tuple[int, int, int]
) -> NoReturn:
    stdout, stderr, errors = writers
    problem = f"{errno.ENOMEM} {os.strerror(errno.ENOMEM)}"  # what else may come up is that
    try:
        os.setsid()
        if group is not None:
            group.enter()
        if not os.read(go, 1):
            os._exit(127)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        for number in _RESET_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        _set_oom_score(0)
        os.chdir("/")
        os.umask(0o022)
        os.execvpe(argv[0], argv, environment)  # noqa: S606 - running commands is what it is for
    except OSError as err:
        problem = f"{err.errno} {err.strerror}"
    except ValueError as err:
        problem = f"{errno.EINVAL} {err}"
    finally:
        with suppress(OSError):
            os.write(errors, problem.encode())
        os._exit(127)


def _set_oom_score(score: int) -> None:
    """Say how ready the kernel should be to kill this process for want of memory; nothing where it may not."""
    try:
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:  # noqa: PTH123
            file.write(str(score))
    except OSError:
        pass


def protect_from_oom() -> None:
    """Let the kernel kill the command, not the runner that tells of it."""
    _set_oom_score(-900)


def split_incomplete_character(content: bytes) -> tuple[bytes, bytes]:
    """Return `content` without, and the 0 to 3 bytes of, a UTF-8 character that its end cuts through.

    Bytes that cannot become a character whatever follows are not held back."""
    for length in range(1, min(3, len(content)) + 1):
        byte = content[-length]
        if byte & 0b1100_0000 == 0b1000_0000:
            continue  # a continuation byte: its first byte is further left
        needed = 2 if 0xC2 <= byte <= 0xDF else 3 if 0xE0 <= byte <= 0xEF else 4 if 0xF0 <= byte <= 0xF4 else 1
        return (content[:-length], content[-length:]) if needed > length else (content, b"")
    return content, b""
