"""Small disks that can lose power: ext4 in a file, mounted over a loop device. Needs root."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

NO_POWER_CUTS: Final = "NOT TESTED: POWER CUTS"
_BLOCK_BYTES: Final = 64 * 1024


def find_disk_obstacles() -> list[str]:
    """Return what keeps this machine from mounting such disks and from showing another boot id; empty: nothing."""
    programs = ("mkfs.ext4", "mount", "umount", "unshare")
    missing = [f"{name} is not there." for name in programs if shutil.which(name) is None]
    if os.geteuid() != 0:
        return ["It takes root.", *missing]
    if not Path("/dev/loop-control").exists():
        missing.append("There are no loop devices (/dev/loop-control).")
    return missing


@contextmanager
def new_disk(image: Path, mountpoint: Path, *, mebibytes: int) -> Iterator[Path]:
    """Make a filesystem in `image` and have it mounted; yield the mountpoint."""
    with image.open("xb") as file:
        file.truncate(mebibytes << 20)
    _run("mkfs.ext4", "-q", "-F", "-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=0", image)
    with mounted(image, mountpoint):
        yield mountpoint


@contextmanager
def mounted(image: Path, mountpoint: Path) -> Iterator[Path]:
    """Mount an image, which replays its journal as after a power cut."""
    mountpoint.mkdir(exist_ok=True)
    _run("mount", "-o", "loop", image, mountpoint)
    try:
        yield mountpoint
    finally:
        _run("umount", mountpoint)


def copy_as_a_power_cut_leaves_it(image: Path, copy: Path) -> None:
    """Copy what has reached the disk itself; what the kernel still holds back is lost.

    The caller has frozen all that writes to it. What the kernel writes on its own meanwhile must not tear the copy:
    two readings that are the same prove that the disk was like that at one moment between them."""
    content = image.read_bytes()
    while (again := image.read_bytes()) != content:
        content = again
    empty = bytes(_BLOCK_BYTES)
    with copy.open("xb") as file:
        file.truncate(len(content))
        for start in range(0, len(content), _BLOCK_BYTES):
            block = content[start : start + _BLOCK_BYTES]
            if block != empty:
                file.seek(start)
                file.write(block)


def booted_again(boot_id: Path) -> list[str]:
    """Return what starts a program so that it reads the boot id of that file as this machine's.

    It sees only its own processes: others are booted from the same disk, and have commands of the same ids."""
    script = 'mount --bind "$0" /proc/sys/kernel/random/boot_id && exec "$@"'
    own = ["--mount-proc", "--pid", "--fork", "--kill-child"]
    return ["unshare", "-m", "--propagation", "private", *own, "sh", "-c", script, str(boot_id)]


def _run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
