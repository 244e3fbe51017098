"""The life of a command as a table: what each event makes of each status. Pure; whoever moves a command asks here."""

from collections.abc import Mapping, Set
from enum import StrEnum
from typing import Literal

from fleetwire_server.model import Command, CommandStatus

_S = CommandStatus

OPEN: Set[CommandStatus] = frozenset(status for status in _S if not status.is_end)
TERMINAL: Set[CommandStatus] = frozenset(_S) - OPEN

UNPROVEN: Set[CommandStatus] = frozenset({_S.LOST, _S.INTERRUPTED})
"""Ends that a later report from the agent may still refine, whoever told them."""


class CommandEvent(StrEnum):
    """What can happen to a command."""

    # What this server does.
    OFFERED = "offered"  # the agent's session is sent it
    UNSENT = "unsent"  # the session was gone before the offer could be sent
    CANCEL_ASKED = "cancel_asked"
    TIME_OVER = "time_over"
    # What the agent reports.
    ACCEPTED = "accepted"
    STARTED = "started"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"
    REFUSED = "refused"  # not run and never will be: policy, unsupported, invalid
    REFUSED_FULL = "refused_full"  # not run, to be offered again later
    REFUSED_CANCELLED = "refused_cancelled"  # not run and never will be: the cancel came first
    REFUSED_EXPIRED = "refused_expired"
    # What a connect shows.
    HELD_ACCEPTED = "held_accepted"
    HELD_RUNNING = "held_running"
    NEVER_RECEIVED = "never_received"  # the very agent that was offered it has never heard of it
    GONE = "gone"  # the agent does not hold it, and remembers no end of it


_E = CommandEvent

REFUSALS: Mapping[str, CommandEvent] = {
    "cancelled": _E.REFUSED_CANCELLED,
    "expired": _E.REFUSED_EXPIRED,
    "full": _E.REFUSED_FULL,
    "policy": _E.REFUSED,
    "unsupported": _E.REFUSED,
    "invalid": _E.REFUSED,
}
"""By the reason of a `command_rejected`."""

ENDS: dict[CommandEvent, CommandStatus] = {
    _E.SUCCEEDED: _S.SUCCEEDED,
    _E.FAILED: _S.FAILED,
    _E.TIMED_OUT: _S.TIMED_OUT,
    _E.CANCELLED: _S.CANCELLED,
    _E.INTERRUPTED: _S.INTERRUPTED,
    _E.REFUSED: _S.REJECTED,
    _E.REFUSED_FULL: _S.REJECTED,
    _E.REFUSED_CANCELLED: _S.CANCELLED,
    _E.REFUSED_EXPIRED: _S.EXPIRED,
}
"""How a command ended, by the agent's last word on it."""

RESULTS: Set[CommandEvent] = frozenset({_E.SUCCEEDED, _E.FAILED, _E.TIMED_OUT, _E.CANCELLED, _E.INTERRUPTED})
"""The command was in the agent's hands up to its end."""

HOLDING: Set[CommandEvent] = RESULTS | {_E.ACCEPTED, _E.STARTED, _E.HELD_ACCEPTED, _E.HELD_RUNNING}
"""These prove that the agent has received the command."""

_BEGUN: dict[CommandEvent, CommandStatus] = {
    _E.ACCEPTED: _S.ACCEPTED,
    _E.HELD_ACCEPTED: _S.ACCEPTED,
    _E.STARTED: _S.RUNNING,
    _E.HELD_RUNNING: _S.RUNNING,
}


def _without(dropped: CommandEvent, moves: Mapping[CommandEvent, CommandStatus]) -> dict[CommandEvent, CommandStatus]:
    return {event: status for event, status in moves.items() if event is not dropped}


TRANSITIONS: Mapping[CommandStatus, Mapping[CommandEvent, CommandStatus]] = {
    # What an agent reports of a queued command is believed: this server may have been restored from a backup that is
    # older than the agent's memory. A command that is refused as full is queued already.
    _S.QUEUED: _without(_E.REFUSED_FULL, _BEGUN | ENDS)
    | {_E.OFFERED: _S.OFFERED, _E.CANCEL_ASKED: _S.CANCELLED, _E.TIME_OVER: _S.EXPIRED},
    # Not ended by time: only the agent can tell whether an offer without an answer was received.
    _S.OFFERED: _BEGUN
    | ENDS
    | {
        _E.REFUSED_FULL: _S.QUEUED,
        _E.UNSENT: _S.QUEUED,
        _E.NEVER_RECEIVED: _S.QUEUED,
        _E.CANCEL_ASKED: _S.OFFERED,
        _E.GONE: _S.LOST,
    },
    _S.ACCEPTED: ENDS
    | {
        _E.STARTED: _S.RUNNING,
        _E.HELD_RUNNING: _S.RUNNING,
        _E.CANCEL_ASKED: _S.ACCEPTED,
        _E.GONE: _S.LOST,
    },
    # A connect may show that it runs before the agent has told since when.
    _S.RUNNING: {event: ENDS[event] for event in RESULTS}
    | {_E.STARTED: _S.RUNNING, _E.CANCEL_ASKED: _S.RUNNING, _E.GONE: _S.LOST},
    # Only of a command that was never accepted does anyone say NEVER_RECEIVED: see core/resync.py.
    _S.LOST: _BEGUN | ENDS | {_E.NEVER_RECEIVED: _S.QUEUED},
    _S.INTERRUPTED: _BEGUN | _without(_E.INTERRUPTED, ENDS),
    **{proved: {} for proved in TERMINAL - UNPROVEN},
}
"""An event that a status does not have changes nothing."""

REFINED: Mapping[CommandEvent, CommandStatus] = _BEGUN | {event: ENDS[event] for event in RESULTS}
"""What the agent's word makes of a command that this server ended alone. That it has not run is no news."""

ADOPTED_AS: Mapping[Literal["accepted", "running", "finished"], CommandStatus] = {
    "accepted": _S.ACCEPTED,
    "running": _S.RUNNING,
    "finished": _S.ACCEPTED,  # its end, of whatever kind, is about to be told
}
"""The first status of a command that an agent holds and this server does not know, by what the agent's ledger says."""


def next_status(command: Command, event: CommandEvent) -> CommandStatus | None:
    """Return the status that the event leads to, which may be the same; None when it changes nothing."""
    moves = REFINED if command.is_ended_alone else TRANSITIONS[command.status]
    return moves.get(event)


def is_proved(command: Command) -> bool:
    """Whether it is over, and nothing changes that any more."""
    return command.status in TERMINAL - UNPROVEN and not command.is_ended_alone
