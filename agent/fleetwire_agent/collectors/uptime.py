"""Time since boot."""

from pathlib import Path


def collect_uptime() -> dict[str, int]:
    """Whole seconds since boot, suspend included. Source: /proc/uptime, which a container may have of its own."""
    return {"uptime_s": int(float(Path("/proc/uptime").read_text(encoding="ascii").split()[0]))}
