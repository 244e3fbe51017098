"""Follows a log file through rotation, truncation and replacement. Blocking calls, for threads."""

import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from fleetwire_agent.files import error_from_os, open_regular
from fleetwire_agent.lines import LineSplitter, RawLine, build_frames, make_line_filter
from fleetwire_shared.errors import FleetwireError, InvalidError
from fleetwire_shared.limits import MAX_LINE_BYTES
from fleetwire_shared.messages import FollowLog, LogGap, LogLines, LogRotated

PIECE_BYTES = 64 * 1024
"""Larger ones are slower: each is a new buffer, and from 128 KiB on the page faults cost more than the reading."""

POLL_SECONDS = 0.2

EMPTY_SUCCESSOR_POLLS = 10
"""A rotated file's writer goes on writing to it until it is told to reopen. So an empty successor is left waiting
for this many polls (2 s); one with content shows that the writer has moved."""

_TAIL_BYTES = 64
"""Kept of what was read last, to notice that a file was truncated and has grown past the same place again."""

_CURSOR = re.compile(r"([0-9]{1,20}):([0-9]{1,20}):([0-9]{1,20})", re.ASCII)
_ROTATED_SUFFIX = re.compile(r"[.-]([0-9][0-9T_.:-]*)", re.ASCII)
_COMPRESSED_SUFFIX = re.compile(r"[.-]([0-9][0-9T_.:-]*)\.(gz|xz|bz2|zst|lz4|Z)", re.ASCII)

LogEvent = LogLines | LogGap | LogRotated


class Sibling(NamedTuple):
    """A rotated file of the same log. Ordered by age, oldest first."""

    modified_ns: int
    order: int  # the negative rotation number (.2 is older than .1): tells files apart that were written at once
    path: str
    device: int
    inode: int
    size_bytes: int
    is_compressed: bool


class _OpenLog:
    """The file that is read now, with what was learnt of it."""

    def __init__(self, path: str, *, offset: int = 0) -> None:
        self.descriptor = open_regular(path)
        status = os.fstat(self.descriptor)
        self.device, self.inode = status.st_dev, status.st_ino
        self.move_to(offset)

    def move_to(self, offset: int) -> None:
        self.position = offset
        self.splitter = LineSplitter(offset)
        tail_bytes = min(offset, _TAIL_BYTES)
        self.tail = os.pread(self.descriptor, tail_bytes, offset - tail_bytes)

    def status(self) -> os.stat_result:
        return os.fstat(self.descriptor)

    def is_rewritten(self) -> bool:
        """Whether the file was truncated below what has been read, or holds other bytes there now."""
        if os.fstat(self.descriptor).st_size < self.position:
            return True
        return os.pread(self.descriptor, len(self.tail), self.position - len(self.tail)) != self.tail

    def read(self) -> bytes:
        piece = os.pread(self.descriptor, PIECE_BYTES, self.position)
        self.position += len(piece)
        self.tail = (self.tail + piece[-_TAIL_BYTES:])[-_TAIL_BYTES:]
        return piece

    def close(self) -> None:
        os.close(self.descriptor)


