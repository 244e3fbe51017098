"""Follows the systemd journal, through journalctl.

What journalctl does by itself when it follows is not enough: held up by a slow reader it passes over files that came
and went meanwhile, of two files written at once it may miss an entry, and it can die. journald numbers its entries
without a hole, so a reader of all of them sees whether one is missing, fetches it, or says how many are gone."""

import asyncio
import logging
import re
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fleetwire_agent.journal_entries import CURSOR_PATTERN, OUTPUT_FIELDS, JournalEntry, Place, read_entry, read_place
from fleetwire_agent.journal_files import SYSTEM_JOURNALS, are_readable, find_files, find_own_machine, holds
from fleetwire_agent.lines import LineSplitter, build_frames
from fleetwire_agent.processes import Process, Spawner
from fleetwire_shared.errors import InvalidError, NotFoundError, UnavailableError
from fleetwire_shared.messages import FollowLog, LogGap, LogLines

MAX_ENTRY_BYTES: Final = 2 * 1024 * 1024
"""Of one entry as JSON. journald takes messages of any size; of one larger than this a gap tells."""

HELD_UP_SECONDS: Final = 0.2
"""Sending that takes this long may hold journalctl up; having to wait for it this long shows that it is not."""

RESTART_SECONDS: Final = 0.5
MAX_RESTARTS: Final = 5
"""How often in a row a journalctl is started again that dies early and without having shown anything."""

EARLY_SECONDS: Final = 60.0

_BOOTS_SECONDS = 10.0
_BOOTS_SHOWN = 20
_STDERR_BYTES = 4096
_GONE = "the journal no longer has the entry that was read last"
_MAYBE_REMOVED = "the journal was cleared faster than it could be read; entries may be missing"
_BOOT = re.compile(r"0|-[1-9][0-9]{0,5}|[0-9a-f]{32}", re.ASCII)
_BOOT_ROW = re.compile(r"^ *(-?[0-9]+) ([0-9a-f]{32}) ", re.ASCII | re.MULTILINE)

SendEvent = Callable[[LogLines | LogGap], Awaitable[None]]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Start:
    """Where to begin. Without a place: at the beginning of the journal."""

    place: Place | None = None
    is_known: bool = False  # the entry there has been seen and is not wanted again


class JournalctlEndedError(UnavailableError):
    """journalctl ended. `has_complained`: with an error of its own, which another attempt would only meet again."""

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.has_complained = status > 0


