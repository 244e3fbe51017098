"""The kept output of one command as a file, whole or a range of it.

Addresses are those of the output as it was written: offsets of one stream, or positions of both. What was not kept
leaves gaps in them."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus

from aiohttp import web

from fleetwire_server.http.bodies import OutputQuery
from fleetwire_server.http.commands import require_command
from fleetwire_server.http.ranges import parse_range
from fleetwire_server.http.requests import parse_query
from fleetwire_server.keys import STORE
from fleetwire_server.model import Command, OutputPiece
from fleetwire_server.storage import commands
from fleetwire_server.storage.commands import KeptOutput, Stream
from fleetwire_server.storage.store import Connection
from fleetwire_shared.errors import NotFoundError, RangeError, UnavailableError

READ_BYTES = 256 * 1024

STALL_SECONDS = 60.0
"""How long a client may take none of the output it asked for."""

MAX_GAPS_NAMED = 16
"""Of two streams that were written by turns there may be thousands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """What of the output is sent, all from one state of the database."""

    command: Command
    stream: Stream | None
    size: int  # of all that was written, as far as it is known
    start: int
    end: int  # address after the last byte sent
    position: int  # of the first byte sent
    length: int | None  # bytes sent, None where that is not known
    is_range: bool
    gaps: tuple[tuple[int, int], ...] = ()
    gap_bytes: int = 0


async def fetch_output(request: web.Request) -> web.StreamResponse:
    """The output that is kept: both streams as they came, or one of them."""
    stream = parse_query(request, OutputQuery).stream
    command = await require_command(request)
    wanted = parse_range(request.headers.get("Range")) if request.method == "GET" else None  # RFC 9110, 14.2
    part = await request.app[STORE].read(
        partial(_choose, command=command, stream=stream, wanted=wanted, if_range=request.headers.get("If-Range"))
    )
    response = _response_of(part)
    await response.prepare(request)
    if request.method != "HEAD":
        await _send(request, response, part)
        await response.write_eof()
    return response


def _choose(
    connection: Connection,
    *,
    command: Command,
    stream: Stream | None,
    wanted: tuple[int, int | None] | None,
    if_range: str | None,
) -> _Part:
    """Return what is to be sent.

    Raises:
        NotFoundError: the command was deleted meanwhile. RangeError: nothing is kept where the range begins."""
    now = commands.get_command(connection, command.agent_id, command.id)
    if now is None:
        raise NotFoundError(f"this agent has no command {command.id}")
    if wanted is None or (if_range is not None and if_range != _etag(now, stream)):
        return _choose_all(connection, now, stream)
    kept = commands.describe_output(connection, now.id, stream)
    size = _size_of(now, stream, kept)
    start = max(size + wanted[0], 0) if wanted[0] < 0 else wanted[0]
    end = size if wanted[1] is None else min(start + wanted[1], size)
    if start >= size:
        raise RangeError(f"the range begins at byte {start}, and there are {size}", size_bytes=size)
    gap = _next_gap(connection, now, stream, kept, size, start)
    if gap is not None and gap[0] <= start:
        raise RangeError(_explain_gap(gap, size, start), size_bytes=size)
    if gap is not None:
        end = min(end, gap[0])
    return _Part(
        command=now,
        stream=stream,
        size=size,
        start=start,
        end=end,
        position=commands.find_position(connection, now.id, stream, start) if stream is not None else start,
        length=end - start,
        is_range=True,
    )


def _choose_all(connection: Connection, command: Command, stream: Stream | None) -> _Part:
    kept = commands.describe_output(connection, command.id, stream, max_gaps=MAX_GAPS_NAMED)
    size = _size_of(command, stream, kept)
    tail = ((kept.end, size),) if kept.end < size else ()
    return _Part(
        command=command,
        stream=stream,
        size=size,
        start=0,
        end=size,
        position=0,
        # Of a command that runs on, the middle may be dropped while this is read.
        length=kept.size_bytes if command.status.is_end else None,
        is_range=False,
        gaps=(kept.gaps + tail)[:MAX_GAPS_NAMED],
        gap_bytes=size - kept.size_bytes,
    )


