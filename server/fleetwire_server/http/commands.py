"""Commands of one agent: send, list, follow, fetch the output of, cancel."""

import hashlib
import json
from collections.abc import Sequence
from functools import partial

from aiohttp import web

from fleetwire_server.core.events import frame_json
from fleetwire_server.core.fanout import Keep, Subscription, command_topic
from fleetwire_server.core.tokens import new_command_id
from fleetwire_server.http.agents import require_agent
from fleetwire_server.http.bodies import CommandAnswer, CommandHeaders, CommandQueued, CommandRequest, KilledAnswer
from fleetwire_server.http.requests import USER, answer, parse_headers, read_json
from fleetwire_server.http.sse import EventStream, serve_events
from fleetwire_server.keys import DISPATCH, FANOUT, NOW, STORE
from fleetwire_server.model import Command, CommandKey, CommandStatus, OutputPiece
from fleetwire_server.storage import commands
from fleetwire_server.storage.store import Connection
from fleetwire_shared.errors import InvalidError, NotFoundError
from fleetwire_shared.limits import MAX_COMMAND_BYTES

PREVIEW_BYTES = 64 * 1024
READ_BYTES = 256 * 1024


async def send_command(request: web.Request) -> web.Response:
    key = parse_headers(request, CommandHeaders).key
    body = await read_json(request, CommandRequest)
    if len(body.params.command.encode()) >= MAX_COMMAND_BYTES:
        raise InvalidError(
            f"params.command: must be shorter than {MAX_COMMAND_BYTES} bytes; upload a script and run that"
        )
    agent = await require_agent(request)
    now = request.app[NOW]()
    username = request[USER].name
    command = await request.app[DISPATCH].submit(
        Command(
            id=new_command_id(),
            agent_id=agent.id,
            type=body.type,
            params={"command": body.params.command, "timeout": body.params.timeout},
            timeout_seconds=body.params.timeout,
            created_at=now,
            created_by=username,
            expires_at=now + body.expires_in,
        ),
        key=CommandKey(agent_id=agent.id, username=username, key=key, body_hash=_body_hash(body), created_at=now)
        if key is not None
        else None,
        is_connected_only=body.on_offline == "fail",
    )
    return answer(CommandQueued(command_id=command.id, status="queued"))


def _body_hash(body: CommandRequest) -> str:
    """Return the same text for all bodies that ask for the same."""
    asked = (body.type, body.params.command, float(body.params.timeout), body.expires_in, body.on_offline)
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


async def list_commands(request: web.Request) -> web.Response:
    """The last 100 commands, newest first."""
    agent = await require_agent(request)

    def read(connection: Connection) -> list[CommandAnswer]:
        listed = commands.list_commands(connection, agent.id)
        tails = commands.tail_outputs(connection, [command.id for command in listed], PREVIEW_BYTES)
        return [command_answer(command, tails.get(command.id, [])) for command in listed]

    return answer(await request.app[STORE].read(read))


async def show_command(request: web.Request) -> web.Response:
    command = await require_command(request)
    return answer(await _with_output(request, command))


async def cancel_command(request: web.Request) -> web.Response:
    command = await require_command(request)
    cancelled = await request.app[DISPATCH].cancel(command.agent_id, command.id)
    return answer(await _with_output(request, cancelled), status=200 if cancelled.status.is_end else 202)


async def stream_command(request: web.Request) -> web.StreamResponse:
    """Events `status` (the command, at once and at each change), `output` (`id:` is the position after it), `gap`, and
    `end` when the command is over and all its output was sent. `Last-Event-ID` resumes at any byte."""
    position = _resume_position(request)
    command = await require_command(request)

    async def feed(stream: EventStream) -> None:
        with request.app[FANOUT].subscribe(command_topic(command.id), Keep.NEWEST) as changes:
            await _follow(request, stream, command, position, changes)

    return await serve_events(request, feed, command.agent_id)


