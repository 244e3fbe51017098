"""How a host comes by the Python the agent needs: one command for each distribution.

The install script holds the same table as a `case` of its shell, so the patterns are of both: shell and fnmatch."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

HINTS: tuple[tuple[str, str], ...] = (
    # what os-release calls itself, ID:VERSION_ID    the command, as root
    ("debian:11*|debian:10*|debian:9*", ""),
    ("debian:*", "apt-get update && apt-get install -y python3"),
    ("ubuntu:22.*", "apt-get update && apt-get install -y python3.11"),
    ("ubuntu:1*|ubuntu:20.*|ubuntu:21.*", ""),
    ("ubuntu:*", "apt-get update && apt-get install -y python3"),
    ("fedora:*", "dnf install -y python3"),
    ("amzn:2", ""),
    ("amzn:*|rhel:[89]*|centos:[89]*|rocky:[89]*|almalinux:[89]*|ol:[89]*", "dnf install -y python3.11"),
    ("rhel:*|centos:1*|rocky:1*|almalinux:1*|ol:1*", "dnf install -y python3"),
    ("opensuse-leap:15*|sles:15*", "zypper --non-interactive install python311"),
    ("opensuse*:*|sles:*", "zypper --non-interactive install python3"),
    ("alpine:*|postmarketos:*", "apk add python3"),
    ("arch:*|archarm:*|manjaro:*", "pacman -Sy --noconfirm python"),
    ("void:*", "xbps-install -y python3"),
    ("gentoo:*", "emerge --noreplace dev-lang/python"),
    # of what it says it is like
    # (their releases have numbers of their own: the newer name first, which only the older ones have)
    ("like:debian|like:ubuntu", "apt-get update && { apt-get install -y python3.11 || apt-get install -y python3; }"),
    ("like:rhel|like:fedora|like:centos", "dnf install -y python3"),
    ("like:suse|like:opensuse", "zypper --non-interactive install python3"),
    ("like:arch", "pacman -Sy --noconfirm python"),
)
"""The first that fits. An empty command: this release has no Python that is new enough in its archive."""

PYTHON_MODULES = "asyncio, compileall, ctypes, json, ssl, tomllib, zipfile"
"""Parts of the standard library that the agent and its installer need, and that some distributions package apart."""

NO_COMMAND = (
    "this release packages no Python 3.11 or later: upgrade the host's distribution,"
    " or install a Python 3.11 or later as /usr/local/bin/python3.11"
)
UNKNOWN = "install Python 3.11 or later with this distribution's package manager"


def python_command(os_id: str, version_id: str, like: Sequence[str] = ()) -> str | None:
    """Return the command that brings Python 3.11 or later, as root; "" when this release has none, None when unknown.

    Args:
        os_id, version_id, like: ID, VERSION_ID and ID_LIKE of os-release(5)."""
    for key in (f"{os_id}:{version_id}", *(f"like:{name}" for name in like)):
        for patterns, command in HINTS:
            if any(fnmatchcase(key, pattern) for pattern in patterns.split("|")):
                return command
    return None


def python_advice(os_id: str, version_id: str, like: Sequence[str] = ()) -> str:
    """Return what to do on a host without Python 3.11 or later, as one sentence without its full stop."""
    command = python_command(os_id, version_id, like)
    if command is None:
        return UNKNOWN
    return f"run there as root: {command}" if command else NO_COMMAND
