"""A log of records on disk: appended, checksummed, made durable together, compacted into its twin.

Two files of the same size, allocated in advance, so that a full disk does not keep the agent from its work. One is the
log; when it is full, the records that still count are written to the other, under the next generation number and with
the header last. Frames carry their generation in the checksum: what a file held before is no record of the present."""

import asyncio
import errno
import fcntl
import logging
import os
import struct
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fleetwire_agent.runner.files import sync_directory, write_all

FILE_BYTES: Final = 4 * 1024 * 1024
NAMES: Final = ("ledger.0", "ledger.1")

_HEADER: Final = struct.Struct(">8sQI")  # magic, generation, CRC-32 of both
_MAGIC: Final = b"FWLEDGR1"
_FRAME: Final = struct.Struct(">4sIII")  # magic, number within the file, length, CRC-32 with the generation as its seed
_FRAME_MAGIC: Final = b"FWr\n"

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Job:
    """Frames to be written at a place, or (`is_whole`) as the start of the other file."""

    content: bytes
    done: "asyncio.Future[None] | None"
    is_whole: bool = False


class LedgerFile:
    """Use `open`, then `append`; all writing is done by one thread, which syncs once for all that waits."""

    def __init__(
        self, directory: Path, list_live: Callable[[], Iterable[bytes]], *, size_bytes: int = FILE_BYTES
    ) -> None:
        """`list_live` returns the records that a compaction keeps, the state they tell of being that of now."""
        self._directory = directory
        self._list_live = list_live
        self._size_bytes = size_bytes
        self._descriptors: list[int] = []
        self._active = 0
        self._generation = 0
        self._number = 0
        self._place = 0  # where the next frame goes, all queued jobs counted
        self._jobs: list[_Job] = []
        self._is_flushing = False
        self._has_failed = False  # what is on disk is less than what was counted here
        self._written_at = 0  # the thread's own place
        self._written_active = 0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ledger")

    # ------------------------------------------------------------ opening

    def open(self) -> tuple[list[bytes], bool]:
        """Return the records on disk in order, and whether some in between are damaged. Blocking; call it once.

        Raises:
            OSError: the directory cannot be used; BlockingIOError: another agent uses it."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in NAMES:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(self._directory / name, flags, 0o600)
            self._descriptors.append(descriptor)
            if os.fstat(descriptor).st_uid != os.geteuid():  # who could have it run what no server offered
                raise PermissionError(errno.EPERM, f"{name} is another user's")
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_size < self._size_bytes:
                os.posix_fallocate(descriptor, 0, self._size_bytes)
                os.fsync(descriptor)
        sync_directory(self._directory)
        contents = [os.pread(descriptor, os.fstat(descriptor).st_size, 0) for descriptor in self._descriptors]
        generations = [_read_generation(content) for content in contents]
        self._generation = max(generations)
        if self._generation == 0:
            self._begin_first()
            return [], False
        self._active = generations.index(self._generation)
        records, self._place, is_damaged = _read_records(contents[self._active], self._generation)
        self._number = len(records)
        self._written_at, self._written_active = self._place, self._active
        if is_damaged:
            self._compact(records)
        return records, is_damaged

    def _begin_first(self) -> None:
        self._generation = 1
        self._place = self._written_at = _HEADER.size
        for descriptor in self._descriptors:  # frames under a damaged header may be of generation 1, too
            os.ftruncate(descriptor, 0)
            os.posix_fallocate(descriptor, 0, self._size_bytes)
        write_all(self._descriptors[0], _build_header(1), 0)
        os.fdatasync(self._descriptors[0])

    def close(self) -> None:
        """Write what is queued, and close. Blocking."""
        self._thread.shutdown()
        jobs, self._jobs = self._jobs, []
        try:
            self._write(jobs)
        except OSError as err:
            _log.error("the ledger cannot be written: %s", err)
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()

    # ------------------------------------------------------------ appending

    def append(self, record: bytes, *, is_durable: bool = True) -> "asyncio.Future[None]":
        """Queue a record; the future is done when it is safe from a power cut, or, without `is_durable`, at once.

        The future raises OSError when the disk failed."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        frame = _build_frame(record, self._number, self._generation)
        if self._has_failed or self._place + len(frame) > self._size_bytes:
            self._has_failed = False
            self._compact(self._list_live())  # which tells of this record's state, too
            frame = b""
        else:
            self._number += 1
            self._place += len(frame)
        self._jobs.append(_Job(frame, done if is_durable else None))
        if not is_durable:
            done.set_result(None)
        self._flush_soon()
        return done

    def compact(self) -> None:
        """Have the next record follow upon those that still count, and nothing else."""
        self._compact(self._list_live())

    def _compact(self, records: Iterable[bytes]) -> None:
        self._generation += 1
        frames = [_build_frame(record, number, self._generation) for number, record in enumerate(records)]
        self._number = len(frames)
        content = b"".join(frames)
        self._active = 1 - self._active
        self._place = _HEADER.size + len(content)
        self._size_bytes = max(self._size_bytes, 2 * self._place)
        self._jobs.append(_Job(_build_header(self._generation) + content, None, is_whole=True))

    def _flush_soon(self) -> None:
        if not self._is_flushing:
            self._is_flushing = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        jobs, self._jobs = self._jobs, []
        if not jobs:  # closed meanwhile
            return
        loop = asyncio.get_running_loop()
        written = loop.run_in_executor(self._thread, self._write, jobs)

        def tell(written: "asyncio.Future[None]") -> None:
            error = written.exception()
            if error is not None:  # what waits would follow upon a hole; the next record begins a whole file instead
                self._has_failed = True
                jobs.extend(self._jobs)
                self._jobs = []
            for job in jobs:
                if job.done is not None and not job.done.done():
                    if error is None:
                        job.done.set_result(None)
                    else:
                        job.done.set_exception(error)
            self._is_flushing = False
            if self._jobs:
                self._flush_soon()

        written.add_done_callback(tell)

    def _write(self, jobs: list[_Job]) -> None:
        """In the thread."""
        is_durable = any(job.done is not None or job.is_whole for job in jobs)
        for job in jobs:
            if job.is_whole:
                self._write_whole(job.content)
            elif job.content:
                write_all(self._descriptors[self._written_active], job.content, self._written_at)
                self._written_at += len(job.content)
        if is_durable:
            os.fdatasync(self._descriptors[self._written_active])

    def _write_whole(self, content: bytes) -> None:
        """Fill the other file, its header last, and go on there."""
        other = 1 - self._written_active
        descriptor = self._descriptors[other]
        if os.fstat(descriptor).st_size < 2 * len(content):
            os.posix_fallocate(descriptor, 0, 2 * len(content))
        write_all(descriptor, bytes(_HEADER.size) + content[_HEADER.size :], 0)
        os.fsync(descriptor)
        write_all(descriptor, content[: _HEADER.size], 0)
        os.fdatasync(descriptor)
        # Not to be taken for the present, should the new header ever be damaged.
        write_all(self._descriptors[self._written_active], bytes(_HEADER.size), 0)
        self._written_active, self._written_at = other, len(content)