async def _follow(
    request: web.Request, stream: EventStream, command: Command, position: int, changes: Subscription
) -> None:
    shown: CommandStatus | None = None
    while True:
        news = await request.app[STORE].read(partial(_read_news, command=command, position=position))
        if news is None:
            return  # the agent was deleted, and the command with it
        command, pieces = news
        if shown is not command.status:
            shown = command.status
            await stream.send_frames(_status_frame(command))
        if pieces:
            await stream.send_frames(b"".join(_output_frames(pieces, position)))
            position = pieces[-1].end
            if position < command.output_end:
                continue
        if command.status.is_end:
            missing = command.stdout_bytes + command.stderr_bytes - position
            last = [_gap_frame(missing)] if missing > 0 else []
            await stream.send_frames(b"".join([*last, frame_json({"reason": command.status}, event="end")]))
            return
        await changes.get()


def _read_news(connection: Connection, *, command: Command, position: int) -> tuple[Command, list[OutputPiece]] | None:
    """Return the command as it is now and some of its output from `position` on, of one state of the database:
    where that says that the command is over, it has all its output."""
    now = commands.get_command(connection, command.agent_id, command.id)
    if now is None:
        return None
    if now.output_end <= position:
        return now, []
    return now, commands.list_output(connection, command.id, position, READ_BYTES)


def _output_frames(pieces: Sequence[OutputPiece], position: int) -> list[bytes]:
    frames = []
    for piece in pieces:
        if piece.position > position:
            frames.append(_gap_frame(piece.position - position))
        document = {"stream": piece.stream, "offset": piece.offset, "text": piece.data.decode("utf-8", "replace")}
        frames.append(frame_json(document, event="output", event_id=str(piece.end)))
        position = piece.end
    return frames


def _gap_frame(count: int) -> bytes:
    reason = (
        "not kept: beyond the quota, dropped while the server was away, or newer than a backup it was restored from"
    )
    return frame_json({"count": count, "reason": reason}, event="gap")


def _status_frame(command: Command) -> bytes:
    document = command_answer(command, [])
    fields = {
        name: getattr(document, name) for name in document.__struct_fields__ if name not in ("output", "truncated")
    }
    return frame_json(fields, event="status")


def _resume_position(request: web.Request) -> int:
    text = request.headers.get("Last-Event-ID", "") or "0"
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise InvalidError(f"Last-Event-ID must be the id of an output event (a number of bytes), got {text[:50]!r}")
    return int(text)


async def require_command(request: web.Request) -> Command:
    """Return the command the address names.

    Raises:
        NotFoundError: there is no such agent, or it has no such command."""
    agent_id, command_id = request.match_info["agent_id"], request.match_info["command_id"]
    found = await request.app[STORE].read(partial(commands.get_command, agent_id=agent_id, command_id=command_id))
    if found is None:
        await require_agent(request)
        raise NotFoundError(f"this agent has no command {command_id}")
    return found


async def _with_output(request: web.Request, command: Command) -> CommandAnswer:
    tail = partial(commands.tail_output, command_id=command.id, limit_bytes=PREVIEW_BYTES)
    return command_answer(command, await request.app[STORE].read(tail))


def command_answer(command: Command, tail: Sequence[OutputPiece]) -> CommandAnswer:
    return CommandAnswer(
        command_id=command.id,
        agent_id=command.agent_id,
        type=command.type,
        params=dict(command.params),
        status=command.status,
        exit_code=command.exit_code,
        output=b"".join(piece.data for piece in tail).decode("utf-8", "replace"),
        stdout_bytes=command.stdout_bytes,
        stderr_bytes=command.stderr_bytes,
        truncated=command.truncated or command.output_end > PREVIEW_BYTES,
        late=command.late,
        created_at=command.created_at,
        accepted_at=command.accepted_at,
        started_at=command.started_at,
        finished_at=command.finished_at,
        expires_at=command.expires_at,
        cancel_requested_at=command.cancel_requested_at,
        created_by=command.created_by,
        orphan=command.is_orphan,
        killed=[KilledAnswer(pid=each.pid, command=each.command, signal=each.signal) for each in command.killed],
        killed_count=command.killed_count,
        error=command.error,
    )