class FileFollower:
    """Reads a log file from a chosen line on, and whatever takes its place after it. Close it from any thread."""

    def __init__(self, request: FollowLog) -> None:
        """Open the file.

        Raises:
            InvalidError: the path or the cursor is none, or the path names no regular file.
            NotFoundError, ForbiddenError, UnavailableError: the kernel's answer."""
        if request.path is None:
            raise InvalidError("path must be given for source file")
        if request.lines < 0:
            raise InvalidError(f"lines must be 0 or more, got {request.lines}")
        cursor = None if request.cursor is None else _parse_cursor(request.cursor)
        self._path = request.path
        self._text_of = make_line_filter(request.grep)
        self._lock = threading.Lock()
        self._is_closed = False
        self._pending: list[LogEvent] = []
        self._search: TailSearch | None = None
        self._copy_of: _OpenLog | None = None  # set while a copy of the truncated file is read to its end
        self._skip_first = False
        self._empty_polls = 0
        self._log = _OpenLog(request.path)
        try:
            if cursor is not None:
                self._resume(*cursor)
            else:
                size_bytes = self._log.status().st_size
                self._search = TailSearch(self._log.descriptor, size_bytes, request.lines, self._text_of)
        except OSError as err:
            self.close()
            raise error_from_os(err, self._path) from err
        except BaseException:
            self.close()
            raise

    def read(self) -> list[LogEvent] | None:
        """Return what comes next, perhaps nothing yet; None when there is nothing to do until the next poll."""
        with self._lock:
            if self._is_closed:
                return None
            if self._pending:
                events, self._pending = self._pending, []
                return events
            try:
                return self._advance()
            except OSError as err:
                raise error_from_os(err, self._path) from err

    def close(self) -> None:
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._log.close()
                if self._copy_of is not None:
                    self._copy_of.close()

    def _advance(self) -> list[LogEvent] | None:
        if self._search is not None:
            offset = self._search.step()
            if offset is not None:
                self._log.move_to(offset)
                self._search = None
            return []
        if self._log.is_rewritten():
            return self._follow_truncation()
        if piece := self._log.read():
            self._empty_polls = 0
            return self._frames(self._log.splitter.feed(piece))
        if self._copy_of is not None:
            return self._leave_copy()
        return self._follow_replacement()

    def _frames(self, lines: list[RawLine]) -> list[LogEvent]:
        if self._skip_first and lines:
            del lines[0]
            self._skip_first = False
        return list(build_frames(self._matching(lines)))

    def _matching(self, lines: list[RawLine]) -> Iterator[tuple[str, str]]:
        prefix = f"{self._log.device}:{self._log.inode}:"
        for line in lines:
            text = self._text_of(line)
            if text is not None:
                yield f"{prefix}{line.offset}", text

    def _finish(self) -> list[LogEvent]:
        """The last line of a file that will not grow any more, when it has no newline."""
        line = self._log.splitter.finish()
        return self._frames([] if line is None else [line])

    # ------------------------------------------------------------ resuming

    def _resume(self, device: int, inode: int, offset: int) -> None:
        """Go to the line after the one at `offset` of the file with this inode, wherever that file is now."""
        if (self._log.device, self._log.inode) != (device, inode):
            found = self._find(device, inode)
            if found is None or not self._replace_log(found):
                self._pending.append(LogGap(reason="the file that was read last is gone"))
                return
        if _is_line_start(self._log.descriptor, offset):
            self._skip_to(offset)
            return
        copy = self._find_copy(lambda descriptor: _is_line_start(descriptor, offset))
        if copy is None:
            self._pending += [LogRotated(reason="truncated"), LogGap(reason="the file was truncated")]
            return
        self._read_copy(copy, offset)
        self._skip_first = True

    def _skip_to(self, offset: int) -> None:
        self._log.move_to(offset)
        self._skip_first = True

    def _find(self, device: int, inode: int) -> str | None:
        with os.scandir(self._directory()) as entries:
            for entry in entries:
                if entry.inode() == inode and entry.is_file(follow_symlinks=False):
                    return entry.path if entry.stat(follow_symlinks=False).st_dev == device else None
        return None

    # ------------------------------------------------------------ truncation

    def _follow_truncation(self) -> list[LogEvent]:
        """The file was emptied in place. `copytruncate` leaves a copy beside it, which has what was not read yet."""
        if self._copy_of is not None:  # the copy was truncated too
            return [*self._leave_copy(), LogGap(reason="the copy of the truncated file was truncated")]
        position, tail = self._log.position, self._log.tail
        copy = self._find_copy(
            lambda descriptor: bool(tail) and os.pread(descriptor, len(tail), position - len(tail)) == tail
        )
        if copy is not None:
            splitter = self._log.splitter
            self._read_copy(copy, position)
            self._log.splitter = splitter
            return []
        events = self._finish()
        self._log.move_to(0)
        return [*events, LogRotated(reason="truncated"), LogGap(reason="the file was truncated")]

    def _find_copy(self, is_copy: Callable[[int], bool]) -> _OpenLog | None:
        for sibling in reversed(self._siblings()):
            if sibling.is_compressed or sibling.inode == self._log.inode:
                continue
            try:
                candidate = _OpenLog(sibling.path)
            except FleetwireError:
                continue  # renamed or removed a moment ago
            if is_copy(candidate.descriptor):
                return candidate
            candidate.close()
        return None

    def _read_copy(self, copy: _OpenLog, offset: int) -> None:
        """Read the copy first; its lines have the cursors they had in the original."""
        self._copy_of = self._log
        copy.device, copy.inode = self._log.device, self._log.inode
        copy.move_to(offset)
        self._log = copy

    def _leave_copy(self) -> list[LogEvent]:
        original = self._copy_of
        if original is None:
            return []
        events = self._finish()
        self._log.close()
        self._log, self._copy_of = original, None
        self._log.move_to(0)
        self._skip_first = False
        return [*events, LogRotated(reason="truncated")]

    # ------------------------------------------------------------ replacement

    def _follow_replacement(self) -> list[LogEvent] | None:
        """At the end of the file: see whether its path names another one now."""
        try:
            present = Path(self._path).stat()
        except FileNotFoundError:
            return None  # the next file has not been made yet
        if (present.st_dev, present.st_ino) == (self._log.device, self._log.inode):
            return None
        if present.st_size == 0 and self._empty_polls < EMPTY_SUCCESSOR_POLLS:
            self._empty_polls += 1
            return None
        if piece := self._log.read():  # written before the writer moved on, and after the last look
            return self._frames(self._log.splitter.feed(piece))
        successor, is_gap = self._find_successor(present)
        events = self._finish()
        if not self._replace_log(successor):
            return events or None
        self._skip_first = False
        self._empty_polls = 0
        events.append(LogRotated(reason="replaced"))
        if is_gap:
            events.append(LogGap(reason="a rotated file between was compressed already"))
        return events

    def _find_successor(self, present: os.stat_result) -> tuple[str, bool]:
        """Return the file that was written after this one, and whether a compressed one lies between."""
        siblings = self._siblings()
        own = next((sibling for sibling in siblings if sibling.inode == self._log.inode), None)
        modified_ns = self._log.status().st_mtime_ns
        later = [
            sibling
            for sibling in siblings
            if sibling.inode not in (self._log.inode, present.st_ino)
            and (sibling > own if own is not None else sibling.modified_ns > modified_ns)
        ]
        readable = [sibling for sibling in later if not sibling.is_compressed]
        if not readable:
            return self._path, bool(later)
        return readable[0].path, later[0].is_compressed

    def _replace_log(self, path: str) -> bool:
        try:
            successor = _OpenLog(path)
        except FleetwireError:
            return False  # renamed or removed a moment ago: the next poll sees what is there then
        self._log.close()
        self._log = successor
        return True

    def _siblings(self) -> list[Sibling]:
        """The rotated files of this log, oldest first."""
        name = os.path.basename(os.path.realpath(self._path))  # noqa: PTH119 - of a resolved text
        siblings = []
        with os.scandir(self._directory()) as entries:
            for entry in entries:
                suffix = entry.name.removeprefix(name)
                if suffix == entry.name or not suffix:
                    continue
                compressed = _COMPRESSED_SUFFIX.fullmatch(suffix)
                matched = compressed or _ROTATED_SUFFIX.fullmatch(suffix)
                if matched is None or not entry.is_file(follow_symlinks=False):
                    continue
                status = entry.stat(follow_symlinks=False)
                siblings.append(
                    Sibling(
                        modified_ns=status.st_mtime_ns,
                        order=-int(matched[1]) if matched[1].isdigit() else 0,
                        path=entry.path,
                        device=status.st_dev,
                        inode=status.st_ino,
                        size_bytes=status.st_size,
                        is_compressed=compressed is not None,
                    )
                )
        return sorted(siblings)

    def _directory(self) -> str:
        return os.path.dirname(os.path.realpath(self._path))  # noqa: PTH120 - of a resolved text


