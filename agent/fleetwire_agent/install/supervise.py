"""Keeps the agent running where no service manager does: starts it again when it ends, keeps its log small."""

import ctypes
import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import IO, Final

from fleetwire_agent.config import Profile
from fleetwire_agent.install.changes import pass_on
from fleetwire_agent.install.failures import InstallError
from fleetwire_agent.install.host import ADMIN_PATH, has_group, read_user
from fleetwire_agent.install.layout import CREDENTIALS, CURRENT, KEY, LOG, PID_FILE, SETTINGS, STATE, USER
from fleetwire_agent.install.texts import parse_settings
from fleetwire_agent.runners import END_COMMANDS

RESTART_SECONDS: Final = 2.0
STOP_SECONDS: Final = 10.0
MAX_LOG_BYTES: Final = 1024 * 1024
"""Then the log becomes agent.log.1, which replaces the one before: the disk never holds more than two."""

_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
_PR_SET_NO_NEW_PRIVS: Final = 38
_PASSED_ON: Final = (signal.SIGHUP, END_COMMANDS, signal.SIGUSR2)


def supervise(*, is_detached: bool) -> None:
    """Run the agent until SIGTERM or SIGINT.

    Args:
        is_detached: return at once, with a process of its own left that does it.
    Raises:
        InstallError: another supervisor runs, or this is not root."""
    if os.geteuid() != 0:
        raise InstallError("not_root", "this must be run as root; run it again with sudo")
    pid_file = _lock_pid_file()
    if is_detached and _detach():
        return
    os.ftruncate(pid_file, 0)
    os.pwrite(pid_file, f"{os.getpid()}\n".encode(), 0)
    log = Log(LOG)
    try:
        _Supervisor(log).run()
    finally:
        log.close()
        _remove_credentials()
        PID_FILE.unlink(missing_ok=True)


def _lock_pid_file() -> int:
    descriptor = os.open(PID_FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as err:
        os.close(descriptor)
        if err.errno != errno.EWOULDBLOCK:
            raise
        raise InstallError("busy", f"the agent is supervised already, see {PID_FILE}") from err
    return descriptor


def _detach() -> bool:
    """Return True in the process that was called, False in the one left behind, which has no terminal."""
    if os.fork():
        return True
    os.setsid()
    if os.fork():
        os._exit(0)
    os.chdir("/")
    os.umask(0o022)
    nothing = os.open("/dev/null", os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    return False


class Log:
    """A log file that is renamed when it is full. A full disk loses lines and nothing else."""

    def __init__(self, path: Path, max_bytes: int = MAX_LOG_BYTES) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._file: IO[bytes] | None = None

    def write(self, content: bytes) -> None:
        try:
            if self._file is None:
                self._file = os.fdopen(
                    os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640), "ab", buffering=0
                )
            if self._file.tell() + len(content) > self._max_bytes:
                self._path.replace(self._path.with_name(f"{self._path.name}.1"))
                self.close()
                self.write(content[-self._max_bytes :])
                return
            self._file.write(content)
        except OSError:
            pass

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def say(self, text: str) -> None:
        self.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} supervisor: {text}\n".encode())


class _Supervisor:
    def __init__(self, log: Log) -> None:
        self._log = log
        self._child: subprocess.Popen[bytes] | None = None
        self._is_stopping = False

    def run(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        for number in _PASSED_ON:
            signal.signal(number, self._pass_on)
        while not self._is_stopping:
            self._run_once()
            deadline = time.monotonic() + RESTART_SECONDS
            while not self._is_stopping and time.monotonic() < deadline:
                time.sleep(0.1)

    def _run_once(self) -> None:
        try:
            child = self._child = _start_agent()
        except (OSError, InstallError, subprocess.SubprocessError) as err:
            self._log.say(f"the agent ended with: it could not be started: {err}")
            return
        if self._is_stopping:
            child.terminate()
        assert child.stderr is not None  # noqa: S101 - for the type checker: a pipe was asked for
        while content := child.stderr.read1(65536):  # type: ignore[attr-defined]
            self._log.write(content)
        status = child.wait()
        self._child = None
        if not self._is_stopping:
            self._log.say(f"the agent ended with status {status}; it is started again in {RESTART_SECONDS:.0f} s")

    def _stop(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._is_stopping = True
        if self._child is not None:
            self._child.terminate()
            signal.signal(signal.SIGALRM, self._kill)
            signal.setitimer(signal.ITIMER_REAL, STOP_SECONDS)

    def _kill(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if self._child is not None:
            self._child.kill()

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._child is not None:
            self._child.send_signal(number)


def _start_agent() -> subprocess.Popen[bytes]:
    """Start the current version, with the profile the settings name."""
    profile: Profile = parse_settings(SETTINGS.read_text(encoding="utf-8")).get("profile", "manage")
    environment = {"PATH": ADMIN_PATH, "HOME": "/", "LANG": "C.UTF-8"}
    user: int | None = None
    group: int | None = None
    groups: list[int | str] = []
    STATE.mkdir(mode=0o700, exist_ok=True)
    if profile == "monitor":
        entry = read_user(USER)
        if entry is None:
            raise InstallError("failed", f"the profile monitor needs the user {USER}; install the agent again")
        user, group = entry.pw_uid, entry.pw_gid
        groups = ["systemd-journal"] if has_group("systemd-journal") else []
        environment |= _hand_credentials(user, group)
        if STATE.stat().st_uid != user:
            pass_on(STATE, user, group)
    return subprocess.Popen(  # noqa: S603 - our own program
        [sys.executable, "-I", str(CURRENT), "run"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment,
        cwd="/",
        start_new_session=True,
        user=user,
        group=group,
        extra_groups=groups if user is not None else None,
        umask=0o077 if user is not None else 0o022,
        preexec_fn=_prepare_monitor if user is not None else _die_with_supervisor,
    )


def _hand_credentials(user: int, group: int) -> Mapping[str, str]:
    """Give the agent's user copies of key and settings in memory, as systemd's LoadCredential= does."""
    _remove_credentials()
    CREDENTIALS.mkdir(mode=0o700)
    for name, source in (("agent-key", KEY), ("agent.toml", SETTINGS)):
        path = CREDENTIALS / name
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400), "wb") as file:
            file.write(source.read_bytes())
            os.fchown(file.fileno(), user, group)
    CREDENTIALS.chmod(0o500)
    os.chown(CREDENTIALS, user, group)
    return {"CREDENTIALS_DIRECTORY": str(CREDENTIALS)}


def _remove_credentials() -> None:
    for name in ("agent-key", "agent.toml"):
        (CREDENTIALS / name).unlink(missing_ok=True)
    if CREDENTIALS.is_dir():
        CREDENTIALS.rmdir()


def _die_with_supervisor() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _prepare_monitor() -> None:
    _die_with_supervisor()
    ctypes.CDLL(None).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
