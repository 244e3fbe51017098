"""Space and inodes of local filesystems, each asked with a time limit."""

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from fleetwire_shared.messages import CollectorFailure, Filesystem

ANSWER_SECONDS = 0.8
"""For all filesystems together, which are asked at once."""

_SKIPPED_TYPES = frozenset(
    # Served over a network or by other hosts: with a dead peer the question never returns.
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "ncpfs", "afs", "ceph", "lustre", "gfs2", "ocfs2", "glusterfs", "autofs"}
    # Read-only images are always full.
    | {"squashfs", "iso9660", "erofs", "udf"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    mountpoint: str
    device: str
    fstype: str


class FilesystemCollector:
    def __init__(
        self,
        *,
        list_mounts: Callable[[], Iterable[Mount]] = lambda: choose_mounts(read_mounts(), read_disk_types()),
        statvfs: Callable[[str], os.statvfs_result] = os.statvfs,
        answer_seconds: float = ANSWER_SECONDS,
    ) -> None:
        self._list_mounts = list_mounts
        self._statvfs = statvfs
        self._answer_seconds = answer_seconds
        self._asked: dict[str, _Question] = {}  # by mountpoint

    def collect(self) -> dict[str, Any]:
        """One entry for each local filesystem. Those that do not answer in time are named in `failures`, and not
        asked again until the answer has come, so that a dead disk costs one thread. Source: statvfs(2)."""
        mounts = {mount.mountpoint: mount for mount in self._list_mounts()}
        hanging = {mountpoint: question for mountpoint, question in self._asked.items() if not question.is_answered}
        asked_now = {
            mountpoint: _Question(self._statvfs, mountpoint) for mountpoint in mounts if mountpoint not in hanging
        }
        self._asked = hanging | asked_now
        deadline = time.monotonic() + self._answer_seconds
        for question in asked_now.values():
            question.wait(deadline)
        filesystems, failures = [], []
        for mountpoint, mount in mounts.items():
            outcome = self._asked[mountpoint].answer
            if outcome is None:
                age_seconds = self._asked[mountpoint].age_seconds()
                failures.append(_failure(mount, f"no answer for {age_seconds:.1f} seconds"))
            elif isinstance(outcome, OSError):
                failures.append(_failure(mount, outcome.strerror or str(outcome)))
            elif outcome.f_blocks:  # of size 0: a pseudo filesystem of a kind not known here
                filesystems.append(_describe(mount, outcome))
        root = next((filesystem for filesystem in filesystems if filesystem.mountpoint == "/"), None)
        return {
            "filesystems": tuple(filesystems),
            "disk_percent": root and root.used_percent,
            "failures": tuple(failures),
        }


class _Question:
    """One statvfs call in a thread of its own, which a hanging call keeps and nothing waits for at exit."""

    def __init__(self, statvfs: Callable[[str], os.statvfs_result], mountpoint: str) -> None:
        self._asked_at = time.monotonic()
        self.answer: os.statvfs_result | OSError | None = None
        self._call = statvfs
        self._thread = threading.Thread(target=self._ask, args=(mountpoint,), name="statvfs", daemon=True)
        self._thread.start()

    @property
    def is_answered(self) -> bool:
        return self.answer is not None

    def age_seconds(self) -> float:
        return time.monotonic() - self._asked_at

    def wait(self, deadline: float) -> None:
        self._thread.join(max(0.0, deadline - time.monotonic()))

    def _ask(self, mountpoint: str) -> None:
        try:
            self.answer = self._call(mountpoint)
        except OSError as err:
            self.answer = err


def read_mounts() -> list[Mount]:
    """Everything that is mounted, in the order of mounting. Source: psutil, which is /proc/self/mounts."""
    return [
        Mount(mountpoint=part.mountpoint, device=part.device, fstype=part.fstype)
        for part in psutil.disk_partitions(all=True)
    ]


def read_disk_types() -> frozenset[str]:
    """Filesystem types that live on a disk. Source: /proc/filesystems, which marks the others with `nodev`."""
    lines = Path("/proc/filesystems").read_text(encoding="ascii").splitlines()
    # zfs is marked nodev, as its pools are no single device.
    return frozenset({line.strip() for line in lines if not line.startswith("nodev")} | {"zfs"})


def choose_mounts(mounts: Iterable[Mount], disk_types: frozenset[str]) -> list[Mount]:
    """Return one mount for each disk filesystem, and always the one at `/`, of whatever type (overlay, tmpfs).

    Of several mounts of one device (bind mounts, btrfs subvolumes) the shortest path is taken."""
    topmost: Mapping[str, Mount] = {mount.mountpoint: mount for mount in mounts}  # a later mount hides an earlier one
    by_device: dict[str, Mount] = {}
    for mount in sorted(topmost.values(), key=lambda mount: (len(mount.mountpoint), mount.mountpoint)):
        if mount.mountpoint == "/" or (mount.fstype in disk_types and mount.fstype not in _SKIPPED_TYPES):
            by_device.setdefault(mount.device, mount)
    return list(by_device.values())


def _describe(mount: Mount, stat: os.statvfs_result) -> Filesystem:
    used_blocks = stat.f_blocks - stat.f_bfree
    usable_blocks = used_blocks + stat.f_bavail  # without the part kept for root, as df counts
    return Filesystem(
        mountpoint=_printable(mount.mountpoint),
        device=_printable(mount.device),
        fstype=mount.fstype,
        total_bytes=stat.f_blocks * stat.f_frsize,
        used_bytes=used_blocks * stat.f_frsize,
        available_bytes=stat.f_bavail * stat.f_frsize,
        used_percent=round(100 * used_blocks / usable_blocks, 1) if usable_blocks else 100.0,
        inodes_total=stat.f_files or None,
        inodes_used=stat.f_files - stat.f_ffree if stat.f_files else None,
    )


def _failure(mount: Mount, message: str) -> CollectorFailure:
    return CollectorFailure(collector="filesystems", message=f"{_printable(mount.mountpoint)}: {message}")


def _printable(path: str) -> str:
    """A path may hold bytes that are no UTF-8; such text could not be sent."""
    return os.fsencode(path).decode(errors="replace")
