"""The server's own numbers for Prometheus: counts and durations only, no host name, user or path of a file."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector


class _Gauges(Collector):
    def __init__(self, read: Callable[[], dict[str, tuple[str, float]]]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        for name, (help_text, value) in self._read().items():
            yield GaugeMetricFamily(name, help_text, value=value)

    def describe(self) -> list[Metric]:
        return []


class Telemetry:
    def __init__(self, read_gauges: Callable[[], dict[str, tuple[str, float]]]) -> None:
        """`read_gauges` returns, by metric name, its help text and its value now."""
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        self._registry.register(_Gauges(read_gauges))
        self._requests = Counter(
            "fleetwire_http_requests", "Answered HTTP requests.", ["method", "route", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "fleetwire_http_request_seconds",
            "Time to answer, without streams and sockets.",
            ["route"],
            registry=self._registry,
        )

    def note_request(self, method: str, route: str, status: int, seconds: float | None) -> None:
        """Count an answered request; `seconds` is None for streams, whose length says nothing."""
        self._requests.labels(method, route, str(status)).inc()
        if seconds is not None:
            self._seconds.labels(route).observe(seconds)

    def exposition(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)
