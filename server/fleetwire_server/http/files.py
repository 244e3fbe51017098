"""Files to and from a host, streamed: neither side ever holds more than a few frames of one."""

import asyncio
import hashlib
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from http import HTTPStatus
from pathlib import PurePosixPath
from typing import IO
from urllib.parse import quote

from aiohttp import BodyPartReader, MultipartReader, web

from fleetwire_server.core.channels import ChannelSocket, receive_message
from fleetwire_server.http.agents import require_agent
from fleetwire_server.http.bodies import FileQuery, UploadAnswer
from fleetwire_server.http.ranges import parse_range
from fleetwire_server.http.requests import answer, parse_query, read_header
from fleetwire_server.keys import CHANNELS, CONFIG, SESSIONS
from fleetwire_shared.errors import (
    FleetwireError,
    InvalidError,
    PeerFailedError,
    PeerTimeoutError,
    UnavailableError,
    error_from_code,
)
from fleetwire_shared.limits import CHUNK_BYTES, MAX_PATH_BYTES
from fleetwire_shared.messages import End, FileOpened, FileReady, FileWritten, ReadFile, WriteFile

STALL_SECONDS = 60.0
"""How long a transfer may stand still, on either side, before it is given up."""

SYNC_SECONDS = 300.0
"""How long the host may take to bring a complete upload to its disk."""

SPOOL_MEMORY_BYTES = 256 * 1024


# ---------------------------------------------------------------- download


async def download_file(request: web.Request) -> web.StreamResponse:
    path = parse_query(request, FileQuery).path
    check_path(path, "path")
    agent = await require_agent(request)
    session = request.app[SESSIONS].require(agent.id)
    offset, length = parse_range(request.headers.get("Range")) or (0, None)
    ask = partial(_read_file, path, offset, length, read_header(request, "If-Range"))
    async with request.app[CHANNELS].open(session, ask) as socket:
        opened = await receive_message(socket, FileOpened, timeout_seconds=STALL_SECONDS)
        if request.headers.get("If-None-Match") == f'"{opened.etag}"':
            return web.Response(status=HTTPStatus.NOT_MODIFIED, headers={"ETag": f'"{opened.etag}"'})
        response = _download_response(path, opened)
        await response.prepare(request)
        if request.method == "HEAD":
            return response
        await _relay(socket, response)  # what it raises breaks the connection: the status line is long gone
        await response.write_eof()
        return response


def _read_file(path: str, offset: int, length: int | None, if_range: str | None, channel_id: str) -> ReadFile:
    etag = if_range.strip('"') if if_range is not None else None
    return ReadFile(channel_id=channel_id, path=path, offset=offset, length=length, if_etag=etag)


def _download_response(path: str, opened: FileOpened) -> web.StreamResponse:
    is_part = opened.size_bytes is not None and opened.length is not None and opened.length < opened.size_bytes
    name = PurePosixPath(path).name
    response = web.StreamResponse(
        status=HTTPStatus.PARTIAL_CONTENT if is_part else HTTPStatus.OK,
        headers={
            "Content-Type": "application/octet-stream",
            "Content-Disposition": f"attachment; filename*=UTF-8''{quote(name, safe='')}",
            "ETag": f'"{opened.etag}"',
            "Accept-Ranges": "bytes" if opened.size_bytes is not None else "none",
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
        },
    )
    response.last_modified = opened.modified_at
    if opened.length is not None:
        response.content_length = opened.length
    if is_part:
        last = opened.offset + (opened.length or 0) - 1
        response.headers["Content-Range"] = f"bytes {opened.offset}-{last}/{opened.size_bytes}"
    return response