def _size_of(command: Command, stream: Stream | None, kept: KeptOutput) -> int:
    totals = {"stdout": command.stdout_bytes, "stderr": command.stderr_bytes}
    told = totals[stream] if stream is not None else sum(totals.values())
    return max(told, kept.end)


def _next_gap(
    connection: Connection, command: Command, stream: Stream | None, kept: KeptOutput, size: int, start: int
) -> tuple[int, int] | None:
    """Return the first gap that reaches beyond `start`, the one at the end included."""
    gaps = commands.describe_output(connection, command.id, stream, gaps_from=start).gaps
    if gaps:
        return gaps[0]
    return (kept.end, size) if kept.end < size else None


def _explain_gap(gap: tuple[int, int], size: int, start: int) -> str:
    before = f"what is kept ends before byte {gap[0]}" if gap[0] > 0 else "nothing is kept from the beginning on"
    after = f"and begins again at byte {gap[1]}" if gap[1] < size else "and nothing is kept after that"
    return f"byte {start} was not kept: {before}, {after}"


def _etag(command: Command, stream: Stream | None) -> str | None:
    """Return a strong validator of a command that is over; a late truth about it makes another one."""
    if not command.status.is_end:
        return None
    return f'"{command.id}-{stream or "both"}-{command.output_end}-{command.status}-{command.finished_at}"'


def _response_of(part: _Part) -> web.StreamResponse:
    response = web.StreamResponse(
        status=HTTPStatus.PARTIAL_CONTENT if part.is_range else HTTPStatus.OK,
        headers={
            "Content-Type": "application/octet-stream",
            "Content-Disposition": f'attachment; filename="{part.command.id}-{part.stream or "output"}"',
            "Accept-Ranges": "bytes",
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
        },
    )
    etag = _etag(part.command, part.stream)
    if etag is not None:
        response.headers["ETag"] = etag
    if part.length is not None:
        response.content_length = part.length
    if part.is_range:
        size = part.size if part.command.status.is_end else "*"
        response.headers["Content-Range"] = f"bytes {part.start}-{part.end - 1}/{size}"
    if part.gap_bytes:
        response.headers["Output-Gaps"] = ", ".join(f"{first}-{after - 1}" for first, after in part.gaps)
        response.headers["Output-Gap-Bytes"] = str(part.gap_bytes)
    return response


async def _send(request: web.Request, response: web.StreamResponse, part: _Part) -> None:
    """Send the part, a few pieces at a time.

    Raises:
        UnavailableError: less is there than was promised, as retention or the quota took it meanwhile."""
    position, sent = part.position, 0
    while part.length is None or sent < part.length:
        pieces = await request.app[STORE].read(
            partial(
                commands.list_output,
                command_id=part.command.id,
                from_position=position,
                limit_bytes=READ_BYTES,
                stream=part.stream,
            )
        )
        if not pieces:
            break
        position = pieces[-1].end
        chunk = b"".join(piece.data for piece in pieces)
        if part.is_range and not _is_seamless(part, sent, pieces):
            break
        if part.length is not None:
            chunk = chunk[: part.length - sent]
        sent += len(chunk)
        async with asyncio.timeout(STALL_SECONDS):
            await response.write(chunk)
        if part.length is None and _end_of(pieces[-1], part.stream) >= part.end:
            break  # what has come since is left: else of a command that writes faster than this there was no end
    if part.length is not None and sent < part.length:
        raise UnavailableError("the output was removed while it was sent")


def _end_of(piece: OutputPiece, stream: Stream | None) -> int:
    return piece.end if stream is None else piece.offset + len(piece.data)


def _is_seamless(part: _Part, sent: int, pieces: Sequence[OutputPiece]) -> bool:
    """Whether these pieces go on where the last ones ended, up to the end of the range."""
    at = part.start + sent
    for piece in pieces:
        if at >= part.end:
            break
        if (piece.position if part.stream is None else piece.offset) != at:
            return False
        at += len(piece.data)
    return True
