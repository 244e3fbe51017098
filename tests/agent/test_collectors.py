"""The collectors, on this machine's own kernel; what it cannot show (dead disks) is passed in."""

import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from fleetwire_agent.collectors import Sampler, _Prepared
from fleetwire_agent.collectors.cpu import CpuCollector
from fleetwire_agent.collectors.filesystems import FilesystemCollector, Mount, choose_mounts
from fleetwire_agent.collectors.processes import collect_processes
from fleetwire_agent.host import read_host_facts
from fleetwire_shared.codec import decode, encode
from fleetwire_shared.messages import FROM_AGENT, MetricsReport

DISK_TYPES = frozenset({"ext4", "xfs", "squashfs"})


def make_mount(mountpoint: str, *, device: str = "/dev/vda", fstype: str = "ext4") -> Mount:
    return Mount(mountpoint=mountpoint, device=device, fstype=fstype)


def burn_until(is_done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not is_done() and time.monotonic() < deadline:
        pass


def test_sample_describes_this_host() -> None:
    sampler = Sampler(now=lambda: 1_700_000_000.0)
    started = time.process_time()
    burn_until(lambda: time.process_time() - started > 0.1)
    report = sampler.sample()
    assert report.failures == ()
    assert report.sampled_at == 1_700_000_000.0
    assert report.cpu_percent is not None
    assert 0 < report.cpu_percent <= 100
    assert len(report.cpu_per_core_percent) == os.cpu_count()
    assert report.cpu_steal_percent is not None
    assert report.cpu_iowait_percent is not None
    assert report.mem_total_bytes is not None
    assert report.mem_used_bytes is not None
    assert report.mem_available_bytes is not None
    assert report.mem_used_bytes + report.mem_available_bytes == report.mem_total_bytes
    assert report.load1 is not None
    assert report.process_count is not None
    assert report.process_count > 0
    assert report.uptime_s is not None
    assert abs(report.uptime_s - time.clock_gettime(time.CLOCK_BOOTTIME)) < 60
    assert decode(encode(report), FROM_AGENT) == report


def test_root_filesystem_is_always_there_with_the_numbers_of_statvfs() -> None:
    report = Sampler().sample()
    (root,) = [filesystem for filesystem in report.filesystems if filesystem.mountpoint == "/"]
    stat = os.statvfs("/")
    assert root.total_bytes == stat.f_blocks * stat.f_frsize
    assert root.inodes_total == (stat.f_files or None)
    assert report.disk_percent == root.used_percent


def test_first_cpu_percentages_are_no_fake_zero() -> None:
    # The known trap: psutil's first cpu_percent() is 0.0. Here the first one is since the start, or none at all.
    collector = CpuCollector()
    started = time.process_time()
    burn_until(lambda: time.process_time() - started > 0.1)
    assert collector.collect()["cpu_percent"] > 0
    burst = [collector.collect() for _ in range(20)]  # within fewer clock ticks than calls
    assert {} in burst


def test_a_failing_collector_is_reported_and_the_others_go_on() -> None:
    def fail() -> Mapping[str, Any]:
        raise RuntimeError("sensor \udcff on fire")

    report = Sampler(collectors={"broken": fail, "processes": collect_processes}).sample()
    (failure,) = report.failures
    assert failure.collector == "broken"
    assert failure.message == "RuntimeError: sensor \\udcff on fire"
    assert report.process_count
    assert decode(encode(report), FROM_AGENT) == report


def test_rates_need_time_between_two_readings() -> None:
    moments = iter([0.0, 0.0, 0.0, 0.0, 5.0, 5.0])
    sampler = Sampler(clock=lambda: next(moments))
    assert sampler.sample().networks == ()
    report = sampler.sample()
    assert report.failures == ()
    assert "lo" not in {network.interface for network in report.networks}
    assert all(not disk.device.startswith("loop") for disk in report.disks)


def test_a_hanging_filesystem_costs_one_thread_and_delays_nobody_twice() -> None:
    release = threading.Event()
    calls: list[str] = []

    def statvfs(path: str) -> os.statvfs_result:
        calls.append(path)
        if path == "/dead":
            release.wait()
        return os.statvfs("/")

    collector = FilesystemCollector(
        list_mounts=lambda: [make_mount("/"), make_mount("/dead")], statvfs=statvfs, answer_seconds=0.2
    )
    first = collector.collect()
    assert [filesystem.mountpoint for filesystem in first["filesystems"]] == ["/"]
    assert first["failures"][0].message.startswith("/dead: no answer for 0.2")
    threads_before, started = threading.active_count(), time.monotonic()
    for _ in range(3):
        assert len(collector.collect()["failures"]) == 1
    assert time.monotonic() - started < 0.15
    assert calls.count("/dead") == 1
    assert threading.active_count() == threads_before
    release.set()
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "statvfs"]
    thread.join(5)
    assert len(collector.collect()["filesystems"]) == 2


