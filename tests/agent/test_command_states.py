"""The table of a command's life: whole, and without a way to run a command twice."""

import random
from itertools import product

import pytest

from fleetwire_agent.command_states import TABLE, Action, Event, State, move

MAY_HAVE_RUN = (State.STARTING, State.RUNNING, State.FINISHED, State.ENDED)

EXPECTED = """
           unknown          accepted           starting          running          finished         ended
offered    accepted:accept  accepted:report    starting:report   running:report   finished:report  ended:answer
cancelled  ended:remember   finished:withdraw  starting:stop     running:stop     -                ended:answer
expired    -                finished:withdraw  -                 -                -                -
started    -                starting:start     -                 -                -                -
ran        -                -                  running:record    -                -                -
never_ran  -                accepted:record    accepted:requeue  -                -                -
finished   -                finished:record    finished:record   finished:record  -                -
stored     -                -                  -                 -                ended:record     -
forgotten  -                finished:withdraw  starting:mute     running:mute     ended:record     -
"""
"""Where each event leads from each state, and what is done; `-` is no change, and nothing to be done."""


def test_every_cell() -> None:
    states, *rows = [line.split() for line in EXPECTED.strip().splitlines()]
    cells = {(state, event): cell for event, *row in rows for state, cell in zip(states, row, strict=True)}
    assert set(cells) == set(TABLE) == set(product(State, Event))
    for (state, event), cell in cells.items():
        to, action = (state, "none") if cell == "-" else cell.split(":")
        assert move(State(state), Event(event)) == (to, action), (state, event)


@pytest.mark.parametrize(("state", "event"), list(product(MAY_HAVE_RUN, Event)))
def test_what_may_have_been_started_is_not_accepted_or_started_again(state: State, event: Event) -> None:
    to, action = move(state, event)
    assert action not in (Action.ACCEPT, Action.START)
    if (state, event) == (State.STARTING, Event.NEVER_RAN):
        assert (to, action) == (State.ACCEPTED, Action.REQUEUE)
    else:
        assert action is not Action.REQUEUE
        assert to in MAY_HAVE_RUN


@pytest.mark.parametrize(("state", "event"), list(product(State, Event)))
def test_only_an_accepted_command_is_started(state: State, event: Event) -> None:
    assert (move(state, event).action is Action.START) == ((state, event) == (State.ACCEPTED, Event.STARTED))


@pytest.mark.parametrize("event", Event)
def test_what_has_ended_stays_ended(event: Event) -> None:
    assert move(State.ENDED, event).to is State.ENDED
    assert move(State.FINISHED, event).to in (State.FINISHED, State.ENDED)


@pytest.mark.parametrize("seed", range(20))
def test_no_walk_through_the_table_runs_a_command_twice(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(500):
        state, starts = State.UNKNOWN, 0
        for _ in range(50):
            # What is proved never to have run did not run: that is the one way back, and its start does not count.
            event = chance.choice(list(Event))
            if state is State.STARTING and event is Event.NEVER_RAN:
                starts -= 1
            state, action = move(state, event)
            starts += action is Action.START
            assert 0 <= starts <= 1
