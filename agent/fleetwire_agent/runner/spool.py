"""The output of one command on disk: segments of pieces, written by its runner, read and removed by the agent.

A segment is a file named after the position of its first byte. Positions count the bytes of both streams in the order
in which the runner read them; where a position is missing, what was there has not been kept."""

import os
import struct
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import pairwise
from typing import Final, Literal, NamedTuple, TypeAlias

from fleetwire_agent.runner.files import open_own

Stream: TypeAlias = Literal["stdout", "stderr"]

SEGMENT_BYTES: Final = 1024 * 1024
MAX_PIECE_BYTES: Final = 64 * 1024

_PREFIX: Final = "output."
_HEADER: Final = struct.Struct(">cQQII")  # stream, position, offset within the stream, length, CRC-32 of the content
_STREAM_OF: Final[dict[bytes, Stream]] = {b"o": "stdout", b"e": "stderr"}
_LETTER_OF: Final = {stream: letter for letter, stream in _STREAM_OF.items()}


class Piece(NamedTuple):
    stream: Stream
    position: int
    offset: int
    content: bytes

    @property
    def end(self) -> int:
        return self.position + len(self.content)


def list_segments(directory: str) -> list[int]:
    """Return the positions at which the segments that are there begin, in order; none where the directory is gone."""
    try:
        names = os.listdir(directory)  # noqa: PTH208 - pathlib costs a runner its import
    except (FileNotFoundError, NotADirectoryError):
        return []
    places = (name.removeprefix(_PREFIX) for name in names if name.startswith(_PREFIX))
    return sorted(int(place) for place in places if place.isdecimal())


def measure(directory: str) -> int:
    """Return the bytes that the segments take."""
    total = 0
    for start in list_segments(directory):
        with suppress(FileNotFoundError):  # removed meanwhile
            total += os.stat(_path(directory, start)).st_size  # noqa: PTH116
    return total


def remove_segments(directory: str, starts: Iterable[int]) -> None:
    for start in starts:
        with suppress(FileNotFoundError):
            os.unlink(_path(directory, start))  # noqa: PTH108


def _path(directory: str, start: int) -> str:
    return f"{directory}/{_PREFIX}{start:020d}"