def _build_header(generation: int) -> bytes:
    return _HEADER.pack(_MAGIC, generation, zlib.crc32(b"%s%d" % (_MAGIC, generation)))


def _read_generation(content: bytes) -> int:
    """Return 0 where there is no valid header."""
    if len(content) < _HEADER.size:
        return 0
    magic, generation, checksum = _HEADER.unpack_from(content)
    is_valid = magic == _MAGIC and checksum == zlib.crc32(b"%s%d" % (_MAGIC, generation))
    return int(generation) if is_valid else 0


def _build_frame(record: bytes, number: int, generation: int) -> bytes:
    checksum = zlib.crc32(record, (generation + number) & 0xFFFFFFFF)
    return _FRAME.pack(_FRAME_MAGIC, number, len(record), checksum) + record


def _read_records(content: bytes, generation: int) -> tuple[list[bytes], int, bool]:
    """Return the records, the place after the last of them that follows without a break, and whether there are more
    behind a break: a torn tail has none, damage has."""
    records: list[bytes] = []
    place = _HEADER.size
    while (record := _read_frame(content, place, len(records), generation)) is not None:
        records.append(record)
        place += _FRAME.size + len(record)
    rest = _find_later(content, place + 1, len(records), generation)
    return records + rest, place, bool(rest)


def _read_frame(content: bytes, place: int, number: int | None, generation: int) -> bytes | None:
    if place + _FRAME.size > len(content):
        return None
    magic, stored_number, length, checksum = _FRAME.unpack_from(content, place)
    record = content[place + _FRAME.size : place + _FRAME.size + length]
    if magic != _FRAME_MAGIC or len(record) != length or (number is not None and stored_number != number):
        return None
    return record if checksum == zlib.crc32(record, (generation + stored_number) & 0xFFFFFFFF) else None


def _find_later(content: bytes, place: int, count: int, generation: int) -> list[bytes]:
    """Return the records of this generation behind a damaged one."""
    found: list[bytes] = []
    while (place := content.find(_FRAME_MAGIC, place)) != -1:
        _, number, _, _ = _FRAME.unpack_from(content.ljust(place + _FRAME.size, b"\0"), place)
        record = _read_frame(content, place, None, generation) if number > count else None
        if record is None:
            place += 1
            continue
        found.append(record)
        place += _FRAME.size + len(record)
    return found