class TailSearch:
    """Finds where the last `wanted` matching lines of a file start, reading backwards block by block."""

    def __init__(self, descriptor: int, size_bytes: int, wanted: int, text_of: Callable[[RawLine], str | None]) -> None:
        self._descriptor = descriptor
        self._position = size_bytes
        self._wanted = wanted
        self._text_of = text_of
        self._head = b""  # start of the line that goes on after `position`, as much of it as is ever looked at
        self._head_bytes = 0
        self._is_last = True  # what follows the last newline is no line yet

    def step(self) -> int | None:
        """Read one block; return the offset when it has been found."""
        start = max(0, self._position - PIECE_BYTES)
        block = os.pread(self._descriptor, self._position - start, start)
        offset = self._position
        self._position = start
        parts = block.split(b"\n")
        for part in reversed(parts[1:]):
            offset -= len(part)
            if self._is_start(offset, part):
                return offset
            offset -= 1  # the newline before it
        self._add_before(parts[0])
        if start == 0:
            return 0
        return None

    def _is_start(self, offset: int, part: bytes) -> bool:
        self._add_before(part)
        line = RawLine(offset, self._head, self._head_bytes)
        self._head, self._head_bytes = b"", 0
        if self._is_last:
            self._is_last = False
        elif self._text_of(line) is not None:
            self._wanted -= 1
        return self._wanted <= 0

    def _add_before(self, part: bytes) -> None:
        self._head = (part + self._head)[:MAX_LINE_BYTES]
        self._head_bytes += len(part)


def _parse_cursor(cursor: str) -> tuple[int, int, int]:
    match = _CURSOR.fullmatch(cursor)
    if match is None or int(match[3]) >= 2**63:
        raise InvalidError(f"cursor must be device:inode:offset as sent with a line, got {cursor[:100]!r}")
    return int(match[1]), int(match[2]), int(match[3])


def _is_line_start(descriptor: int, offset: int) -> bool:
    """Whether there is a line at `offset`: bytes, and a newline before them."""
    around = os.pread(descriptor, 2, offset - 1) if offset else b"\n" + os.pread(descriptor, 1, 0)
    return len(around) == 2 and around.startswith(b"\n")
