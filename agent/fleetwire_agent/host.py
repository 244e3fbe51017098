"""What does not change between two boots of the host."""

import os
import platform
from pathlib import Path

import psutil

from fleetwire_shared.messages import HostFacts


def read_host_facts() -> HostFacts:
    """Return the facts of this host. Blocking, a few milliseconds; a fact the host does not tell is "" or 0."""
    kernel = os.uname()
    return HostFacts(
        hostname=kernel.nodename,
        os=_read_os_name(),
        kernel=kernel.release,
        architecture=kernel.machine,
        boot_id=_read_boot_id(),
        cpu_count=psutil.cpu_count() or 0,
        memory_bytes=psutil.virtual_memory().total,
        python=platform.python_version(),
    )


def _read_os_name() -> str:
    try:
        release = platform.freedesktop_os_release()
    except OSError:  # neither /etc/os-release nor /usr/lib/os-release, as in the smallest containers
        return platform.system()
    return release["PRETTY_NAME"]  # the standard library fills in its default


def _read_boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