async def _relay(socket: ChannelSocket, response: web.StreamResponse) -> None:
    """Send what the channel brings, one frame late: the last one goes out only when the digest was right.

    Raises:
        FleetwireError: the agent failed, or the bytes are not those it read."""
    digest, total, held = hashlib.sha256(), 0, b""
    while True:
        try:
            async with asyncio.timeout(STALL_SECONDS):
                frame = await socket.receive()
        except TimeoutError as err:
            raise PeerTimeoutError(f"the agent sent nothing for {STALL_SECONDS:.0f} s") from err
        if isinstance(frame, bytes):
            digest.update(frame)
            total += len(frame)
            await _write(response, held)
            held = frame
        elif isinstance(frame, End):
            if frame.code is not None:
                raise error_from_code(frame.code, frame.message or "the agent gave no reason")
            if (frame.bytes, frame.sha256) != (total, digest.hexdigest()):
                raise PeerFailedError("what arrived is not what the agent read")
            await _write(response, held)
            return
        else:
            raise PeerFailedError(f"the agent sent {frame.type} in the middle of a file")


async def _write(response: web.StreamResponse, chunk: bytes) -> None:
    if chunk:
        async with asyncio.timeout(STALL_SECONDS):
            await response.write(chunk)


# ---------------------------------------------------------------- upload


async def upload_file(request: web.Request) -> web.Response:
    """Store a file on the host. With `dest` before `file` it is passed on as it comes, else spooled first."""
    if request.content_type != "multipart/form-data":
        raise InvalidError("send multipart/form-data with the fields file and dest")
    agent = await require_agent(request)
    request.app[SESSIONS].require(agent.id)
    form = _Form()
    async with AsyncExitStack() as stack:
        try:
            parts = await request.multipart()
            while (part := await _next_part(parts)) is not None:
                await _take_part(request, agent.id, part, form, stack)
        except (ValueError, AssertionError) as err:
            raise InvalidError(f"the body is not well-formed multipart/form-data: {err}") from err
        if form.dest is None:
            raise InvalidError("dest: is missing; it is the destination path on the agent")
        if form.sent is None:
            if form.spool is None:
                raise InvalidError("file: is missing; it is the file to upload")
            form.sent = await _open_sending(request, agent.id, form.dest, stack)
            await form.sent.send(_spooled_chunks(form.spool))
        return answer(await form.sent.finish())  # only now: what is wrong with the form must leave nothing on the host


async def _next_part(parts: MultipartReader) -> MultipartReader | BodyPartReader | None:
    async with _no_stall():
        return await parts.next()


@asynccontextmanager
async def _no_stall() -> AsyncIterator[None]:
    """Bound a wait for the client's next bytes. Raises PeerTimeoutError."""
    try:
        async with asyncio.timeout(STALL_SECONDS):
            yield
    except TimeoutError as err:
        raise PeerTimeoutError(f"the upload stood still for {STALL_SECONDS:.0f} s") from err


class _Form:
    """The fields read so far."""

    def __init__(self) -> None:
        self.dest: str | None = None
        self.spool: IO[bytes] | None = None
        self.sent: _Sending | None = None

    @property
    def has_file(self) -> bool:
        return self.spool is not None or self.sent is not None


async def _take_part(
    request: web.Request, agent_id: str, part: MultipartReader | BodyPartReader, form: _Form, stack: AsyncExitStack
) -> None:
    if not isinstance(part, BodyPartReader):
        raise InvalidError("nested multipart bodies are not understood; send the fields file and dest")
    if part.name == "dest":
        if form.dest is not None:
            raise InvalidError("dest: is given more than once; give it once")
        form.dest = await _read_dest(part)
        check_path(form.dest, "dest")
    elif part.name == "file":
        if form.has_file:
            raise InvalidError("file: is given more than once; upload one file a request")
        if form.dest is not None:
            form.sent = await _open_sending(request, agent_id, form.dest, stack)
            await form.sent.send(_part_chunks(part))
        else:
            form.spool = stack.enter_context(
                tempfile.SpooledTemporaryFile(max_size=SPOOL_MEMORY_BYTES, dir=str(request.app[CONFIG].spool_dir))  # noqa: SIM115 - the stack closes it
            )
            await _spool(part, form.spool)
    else:
        async with _no_stall():
            await part.release()


