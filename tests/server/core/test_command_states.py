"""The table of a command's life: every status with every event."""

from itertools import product
from typing import get_args, get_type_hints

import pytest

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
    is_late,
    is_proved,
    next_status,
)
from fleetwire_server.model import CommandStatus
from fleetwire_shared.messages import CommandFinished, CommandRejected, LedgerEntry

E, S = CommandEvent, CommandStatus
CELLS = list(product(S, E))

EXPECTED = """
                   queued       offered      accepted     running      interrupted  lost
offered            offered      -            -            -            -            -
unsent             -            queued       -            -            -            -
cancel_asked       cancelled    offered      accepted     running      -            -
time_over          expired      -            -            -            -            -
accepted           accepted     accepted     -            -            accepted     accepted
started            running      running      running      -            running      running
succeeded          succeeded    succeeded    succeeded    succeeded    succeeded    succeeded
failed             failed       failed       failed       failed       failed       failed
timed_out          timed_out    timed_out    timed_out    timed_out    timed_out    timed_out
cancelled          cancelled    cancelled    cancelled    cancelled    cancelled    cancelled
interrupted        interrupted  interrupted  interrupted  interrupted  -            interrupted
refused            rejected     rejected     rejected     -            rejected     rejected
refused_full       -            queued       rejected     -            rejected     rejected
refused_cancelled  cancelled    cancelled    cancelled    -            cancelled    cancelled
refused_expired    expired      expired      expired      -            expired      expired
held_accepted      accepted     accepted     -            -            accepted     accepted
held_running       running      running      running      -            running      running
never_received     -            queued       -            -            -            queued
gone               -            lost         lost         lost         -            -
"""
"""What each event makes of each status; `-` is no change, as with all events of the statuses that are not here."""


def expected(status: CommandStatus, event: CommandEvent) -> CommandStatus | None:
    statuses, *rows = [line.split() for line in EXPECTED.strip().splitlines()]
    cells = {name: dict(zip(statuses, row, strict=True)) for name, *row in rows}
    cell = cells[event].get(status, "-")
    return None if cell == "-" else S(cell)


@pytest.mark.parametrize(("status", "event"), CELLS)
def test_every_cell(status: CommandStatus, event: CommandEvent) -> None:
    assert next_status(status, event) == expected(status, event)


def test_the_table_is_whole() -> None:
    assert set(TRANSITIONS) == set(S) == OPEN | TERMINAL
    assert not OPEN & TERMINAL
    assert {status for status in S if status.is_end} == TERMINAL
    reachable = {status for moves in TRANSITIONS.values() for status in moves.values()}
    assert reachable == set(S)


@pytest.mark.parametrize(("status", "event"), CELLS)
def test_invariants(status: CommandStatus, event: CommandEvent) -> None:
    after = next_status(status, event)
    if status in TERMINAL - UNPROVEN:
        assert after is None  # a proved end never changes
    if status in (S.ACCEPTED, S.RUNNING):
        assert after not in (S.QUEUED, S.OFFERED)  # what an agent took is never given again
    if status is S.RUNNING:
        assert after is not S.ACCEPTED
    if status.is_end and after is not None:
        assert is_late(status)  # only an unproven end is refined, and then late
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
    assert is_proved(status) == (status in TERMINAL - UNPROVEN)
    assert is_late(status) == (status in UNPROVEN) == (status.is_end and not is_proved(status))


def test_every_word_of_the_wire_is_an_event() -> None:
    assert set(REFUSALS) == set(get_args(get_type_hints(CommandRejected)["reason"]))
    assert {event.value for event in RESULTS} == set(get_args(get_type_hints(CommandFinished)["status"]))
    assert set(ADOPTED_AS) == set(get_args(get_type_hints(LedgerEntry)["state"]))
    assert set(ADOPTED_AS.values()) <= OPEN
    assert all(next_status(ADOPTED_AS["finished"], event) for event in ENDS)
