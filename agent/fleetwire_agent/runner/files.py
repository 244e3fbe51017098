"""What a runner and its agent leave for each other in the command's directory."""

import json
import os
import struct
import zlib
from contextlib import suppress
from typing import Any, Final, Literal, NamedTuple, TypeAlias

ORDER: Final = "order.json"
CLAIM: Final = "claim"
"""Made by whoever is first: by the runner when it is about to start the shell, or by an agent that wants to be sure
that it never will. Holds the runner's pid."""

RESULT: Final = "result"
SOCKET: Final = "socket"

RESERVE: Final = "reserve"
"""Of the directory above that of all commands: a file that only takes room, which is given up when the disk is full, so
that somebody can still run what frees it."""

RESERVE_BYTES: Final = 4 * 1024 * 1024

MAX_RESULT_BYTES: Final = 64 * 1024
"""Allocated before the shell starts, so that the end can be written to a disk that is full by then."""

_RESULT_HEADER: Final = struct.Struct(">4sII")  # magic, length and CRC-32 of the JSON that follows
_RESULT_MAGIC: Final = b"FWR1"

ResultStatus: TypeAlias = Literal["succeeded", "failed", "timed_out", "cancelled", "interrupted"]


class Order(NamedTuple):
    """What to run, and how."""

    command_id: str
    argv: list[str]
    environment: dict[str, str]
    timeout_seconds: float
    grace_seconds: float  # between SIGTERM and SIGKILL
    # unit: within the systemd unit this runner is the main process of; own: below the runner's own; none: use none
    control_group: Literal["unit", "own", "none"]
    head_segments: int  # of the output these are kept, and as many of the newest
    waiting_segments: int  # where the agent is connected and so many wait for it, the command waits, too


class Killed(NamedTuple):
    pid: int
    command: str
    signal: Literal["TERM", "KILL"]


class Result(NamedTuple):
    """How the command ended."""

    status: ResultStatus
    exit_code: int | None
    error: str | None
    started_at: float  # Unix seconds
    duration_seconds: float
    stdout_bytes: int  # all that was written, also what was not kept
    stderr_bytes: int
    killed: list[Killed]
    killed_count: int


def keep_reserve(state_directory: str) -> None:
    """Make the reserve unless it is there, or there is no room for it."""
    path = f"{state_directory}/{RESERVE}"
    if os.path.exists(path):  # noqa: PTH110
        return
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, RESERVE_BYTES)
        finally:
            os.close(descriptor)
    except OSError:
        use_reserve(state_directory)


def use_reserve(state_directory: str) -> bool:
    """Give up the reserve; return whether there was one, so that it is of use to try again."""
    try:
        os.unlink(f"{state_directory}/{RESERVE}")  # noqa: PTH108
    except OSError:
        return False
    return True


def write_order(directory: str, order: Order) -> None:
    """Make the command's directory, with its order. Raises OSError."""
    os.mkdir(directory, 0o700)  # noqa: PTH102
    descriptor = os.open(f"{directory}/{ORDER}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(order._asdict(), file)


def read_order(directory: str) -> Order:
    with open(f"{directory}/{ORDER}", encoding="utf-8") as file:  # noqa: PTH123 - pathlib costs a runner its import
        return Order(**json.load(file))


def claim(directory: str) -> bool:
    """Return whether the command is the caller's to start, or never to be started: only the first gets it."""
    try:
        descriptor = os.open(f"{directory}/{CLAIM}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return False
    with suppress(OSError):  # a full disk; that the file is there counts, who made it is for people to read
        os.write(descriptor, b"%d\n" % os.getpid())
    os.close(descriptor)
    return True


def allocate_result(directory: str) -> int:
    """Make the result's file, empty, with room for all that it may hold; return its descriptor. Raises OSError."""
    descriptor = os.open(f"{directory}/{RESULT}", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    os.posix_fallocate(descriptor, 0, _RESULT_HEADER.size + MAX_RESULT_BYTES)
    return descriptor


def write_result(descriptor: int, directory: str, result: Result) -> None:
    """Write the result so that a power cut leaves all of it or none. Raises OSError."""
    content = _encode(result)
    while len(content) > MAX_RESULT_BYTES:
        result = result._replace(killed=result.killed[: len(result.killed) // 2])
        content = _encode(result)
    os.pwrite(descriptor, _RESULT_HEADER.pack(_RESULT_MAGIC, len(content), zlib.crc32(content)) + content, 0)
    os.fdatasync(descriptor)
    for path in (directory, f"{directory}/.."):
        sync_directory(path)


def read_result(directory: str) -> Result | None:
    """Return the result, None when there is none yet, or only a part of it."""
    try:
        with open(f"{directory}/{RESULT}", "rb") as file:  # noqa: PTH123
            stored = file.read()
    except FileNotFoundError:
        return None
    if len(stored) < _RESULT_HEADER.size:
        return None
    magic, length, checksum = _RESULT_HEADER.unpack_from(stored)
    content = stored[_RESULT_HEADER.size : _RESULT_HEADER.size + length]
    if magic != _RESULT_MAGIC or not content or len(content) != length or zlib.crc32(content) != checksum:
        return None
    fields: dict[str, Any] = json.loads(content)
    fields["killed"] = [Killed(*each) for each in fields["killed"]]
    return Result(**fields)


def _encode(result: Result) -> bytes:
    return json.dumps(result._asdict()).encode()


def sync_directory(path: str) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
