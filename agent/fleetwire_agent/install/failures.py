"""Why an installation ends without an agent."""

import errno
from typing import Literal, TypeAlias

from fleetwire_shared.errors import FleetwireError

Reason: TypeAlias = Literal[
    "not_root",
    "unsupported",
    "other_identity",
    "no_route",
    "tls",
    "key_refused",
    "not_connected",
    "disk_full",
    "busy",
    "failed",
]


class InstallError(FleetwireError):
    """The installation cannot go on. The message says why, and what to do."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class InstallInterrupt(KeyboardInterrupt):
    """Somebody does not want it any more: a signal, or whoever read the answers is gone.

    Not an InstallError, which the search for a Python, for one, takes as a reason to try the next."""


def describe_os_error(error: OSError) -> InstallError:
    """Return what a failed system call means to whoever installs."""
    place = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return InstallError("disk_full", f"{place}the disk is full ({error.strerror}); make room there and try again")
    if error.errno == errno.EROFS:
        return InstallError("failed", f"{place}the filesystem is read-only; it must be writable for an installation")
    return InstallError("failed", f"{place}{error.strerror or error}")
