"""Follows the systemd journal, through journalctl."""

import json
import re
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fleetwire_agent.lines import LineSplitter, RawLine, build_frames, cut_text
from fleetwire_agent.processes import Process, Spawner
from fleetwire_shared.errors import InvalidError, UnavailableError
from fleetwire_shared.limits import MAX_LINE_BYTES
from fleetwire_shared.messages import FollowLog, LogGap, LogLines

MAX_ENTRY_BYTES = 2 * 1024 * 1024
"""Of one entry as JSON. journald takes messages of any size; of one larger than this a gap tells."""

_FIELDS = "MESSAGE,SYSLOG_IDENTIFIER,_COMM,_PID,SYSLOG_PID,_HOSTNAME,_SOURCE_REALTIME_TIMESTAMP"
_CURSOR = re.compile(r"[a-z]=[0-9a-f]+(;[a-z]=[0-9a-f]+)*", re.ASCII)
_SYSTEM_JOURNALS = (Path("/var/log/journal"), Path("/run/log/journal"))
_STDERR_BYTES = 4096
_GONE = "the journal no longer has the entry that was read last"

SendEvent = Callable[[LogLines | LogGap], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Start:
    """Where to begin. Without a cursor: at the beginning of the journal."""

    cursor: str | None = None
    is_known: bool = False  # the entry at the cursor has been seen and is not wanted again


class JournalFollower:
    """Reads the journal from a chosen entry on, as lines of text."""

    def __init__(self, request: FollowLog, *, spawner: Spawner, directory: str | None) -> None:
        """Check the request and that there is a journal. Blocking.

        Args:
            directory: where the journal files are; None for the system's own.
        Raises:
            InvalidError: a parameter is wrong.
            UnavailableError: the host has no journalctl, or no journal."""
        _check(request)
        if shutil.which("journalctl") is None:
            raise UnavailableError("this host has no journalctl; follow a file instead (source=file)")
        _require_journal(directory)
        self._request = request
        self._spawner = spawner
        self._matches = ["journalctl", "--quiet", "--no-pager", "--output=json", "--all", f"--output-fields={_FIELDS}"]
        if directory is not None:
            self._matches.append(f"--directory={directory}")
        if request.unit is not None:
            self._matches.append(f"--unit={request.unit}")
        if request.priority is not None:
            self._matches.append(f"--priority={request.priority}")

    async def run(self, send: SendEvent) -> None:
        """Send what the journal has and will have, until cancelled.

        Raises:
            UnavailableError: journalctl ended."""
        if self._request.cursor is None and self._request.since is not None:
            await self._follow(Start(), send, f"--since=@{self._request.since:.6f}")
            return
        if self._request.cursor is not None:
            start, is_gap = await self._find_known(self._request.cursor)
            if is_gap:
                await send(LogGap(reason=_GONE))
        else:
            start = await self._find_last(self._request.lines)
        await self._follow(start, send)

    async def _find_known(self, cursor: str) -> tuple[Start, bool]:
        """Return where to go on after the entry at `cursor`, and whether entries may be missing.

        journalctl goes on silently after a cursor that it does not find (vacuumed), and waits without a word at one
        that lies in the future (a journal from before a restored backup, a clock set back). Hence this first look."""
        async with self._journalctl("--lines=all", f"--cursor={cursor}") as process:
            first = await _read_until(process, lambda _entry: True)
        if first is None:
            return await self._find_last(0), True
        found = first["__CURSOR"]
        return Start(found, is_known=found == cursor), found != cursor

    async def _find_last(self, lines: int) -> Start:
        """Return where the last `lines` matching entries start.

        Not left to `--lines=N`: it counts before --priority filters, and knows nothing of grep."""
        newest: str | None = None
        oldest: str | None = None
        missing = lines

        def is_enough(entry: dict[str, Any]) -> bool:
            nonlocal newest, oldest, missing
            newest = newest or entry["__CURSOR"]
            if missing and self._is_wanted(format_entry(entry)):
                oldest = entry["__CURSOR"]
                missing -= 1
            return missing == 0

        async with self._journalctl("--reverse", "--lines=all") as process:
            await _read_until(process, is_enough)
        return Start(newest, is_known=True) if oldest is None else Start(oldest)

    async def _follow(self, start: Start, send: SendEvent, *arguments: str) -> None:
        # Inclusive: --after-cursor would silently drop an entry when the cursor has been vacuumed meanwhile.
        position = () if start.cursor is None else (f"--cursor={start.cursor}",)
        splitter = LineSplitter(0, limit_bytes=MAX_ENTRY_BYTES)
        is_first = start.cursor is not None
        async with self._journalctl("--follow", "--lines=all", *position, *arguments) as process:
            while piece := await process.stdout.read():
                lines = splitter.feed(piece)
                if is_first and lines:
                    is_first = False
                    lines = await self._check_first(lines, start, send)
                await self._send_entries(lines, send)
            await _require_success(process)
        raise UnavailableError("journalctl ended by itself")

    async def _check_first(self, lines: list[RawLine], start: Start, send: SendEvent) -> list[RawLine]:
        """Return the lines without the entry that was sent before; say it if that entry has gone meanwhile."""
        first = _parse_entry(lines[0])
        if first is None or first["__CURSOR"] != start.cursor:
            await send(LogGap(reason=_GONE))
            return lines
        return lines[1:] if start.is_known else lines

    async def _send_entries(self, lines: list[RawLine], send: SendEvent) -> None:
        texts: list[tuple[str, str]] = []
        for line in lines:
            entry = _parse_entry(line)
            if entry is None:
                await _send_lines(texts, send)
                texts = []
                await send(LogGap(reason=f"an entry of {line.full_bytes} bytes is too large to be read", count=1))
            elif self._is_wanted(text := format_entry(entry)):
                texts.append((entry["__CURSOR"], text))
        await _send_lines(texts, send)

    def _is_wanted(self, text: str) -> bool:
        return not self._request.grep or self._request.grep in text

    @asynccontextmanager
    async def _journalctl(self, *arguments: str) -> AsyncIterator[Process]:
        try:
            # Errors only: warnings about damaged journal files would fill a pipe that is read at the end alone.
            process = self._spawner.spawn([*self._matches, *arguments], env={"SYSTEMD_LOG_LEVEL": "err"})
        except OSError as err:
            raise UnavailableError(f"journalctl cannot be started: {err.strerror}") from err
        try:
            yield process
        finally:
            try:
                await process.kill()
            finally:
                process.close()


async def _send_lines(texts: list[tuple[str, str]], send: SendEvent) -> None:
    for frame in build_frames(texts):
        await send(frame)


async def _read_until(process: Process, is_enough: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
    """Return the first entry that is enough; None at the end of the journal."""
    splitter = LineSplitter(0, limit_bytes=MAX_ENTRY_BYTES)
    while piece := await process.stdout.read():
        for line in splitter.feed(piece):
            entry = _parse_entry(line)
            if entry is not None and is_enough(entry):
                return entry
    await _require_success(process)
    return None


async def _require_success(process: Process) -> None:
    status = await process.wait()
    if status:
        said = (await process.stderr.read(_STDERR_BYTES)).decode(errors="replace").strip()
        raise UnavailableError(f"journalctl ended with status {status}: {said or 'it said nothing'}")


def _check(request: FollowLog) -> None:
    if request.unit is not None and (not request.unit or "\0" in request.unit):
        raise InvalidError("unit must be the name of a systemd unit, such as nginx or nginx.service")
    if request.lines < 0:
        raise InvalidError(f"lines must be 0 or more, got {request.lines}")
    if request.since is not None and not 0 <= request.since < 2**40:
        raise InvalidError(f"since must be Unix seconds, got {request.since}")
    if request.priority is not None and not 0 <= request.priority <= 7:
        raise InvalidError(f"priority must be 0 (emerg) to 7 (debug), got {request.priority}")
    if request.cursor is not None and _CURSOR.fullmatch(request.cursor) is None:
        raise InvalidError(f"cursor must be a journal cursor as sent with a line, got {request.cursor[:100]!r}")


def _require_journal(directory: str | None) -> None:
    places = _SYSTEM_JOURNALS if directory is None else (Path(directory),)
    # Files lie in the directory itself (journalctl -D) or in one named after the machine id.
    if not any(next(place.glob(pattern), None) for place in places for pattern in ("*.journal", "*/*.journal")):
        names = " or ".join(map(str, places))
        raise UnavailableError(f"this host has no journal in {names} that the agent can read; is systemd-journald on?")


def _parse_entry(line: RawLine) -> dict[str, Any] | None:
    """Return the fields of one line of `journalctl -o json`; None for a line that was too long to be kept."""
    if line.full_bytes > len(line.kept):
        return None
    entry: dict[str, Any] = json.loads(line.kept.decode(errors="replace"))
    return entry


def format_entry(entry: dict[str, Any]) -> str:
    """Return `TIME HOST IDENT[PID]: MESSAGE`, the time in UTC with microseconds.

    Args:
        entry: fields as journalctl writes them in JSON: text, a list of byte values, a list of several values."""
    moment = _field(entry, "_SOURCE_REALTIME_TIMESTAMP") or _field(entry, "__REALTIME_TIMESTAMP")
    seconds, microseconds = divmod(int(moment), 1_000_000)
    moment_text = datetime.fromtimestamp(seconds, UTC).replace(microsecond=microseconds).isoformat("T", "microseconds")
    identifier = _field(entry, "SYSLOG_IDENTIFIER") or _field(entry, "_COMM") or "unknown"
    pid = _field(entry, "_PID") or _field(entry, "SYSLOG_PID")
    host = _field(entry, "_HOSTNAME") or "localhost"
    source = f"{identifier}[{pid}]" if pid else identifier
    text = f"{moment_text} {host} {source}: {_field(entry, 'MESSAGE')}"
    if len(text) * 4 > MAX_LINE_BYTES and len(whole := text.encode(errors="replace")) > MAX_LINE_BYTES:
        return cut_text(whole[:MAX_LINE_BYTES], len(whole))
    return text.replace("\0", "\ufffd") if "\0" in text else text


def _field(entry: dict[str, Any], name: str) -> str:
    value = entry.get(name)
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        if all(isinstance(item, int) for item in value):  # not UTF-8, or with control characters
            return bytes(value).decode(errors="replace")
        return _field({name: value[0]}, name)  # the field was given several times
    return ""
