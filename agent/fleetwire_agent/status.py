"""What the agent says of its link in status.json, for `fleetwire-agent status` and for its installer."""

import json
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self, TypeAlias

LinkState: TypeAlias = Literal["connecting", "connected"]

STATUS_NAME: Final = "status.json"
KEY_NOT_ACCEPTED: Final = "the server does not accept the agent's key (HTTP 401)"
KEY_REVOKED: Final = "the server has revoked the agent's key"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    state: LinkState
    since: float  # Unix seconds
    server: str
    agent_id: str | None  # None before the first welcome
    version: str
    pid: int
    detail: str | None  # why it is not connected; None when it is, or before the first failure


class StatusFile:
    """Replaces status.json at each change, in a thread of its own: a dead disk must not stop the link.

    A file that cannot be written is logged once and otherwise ignored. Use as a context manager."""

    def __init__(self, directory: str, *, server: str, version: str, now: Callable[[], float] = time.time) -> None:
        self._directory = Path(directory)
        self._server = server
        self._version = version
        self._now = now
        self._status: Status | None = None
        self._has_complained = False
        self._is_closed = False
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="status")

    def __enter__(self) -> Self:
        self._threads.submit(self._make_directory)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(wait=False)

    def close(self) -> None:
        """Write no more."""
        self._is_closed = True

    def note(self, state: LinkState, *, agent_id: str | None = None, detail: str | None = None) -> None:
        """Say what the link does now. Returns at once."""
        before = self._status
        is_same = before is not None and before.state == state
        self._status = Status(
            state=state,
            since=before.since if before is not None and is_same else self._now(),
            server=self._server,
            agent_id=agent_id or (before and before.agent_id) or None,
            version=self._version,
            pid=os.getpid(),
            detail=detail or (before.detail if before is not None and state == "connecting" else None),
        )
        if self._status != before and not self._is_closed:
            self._threads.submit(self._write, self._status)

    def _make_directory(self) -> None:
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as err:
            self._complain(err)

    def _write(self, status: Status) -> None:
        temporary = self._directory / f".{STATUS_NAME}.{status.pid}"
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(json.dumps(asdict(status)) + "\n")
            temporary.replace(self._directory / STATUS_NAME)
        except OSError as err:
            self._complain(err)
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _complain(self, err: OSError) -> None:
        if not self._has_complained:
            self._has_complained = True
            _log.warning("%s cannot be written: %s", self._directory / STATUS_NAME, err.strerror)


def read_status(directory: Path) -> Status | None:
    """Return what the agent said last, None when it said nothing that can be understood.

    Raises:
        PermissionError: only the agent's user and root may look."""
    try:
        return Status(**json.loads((directory / STATUS_NAME).read_text(encoding="utf-8")))
    except PermissionError:
        raise
    except (OSError, ValueError, TypeError):
        return None


def is_alive(status: Status) -> bool:
    """Whether the agent that said so still runs."""
    try:
        command = Path(f"/proc/{status.pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"fleetwire" in command


def format_status(status: Status | None, now: float) -> str:
    """Return what to tell a person."""
    if status is None:
        return "the agent has not run here: it has written no status"
    if not is_alive(status):
        return f"the agent (version {status.version}, {status.server}) is not running"
    since = _format_duration(now - status.since)
    if status.state == "connected":
        return f"connected to {status.server} as {status.agent_id} for {since}, version {status.version}"
    why = f": {status.detail}" if status.detail else ""
    return f"not connected to {status.server} for {since}{why}; version {status.version}"


def _format_duration(seconds: float) -> str:
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86400)
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min" if minutes else f"{max(0, int(seconds))} s"
