"""What an agent reports of its commands, stored in order and in one transaction."""

import base64
import binascii
import logging
from collections.abc import Sequence, Set
from typing import TypeAlias

from fleetwire_server.core.command_changes import LOST_ERROR, move, requeue
from fleetwire_server.core.command_states import ENDS, REFUSALS, CommandEvent, is_proved, next_status
from fleetwire_server.model import Command, CommandStatus, KilledProcess, OutputPiece
from fleetwire_server.storage import commands
from fleetwire_server.storage.commands import CommandChanges
from fleetwire_server.storage.store import Connection
from fleetwire_shared.errors import ProtocolError
from fleetwire_shared.limits import CHUNK_BYTES, COMMAND_PREVIEW_CHARACTERS, MAX_KILLED_LISTED, OUTPUT_KEEP_BYTES
from fleetwire_shared.messages import CommandAccepted, CommandFinished, CommandOutput, CommandRejected, CommandStarted

logger = logging.getLogger(__name__)

CommandReport: TypeAlias = CommandAccepted | CommandRejected | CommandStarted | CommandOutput | CommandFinished

MAX_POSITION = 1 << 62
"""Of output; what is added to it still is an integer of 64 bits."""


def apply_reports(
    connection: Connection,
    *,
    agent_id: str,
    instance_id: str,
    asked_ids: Set[str],
    reports: Sequence[CommandReport],
    now: float,
) -> list[Command | int | None]:
    changes: list[Command | int | None] = []
    for report in reports:
        if isinstance(report, CommandRejected) and report.command_id in asked_ids:
            changes.append(_apply_ignorance(connection, agent_id, instance_id, report, now))
        else:
            changes.append(_apply(connection, agent_id, report, now))
    return changes


def _apply_ignorance(
    connection: Connection, agent_id: str, instance_id: str, report: CommandRejected, now: float
) -> Command | None:
    """Store the answer to a question that is no result: the agent has not run the command, or does not remember it."""
    stored = commands.get_command(connection, agent_id, report.command_id)
    if stored is None:
        return None
    if stored.is_ended_alone:
        # As proved as it will ever be: it is not asked about again.
        commands.update_command(connection, stored.id, {stored.status}, offered_to=instance_id)
        return None
    is_remembered = report.reason in ("cancelled", "expired") and stored.status is CommandStatus.ACCEPTED
    if is_remembered:
        return _apply_rejection(connection, stored, report, now)
    return move(connection, stored, CommandEvent.GONE, now, LOST_ERROR)


def _apply(connection: Connection, agent_id: str, report: CommandReport, now: float) -> Command | int | None:
    """Store one report.

    Returns:
        The command as it is now; for output the position up to which it is stored; None where nothing changed."""
    if isinstance(report, CommandOutput):
        return _apply_output(connection, _piece(report), report.command_id)
    stored = commands.get_command(connection, agent_id, report.command_id)
    if stored is None:
        return None
    match report:
        case CommandAccepted():
            return move(connection, stored, CommandEvent.ACCEPTED, now)
        case CommandStarted():
            if stored.status is CommandStatus.RUNNING and stored.started_at is not None:
                return None
            started_at = _moment_of(stored, report.seconds_ago, now)
            return move(connection, stored, CommandEvent.STARTED, now, changes={"started_at": started_at})
        case CommandRejected():
            return _apply_rejection(connection, stored, report, now)
        case CommandFinished():
            return _apply_result(connection, stored, report, now)


def _apply_output(connection: Connection, piece: OutputPiece, command_id: str) -> int | None:
    known = commands.get_output_ends(connection, command_id, piece.stream)
    if known is None:
        return None
    output_end, stream_end = known
    if piece.end > output_end and piece.offset + max(output_end - piece.position, 0) < stream_end:
        # The quota is counted in offsets: output that all had the same would never fall out of it.
        raise ProtocolError(
            "command_output.offset", f"is {piece.offset} at position {piece.position}, after byte {stream_end} was sent"
        )
    return commands.add_output(connection, command_id, [piece], OUTPUT_KEEP_BYTES)


def _apply_rejection(connection: Connection, stored: Command, report: CommandRejected, now: float) -> Command | None:
    event = REFUSALS[report.reason]
    if event is CommandEvent.REFUSED_FULL and stored.cancel_requested_at is not None:
        event = CommandEvent.REFUSED_CANCELLED
    _compare(stored, event)
    if next_status(stored, event) is CommandStatus.QUEUED:
        return requeue(connection, stored, event, now)
    return move(connection, stored, event, now, report.message)


def _apply_result(connection: Connection, stored: Command, report: CommandFinished, now: float) -> Command | None:
    event = CommandEvent(report.status)
    _compare(stored, event)
    finished_at = _moment_of(stored, report.seconds_ago, now)
    started_at = _moment_of(stored, now - finished_at + report.duration_seconds, now)
    # Where the command left no result, the agent tells what it finds on the host's disk: less than came here before.
    stdout_bytes = max(stored.stdout_bytes, report.stdout_bytes)
    stderr_bytes = max(stored.stderr_bytes, report.stderr_bytes)
    changes: CommandChanges = {
        "exit_code": report.exit_code,
        "stdout_bytes": stdout_bytes,
        "stderr_bytes": stderr_bytes,
        "truncated": stored.truncated or stored.output_end < stdout_bytes + stderr_bytes,
        "started_at": min(stored.started_at or finished_at, started_at),
        "finished_at": finished_at,
        "killed": tuple(
            KilledProcess(pid=each.pid, command=each.command[:COMMAND_PREVIEW_CHARACTERS], signal=each.signal)
            for each in report.killed[:MAX_KILLED_LISTED]
        ),
        "killed_count": max(report.killed_count, len(report.killed)),
    }
    return move(connection, stored, event, now, report.error, changes)


def _moment_of(stored: Command, seconds_ago: float, now: float) -> float:
    """Return when it happened by this server's clock: not after now, nor before the command was there. An orphan was
    there before it was known here."""
    earliest = 0.0 if stored.is_orphan else stored.created_at
    return min(now, max(earliest, now - seconds_ago))


def _compare(stored: Command, event: CommandEvent) -> None:
    """Say so where the agent tells another end than the one that is proved. The stored one stays."""
    if is_proved(stored) and ENDS[event] is not stored.status:
        logger.warning("command %s: %s here, and %s at the agent", stored.id, stored.status, ENDS[event])


def _piece(report: CommandOutput) -> OutputPiece:
    try:
        data = base64.b64decode(report.base64, validate=True)
    except (binascii.Error, ValueError) as err:
        raise ProtocolError("command_output.base64", f"is not base64: {err}") from err
    if len(data) > CHUNK_BYTES:
        raise ProtocolError("command_output.base64", f"holds {len(data)} bytes, at most {CHUNK_BYTES} are allowed")
    if not 0 <= report.offset <= report.position <= MAX_POSITION:
        raise ProtocolError(
            "command_output.position", f"must be the offset or more, and at most {MAX_POSITION}, got {report.position}"
        )
    return OutputPiece(position=report.position, stream=report.stream, offset=report.offset, data=data)