def test_a_filesystem_that_cannot_be_asked_is_named() -> None:
    collector = FilesystemCollector(list_mounts=lambda: [make_mount("/no/such/place\udcff")])
    (failure,) = collector.collect()["failures"]
    assert failure.message == "/no/such/place\ufffd: No such file or directory"


def test_an_overlay_root_is_chosen_and_pseudo_and_network_filesystems_are_not() -> None:
    chosen = choose_mounts(
        [
            make_mount("/", device="overlay", fstype="overlay"),
            make_mount("/proc", device="proc", fstype="proc"),
            make_mount("/mnt/share", device="server:/share", fstype="nfs4"),
            make_mount("/snap/core", device="/dev/loop0", fstype="squashfs"),
            make_mount("/data", device="/dev/vdb", fstype="xfs"),
        ],
        DISK_TYPES,
    )
    assert [mount.mountpoint for mount in chosen] == ["/", "/data"]


def test_bind_mounts_of_one_device_are_counted_once() -> None:
    chosen = choose_mounts([make_mount("/run/host/etc"), make_mount("/"), make_mount("/etc/hosts")], DISK_TYPES)
    assert [mount.mountpoint for mount in chosen] == ["/"]


def test_the_topmost_mount_of_a_path_is_chosen() -> None:
    chosen = choose_mounts([make_mount("/", device="rootfs", fstype="rootfs"), make_mount("/")], DISK_TYPES)
    assert [mount.device for mount in chosen] == ["/dev/vda"]


def test_a_sample_is_cheap() -> None:
    sampler = Sampler()
    sampler.sample()
    started = time.process_time()
    for _ in range(50):
        sampler.sample()
    # 1 ms on an idle machine; the bound leaves room for a busy one, and none for a walk over all processes.
    assert (time.process_time() - started) / 50 < 0.005


def test_host_facts_are_those_of_this_host() -> None:
    facts = read_host_facts()
    assert facts.hostname == os.uname().nodename
    assert facts.architecture == os.uname().machine
    assert len(facts.boot_id) == 36
    assert facts.cpu_count == os.cpu_count()
    assert facts.os


def test_reports_without_collectors_are_empty() -> None:
    assert Sampler(now=lambda: 1.0, collectors={}).sample() == MetricsReport(sampled_at=1.0)


@pytest.mark.parametrize("fstype", ["nfs", "nfs4", "cifs", "ceph", "autofs"])
def test_a_network_filesystem_is_not_asked_even_if_the_kernel_calls_it_a_disk(fstype: str) -> None:
    assert choose_mounts([make_mount("/mnt", fstype=fstype)], DISK_TYPES | {fstype}) == []


def test_a_collector_whose_first_reading_fails_is_tried_again() -> None:
    attempts = []

    class Late:
        def __init__(self) -> None:
            attempts.append(self)
            if len(attempts) < 3:
                raise FileNotFoundError("/sys/block")

        def collect(self) -> dict[str, int]:
            return {"process_count": 7}

    sampler = Sampler(collectors={"late": _Prepared(Late).collect})
    first, second = sampler.sample(), sampler.sample()
    assert [failure.collector for failure in first.failures] == ["late"]
    assert (second.failures, second.process_count) == ((), 7)
