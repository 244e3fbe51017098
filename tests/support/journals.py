"""Real journal files, written without a running journald."""

import subprocess
from pathlib import Path

JOURNAL_REMOTE = Path("/lib/systemd/systemd-journal-remote")  # Debian package systemd-journal-remote

FIRST_MICROSECONDS = 1_700_000_000_000_000
BOOT_ID = "a" * 32


def make_entry(number: int, **fields: str | bytes) -> bytes:
    """Return one entry in the journal export format, `number` seconds after the first."""
    microseconds = FIRST_MICROSECONDS + number * 1_000_000
    all_fields: dict[str, str | bytes] = {
        "__REALTIME_TIMESTAMP": str(microseconds),
        "__MONOTONIC_TIMESTAMP": str((number + 1) * 1_000_000),
        "_BOOT_ID": BOOT_ID,
        "_HOSTNAME": "web-01",
        "SYSLOG_IDENTIFIER": "nginx",
        "_PID": "12",
        "PRIORITY": "6",
        "_SYSTEMD_UNIT": "nginx.service",
        "MESSAGE": f"message {number}",
        **fields,
    }
    return b"".join(_export(name, value) for name, value in all_fields.items()) + b"\n"


def _export(name: str, value: str | bytes) -> bytes:
    content = value.encode() if isinstance(value, str) else value
    if all(byte >= 32 for byte in content):
        return name.encode() + b"=" + content + b"\n"
    return name.encode() + b"\n" + len(content).to_bytes(8, "little") + content + b"\n"


def write_journal(path: Path, *entries: bytes) -> None:
    """Make the journal file, or add to it: as journald does, to be seen by who follows it."""
    subprocess.run([JOURNAL_REMOTE, "-o", path, "-"], input=b"".join(entries), capture_output=True, check=True)
