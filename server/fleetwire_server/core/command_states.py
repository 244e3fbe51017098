"""The life of a command as a table. Pure: who moves a command asks here whether it may."""

from collections.abc import Mapping, Set

from fleetwire_server.model import CommandStatus

_S = CommandStatus

TERMINAL: Set[CommandStatus] = frozenset(
    {
        _S.SUCCEEDED,
        _S.FAILED,
        _S.TIMED_OUT,
        _S.CANCELLED,
        _S.EXPIRED,
        _S.REJECTED,
        _S.INTERRUPTED,
        _S.LOST,
    }
)

UNPROVEN: Set[CommandStatus] = frozenset({_S.LOST, _S.INTERRUPTED})
"""Ends that a later report from the agent may still refine."""

OPEN: Set[CommandStatus] = frozenset(_S) - TERMINAL

_RESULTS = frozenset({_S.SUCCEEDED, _S.FAILED, _S.TIMED_OUT, _S.CANCELLED, _S.INTERRUPTED})

TRANSITIONS: Mapping[CommandStatus, Set[CommandStatus]] = {
    _S.QUEUED: frozenset({_S.OFFERED, _S.CANCELLED, _S.EXPIRED}) | {_S.ACCEPTED, _S.RUNNING} | _RESULTS,
    _S.OFFERED: frozenset({_S.QUEUED, _S.ACCEPTED, _S.RUNNING, _S.REJECTED, _S.EXPIRED, _S.LOST}) | _RESULTS,
    _S.ACCEPTED: frozenset({_S.RUNNING, _S.REJECTED, _S.EXPIRED, _S.LOST}) | _RESULTS,
    _S.RUNNING: frozenset({_S.LOST}) | _RESULTS,
    _S.LOST: frozenset({_S.ACCEPTED, _S.RUNNING, _S.REJECTED}) | _RESULTS,
    _S.INTERRUPTED: frozenset({_S.RUNNING}) | (_RESULTS - {_S.INTERRUPTED}),
    **{
        proved: frozenset() for proved in (_S.SUCCEEDED, _S.FAILED, _S.TIMED_OUT, _S.CANCELLED, _S.EXPIRED, _S.REJECTED)
    },
}
"""From each status, those that may follow. QUEUED may become what an agent reports: the server may have been restored
from a backup that is older than the agent's memory."""


def sources_of(target: CommandStatus) -> frozenset[CommandStatus]:
    """Return the statuses that `target` may follow."""
    return frozenset(source for source, targets in TRANSITIONS.items() if target in targets)


def is_late(before: CommandStatus) -> bool:
    """Whether news for a command in this status refines an end that was already told."""
    return before in UNPROVEN
