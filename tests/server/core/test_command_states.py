"""The table of a command's life: every status with every event."""

from itertools import product
from typing import get_args, get_type_hints

import pytest
from tests.support.stored import make_command

from fleetwire_server.core.command_states import (
    ADOPTED_AS,
    ENDS,
    HOLDING,
    OPEN,
    REFUSALS,
    RESULTS,
    TERMINAL,
    TRANSITIONS,
    UNPROVEN,
    CommandEvent,
    is_proved,
    next_status,
)
from fleetwire_server.model import Command, CommandStatus
from fleetwire_shared.messages import CommandFinished, CommandRejected, LedgerEntry

E, S = CommandEvent, CommandStatus
CELLS = list(product(S, E))

EXPECTED = """
                   queued       offered      accepted     running      interrupted  lost        ended_alone
offered            offered      -            -            -            -            -           -
unsent             -            queued       -            -            -            -           -
cancel_asked       cancelled    offered      accepted     running      -            -           -
time_over          expired      -            -            -            -            -           -
accepted           accepted     accepted     -            -            accepted     accepted    accepted
started            running      running      running      running      running      running     running
succeeded          succeeded    succeeded    succeeded    succeeded    succeeded    succeeded   succeeded
failed             failed       failed       failed       failed       failed       failed      failed
timed_out          timed_out    timed_out    timed_out    timed_out    timed_out    timed_out   timed_out
cancelled          cancelled    cancelled    cancelled    cancelled    cancelled    cancelled   cancelled
interrupted        interrupted  interrupted  interrupted  interrupted  -            interrupted interrupted
refused            rejected     rejected     rejected     -            rejected     rejected    -
refused_full       -            queued       rejected     -            rejected     rejected    -
refused_cancelled  cancelled    cancelled    cancelled    -            cancelled    cancelled   -
refused_expired    expired      expired      expired      -            expired      expired     -
held_accepted      accepted     accepted     -            -            accepted     accepted    accepted
held_running       running      running      running      -            running      running     running
never_received     -            queued       -            -            -            queued      -
gone               -            lost         lost         lost         -            -           -
"""
"""What each event makes of each status; `-` is no change, as with all events of the statuses that are not here.
`ended_alone` is `cancelled` or `expired`, without a word of the agent."""


def make(status: CommandStatus) -> Command:
    return make_command(status=status, offered_to="an instance")


def expected(status: str, event: CommandEvent) -> CommandStatus | None:
    statuses, *rows = [line.split() for line in EXPECTED.strip().splitlines()]
    cells = {name: dict(zip(statuses, row, strict=True)) for name, *row in rows}
    cell = cells[event].get(status, "-")
    return None if cell == "-" else S(cell)


@pytest.mark.parametrize(("status", "event"), CELLS)
def test_every_cell(status: CommandStatus, event: CommandEvent) -> None:
    assert next_status(make(status), event) == expected(status, event)


@pytest.mark.parametrize("event", E)
@pytest.mark.parametrize("status", [S.CANCELLED, S.EXPIRED])
def test_what_this_server_ended_alone_is_open_to_the_agents_word(status: CommandStatus, event: CommandEvent) -> None:
    alone = make_command(status=status)
    assert alone.is_ended_alone
    assert not is_proved(alone)
    assert next_status(alone, event) == expected("ended_alone", event)
    for proved in (make(status), make_command(status=status, accepted_at=1.0)):
        assert is_proved(proved)
        assert next_status(proved, event) is None


def test_the_table_is_whole() -> None:
    assert set(TRANSITIONS) == set(S) == OPEN | TERMINAL
    assert not OPEN & TERMINAL
    assert {status for status in S if status.is_end} == TERMINAL
    reachable = {status for moves in TRANSITIONS.values() for status in moves.values()}
    assert reachable == set(S)


@pytest.mark.parametrize(("status", "event"), CELLS)
def test_invariants(status: CommandStatus, event: CommandEvent) -> None:
    after = next_status(make(status), event)
    if status in TERMINAL - UNPROVEN:
        assert after is None  # a proved end never changes
    if status in (S.ACCEPTED, S.RUNNING):
        assert after not in (S.QUEUED, S.OFFERED)  # what an agent took is never given again
    if status is S.RUNNING:
        assert after is not S.ACCEPTED
    if status.is_end and after is not None:
        assert status in UNPROVEN  # only an unproven end is refined
        assert after is not status
    if event is E.TIME_OVER and after is not None:
        assert status is S.QUEUED  # what was offered is never ended by time
    if event is E.OFFERED and after is not None:
        assert status is S.QUEUED
    if event in HOLDING and after is not None:
        assert after not in (S.QUEUED, S.OFFERED)
    if event in ENDS and after is not None:
        assert after is (S.QUEUED if (status, event) == (S.OFFERED, E.REFUSED_FULL) else ENDS[event])


@pytest.mark.parametrize("status", S)
def test_an_end_is_proved_or_may_be_refined(status: CommandStatus) -> None:
    assert is_proved(make(status)) == (status in TERMINAL - UNPROVEN)
    assert (status in UNPROVEN) == (status.is_end and not is_proved(make(status)))
    assert make_command(status=status).is_ended_alone == (status in (S.CANCELLED, S.EXPIRED))


def test_every_word_of_the_wire_is_an_event() -> None:
    assert set(REFUSALS) == set(get_args(get_type_hints(CommandRejected)["reason"]))
    assert {event.value for event in RESULTS} == set(get_args(get_type_hints(CommandFinished)["status"]))
    assert set(ADOPTED_AS) == set(get_args(get_type_hints(LedgerEntry)["state"]))
    assert set(ADOPTED_AS.values()) <= OPEN
    assert all(next_status(make(ADOPTED_AS["finished"]), event) for event in ENDS)