class JournalFollower:
    """Reads the journal from a chosen entry on, as lines of text."""

    def __init__(self, request: FollowLog, *, spawner: Spawner, directory: str | None) -> None:
        """Check the request and that there is a journal. Blocking; `find_boot` completes it.

        Args:
            directory: where the journal files are; None for the system's own.
        Raises:
            InvalidError: a parameter is wrong.
            UnavailableError: the host has no journalctl, or no journal."""
        _check(request)
        if shutil.which("journalctl") is None:
            raise UnavailableError("this host has no journalctl; follow a file instead (source=file)")
        files = _require_files(directory)
        self._request = request
        self._spawner = spawner
        self._directory = directory
        self._machine_id = find_own_machine(directory)
        self._boot_id: str | None = None
        # Only who is shown every entry can tell from their numbers that one is missing.
        is_filtered = request.unit is not None or request.priority is not None or request.kernel
        self._sees_all = not is_filtered and request.boot is None and are_readable(files)
        self._last: Place | None = None  # of the entry that journalctl showed last, wanted or not
        self._unplaced = 0  # how many were shown since whose cursor could not be read, as they are too large
        self._neighbours: set[tuple[str, str]] = set()  # series that change over without anything between
        self._is_held_up = False
        self._is_removal_told = False

    async def find_boot(self) -> None:
        """Look for the boot that the request names.

        Raises:
            NotFoundError: the journal has no such boot; the message names those it has.
            UnavailableError: journalctl failed, or did not answer in time."""
        wanted = self._request.boot
        if wanted is None:
            return
        boots = await self._list_boots()
        for index, boot_id in boots:
            if wanted in (index, boot_id):
                self._boot_id = boot_id
                return
        shown = ", ".join(f"{index} ({boot_id})" for index, boot_id in reversed(boots[-_BOOTS_SHOWN:]))
        raise NotFoundError(f"boot {wanted}: the host's journal has no such boot; it has {shown or 'none'}")

    async def _list_boots(self) -> list[tuple[str, str]]:
        """Return offset and id of each boot, oldest first."""
        pieces = []
        try:
            async with asyncio.timeout(_BOOTS_SECONDS), self._spawned("--list-boots") as process:
                while piece := await process.stdout.read():
                    pieces.append(piece)
                await _require_success(process)
        except TimeoutError:
            raise UnavailableError(f"journalctl did not list the boots within {_BOOTS_SECONDS:.0f} s") from None
        rows: list[tuple[str, str]] = _BOOT_ROW.findall(b"".join(pieces).decode(errors="replace"))
        return rows

    async def run(self, send: SendEvent) -> None:
        """Send what the journal has and will have, until cancelled.

        Raises:
            UnavailableError: journalctl cannot be started, or ends again and again."""
        start = Start()
        arguments: tuple[str, ...] = ()
        if self._request.cursor is not None:
            start = await self._find_known(self._request.cursor, send)
        elif self._request.since is not None:
            arguments = (f"--since=@{self._request.since:.6f}",)
        else:
            start = await self._find_last(self._request.lines)
        if start.is_known:
            self._last = start.place
        await self._keep_following(start, send, arguments)

    # ------------------------------------------------------------ where to begin

    async def _find_known(self, cursor: str, send: SendEvent) -> Start:
        """Return where to go on after the entry at `cursor`; say it when entries are missing.

        journalctl goes on silently after a cursor that it does not find (vacuumed), and waits without a word at one
        that lies in the future (a journal from before a restored backup, a clock set back). Hence this first look."""
        known = read_place(cursor)
        if self._boot_id is not None and known is not None and known.boot_id != self._boot_id:
            return Start()  # of another boot than is wanted now: nothing of this one has been shown
        async with self._journalctl("--lines=all", f"--cursor={cursor}") as process:
            found = await _read_until(process, lambda _: True)
        if found is None or found.place is None:
            await send(LogGap(reason=_GONE))
            return await self._find_last(0)
        if found.place.cursor == cursor:
            return Start(found.place, is_known=True)
        if known is None or not await asyncio.to_thread(holds, self._directory, known):
            await self._send_gap(known, found.place, send)
        return Start(found.place)

    async def _find_last(self, lines: int) -> Start:
        """Return where the last `lines` matching entries start.

        Not left to `--lines=N`: it counts before --priority filters, and knows nothing of grep."""
        newest: Place | None = None
        oldest: Place | None = None
        missing = lines

        def is_enough(entry: JournalEntry) -> bool:
            nonlocal newest, oldest, missing
            newest = newest or entry.place
            if missing and entry.text is not None and self._is_wanted(entry.text):
                oldest = entry.place
                missing -= 1
            return missing == 0

        async with self._journalctl("--reverse", "--lines=all") as process:
            await _read_until(process, is_enough)
        return Start(newest, is_known=True) if oldest is None else Start(oldest)

    # ------------------------------------------------------------ following

    async def _keep_following(self, start: Start, send: SendEvent, arguments: tuple[str, ...]) -> None:
        """Follow; where journalctl ends, start it again after the entry it showed last."""
        loop = asyncio.get_running_loop()
        failures = 0
        while True:
            before, began_at = self._last, loop.time()
            try:
                await self._follow(start, send, arguments)
            except JournalctlEndedError as err:
                is_early = self._last == before and loop.time() - began_at < EARLY_SECONDS
                failures = failures + 1 if is_early else 0
                if failures > MAX_RESTARTS or (is_early and err.has_complained):
                    raise
                _log.warning("%s; it is started again", err.message)
            if self._last is not None:
                start, arguments = Start(self._last, is_known=True), ()
            await asyncio.sleep(RESTART_SECONDS)

    async def _follow(self, start: Start, send: SendEvent, arguments: tuple[str, ...]) -> None:
        """Send entries until journalctl ends, which always is an exception."""
        loop = asyncio.get_running_loop()
        # Inclusive: --after-cursor would silently drop an entry when the cursor has been vacuumed meanwhile.
        position = () if start.place is None else (f"--cursor={start.place.cursor}",)
        splitter = LineSplitter(0, limit_bytes=MAX_ENTRY_BYTES)
        is_first = start.place is not None
        # --follow shows the present boot only, unless it is told to --merge: what is left to read of an earlier boot
        # would be missing without a word.
        machine = () if self._machine_id is None else (f"_MACHINE_ID={self._machine_id}",)
        flags = ("--follow", "--merge", "--lines=all")
        async with self._journalctl(*flags, *position, *arguments, *machine) as process:
            asked_at = loop.time()
            while piece := await process.stdout.read():
                got_at = loop.time()
                entries = [read_entry(line) for line in splitter.feed(piece)]
                if is_first and entries:
                    is_first = False
                    entries = await self._check_first(entries, start, send)
                self._is_held_up &= got_at - asked_at < HELD_UP_SECONDS
                if self._is_held_up and not self._sees_all:
                    await self._check_removal(send)
                await self._send_entries(entries, send)
                asked_at = loop.time()
                self._is_held_up |= asked_at - got_at >= HELD_UP_SECONDS
            await _raise_end(process)

    async def _check_first(self, entries: list[JournalEntry], start: Start, send: SendEvent) -> list[JournalEntry]:
        """Return the entries without the one that was sent before; say it if that one has gone meanwhile."""
        if entries[0].place == start.place:
            return entries[1:] if start.is_known else entries
        if not (start.is_known and self._sees_all):  # else its number will show it
            await send(LogGap(reason=_GONE))
        return entries

    async def _check_removal(self, send: SendEvent) -> None:
        """Say it when files were removed that journalctl, held up by us, may not have opened yet."""
        if self._last is None:
            return
        is_removed = not await asyncio.to_thread(holds, self._directory, self._last)
        if is_removed and not self._is_removal_told:
            await send(LogGap(reason=_MAYBE_REMOVED))
        self._is_removal_told = is_removed

    async def _send_entries(self, entries: list[JournalEntry], send: SendEvent) -> None:
        """Send the wanted ones of these entries, and what journalctl passed over before them."""
        lines: list[tuple[str, str]] = []
        for entry in entries:
            place, last = entry.place, self._last
            if place is not None and last is not None:
                if place.series == last.series and place.number <= last.number:
                    continue  # shown before: a file that is renamed while it is read
                if self._sees_all and place.number != last.number + 1 + self._unplaced:
                    await _send_lines(lines, send)
                    lines = []
                    await self._bridge(last, place, send)
            lines = await self._add_line(entry, lines, send)
        await _send_lines(lines, send)

    async def _add_line(
        self, entry: JournalEntry, lines: list[tuple[str, str]], send: SendEvent
    ) -> list[tuple[str, str]]:
        """Return the lines that wait to be sent, after this entry."""
        self._unplaced = 0 if entry.place is not None else self._unplaced + 1
        self._last = entry.place or self._last
        if entry.text is None or entry.place is None:
            await _send_lines(lines, send)
            await send(LogGap(reason=f"an entry of {entry.full_bytes} bytes is too large to be read", count=1))
            return []
        if self._is_wanted(entry.text):
            lines.append((entry.place.cursor, entry.text))
        return lines

    async def _bridge(self, last: Place, following: Place, send: SendEvent) -> None:
        """Read again from `last` on, send what journalctl passed over before `following`, and say how much is gone."""
        if (last.series, following.series) in self._neighbours:
            return
        reached, is_last_there, is_over = last, False, False
        splitter = LineSplitter(0, limit_bytes=MAX_ENTRY_BYTES)
        async with self._journalctl("--lines=all", f"--cursor={last.cursor}") as process:
            while not is_over and (piece := await process.stdout.read()):
                lines: list[tuple[str, str]] = []
                for entry in map(read_entry, splitter.feed(piece)):
                    if entry.place == last:
                        is_last_there = True
                        continue
                    is_over = entry.place is None or _is_at_or_after(entry.place, following)
                    if is_over or entry.place is None:
                        break
                    lines = await self._send_numbered_gap(reached, entry.place, lines, send)
                    reached = entry.place
                    lines = await self._add_line(entry, lines, send)
                await _send_lines(lines, send)
        if last.series == following.series:
            await self._send_numbered_gap(reached, following, [], send)
        elif not is_last_there:
            await send(LogGap(reason=_GONE))
        elif reached == last:
            self._neighbours.add((last.series, following.series))

    async def _send_numbered_gap(
        self, before: Place, after: Place, lines: list[tuple[str, str]], send: SendEvent
    ) -> list[tuple[str, str]]:
        """Send `lines` and a gap when numbers of one series are missing; return the lines that wait still."""
        if before.series != after.series or after.number == before.number + 1:
            return lines
        await _send_lines(lines, send)
        await self._send_gap(before, after, send)
        return []

    async def _send_gap(self, before: Place | None, after: Place, send: SendEvent) -> None:
        """Say what is gone between two entries: how many, where their numbers tell."""
        if before is None or before.series != after.series or after.number <= before.number or not self._sees_all:
            await send(LogGap(reason=_GONE))
            return
        missing = after.number - before.number - 1
        reason = f"{missing} entries were removed from the journal before they could be read"
        if self._request.grep:
            await send(LogGap(reason=f"{reason}; how many of them held the text that is looked for is not known"))
        elif missing:
            await send(LogGap(reason=reason, count=missing))

    def _is_wanted(self, text: str) -> bool:
        return not self._request.grep or self._request.grep in text

    # ------------------------------------------------------------ journalctl

    @asynccontextmanager
    async def _journalctl(self, *arguments: str) -> AsyncIterator[Process]:
        """Run journalctl for the entries that match the request."""
        matches = []
        if self._request.unit is not None:
            matches.append(f"--unit={self._request.unit}")
        if self._request.priority is not None:
            matches.append(f"--priority={self._request.priority}")
        if self._boot_id is not None:
            matches.append(f"_BOOT_ID={self._boot_id}")
        if self._request.kernel:
            matches.append("_TRANSPORT=kernel")
        output = ("--output=json", "--all", f"--output-fields={OUTPUT_FIELDS}")
        async with self._spawned(*output, *arguments, *matches) as process:
            yield process

    @asynccontextmanager
    async def _spawned(self, *arguments: str) -> AsyncIterator[Process]:
        directory = () if self._directory is None else (f"--directory={self._directory}",)
        try:
            # Errors only: warnings about damaged journal files would fill a pipe that is read at the end alone.
            process = self._spawner.spawn(
                ["journalctl", "--quiet", "--no-pager", *directory, *arguments], env={"SYSTEMD_LOG_LEVEL": "err"}
            )
        except OSError as err:
            raise UnavailableError(f"journalctl cannot be started: {err.strerror}") from err
        try:
            yield process
        finally:
            try:
                await process.kill()
            finally:
                process.close()


