"""Where things are on this machine, and the errors a person reads."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

STATE_DIR: Final = Path("/run/fleetwire-testhosts")
"""What runs now. One directory in `hosts` for each host; gone with the last one."""
CACHE_DIR: Final = Path("/var/cache/fleetwire-testhosts")
"""What is made once: roots, the SSH key; and `disks`, what running hosts write."""

HOSTS_DIR: Final = STATE_DIR / "hosts"
OWNERS_DIR: Final = STATE_DIR / "owners"
DISKS_DIR: Final = CACHE_DIR / "disks"
ROOTS_DIR: Final = CACHE_DIR / "roots"
SSH_KEY: Final = CACHE_DIR / "ssh" / "id_ed25519"

SOURCE_ROOT: Final = Path(__file__).resolve().parents[3]


class HostError(Exception):
    """Says what could not be done with a test host, and what would help."""


@contextmanager
def locked(name: str, directory: Path = STATE_DIR) -> Iterator[None]:
    """Hold one of the locks that all processes of this machine share; waits for it."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
