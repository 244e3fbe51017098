"""Commands and their output. Pieces of output are addressed by position, see fleetwire_shared.messages."""

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any, Literal, TypeAlias, TypedDict, Unpack

from sqlalchemy import Column, ColumnElement, Connection, Row, bindparam, delete, func, insert, select, tuple_, update
from sqlalchemy.sql.dml import ReturningUpdate

from fleetwire_server.model import Command, CommandStatus, KilledProcess, OutputPiece
from fleetwire_shared.errors import NotFoundError

from .tables import AGENTS, COMMAND_OUTPUT, COMMANDS, IS_ENDED_ALONE

Stream: TypeAlias = Literal["stdout", "stderr"]

PIECES_IN_TRANSACTION = 64
"""Pieces of output removed at once, 4 MiB: a command may have 512 of them, and what deletes many megabytes in one
transaction lets all others wait for seconds."""

# Statements of every command's way are built once: building one takes longer than running it.
_AGENT_EXISTS = select(AGENTS.c.id).where(AGENTS.c.id == bindparam("agent_id"))
_ADD = insert(COMMANDS)
_GET = select(COMMANDS).where(COMMANDS.c.id == bindparam("id"), COMMANDS.c.agent_id == bindparam("agent_id"))
_GET_OUTPUT_END = select(
    COMMANDS.c.output_end, COMMANDS.c.truncated, COMMANDS.c.stdout_bytes, COMMANDS.c.stderr_bytes
).where(COMMANDS.c.id == bindparam("id"))
_GET_STREAM_END = (
    select(COMMAND_OUTPUT.c.offset + func.length(COMMAND_OUTPUT.c.data))
    .where(COMMAND_OUTPUT.c.command_id == bindparam("id"), COMMAND_OUTPUT.c.stream == bindparam("stream"))
    .order_by(COMMAND_OUTPUT.c.offset.desc())
    .limit(1)
)
_ADD_OUTPUT = insert(COMMAND_OUTPUT)
_GET_LAST_PIECE = (
    select(COMMAND_OUTPUT)
    .where(COMMAND_OUTPUT.c.command_id == bindparam("id"))
    .order_by(COMMAND_OUTPUT.c.position.desc())
    .limit(1)
)
_SET_OUTPUT = (
    update(COMMAND_OUTPUT)
    .where(COMMAND_OUTPUT.c.command_id == bindparam("of_id"), COMMAND_OUTPUT.c.position == bindparam("at"))
    .values(data=bindparam("data"))
)
_SET_OUTPUT_END = update(COMMANDS).where(COMMANDS.c.id == bindparam("of_id"))

_IS_QUEUED = (COMMANDS.c.agent_id == bindparam("agent_id")) & (COMMANDS.c.status == CommandStatus.QUEUED.value)
_ANY_QUEUED = select(COMMANDS.c.sequence).where(_IS_QUEUED).limit(1)
_LIST_QUEUED = (
    select(COMMANDS)
    # As a sum: SQLite would take the index on (status, expires_at), and read and sort what waits for all agents.
    .where(_IS_QUEUED, COMMANDS.c.expires_at + 0.0 > bindparam("now"))
    .order_by(COMMANDS.c.sequence)
    .limit(bindparam("limit"))
)

_OPEN = tuple(status.value for status in CommandStatus if not status.is_end)
_GIVEN = tuple(status for status in _OPEN if status != CommandStatus.QUEUED.value)
_STREAMS: tuple[Stream, ...] = ("stdout", "stderr")


class CommandChanges(TypedDict, total=False):
    """What `update_command` can set; names and meanings are those of Command."""

    status: CommandStatus
    timeout_seconds: float
    expires_at: float
    offered_to: str | None
    accepted_at: float | None
    started_at: float | None
    finished_at: float | None
    cancel_requested_at: float | None
    exit_code: int | None
    stdout_bytes: int
    stderr_bytes: int
    truncated: bool
    late: bool
    killed: tuple[KilledProcess, ...]
    killed_count: int
    error: str | None