async def _send_lines(lines: list[tuple[str, str]], send: SendEvent) -> None:
    for frame in build_frames(lines):
        await send(frame)


async def _read_until(process: Process, is_enough: Callable[[JournalEntry], bool]) -> JournalEntry | None:
    """Return the first entry that is enough; None at the end of the journal."""
    splitter = LineSplitter(0, limit_bytes=MAX_ENTRY_BYTES)
    while piece := await process.stdout.read():
        for entry in map(read_entry, splitter.feed(piece)):
            if is_enough(entry):
                return entry
    await _require_success(process)
    return None


async def _require_success(process: Process) -> None:
    if await process.wait():
        await _raise_end(process)


async def _raise_end(process: Process) -> None:
    status = await process.wait()
    said = (await process.stderr.read(_STDERR_BYTES)).decode(errors="replace").strip()
    raise JournalctlEndedError(f"journalctl ended with status {status}: {said or 'it said nothing'}", status=status)


def _is_at_or_after(place: Place, following: Place) -> bool:
    if place.series == following.series:
        return place.number >= following.number
    return place.microseconds > following.microseconds


def _check(request: FollowLog) -> None:
    if request.unit is not None and (not request.unit or "\0" in request.unit):
        raise InvalidError("unit must be the name of a systemd unit, such as nginx or nginx.service")
    if request.unit is not None and request.kernel:
        raise InvalidError("unit must be left out with kernel: the kernel's messages belong to no unit")
    if request.lines < 0:
        raise InvalidError(f"lines must be 0 or more, got {request.lines}")
    if request.since is not None and not 0 <= request.since < 2**40:
        raise InvalidError(f"since must be Unix seconds, got {request.since}")
    if request.priority is not None and not 0 <= request.priority <= 7:
        raise InvalidError(f"priority must be 0 (emerg) to 7 (debug), got {request.priority}")
    if request.cursor is not None and CURSOR_PATTERN.fullmatch(request.cursor) is None:
        raise InvalidError(f"cursor must be a journal cursor as sent with a line, got {request.cursor[:100]!r}")
    if request.boot is not None and _BOOT.fullmatch(request.boot) is None:
        raise InvalidError(f"boot must be 0, -1, -2 and so on, or 32 hexadecimal digits, got {request.boot[:100]!r}")


def _require_files(directory: str | None) -> list[Path]:
    files = find_files(directory)
    if not files:
        names = " or ".join(map(str, SYSTEM_JOURNALS)) if directory is None else directory
        raise UnavailableError(f"this host has no journal in {names} that the agent can read; is systemd-journald on?")
    return files
