"""History: every sample counts once, from memory where that covers its minute, else from its rollup."""

from typing import Any

from fleetwire_server.core.metrics import Metrics, build_history, kept_values
from fleetwire_server.model import METRIC_NAMES
from fleetwire_shared.messages import DiskRates, MetricsReport, NetworkRates

START = 1_800_000_000.0  # a whole minute


def make_report(**values: Any) -> MetricsReport:
    return MetricsReport(**{"sampled_at": 0.0, "cpu_percent": 10.0, "mem_percent": 20.0} | values)


def make_network(interface: str, received: float) -> NetworkRates:
    return NetworkRates(
        interface=interface,
        received_bytes_per_second=received,
        sent_bytes_per_second=0.0,
        received_packets_per_second=0.0,
        sent_packets_per_second=0.0,
        errors_per_second=0.0,
    )


def feed(metrics: Metrics, minutes: int, *, start: float = START) -> None:
    """Add a sample every 5 s whose CPU share is the number of its minute."""
    for second in range(0, minutes * 60, 5):
        metrics.add("agent", make_report(cpu_percent=float(second // 60)), start + second)


def test_totals_leave_loopback_out_and_are_none_without_devices() -> None:
    disk = DiskRates(
        device="sda",
        read_bytes_per_second=5.0,
        written_bytes_per_second=7.0,
        reads_per_second=1.0,
        writes_per_second=1.0,
    )
    report = make_report(networks=(make_network("lo", 100.0), make_network("eth0", 3.0), make_network("eth1", 4.0)))
    values = dict(zip(METRIC_NAMES, kept_values(report), strict=True))
    assert values["received_bytes_per_second"] == 7.0
    assert values["written_bytes_per_second"] is None
    assert dict(zip(METRIC_NAMES, kept_values(make_report(disks=(disk,))), strict=True))["read_bytes_per_second"] == 5.0


def test_history_has_mean_and_maximum_of_each_step() -> None:
    metrics = Metrics()
    for second, percent in ((0, 10.0), (5, 30.0), (60, 50.0)):
        metrics.add("agent", make_report(cpu_percent=percent, mem_percent=None), START + second)
    points = build_history(metrics.samples("agent"), [], start=START, end=START + 120, step_seconds=60)
    assert points == [
        {"at": START, "cpu_percent": 20.0, "cpu_percent_max": 30.0},
        {"at": START + 60, "cpu_percent": 50.0, "cpu_percent_max": 50.0},
    ]


def test_memory_and_rollups_together_count_every_sample_once() -> None:
    before, after = Metrics(), Metrics()
    feed(before, 3)
    rollups = before.finished_rollups(before=float("inf"))
    # The server restarts in the middle of the third minute: its rollup holds all of it, memory the second half.
    for second in range(150, 240, 5):
        after.add("agent", make_report(cpu_percent=float(second // 60)), START + second)
    points = build_history(after.samples("agent"), rollups, start=START, end=START + 240, step_seconds=60)
    assert [(point["at"] - START, point["cpu_percent"]) for point in points] == [(0, 0), (60, 1), (120, 2), (180, 3)]


def test_only_the_asked_time_is_shown() -> None:
    metrics = Metrics()
    feed(metrics, 5)
    points = build_history(metrics.samples("agent"), [], start=START + 60, end=START + 120, step_seconds=5)
    assert [point["at"] - START for point in points] == list(range(60, 120, 5))


def test_a_rollup_is_kept_until_it_is_stored() -> None:
    metrics = Metrics()
    feed(metrics, 2)
    first = metrics.finished_rollups(before=START + 60)
    assert [rollup.minute for rollup in first] == [START]
    assert metrics.finished_rollups(before=START + 60) == first, "the write may have failed"
    metrics.drop_rollups(first)
    assert metrics.finished_rollups(before=START + 60) == []
    assert [rollup.minute for rollup in metrics.finished_rollups(before=float("inf"))] == [START + 60]


def test_memory_holds_one_hour() -> None:
    metrics = Metrics()
    feed(metrics, 90)
    assert len(metrics.samples("agent")) == 720
    assert metrics.samples("agent")[0][0] == START + 30 * 60


def test_a_forgotten_agent_leaves_nothing() -> None:
    metrics = Metrics()
    feed(metrics, 2)
    metrics.forget("agent")
    assert metrics.newest("agent") is None
    assert metrics.samples("agent") == ()
    assert metrics.finished_rollups(before=float("inf")) == []


def test_what_no_host_can_have_never_reaches_the_sums() -> None:
    metrics = Metrics()
    for sign in (1.0, -1.0):
        networks = (make_network("eth0", sign * 1.7e308), make_network("eth1", sign * 1.7e308))
        metrics.add("agent", make_report(networks=networks), START)
    (rollup,) = metrics.finished_rollups(before=float("inf"))
    assert "received_bytes_per_second" not in rollup.counts
    assert rollup.counts["cpu_percent"] == 2