def add_command(connection: Connection, command: Command) -> None:
    """Raises NotFoundError when the agent was deleted meanwhile."""
    if connection.execute(_AGENT_EXISTS, {"agent_id": command.agent_id}).one_or_none() is None:
        raise NotFoundError(f"there is no agent {command.agent_id}")
    connection.execute(
        _ADD,
        {
            "id": command.id,
            "agent_id": command.agent_id,
            "type": command.type,
            "params": json.dumps(dict(command.params), separators=(",", ":")),
            "status": command.status.value,
            "timeout_seconds": command.timeout_seconds,
            "created_at": command.created_at,
            "created_by": command.created_by,
            "expires_at": command.expires_at,
            "offered_to": command.offered_to,
            "accepted_at": command.accepted_at,
            "started_at": command.started_at,
            "finished_at": command.finished_at,
            "cancel_requested_at": command.cancel_requested_at,
            "exit_code": command.exit_code,
            "stdout_bytes": command.stdout_bytes,
            "stderr_bytes": command.stderr_bytes,
            "output_end": command.output_end,
            "truncated": command.truncated,
            "late": command.late,
            "is_orphan": command.is_orphan,
            "killed": _killed_text(command.killed),
            "killed_count": command.killed_count,
            "error": command.error,
        },
    )


def get_command(connection: Connection, agent_id: str, command_id: str) -> Command | None:
    """Return the command if it is of that agent."""
    row = connection.execute(_GET, {"id": command_id, "agent_id": agent_id}).one_or_none()
    return None if row is None else _command_from(row)


def is_known(connection: Connection, command_id: str) -> bool:
    """Return whether there is such a command, of whichever agent."""
    return connection.execute(select(COMMANDS.c.sequence).where(COMMANDS.c.id == command_id)).first() is not None


def list_commands(connection: Connection, agent_id: str, limit: int = 100) -> list[Command]:
    """Return the agent's last commands, newest first."""
    newest = select(COMMANDS).where(COMMANDS.c.agent_id == agent_id).order_by(COMMANDS.c.sequence.desc()).limit(limit)
    return [_command_from(row) for row in connection.execute(newest)]


def count_open(connection: Connection, agent_id: str) -> int:
    """Return how many of the agent's commands are not over."""
    wanted = select(func.count()).where(COMMANDS.c.agent_id == agent_id, COMMANDS.c.status.in_(_OPEN))
    return connection.execute(wanted).scalar_one()


def list_ended_alone(connection: Connection, agent_id: str, limit: int) -> list[Command]:
    """Return some of the agent's commands that were ended here without its word, see Command.is_ended_alone."""
    wanted = select(COMMANDS).where(COMMANDS.c.agent_id == agent_id, IS_ENDED_ALONE).limit(limit)
    return [_command_from(row) for row in connection.execute(wanted)]


def list_queued(connection: Connection, agent_id: str, now: float, limit: int) -> list[Command]:
    """Return the agent's first queued commands that have time left, oldest first."""
    wanted = {"agent_id": agent_id, "now": now, "limit": limit}
    return [_command_from(row) for row in connection.execute(_LIST_QUEUED, wanted)]


def has_queued(connection: Connection, agent_id: str) -> bool:
    return connection.execute(_ANY_QUEUED, {"agent_id": agent_id}).first() is not None


def list_unsettled(connection: Connection, agent_id: str, instance_id: str, limit: int = 256) -> list[Command]:
    """Return the agent's commands that were offered and are not over, then some of those that were lost before this
    instance of the agent, which had been offered them, could answer."""
    lost = (
        select(COMMANDS)
        .where(
            COMMANDS.c.agent_id == agent_id,
            COMMANDS.c.status == CommandStatus.LOST.value,
            COMMANDS.c.offered_to == instance_id,
            COMMANDS.c.accepted_at.is_(None),
        )
        .limit(limit)
    )
    given = select(COMMANDS).where(COMMANDS.c.agent_id == agent_id, COMMANDS.c.status.in_(_GIVEN))
    # Sorted here: asked for an order, SQLite would walk the agent's whole history in that order.
    rows = sorted(connection.execute(given), key=lambda row: row.sequence)
    return [_command_from(row) for row in (*rows, *connection.execute(lost))]