async def _spool(part: BodyPartReader, spool: IO[bytes]) -> None:
    async for chunk in _part_chunks(part):
        try:
            await asyncio.to_thread(spool.write, chunk)
        except OSError as err:
            raise UnavailableError(
                f"the server's disk cannot take the upload: {err.strerror}; send dest before file, which needs no copy"
            ) from err


async def _read_dest(part: BodyPartReader) -> str:
    text = b""
    async for chunk in _part_chunks(part):
        text += chunk
        if len(text) > MAX_PATH_BYTES:
            raise InvalidError(f"dest: is longer than {MAX_PATH_BYTES} bytes")
    try:
        return text.decode()
    except UnicodeDecodeError as err:
        raise InvalidError("dest: must be UTF-8") from err


async def _part_chunks(part: BodyPartReader) -> AsyncIterator[bytes]:
    while True:
        async with _no_stall():
            chunk = await part.read_chunk(CHUNK_BYTES)
        if not chunk:
            return
        yield bytes(chunk)


async def _spooled_chunks(spool: IO[bytes]) -> AsyncIterator[bytes]:
    spool.seek(0)
    while chunk := await asyncio.to_thread(spool.read, CHUNK_BYTES):
        yield chunk


class _Sending:
    """A file on its way to a host, where nothing of it is seen before `finish`."""

    def __init__(self, socket: ChannelSocket) -> None:
        self._socket = socket
        self._digest = hashlib.sha256()
        self._sent_bytes = 0

    async def send(self, chunks: AsyncIterator[bytes]) -> None:
        async for chunk in chunks:
            self._digest.update(chunk)
            self._sent_bytes += len(chunk)
            await _send_chunk(self._socket, chunk)

    async def finish(self) -> UploadAnswer:
        await self._socket.send(End(bytes=self._sent_bytes, sha256=self._digest.hexdigest()))
        written = await receive_message(self._socket, FileWritten, timeout_seconds=SYNC_SECONDS)
        return UploadAnswer(path=written.path, bytes=written.bytes, sha256=written.sha256)


async def _open_sending(request: web.Request, agent_id: str, dest: str, stack: AsyncExitStack) -> _Sending:
    """Open `dest` on the host. It is given up when the stack closes, unless it was finished.

    Raises:
        FleetwireError: the agent refuses or is away."""
    session = request.app[SESSIONS].require(agent_id)
    channel = request.app[CHANNELS].open(session, lambda channel_id: WriteFile(channel_id=channel_id, path=dest))
    socket = await stack.enter_async_context(channel)
    await receive_message(socket, FileReady, timeout_seconds=STALL_SECONDS)
    return _Sending(socket)


async def _send_chunk(socket: ChannelSocket, chunk: bytes) -> None:
    """Send one chunk.

    Raises:
        FleetwireError: the agent gave up; its reason, where it gave one."""
    try:
        async with asyncio.timeout(STALL_SECONDS):
            await socket.send_bytes(chunk)
    except TimeoutError as err:
        raise PeerTimeoutError(f"the agent took nothing for {STALL_SECONDS:.0f} s") from err
    except FleetwireError:
        await receive_message(socket, FileWritten, timeout_seconds=1.0)  # raises what the agent said before it closed
        raise


def check_path(path: str, name: str) -> None:
    """Raise InvalidError unless `path` is one that a host could have."""
    if not path.startswith("/"):
        raise InvalidError(f"{name}: must be an absolute path such as /var/log/syslog, got {path[:100]!r}")
    if "\x00" in path:
        raise InvalidError(f"{name}: must not hold NUL characters")
    try:
        encoded = path.encode()
    except UnicodeEncodeError as err:
        raise InvalidError(f"{name}: must be UTF-8") from err
    if len(encoded) >= MAX_PATH_BYTES:
        raise InvalidError(f"{name}: must be shorter than {MAX_PATH_BYTES} bytes")
