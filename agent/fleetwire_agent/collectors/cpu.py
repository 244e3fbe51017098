"""CPU time shares, in total and for each logical CPU."""

from collections.abc import Sequence
from typing import Any

import psutil

from fleetwire_agent.deltas import shares

_STATES = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")
"""guest and guest_nice are left out: the kernel counts them within user and nice already."""

_IDLE, _IOWAIT, _STEAL = (_STATES.index(state) for state in ("idle", "iowait", "steal"))
_Times = tuple[float, ...]


class CpuCollector:
    def __init__(self) -> None:
        self._before = _read_cpu_times()

    def collect(self) -> dict[str, Any]:
        """Percentages since the last call; None while no CPU tick (10 ms) has passed or the set of CPUs changed.

        Source: psutil.cpu_times(percpu=True), which is /proc/stat."""
        before, self._before = self._before, _read_cpu_times()
        after = self._before
        if len(before) != len(after):  # a CPU came or went: readings of different CPUs would be compared
            return {}
        total = shares(_sum(before), _sum(after))
        if total is None:
            return {}
        return {
            "cpu_percent": _busy_percent(total),
            "cpu_per_core_percent": tuple(
                _busy_percent(shares(old, new)) for old, new in zip(before, after, strict=True)
            ),
            "cpu_steal_percent": round(100 * total[_STEAL], 1),
            "cpu_iowait_percent": round(100 * total[_IOWAIT], 1),
        }


def _read_cpu_times() -> list[_Times]:
    return [tuple(getattr(times, state, 0.0) for state in _STATES) for times in psutil.cpu_times(percpu=True)]


def _sum(cores: Sequence[_Times]) -> _Times:
    return tuple(map(sum, zip(*cores, strict=True)))


def _busy_percent(share: _Times | None) -> float:
    if share is None:  # this CPU slept through the whole interval: with NO_HZ even its idle time may stand still
        return 0.0
    return round(100 * max(0.0, 1 - share[_IDLE] - share[_IOWAIT]), 1)
