"""Counters to rates."""

import pytest

from fleetwire_agent.deltas import Counters, rates, shares


def make_counters(read_at: float, **totals: tuple[int, ...]) -> Counters:
    return Counters(read_at=read_at, totals=totals)


def test_rates_are_changes_for_each_second() -> None:
    before, after = make_counters(10.0, eth0=(100, 1)), make_counters(15.0, eth0=(600, 2))
    assert rates(before, after) == {"eth0": (100.0, 0.2)}


def test_a_counter_that_went_back_counts_as_zero() -> None:
    assert rates(make_counters(0.0, eth0=(2**32 - 1, 5)), make_counters(1.0, eth0=(10, 6))) == {"eth0": (0.0, 1.0)}


def test_only_names_in_both_readings_have_rates() -> None:
    before, after = make_counters(0.0, gone=(1,), kept=(1,)), make_counters(1.0, kept=(2,), new=(1_000_000,))
    assert rates(before, after) == {"kept": (1.0,)}


@pytest.mark.parametrize("later", [10.0, 9.0])
def test_readings_without_time_between_them_are_refused(later: float) -> None:
    with pytest.raises(ValueError, match="must be later"):
        rates(make_counters(10.0), make_counters(later))


def test_shares_are_parts_of_the_whole_change() -> None:
    assert shares((0.0, 10.0), (1.0, 13.0)) == (0.25, 0.75)


def test_shares_of_no_change_are_unknown() -> None:
    assert shares((1.0, 2.0), (1.0, 2.0)) is None


def test_a_time_that_went_back_takes_no_share() -> None:
    assert shares((5.0, 0.0), (4.0, 2.0)) == (0.0, 1.0)
