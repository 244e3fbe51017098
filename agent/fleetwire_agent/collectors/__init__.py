"""Metrics of the host: one module for each kind, each isolated from the failures of the others."""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, TypeAlias

from fleetwire_agent.collectors.cpu import CpuCollector
from fleetwire_agent.collectors.disks import DiskCollector
from fleetwire_agent.collectors.filesystems import FilesystemCollector
from fleetwire_agent.collectors.load import collect_load
from fleetwire_agent.collectors.memory import collect_memory
from fleetwire_agent.collectors.networks import NetworkCollector
from fleetwire_agent.collectors.processes import collect_processes
from fleetwire_agent.collectors.temperatures import collect_temperatures
from fleetwire_agent.collectors.uptime import collect_uptime
from fleetwire_shared.messages import CollectorFailure, MetricsReport

Collector: TypeAlias = Callable[[], Mapping[str, Any]]
"""Returns fields of `MetricsReport`; may raise anything. `failures` among the fields are those of a part of it."""


class Sampler:
    """Takes one reading of everything at a time; rates and CPU percentages are those since the reading before."""

    def __init__(
        self,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
        *,
        collectors: Mapping[str, Collector] | None = None,
    ) -> None:
        """Read the counters once, so that the first sample has rates.

        Args:
            now: Unix seconds.
            clock: monotonic seconds.
            collectors: by the name that appears in `failures`; the host's own when left out."""
        self._now = now
        self._collectors = _host_collectors(clock) if collectors is None else collectors

    def sample(self) -> MetricsReport:
        """Return a reading of all collectors. Blocking, about a millisecond and never much over a second."""
        values: dict[str, Any] = {}
        failures: list[CollectorFailure] = []
        for name, collect in self._collectors.items():
            try:
                fields = dict(collect())
            except Exception as err:  # noqa: BLE001 - the border of a collector: whatever it is, the others go on
                failures.append(CollectorFailure(collector=name, message=_describe(err)))
                continue
            failures += fields.pop("failures", ())
            values |= fields
        return MetricsReport(sampled_at=self._now(), failures=tuple(failures), **values)


class _Prepared:
    """A collector with a first reading behind it. Where that fails, it is tried again when it is asked."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._collector: Any = None
        with suppress(Exception):  # told by `collect`, where a failure of one does not stop the others
            self._collector = make()

    def collect(self) -> Mapping[str, Any]:
        if self._collector is None:
            self._collector = self._make()
        fields: Mapping[str, Any] = self._collector.collect()
        return fields


def _host_collectors(clock: Callable[[], float]) -> dict[str, Collector]:
    return {
        "cpu": _Prepared(CpuCollector).collect,
        "load": collect_load,
        "memory": collect_memory,
        "filesystems": FilesystemCollector().collect,
        "disks": _Prepared(partial(DiskCollector, clock)).collect,
        "networks": _Prepared(partial(NetworkCollector, clock)).collect,
        "temperatures": collect_temperatures,
        "processes": collect_processes,
        "uptime": collect_uptime,
    }


def _describe(err: Exception) -> str:
    # A path in the message may hold bytes that are no UTF-8; such text could not be sent.
    text = f"{type(err).__name__}: {err}"
    return text.encode(errors="backslashreplace").decode()
