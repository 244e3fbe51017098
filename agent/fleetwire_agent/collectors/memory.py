"""Memory and swap."""

from typing import Any

import psutil


def collect_memory() -> dict[str, Any]:
    """Used memory is what is not available without swapping. Source: psutil, which is /proc/meminfo."""
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    return {
        "mem_percent": _percent(memory.total - memory.available, memory.total),
        "mem_total_bytes": memory.total,
        "mem_used_bytes": memory.total - memory.available,
        "mem_available_bytes": memory.available,
        "swap_percent": _percent(swap.used, swap.total),
        "swap_total_bytes": swap.total,
        "swap_used_bytes": swap.used,
    }


def _percent(used: int, total: int) -> float | None:
    """None where there is nothing to be used, as on a host without swap."""
    return round(100 * used / total, 1) if total else None
