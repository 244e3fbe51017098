"""The life of a command on its host, as one table. Pure: who changes a command asks here what is to be done.

Each cell says into which state an event leads, and the one thing to do for it. There is no cell from which a command
that may have been started is started again."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Final, NamedTuple


class State(StrEnum):
    UNKNOWN = "unknown"  # never heard of, or so long ago that it is forgotten
    ACCEPTED = "accepted"  # held, on disk; waits for its turn
    STARTING = "starting"  # on disk that it may have been started from here on
    RUNNING = "running"  # its runner has said so
    FINISHED = "finished"  # how it ended is known, and the server may not know yet
    ENDED = "ended"  # the server knows, or never asked: only the id and the end are remembered


class Event(StrEnum):
    OFFERED = "offered"  # by the server, perhaps not for the first time
    CANCELLED = "cancelled"  # by the server: it was cancelled, or is out of time there
    EXPIRED = "expired"  # its time to wait here is over
    STARTED = "started"  # its turn has come
    RAN = "ran"  # the runner says that the shell runs
    NEVER_RAN = "never_ran"  # it is proved that the runner did not start the shell and never will
    FINISHED = "finished"  # the runner has left a result, or it is known that there will be none
    STORED = "stored"  # the server has stored its end
    FORGOTTEN = "forgotten"  # the server never wants to hear of it again


class Action(StrEnum):
    NONE = "none"
    ACCEPT = "accept"  # write it down, say so, let it wait for its turn
    REPORT = "report"  # say again what is known of it
    ANSWER = "answer"  # say again how it ended
    REMEMBER = "remember"  # write down that an id that was never seen must not run
    WITHDRAW = "withdraw"  # it ends without having run
    START = "start"  # write that down, then let its runner go
    STOP = "stop"  # have the runner end all of it
    REQUEUE = "requeue"  # let it wait for its turn again
    RECORD = "record"  # write down what happened
    MUTE = "mute"  # say no more of it; a command that still runs goes on


WRITING: Final = frozenset(
    {Action.ACCEPT, Action.REMEMBER, Action.WITHDRAW, Action.START, Action.REQUEUE, Action.RECORD}
)
"""What changes the ledger."""


class Move(NamedTuple):
    to: State
    action: Action


_S, _E, _A = State, Event, Action
_STAY: Final = {state: Move(state, Action.NONE) for state in State}

TABLE: Final[Mapping[tuple[State, Event], Move]] = {
    **{(state, event): _STAY[state] for state in State for event in Event},
    (_S.UNKNOWN, _E.OFFERED): Move(_S.ACCEPTED, _A.ACCEPT),
    (_S.UNKNOWN, _E.CANCELLED): Move(_S.ENDED, _A.REMEMBER),
    (_S.ACCEPTED, _E.OFFERED): Move(_S.ACCEPTED, _A.REPORT),
    (_S.ACCEPTED, _E.CANCELLED): Move(_S.FINISHED, _A.WITHDRAW),
    (_S.ACCEPTED, _E.EXPIRED): Move(_S.FINISHED, _A.WITHDRAW),
    (_S.ACCEPTED, _E.STARTED): Move(_S.STARTING, _A.START),
    (_S.ACCEPTED, _E.NEVER_RAN): Move(_S.ACCEPTED, _A.RECORD),  # its runner waited for the word of an earlier agent
    (_S.ACCEPTED, _E.FINISHED): Move(_S.FINISHED, _A.RECORD),  # it could not be prepared
    (_S.ACCEPTED, _E.FORGOTTEN): Move(_S.FINISHED, _A.WITHDRAW),
    (_S.STARTING, _E.OFFERED): Move(_S.STARTING, _A.REPORT),
    (_S.STARTING, _E.CANCELLED): Move(_S.STARTING, _A.STOP),
    (_S.STARTING, _E.RAN): Move(_S.RUNNING, _A.RECORD),
    (_S.STARTING, _E.NEVER_RAN): Move(_S.ACCEPTED, _A.REQUEUE),
    (_S.STARTING, _E.FINISHED): Move(_S.FINISHED, _A.RECORD),
    (_S.STARTING, _E.FORGOTTEN): Move(_S.STARTING, _A.MUTE),
    (_S.RUNNING, _E.OFFERED): Move(_S.RUNNING, _A.REPORT),
    (_S.RUNNING, _E.CANCELLED): Move(_S.RUNNING, _A.STOP),
    (_S.RUNNING, _E.FINISHED): Move(_S.FINISHED, _A.RECORD),
    (_S.RUNNING, _E.FORGOTTEN): Move(_S.RUNNING, _A.MUTE),
    (_S.FINISHED, _E.OFFERED): Move(_S.FINISHED, _A.REPORT),
    (_S.FINISHED, _E.STORED): Move(_S.ENDED, _A.RECORD),
    (_S.FINISHED, _E.FORGOTTEN): Move(_S.ENDED, _A.RECORD),
    (_S.ENDED, _E.OFFERED): Move(_S.ENDED, _A.ANSWER),
    (_S.ENDED, _E.CANCELLED): Move(_S.ENDED, _A.ANSWER),
}


def move(state: State, event: Event) -> Move:
    """Return what an event makes of a command in that state, and what is to be done."""
    return TABLE[state, event]
