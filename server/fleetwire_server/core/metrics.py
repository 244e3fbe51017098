"""Metrics: the newest report of each agent, the last hour of samples in memory, and one-minute rollups on their way to
the database."""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields

from fleetwire_server.model import METRIC_NAMES, MinuteRollup
from fleetwire_shared.limits import METRICS_SECONDS
from fleetwire_shared.messages import MetricsReport

MEMORY_SECONDS = 3600
_MAX_SAMPLES = int(MEMORY_SECONDS / METRICS_SECONDS)

MAX_KEPT_VALUE = 1e18
"""Beyond what any host has. An agent may claim more, and sums of that would not be numbers any more."""

Sample = tuple[float, tuple[float | None, ...]]
"""When it was received (Unix seconds, server's clock), and the values in the order of METRIC_NAMES."""


@dataclass(slots=True)
class Sums:
    """Counts, sums and maxima of some samples, by metric name."""

    counts: dict[str, int] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, count: int, total: float, maximum: float) -> None:
        self.counts[name] = self.counts.get(name, 0) + count
        self.sums[name] = self.sums.get(name, 0.0) + total
        self.maxima[name] = max(self.maxima.get(name, maximum), maximum)

    def add_values(self, values: Sequence[float | None]) -> None:
        for name, value in zip(METRIC_NAMES, values, strict=True):
            if value is not None:
                self.add(name, 1, value, value)

    def add_rollup(self, rollup: MinuteRollup) -> None:
        for name, count in rollup.counts.items():
            self.add(name, count, rollup.sums[name], rollup.maxima[name])

    def point(self, at: float) -> dict[str, float]:
        """Return one point of a history: the mean of each metric, and its maximum as `<name>_max`."""
        point = {"at": at}
        for name, count in self.counts.items():
            point[name] = round(self.sums[name] / count, 3)
            point[f"{name}_max"] = round(self.maxima[name], 3)
        return point


@dataclass(frozen=True, slots=True)
class Newest:
    received_at: float
    report: MetricsReport


class Metrics:
    def __init__(self) -> None:
        self._newest: dict[str, Newest] = {}
        self._samples: dict[str, deque[Sample]] = {}
        self._minutes: dict[tuple[str, int], Sums] = {}

    def add(self, agent_id: str, report: MetricsReport, received_at: float) -> None:
        self._newest[agent_id] = Newest(received_at, report)
        values = kept_values(report)
        self._samples.setdefault(agent_id, deque(maxlen=_MAX_SAMPLES)).append((received_at, values))
        minute = int(received_at) // 60 * 60
        self._minutes.setdefault((agent_id, minute), Sums()).add_values(values)

    def newest(self, agent_id: str) -> Newest | None:
        return self._newest.get(agent_id)

    def samples(self, agent_id: str) -> Sequence[Sample]:
        """Return what memory holds of the last hour, oldest first."""
        return tuple(self._samples.get(agent_id, ()))

    def forget(self, agent_id: str) -> None:
        self._newest.pop(agent_id, None)
        self._samples.pop(agent_id, None)
        for key in [key for key in self._minutes if key[0] == agent_id]:
            del self._minutes[key]

    def finished_rollups(self, *, before: float) -> list[MinuteRollup]:
        """Return the rollups of minutes that began before `before`, for storing."""
        return [
            MinuteRollup(
                agent_id=agent_id,
                minute=minute,
                counts=dict(sums.counts),
                sums=dict(sums.sums),
                maxima=dict(sums.maxima),
            )
            for (agent_id, minute), sums in self._minutes.items()
            if minute < before
        ]

    def drop_rollups(self, stored: Iterable[MinuteRollup]) -> None:
        """Forget what is stored now."""
        for rollup in stored:
            self._minutes.pop((rollup.agent_id, rollup.minute), None)


def kept_values(report: MetricsReport) -> tuple[float | None, ...]:
    """Return the values kept as history, in the order of METRIC_NAMES; totals leave the loopback interface out.

    What no host can have is left out too: the agent's word is not trusted with the database."""
    networks = [network for network in report.networks if network.interface != "lo"]
    values = (
        report.cpu_percent,
        report.mem_percent,
        report.disk_percent,
        report.swap_percent,
        report.load1,
        _total(network.received_bytes_per_second for network in networks),
        _total(network.sent_bytes_per_second for network in networks),
        _total(disk.read_bytes_per_second for disk in report.disks),
        _total(disk.written_bytes_per_second for disk in report.disks),
    )
    return tuple(value if value is not None and 0 <= value <= MAX_KEPT_VALUE else None for value in values)


def _total(values: Iterable[float]) -> float | None:
    present = tuple(values)
    return sum(present) if present else None


def build_history(
    samples: Iterable[Sample], rollups: Iterable[MinuteRollup], *, start: float, end: float, step_seconds: int
) -> list[dict[str, float]]:
    """Return the points from `start` up to `end`, oldest first, one for each step that has samples.

    A minute is taken from `samples` where they cover it from its first second, else from its rollup, never from both.
    A rollup counts as if all its samples were taken when its minute began."""
    samples = tuple(samples)
    covered_from = -(-samples[0][0] // 60) * 60 if samples else end
    buckets: dict[int, Sums] = {}

    def bucket(at: float) -> Sums:
        return buckets.setdefault(int(at // step_seconds) * step_seconds, Sums())

    rolled_minutes = set()
    for rollup in rollups:
        if rollup.minute < covered_from and start <= rollup.minute < end:
            rolled_minutes.add(rollup.minute)
            bucket(rollup.minute).add_rollup(rollup)
    for at, values in samples:
        if start <= at < end and int(at) // 60 * 60 not in rolled_minutes:
            bucket(at).add_values(values)
    return [sums.point(at) for at, sums in sorted(buckets.items())]


def report_document(agent_id: str, newest: Newest) -> Mapping[str, object]:
    """Return a report as the API shows it; None where the host has no such value."""
    document = {item.name: getattr(newest.report, item.name) for item in fields(newest.report)}
    return document | {"agent_id": agent_id, "received_at": newest.received_at}
