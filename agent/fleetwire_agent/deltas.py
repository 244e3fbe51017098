"""Counters to rates and shares. Pure: no clock, no psutil."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """One reading of counters that only grow, such as bytes of each interface."""

    read_at: float  # seconds, monotonic clock
    totals: Mapping[str, tuple[int, ...]]  # the same fields in the same order for each name


def rates(before: Counters, after: Counters) -> dict[str, tuple[float, ...]]:
    """Return the change between two readings, for each second.

    Returns:
        One entry for each name in both readings, fields in the order of the readings, never negative.
    Raises:
        ValueError: `after` is not later than `before`.
    A counter that went back (reset of a driver, 32-bit wrap) counts as 0."""
    elapsed_seconds = after.read_at - before.read_at
    if elapsed_seconds <= 0:
        raise ValueError(f"the second reading must be later than the first, got {elapsed_seconds} seconds")
    return {
        name: tuple(max(0.0, new - old) / elapsed_seconds for old, new in zip(before.totals[name], totals, strict=True))
        for name, totals in after.totals.items()
        if name in before.totals
    }


def shares(before: Sequence[float], after: Sequence[float]) -> tuple[float, ...] | None:
    """Return what part (0 to 1) of the whole change each counter had; None when none of them changed.

    For times that a CPU spent in each state. A counter that went back (the kernel's iowait does) counts as 0."""
    changes = [max(0.0, new - old) for old, new in zip(before, after, strict=True)]
    whole = sum(changes)
    if whole <= 0:
        return None
    return tuple(change / whole for change in changes)
