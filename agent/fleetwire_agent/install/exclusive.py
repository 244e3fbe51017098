"""What keeps a run alone on its host, and whole: one at a time, not from within the agent, and undone by a signal."""

import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

from fleetwire_agent.install.failures import InstallError, InstallInterrupt
from fleetwire_agent.install.layout import LOCK, UNIT_NAME
from fleetwire_agent.process_table import COMMAND_ID_VARIABLE


def check_place() -> None:
    """Refuse to be a command of the agent that would be stopped half-way through."""
    try:
        is_in_unit = UNIT_NAME in Path("/proc/self/cgroup").read_text(encoding="ascii", errors="replace")
    except OSError:
        is_in_unit = False
    if is_in_unit or COMMAND_ID_VARIABLE in os.environ:
        raise InstallError(
            "unsupported",
            "this runs as a command of the agent itself, which would end it half-way: run it from a shell of the host",
        )


@contextmanager
def only_one() -> Iterator[None]:
    """Hold the lock of this host. Raises InstallError: another run holds it."""
    while True:
        descriptor = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            os.close(descriptor)
            raise InstallError(
                "busy", "another installation is under way on this host; wait for its end and try again"
            ) from err
        try:  # the run before may have removed the file while this one waited to open it
            if os.fstat(descriptor).st_ino == LOCK.stat().st_ino:
                break
        except FileNotFoundError:
            pass
        os.close(descriptor)
    try:
        yield
    finally:
        LOCK.unlink(missing_ok=True)
        os.close(descriptor)


_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def interruptible() -> Iterator[None]:
    """Let signals that end a program undo the installation first."""

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        del frame
        raise InstallInterrupt(f"interrupted by {signal.Signals(number).name}")

    before = {number: signal.signal(number, interrupt) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _pass_over(number: int, frame: FrameType | None) -> None:
    del number, frame


@contextmanager
def not_interruptible() -> Iterator[None]:
    """Pass over signals. Not SIG_IGN, which programs started meanwhile would inherit."""
    before = {number: signal.signal(number, _pass_over) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