def count_orphans(connection: Connection, agent_id: str) -> int:
    wanted = select(func.count()).where(COMMANDS.c.agent_id == agent_id, COMMANDS.c.is_orphan)
    return connection.execute(wanted).scalar_one()


def list_expirable(connection: Connection, now: float, limit: int = 1000) -> list[Command]:
    """Return queued commands whose time to be offered is over, oldest first."""
    overdue = select(COMMANDS).where(COMMANDS.c.status == CommandStatus.QUEUED.value, COMMANDS.c.expires_at <= now)
    return [_command_from(row) for row in connection.execute(overdue.order_by(COMMANDS.c.sequence).limit(limit))]


def update_command(
    connection: Connection,
    command_id: str,
    expected_statuses: Collection[CommandStatus],
    **changes: Unpack[CommandChanges],
) -> Command | None:
    """Change a command that is in one of the expected statuses and return it as it is now; else return None."""
    statement = _update_of(tuple(changes))
    expected = [status.value for status in expected_statuses]
    values: dict[str, Any] = {"of_id": command_id, "expected": expected, **changes}
    if "killed" in changes:
        values["killed"] = _killed_text(changes["killed"])
    row = connection.execute(statement, values).one_or_none()
    return None if row is None else _command_from(row)


@cache
def _update_of(names: tuple[str, ...]) -> ReturningUpdate[Any]:
    """Return the statement that sets these columns of a command."""
    return (
        update(COMMANDS)
        .where(COMMANDS.c.id == bindparam("of_id"), COMMANDS.c.status.in_(bindparam("expected", expanding=True)))
        .values({name: bindparam(name) for name in names})
        .returning(*COMMANDS.c)
    )