class SpoolWriter:
    """Appends pieces. Of what nobody fetched in time the first segments are kept and the last."""

    def __init__(self, directory: str, *, head_segments: int, make_room: Callable[[], bool]) -> None:
        """`make_room` is called where the disk takes no more; it returns whether to try again."""
        self._directory = directory
        self._head_segments = head_segments
        self._make_room = make_room
        self._descriptor: int | None = None
        self._size_bytes = 0
        self.position = 0
        self.written_bytes: dict[Stream, int] = {"stdout": 0, "stderr": 0}
        self.segments = 0  # full ones, as counted last
        self.has_failed = False  # the disk took no more: what followed is missing

    def add(self, stream: Stream, content: bytes) -> None:
        """Append at most MAX_PIECE_BYTES. What the disk does not take is counted and missing."""
        header = _HEADER.pack(
            _LETTER_OF[stream], self.position, self.written_bytes[stream], len(content), zlib.crc32(content)
        )
        if not self._try_to_write(header + content) and not (
            self._make_room() and self._try_to_write(header + content)
        ):
            self.has_failed = True
        self.position += len(content)
        self.written_bytes[stream] += len(content)

    def _try_to_write(self, frame: bytes) -> bool:
        try:
            self._write(self._begin_piece(len(frame)), frame)
        except OSError:
            return False
        return True

    def _begin_piece(self, size_bytes: int) -> int:
        """Return the descriptor to write so much to: of the present segment, or of a new one where that is full."""
        if self._descriptor is not None and self._size_bytes + size_bytes <= SEGMENT_BYTES:
            return self._descriptor
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        self._drop_middle()
        self.recount()
        self._descriptor = open_own(_path(self._directory, self.position), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._size_bytes = 0
        return self._descriptor

    def _write(self, descriptor: int, frame: bytes) -> None:
        written = os.write(descriptor, frame)
        if written < len(frame):  # full: a reader would take the rest of this piece for the next
            os.ftruncate(descriptor, self._size_bytes)
            os.lseek(descriptor, self._size_bytes, os.SEEK_SET)
            raise OSError
        self._size_bytes += written

    def _drop_middle(self) -> None:
        """Make room for one more segment."""
        starts = list_segments(self._directory)
        excess = len(starts) + 1 - 2 * self._head_segments
        if excess > 0:
            remove_segments(self._directory, starts[self._head_segments : self._head_segments + excess])

    def recount(self) -> None:
        """See what is there still: others remove what they have fetched."""
        self.segments = len(list_segments(self._directory)) - (self._descriptor is not None)

    def close(self) -> None:
        """Make all that is there durable."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        for start in list_segments(self._directory):
            with suppress(OSError):  # removed meanwhile, or the disk is failing: the result says more
                descriptor = open_own(_path(self._directory, start), os.O_RDONLY)
                try:
                    os.fdatasync(descriptor)
                finally:
                    os.close(descriptor)


class SpoolReader:
    """Reads pieces in order, also while they are being written."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._start: int | None = None  # of the open segment
        self._descriptor: int | None = None
        self._place = 0  # in the open segment
        self.position = 0  # of the next piece wanted

    def seek(self, position: int) -> None:
        """Go on with the byte at a position, or with what is kept after it."""
        self.close()
        self.position = position

    def read(self) -> Piece | None:
        """Return the next piece, of which what lies before the position is cut off; None when there is none now.

        Raises:
            OSError: the disk cannot be read."""
        while True:
            if self._descriptor is None and not self._open(self._find_segment()):
                return None
            piece = None if self._descriptor is None else self._read_piece(self._descriptor)
            if piece is None:
                following = self._find_next_segment()
                if following is not None and self._descriptor is not None:
                    piece = self._read_piece(self._descriptor)  # what was added before the next segment was begun
            if piece is None:
                if not self._open(following):
                    return None
                continue
            if piece.end <= self.position:
                continue
            cut = max(0, self.position - piece.position)
            self.position = piece.end
            return Piece(piece.stream, piece.position + cut, piece.offset + cut, piece.content[cut:])

    def drop_before(self, position: int) -> bool:
        """Remove the segments that hold nothing from `position` on; return whether there were any."""
        starts = list_segments(self._directory)
        done = [start for start, following in pairwise(starts) if following <= position]
        remove_segments(self._directory, done)
        return bool(done)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = self._start = None

    def _find_segment(self) -> int | None:
        starts = list_segments(self._directory)
        before = [start for start in starts if start <= self.position]
        return before[-1] if before else min(starts, default=None)

    def _find_next_segment(self) -> int | None:
        after = -1 if self._start is None else self._start
        return min((start for start in list_segments(self._directory) if start > after), default=None)

    def _open(self, start: int | None) -> bool:
        if start is None:
            return False
        try:
            descriptor = open_own(_path(self._directory, start), os.O_RDONLY)
        except FileNotFoundError:  # removed between the listing and now; the next call finds what is left
            return False
        self.close()
        self._descriptor, self._start, self._place = descriptor, start, 0
        return True

    def _read_piece(self, descriptor: int) -> Piece | None:
        """Return the piece at the place, None when it is not there as a whole."""
        head = os.pread(descriptor, _HEADER.size, self._place)
        if len(head) < _HEADER.size:
            return None
        letter, position, offset, length, checksum = _HEADER.unpack(head)
        if letter not in _STREAM_OF or length > MAX_PIECE_BYTES:
            return None
        content = os.pread(descriptor, length, self._place + _HEADER.size)
        if len(content) < length or zlib.crc32(content) != checksum:
            return None
        self._place += _HEADER.size + length
        return Piece(_STREAM_OF[letter], position, offset, content)
