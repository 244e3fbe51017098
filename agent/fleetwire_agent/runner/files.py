"""What a runner and its agent leave for each other in the command's directory."""

import errno
import json
import os
import struct
import zlib
from typing import Any, Final, Literal, NamedTuple, TypeAlias, get_args

COMMANDS: Final = "commands"
"""Of the agent's state directory: one directory for each command."""

ORDER: Final = "order.json"
CLAIM: Final = "claim"
"""Made by whoever is first: by the runner when it is about to start the shell, or by an agent that wants to be sure
that it never will. A link to nowhere that says who: so it can be made in one step, also where the disk is full."""

TRACES: Final = "traces"
"""Written by the runner: where to find what it started, for an agent that finds the runner killed."""

RESULT: Final = "result"
SOCKET: Final = "socket"

RESERVE: Final = "reserve"
"""Of the directory above that of all commands: a file that only takes room, which is given up when the disk is full, so
that somebody can still run what frees it."""

RESERVE_BYTES: Final = 4 * 1024 * 1024

MAX_ERROR_CHARACTERS: Final = 1000
MAX_RESULT_BYTES: Final = 64 * 1024
"""Allocated before the shell starts, so that the end can be written to a disk that is full by then."""

_TRACES_BYTES: Final = 8192  # taken at once, so that a disk that is full later takes what is added; a path has 4096

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
    head_segments: int  # of the output these are kept, and as many of the newest
    waiting_segments: int  # where the agent is connected and so many wait for it, the command waits, too


class Traces(NamedTuple):
    """What a runner leaves behind when it is killed; of this boot."""

    runner_pid: int
    control_group: str | None  # where it is, or would have been made
    shell: tuple[int, int] | None  # pid, also its session's, and start in ticks; None as long as there is none


class Killed(NamedTuple):
    pid: int
    command: str
    signal: Literal["TERM", "KILL"]


class Result(NamedTuple):
    """How the command ended."""

    status: ResultStatus
    exit_code: int | None
    error: str | None
    ended_at: float  # Unix seconds
    ended_boottime: float  # seconds of CLOCK_BOOTTIME
    duration_seconds: float
    stdout_bytes: int  # all that was written, also what was not kept
    stderr_bytes: int
    killed: list[Killed]
    killed_count: int


def open_own(path: str, flags: int) -> int:
    """Open a file of the state directory, or make it (as `open` and `os.open` do). Raises OSError, also for a link: the
    runner makes none there but the claim, and who could plant one would have root write elsewhere."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def keep_reserve(state_directory: str) -> None:
    """Make the reserve unless it is there, or there is no room for it."""
    path = f"{state_directory}/{RESERVE}"
    if os.path.exists(path):  # noqa: PTH110
        return
    try:
        descriptor = open_own(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
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
    descriptor = open_own(f"{directory}/{ORDER}", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(order._asdict(), file)


def read_order(directory: str) -> Order:
    # Not with pathlib, which costs a runner its import.
    with open(f"{directory}/{ORDER}", encoding="utf-8", opener=open_own) as file:
        return Order(**json.load(file))


def claim(directory: str, who: Literal["runner", "agent"]) -> bool:
    """Return whether the command is the runner's to start, or the agent's, so that it is never started from there: it
    belongs to the first, and stays with it. Raises OSError."""
    try:
        os.symlink(who, f"{directory}/{CLAIM}")  # noqa: PTH211
    except FileExistsError:
        return os.readlink(f"{directory}/{CLAIM}") == who  # noqa: PTH115
    return True


def write_traces(directory: str, traces: Traces) -> None:
    """Write the traces, or replace them, which needs no more room. Raises OSError."""
    content = json.dumps(traces._asdict()).encode().ljust(_TRACES_BYTES)
    descriptor = open_own(f"{directory}/{TRACES}", os.O_WRONLY | os.O_CREAT)
    try:
        write_all(descriptor, content, 0)
    finally:
        os.close(descriptor)


def read_traces(directory: str) -> Traces | None:
    """Return the traces, None where the runner was killed before it wrote any, or they cannot be read."""
    try:
        with open(f"{directory}/{TRACES}", encoding="utf-8", opener=open_own) as file:
            fields = json.load(file)
        shell = fields["shell"] and (int(fields["shell"][0]), int(fields["shell"][1]))
        return Traces(int(fields["runner_pid"]), fields["control_group"], shell)
    except (OSError, ValueError, LookupError, TypeError):
        return None


def allocate_result(directory: str) -> int:
    """Make the result's file, empty, with room for all that it may hold; return its descriptor. Raises OSError."""
    descriptor = open_own(f"{directory}/{RESULT}", os.O_RDWR | os.O_CREAT | os.O_EXCL)
    os.posix_fallocate(descriptor, 0, _RESULT_HEADER.size + MAX_RESULT_BYTES)
    return descriptor


def write_result(descriptor: int, directory: str, result: Result) -> None:
    """Write the result so that a power cut leaves all of it or none; of one that is too large, less. Raises OSError."""
    result = result._replace(error=result.error and result.error[:MAX_ERROR_CHARACTERS])
    content = _encode(result)
    while len(content) > MAX_RESULT_BYTES:
        result = result._replace(killed=result.killed[: len(result.killed) // 2])
        content = _encode(result)
    write_all(descriptor, _RESULT_HEADER.pack(_RESULT_MAGIC, len(content), zlib.crc32(content)) + content, 0)
    os.fdatasync(descriptor)
    for path in (directory, f"{directory}/.."):
        sync_directory(path)


class UnknownResultError(Exception):
    """There is a result, of another version of the runner, and it is not understood; the message says which."""


def read_result(directory: str) -> Result | None:
    """Return the result, None when there is none yet, or only a part of it.

    What a newer runner says beyond it is left out.

    Raises:
        OSError: the disk cannot be read. UnknownResultError."""
    try:
        with open(f"{directory}/{RESULT}", "rb", opener=open_own) as file:
            stored = file.read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if len(stored) < _RESULT_HEADER.size:
        return None
    magic, length, checksum = _RESULT_HEADER.unpack_from(stored)
    content = stored[_RESULT_HEADER.size : _RESULT_HEADER.size + length]
    if magic != _RESULT_MAGIC or not content or len(content) != length or zlib.crc32(content) != checksum:
        return None
    try:
        return _parse_result(json.loads(content))
    except (ValueError, LookupError, TypeError) as err:
        raise UnknownResultError(f"{directory}/{RESULT}: {type(err).__name__} {err}") from err


def _parse_result(fields: dict[str, Any]) -> Result:
    """Raises ValueError, LookupError or TypeError: it is something else."""
    if fields["status"] not in get_args(ResultStatus):
        raise ValueError(f"status {fields['status']!r} is not known")
    result = Result(**{name: fields[name] for name in Result._fields})
    return result._replace(killed=[Killed(each[0], each[1], each[2]) for each in result.killed])


def _encode(result: Result) -> bytes:
    return json.dumps(result._asdict()).encode()


def write_all(descriptor: int, content: bytes, place: int) -> None:
    """Write the whole of it: the kernel may take a part, as where the disk becomes full. Raises OSError."""
    rest = memoryview(content)
    while rest:
        written = os.pwrite(descriptor, rest, place)
        if not written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rest, place = rest[written:], place + written


def sync_directory(path: str | os.PathLike[str]) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