def add_output(connection: Connection, command_id: str, pieces: Iterable[OutputPiece], keep_bytes: int) -> int | None:
    """Store pieces that come in order of position, and return the position after the last stored byte.

    What is stored already is passed over, so pieces may be sent again. A gap before a piece marks the command as
    truncated. Of each stream the first `keep_bytes / 2` bytes are kept, and of the rest the last `keep_bytes / 2`,
    both to whole pieces; what falls out marks the command as truncated too.

    Pieces that follow each other are joined up to a 4096th of the quota (4 KiB): a command that prints a few bytes at a
    time does not fill the database with rows.

    Returns:
        None when there is no such command (any more)."""
    row = connection.execute(_GET_OUTPUT_END, {"id": command_id}).one_or_none()
    if row is None:
        return None
    fresh, has_gap = _fresh_pieces(pieces, row.output_end)
    if not fresh:
        return int(row.output_end)
    joined_bytes = keep_bytes // 4096
    stored = _get_last_piece(connection, command_id, row.output_end) if len(fresh[0].data) < joined_bytes else None
    joined = _join(fresh if stored is None else [stored, *fresh], joined_bytes)
    if stored is not None and joined[0] != stored:
        connection.execute(_SET_OUTPUT, {"of_id": command_id, "at": stored.position, "data": joined[0].data})
    added = joined if stored is None else joined[1:]
    if added:
        connection.execute(
            _ADD_OUTPUT,
            [
                {
                    "command_id": command_id,
                    "position": p.position,
                    "stream": p.stream,
                    "offset": p.offset,
                    "data": p.data,
                }
                for p in added
            ],
        )
    deleted = sum(_delete_middle(connection, command_id, stream, fresh, keep_bytes // 2) for stream in _STREAMS)
    connection.execute(
        _SET_OUTPUT_END,
        {
            "of_id": command_id,
            "output_end": fresh[-1].end,
            "truncated": bool(row.truncated or has_gap or deleted),
            # Until the agent reports the end, with its exact totals, these are what is known.
            "stdout_bytes": max(row.stdout_bytes, _end_of("stdout", fresh)),
            "stderr_bytes": max(row.stderr_bytes, _end_of("stderr", fresh)),
        },
    )
    return fresh[-1].end


def get_output_ends(connection: Connection, command_id: str, stream: Stream) -> tuple[int, int] | None:
    """Return the position after the last stored byte, and the offset after the last one of that stream.

    Returns:
        None when there is no such command."""
    row = connection.execute(_GET_OUTPUT_END, {"id": command_id}).one_or_none()
    if row is None:
        return None
    last = connection.execute(_GET_STREAM_END, {"id": command_id, "stream": stream}).scalar_one_or_none()
    return int(row.output_end), int(last or 0)


def list_output(
    connection: Connection,
    command_id: str,
    from_position: int,
    limit_bytes: int,
    stream: Stream | None = None,
) -> list[OutputPiece]:
    """Return stored pieces from a position on, in order; of one stream only, when it is given.

    A piece that the position lies in is cut. At least one piece is returned if any is there, and then as many as
    begin within `limit_bytes` positions of it. Empty: nothing is stored from there on."""
    of_command = COMMAND_OUTPUT.c.command_id == command_id
    if stream is not None:
        of_command &= COMMAND_OUTPUT.c.stream == stream
    position = COMMAND_OUTPUT.c.position
    start = connection.execute(
        select(position)
        .where(
            of_command,
            # A piece that began earlier may reach to here; the one before it cannot.
            position >= func.coalesce(_last_position_before(command_id, from_position + 1), 0),
            position + func.length(COMMAND_OUTPUT.c.data) > from_position,
        )
        .order_by(position)
        .limit(1)
    ).scalar_one_or_none()
    if start is None:
        return []
    wanted = select(COMMAND_OUTPUT).where(
        of_command, position >= start, position < max(start, from_position) + limit_bytes
    )
    return [_piece_from(row, from_position) for row in connection.execute(wanted.order_by(position))]


@dataclass(frozen=True, slots=True)
class KeptOutput:
    """What is stored of a command's output, in offsets of one stream or, of both, in positions."""

    size_bytes: int  # kept, all of it
    end: int  # after the last byte that is kept
    gaps: tuple[tuple[int, int], ...]  # first bytes missing, first bytes there again; those from an address on


def describe_output(
    connection: Connection,
    command_id: str,
    stream: Stream | None = None,
    *,
    gaps_from: int = 0,
    max_gaps: int = 1,
) -> KeptOutput:
    """Return what is kept, and the first `max_gaps` gaps that reach beyond the address `gaps_from`."""
    at, of_command = _address_of(command_id, stream)
    end = at + func.length(COMMAND_OUTPUT.c.data)
    size_bytes, last = connection.execute(
        select(func.coalesce(func.sum(func.length(COMMAND_OUTPUT.c.data)), 0), func.coalesce(func.max(end), 0)).where(
            of_command
        )
    ).one()
    pieces = select(at.label("at"), func.lag(end, 1, 0).over(order_by=at).label("before")).where(of_command).subquery()
    gaps = (
        select(pieces.c.before, pieces.c.at)
        .where(pieces.c.at > pieces.c.before, pieces.c.at > gaps_from)
        .order_by(pieces.c.at)
        .limit(max_gaps)
    )
    return KeptOutput(size_bytes, last, tuple((row.before, row.at) for row in connection.execute(gaps)))


def find_position(connection: Connection, command_id: str, stream: Stream, offset: int) -> int:
    """Return the position of a stored byte of one stream."""
    of_stream = (COMMAND_OUTPUT.c.command_id == command_id) & (COMMAND_OUTPUT.c.stream == stream)
    found = connection.execute(
        select(COMMAND_OUTPUT.c.position - COMMAND_OUTPUT.c.offset)
        .where(of_stream, COMMAND_OUTPUT.c.offset <= offset)
        .order_by(COMMAND_OUTPUT.c.offset.desc())
        .limit(1)
    ).scalar_one_or_none()
    return offset if found is None else int(found) + offset


def tail_output(connection: Connection, command_id: str, limit_bytes: int) -> list[OutputPiece]:
    """Return what is stored of the last `limit_bytes` bytes of a command's output, in order."""
    return tail_outputs(connection, [command_id], limit_bytes).get(command_id, [])


def tail_outputs(connection: Connection, command_ids: Sequence[str], limit_bytes: int) -> dict[str, list[OutputPiece]]:
    """Return `tail_output` of several commands; those without output are missing."""
    start = COMMANDS.c.output_end - limit_bytes
    earlier = COMMAND_OUTPUT.alias("earlier")
    first = (
        select(func.max(earlier.c.position))
        .where(earlier.c.command_id == COMMANDS.c.id, earlier.c.position <= start)
        .correlate(COMMANDS)
        .scalar_subquery()
    )
    rows = connection.execute(
        select(COMMAND_OUTPUT, COMMANDS.c.output_end)
        .join_from(COMMANDS, COMMAND_OUTPUT)
        .where(COMMANDS.c.id.in_(command_ids), COMMAND_OUTPUT.c.position >= func.coalesce(first, 0))
        .order_by(COMMAND_OUTPUT.c.command_id, COMMAND_OUTPUT.c.position)
    )
    tails: dict[str, list[OutputPiece]] = {}
    for row in rows:
        piece = _piece_from(row, row.output_end - limit_bytes)
        if piece.data:
            tails.setdefault(row.command_id, []).append(piece)
    return tails


def delete_old_commands(connection: Connection, before: float, limit: int) -> int:
    """Remove up to `limit` of the oldest commands that are over and were made before then, or some of their output.

    Each call is a short transaction: call again while it returns `limit`."""
    oldest = (
        select(COMMANDS.c.sequence)
        .where(COMMANDS.c.created_at < before, COMMANDS.c.status.not_in(_OPEN))
        .order_by(COMMANDS.c.created_at)
        .limit(limit)
    )
    if _delete_pieces(connection, COMMANDS.c.sequence.in_(oldest)):
        return limit
    return connection.execute(delete(COMMANDS).where(COMMANDS.c.sequence.in_(oldest))).rowcount


def delete_output_of_agent(connection: Connection, agent_id: str) -> bool:
    """Remove some of the output of an agent's commands; return whether there may be more of it."""
    return _delete_pieces(connection, COMMANDS.c.agent_id == agent_id)


def _delete_pieces(connection: Connection, of_commands: ColumnElement[bool]) -> bool:
    """Remove up to PIECES_IN_TRANSACTION pieces of these commands; return whether there may be more."""
    key = (COMMAND_OUTPUT.c.command_id, COMMAND_OUTPUT.c.position)
    some = select(*key).join_from(COMMANDS, COMMAND_OUTPUT).where(of_commands).limit(PIECES_IN_TRANSACTION)
    return connection.execute(delete(COMMAND_OUTPUT).where(tuple_(*key).in_(some))).rowcount >= PIECES_IN_TRANSACTION


def _fresh_pieces(pieces: Iterable[OutputPiece], output_end: int) -> tuple[list[OutputPiece], bool]:
    """Return what of the pieces lies beyond `output_end`, and whether something before one of them is missing."""
    fresh: list[OutputPiece] = []
    has_gap = False
    for piece in pieces:
        if piece.end <= output_end:
            continue
        has_gap = has_gap or piece.position > output_end
        fresh.append(_cut_before(piece, output_end))
        output_end = piece.end
    return fresh, has_gap


def _get_last_piece(connection: Connection, command_id: str, output_end: int) -> OutputPiece | None:
    """Return the piece that ends where the stored output does, None where there is none."""
    row = connection.execute(_GET_LAST_PIECE, {"id": command_id}).one_or_none()
    last = None if row is None else _piece_from(row, 0)
    return last if last is not None and last.end == output_end else None


def _join(pieces: Iterable[OutputPiece], limit_bytes: int) -> list[OutputPiece]:
    """Return the pieces with those joined that follow each other in one stream and are short enough together."""
    joined: list[OutputPiece] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        is_next = last is not None and (last.stream, last.end) == (piece.stream, piece.position)
        if last is not None and is_next and len(last.data) + len(piece.data) <= limit_bytes:
            joined[-1] = replace(last, data=last.data + piece.data)
        else:
            joined.append(piece)
    return joined


def _cut_before(piece: OutputPiece, position: int) -> OutputPiece:
    """Return the piece without its bytes before `position`."""
    cut = max(position - piece.position, 0)
    if cut == 0:
        return piece
    return OutputPiece(
        position=piece.position + cut, stream=piece.stream, offset=piece.offset + cut, data=piece.data[cut:]
    )


def _end_of(stream: Stream, pieces: Iterable[OutputPiece]) -> int:
    """Return the offset after the last of that stream's pieces, 0 when there are none."""
    return max((piece.offset + len(piece.data) for piece in pieces if piece.stream == stream), default=0)


def _delete_middle(
    connection: Connection,
    command_id: str,
    stream: Stream,
    fresh: Iterable[OutputPiece],
    half_bytes: int,
) -> int:
    """Remove pieces that the stream's head and tail no longer cover; return how many.

    The index on (command, stream, offset) leads to exactly these: what was before them is gone already."""
    tail_offset = _end_of(stream, fresh) - half_bytes
    if tail_offset <= half_bytes:
        return 0
    offset = COMMAND_OUTPUT.c.offset
    return connection.execute(
        delete(COMMAND_OUTPUT).where(
            COMMAND_OUTPUT.c.command_id == command_id,
            COMMAND_OUTPUT.c.stream == stream,
            offset >= half_bytes,
            offset < tail_offset,
            offset + func.length(COMMAND_OUTPUT.c.data) <= tail_offset,
        )
    ).rowcount


def _address_of(command_id: str, stream: Stream | None) -> tuple[Column[int], ColumnElement[bool]]:
    """Return what addresses a piece, and which pieces are meant."""
    of_command = COMMAND_OUTPUT.c.command_id == command_id
    if stream is None:
        return COMMAND_OUTPUT.c.position, of_command
    return COMMAND_OUTPUT.c.offset, of_command & (COMMAND_OUTPUT.c.stream == stream)


def _last_position_before(command_id: str, position: int) -> Any:
    return (
        select(func.max(COMMAND_OUTPUT.c.position))
        .where(COMMAND_OUTPUT.c.command_id == command_id, COMMAND_OUTPUT.c.position < position)
        .scalar_subquery()
    )


def _piece_from(row: Row[Any], from_position: int) -> OutputPiece:
    stored = OutputPiece(position=row.position, stream=row.stream, offset=row.offset, data=row.data)
    return _cut_before(stored, from_position)


def _float_or_none(value: float | None) -> float | None:
    return None if value is None else float(value)


def _killed_text(killed: Sequence[KilledProcess]) -> str | None:
    return json.dumps([asdict(each) for each in killed], separators=(",", ":")) if killed else None


def _killed_from(text: str | None) -> tuple[KilledProcess, ...]:
    return tuple(KilledProcess(**each) for each in json.loads(text)) if text else ()


def _command_from(row: Row[Any]) -> Command:
    # SQLite's RETURNING gives whole floats as integers: hence float().
    return Command(
        id=row.id,
        agent_id=row.agent_id,
        type=row.type,
        params=json.loads(row.params),
        status=CommandStatus(row.status),
        timeout_seconds=float(row.timeout_seconds),
        created_at=float(row.created_at),
        created_by=row.created_by,
        expires_at=float(row.expires_at),
        offered_to=row.offered_to,
        accepted_at=_float_or_none(row.accepted_at),
        started_at=_float_or_none(row.started_at),
        finished_at=_float_or_none(row.finished_at),
        cancel_requested_at=_float_or_none(row.cancel_requested_at),
        exit_code=row.exit_code,
        stdout_bytes=row.stdout_bytes,
        stderr_bytes=row.stderr_bytes,
        output_end=row.output_end,
        truncated=row.truncated,
        late=row.late,
        is_orphan=row.is_orphan,
        killed=_killed_from(row.killed),
        killed_count=row.killed_count,
        error=row.error,
    )
