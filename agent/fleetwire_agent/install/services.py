"""The three ways in which a host starts the agent: systemd, OpenRC, or a supervisor of our own."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol

from fleetwire_agent.config import Profile
from fleetwire_agent.install.changes import Changes
from fleetwire_agent.install.failures import InstallError
from fleetwire_agent.install.host import Init, describe_failure, has_group, run_program, run_quietly
from fleetwire_agent.install.layout import (
    CREDENTIALS,
    CURRENT,
    INIT_SCRIPT,
    LAUNCHER,
    LOG,
    OTHER_UNITS,
    PID_FILE,
    UNIT,
    UNIT_LINK,
    UNIT_NAME,
    is_ours,
)
from fleetwire_agent.install.texts import build_init_script, build_unit
from fleetwire_agent.runners import END_COMMANDS

_CALL_SECONDS: Final = 60.0
_STOP_SECONDS: Final = 20.0
_LAST_LINES: Final = 5
_JOURNAL_SECONDS: Final = 0.3  # until journald has written what was said last


class Service(Protocol):
    """The agent as a service of this host."""

    name: str
    files: tuple[Path, ...]  # that `write` writes

    def check_foreign(self) -> None:
        """Raises InstallError: there is a service of that name which is not ours."""

    def write(self, changes: Changes, python: str, profile: Profile) -> bool:
        """Make it known and started at boot; return whether anything was different."""

    def is_active(self) -> bool: ...

    def start(self) -> None:
        """Raises InstallError."""

    def stop(self) -> None:
        """Return when it is stopped; one that does not run is no failure."""

    def end_commands(self) -> None:
        """Have the agent end its commands and run on, to tell of them. Returns at once."""

    def reload(self) -> None:
        """Have the service manager read the files again, after they were restored."""

    def find_death(self) -> str | None:
        """Return what the agent said last when it has died since `start`, None while it lives."""

    def forget(self, *, is_leaving: bool) -> list[str]:
        """Remove the service's files and links; return their paths.

        Args:
            is_leaving: the agent itself calls this, and still runs."""

    def leave(self) -> None:
        """Stop the agent that calls this, without waiting for it."""


def make_service(init: Init) -> Service:
    match init:
        case "systemd":
            return Systemd()
        case "openrc":
            return OpenRc()
        case "plain":
            return Plain()


def call(*command: str, may_fail: bool = False) -> None:
    """Run a program of the service manager. Raises InstallError with what it said."""
    result = run_program(command, seconds=_CALL_SECONDS)
    if result.returncode and not may_fail:
        raise describe_failure(command, result)


def condense(lines: Sequence[str]) -> str:
    """Return the last lines of a log in one; of a traceback its head and its end."""
    return " | ".join([line for line in lines if line.strip() and not line[0].isspace()][-_LAST_LINES:])


def _remove_files(paths: Sequence[Path]) -> list[str]:
    removed = []
    for path in paths:
        if os.path.lexists(path):
            path.unlink()
            removed.append(str(path))
    return removed


class Systemd:
    name = "systemd"
    files: tuple[Path, ...] = (UNIT,)

    def __init__(self) -> None:
        self._started_at = time.time()

    def check_foreign(self) -> None:
        for path in (UNIT, *OTHER_UNITS):
            if path.exists() and not is_ours(path):
                raise InstallError(
                    "failed",
                    f"{path} was not written by this installer; stop and remove that service first:"
                    f" systemctl disable --now {UNIT_NAME} && rm {path}",
                )

    def write(self, changes: Changes, python: str, profile: Profile) -> bool:
        text = build_unit(python, profile, has_journal_group=has_group("systemd-journal"))
        is_changed = changes.write_file(UNIT, text.encode(), 0o644)
        if not UNIT_LINK.is_symlink():
            is_changed = True
            changes.do(f"start {UNIT_NAME} at boot", lambda: call("systemctl", "enable", UNIT_NAME), self._disable)
        if is_changed:
            changes.do("have systemd read its units", self.reload)
        return is_changed

    def _disable(self) -> None:
        UNIT_LINK.unlink(missing_ok=True)
        self.reload()

    def is_active(self) -> bool:
        return self._show("ActiveState").get("ActiveState") in ("active", "activating", "reloading")

    def start(self) -> None:
        self._started_at = time.time()
        call("systemctl", "reset-failed", UNIT_NAME, may_fail=True)
        try:
            call("systemctl", "start", UNIT_NAME)
        except InstallError as err:
            raise InstallError("not_connected", f"the agent does not start: {self._last_words() or err}") from err

    def stop(self) -> None:
        call("systemctl", "stop", UNIT_NAME, may_fail=True)

    def end_commands(self) -> None:
        # Not --kill-whom, which systemd knows since 252 only.
        call("systemctl", "kill", "--kill-who=main", f"--signal={END_COMMANDS.name}", UNIT_NAME, may_fail=True)

    def reload(self) -> None:
        call("systemctl", "daemon-reload")

    def find_death(self) -> str | None:
        state = self._show("ActiveState", "SubState", "NRestarts", "Result", "ExecMainStatus")
        is_dead = state.get("ActiveState") in ("failed", "inactive") or state.get("SubState") == "auto-restart"
        if not is_dead and state.get("NRestarts", "0") == "0":
            return None
        return self._last_words() or f"it ended with {state.get('Result')}, status {state.get('ExecMainStatus')}"

    def _show(self, *properties: str) -> dict[str, str]:
        said = run_quietly(["systemctl", "show", UNIT_NAME, "--property", ",".join(properties)])
        return dict(line.split("=", 1) for line in said.splitlines() if "=" in line)

    def _last_words(self) -> str:
        since = f"@{int(self._started_at)}"
        lines = ("journalctl", "-u", UNIT_NAME, "--since", since, "--no-pager", "-q", "-o", "cat", "-n", "40")
        time.sleep(_JOURNAL_SECONDS)
        return condense(run_quietly(lines).splitlines())

    def forget(self, *, is_leaving: bool) -> list[str]:
        del is_leaving
        if UNIT.exists() and not is_ours(UNIT):
            return []
        removed = _remove_files((UNIT, UNIT_LINK))
        with suppress(InstallError):
            call("systemctl", "daemon-reload")
        call("systemctl", "reset-failed", UNIT_NAME, may_fail=True)
        return removed

    def leave(self) -> None:
        call("systemctl", "stop", "--no-block", UNIT_NAME, may_fail=True)


class _Supervised:
    """What OpenRC and the plain start share: `fleetwire-agent supervise` keeps the agent running and writes its log."""

    def __init__(self) -> None:
        self._log_start = 0

    def _note_log(self) -> None:
        self._log_start = LOG.stat().st_size if LOG.exists() else 0

    def find_death(self) -> str | None:
        """The supervisor says in the log when the agent ended."""
        lines = self._log_lines()
        if any("the agent ended with" in line for line in lines) or not self._is_supervised():
            return condense(lines) or "its supervisor ended"
        return None

    def _log_lines(self) -> list[str]:
        try:
            with LOG.open("rb") as file:
                file.seek(self._log_start)
                return file.read(65536).decode(errors="replace").splitlines()
        except OSError:
            return []

    def end_commands(self) -> None:
        """The supervisor passes the signal on."""
        pid = read_supervisor()
        if pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, END_COMMANDS)

    def _is_supervised(self) -> bool:
        return read_supervisor() is not None


class OpenRc(_Supervised):
    name = "OpenRC"
    files: tuple[Path, ...] = (INIT_SCRIPT,)

    def check_foreign(self) -> None:
        if INIT_SCRIPT.exists() and not is_ours(INIT_SCRIPT):
            raise InstallError(
                "failed", f"{INIT_SCRIPT} was not written by this installer; stop that service and remove it first"
            )

    def write(self, changes: Changes, python: str, profile: Profile) -> bool:
        del profile  # the supervisor reads it from the settings
        is_changed = changes.write_file(INIT_SCRIPT, build_init_script(python).encode(), 0o755)
        if "fleetwire-agent" not in run_quietly(["rc-update", "show", "default"]):
            is_changed = True
            changes.do(
                "start fleetwire-agent at boot",
                lambda: call("rc-update", "add", "fleetwire-agent", "default"),
                lambda: call("rc-update", "delete", "fleetwire-agent", "default", may_fail=True),
            )
        return is_changed

    def is_active(self) -> bool:
        return read_supervisor() is not None

    def start(self) -> None:
        self._note_log()
        call("rc-service", "fleetwire-agent", "zap", may_fail=True)
        call("rc-service", "fleetwire-agent", "start")
        wait_until(lambda: read_supervisor() is not None, seconds=10)

    def stop(self) -> None:
        if INIT_SCRIPT.exists():
            call("rc-service", "fleetwire-agent", "stop", may_fail=True)
        stop_supervisor()

    def reload(self) -> None:
        """OpenRC reads its scripts each time."""

    def forget(self, *, is_leaving: bool) -> list[str]:
        if INIT_SCRIPT.exists() and not is_ours(INIT_SCRIPT):
            return []
        call("rc-update", "delete", "fleetwire-agent", "default", may_fail=True)
        if is_leaving and INIT_SCRIPT.exists():
            call("rc-service", "fleetwire-agent", "zap", may_fail=True)  # else it stays there as crashed
        shutil.rmtree("/run/openrc/options/fleetwire-agent", ignore_errors=True)  # of supervise-daemon
        return _remove_files((INIT_SCRIPT,))

    def leave(self) -> None:
        # First what would start our supervisor again.
        daemon = read_pid(Path("/run/fleetwire-agent-daemon.pid"), "supervise-daemon")
        for pid in (daemon, read_supervisor()):
            if pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)


class Plain(_Supervised):
    name = "no service manager"
    files: tuple[Path, ...] = ()  # nothing starts it at boot

    def check_foreign(self) -> None:
        """There is no place where another could be."""

    def write(self, changes: Changes, python: str, profile: Profile) -> bool:
        del changes, python, profile
        return False

    def is_active(self) -> bool:
        return read_supervisor() is not None

    def start(self) -> None:
        self._note_log()
        command = [_read_launcher_python(), "-I", str(CURRENT), "supervise"]
        result = subprocess.run(  # noqa: S603 - our own program
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_CALL_SECONDS,
            check=False,
            cwd="/",
        )
        if result.returncode:
            raise InstallError("failed", f"the supervisor does not start: {result.stderr.strip()[-500:]}")
        wait_until(lambda: read_supervisor() is not None, seconds=10)

    def stop(self) -> None:
        stop_supervisor()

    def reload(self) -> None:
        """Nothing reads files."""

    def forget(self, *, is_leaving: bool) -> list[str]:
        del is_leaving
        return []

    def leave(self) -> None:
        pid = read_supervisor()
        if pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)


def _read_launcher_python() -> str:
    """Return the interpreter the installation recorded; without a launcher (/usr/local is read-only) this one."""
    try:
        match = re.search(r"^exec (\S+) -I ", LAUNCHER.read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1] if match else sys.executable


# ---------------------------------------------------------------- the supervisor's process


def read_supervisor() -> int | None:
    """Return the process id of the supervisor that runs, None when none does."""
    return read_pid(PID_FILE, "supervise")


def read_pid(file: Path, word: str) -> int | None:
    """Return the id in a pid file if such a process runs, with `word` in its command line."""
    try:
        pid = int(file.read_text(encoding="ascii"))
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ValueError):
        return None
    return pid if word.encode() in command else None


def stop_supervisor() -> None:
    """Stop the supervisor and with it the agent, by force in the end."""
    pid = read_supervisor()
    if pid is None:
        return
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    if not wait_until(lambda: read_supervisor() is None, seconds=_STOP_SECONDS):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for path in (PID_FILE, CREDENTIALS / "agent-key", CREDENTIALS / "agent.toml"):
        path.unlink(missing_ok=True)
    with suppress(OSError):
        CREDENTIALS.rmdir()


def wait_until(is_true: Callable[[], bool], *, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if is_true():
            return True
        time.sleep(0.05)
    return is_true()
