"""Transfer rates of whole disks."""

import os
from collections.abc import Callable

import psutil

from fleetwire_agent.deltas import Counters, rates
from fleetwire_shared.messages import DiskRates


class DiskCollector:
    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._before = _read_disk_counters(clock())

    def collect(self) -> dict[str, tuple[DiskRates, ...]]:
        """Rates since the last call; none when no time has passed. Source: psutil.disk_io_counters(perdisk=True)."""
        before, self._before = self._before, _read_disk_counters(self._clock())
        if self._before.read_at <= before.read_at:
            return {}
        return {
            "disks": tuple(
                DiskRates(
                    device=device,
                    read_bytes_per_second=round(read_bytes, 1),
                    written_bytes_per_second=round(written_bytes, 1),
                    reads_per_second=round(reads, 2),
                    writes_per_second=round(writes, 2),
                )
                for device, (read_bytes, written_bytes, reads, writes) in rates(before, self._before).items()
            )
        }


def _read_disk_counters(read_at: float) -> Counters:
    """Partitions are left out, as they are counted in their disk; loop and ram devices, as their files' disks count."""
    whole_disks = {name for name in os.listdir("/sys/block") if not name.startswith(("loop", "ram"))}  # noqa: PTH208
    return Counters(
        read_at=read_at,
        totals={
            device: (disk.read_bytes, disk.write_bytes, disk.read_count, disk.write_count)
            for device, disk in (psutil.disk_io_counters(perdisk=True, nowrap=False) or {}).items()
            if device.replace("/", "!") in whole_disks  # sysfs writes cciss/c0d0 as cciss!c0d0
        },
    )
