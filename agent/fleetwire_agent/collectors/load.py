"""Load averages."""

import os


def collect_load() -> dict[str, float]:
    """Runnable and uninterruptible processes, mean of the last 1, 5 and 15 minutes. Source: getloadavg(3)."""
    load1, load5, load15 = os.getloadavg()
    return {"load1": round(load1, 2), "load5": round(load5, 2), "load15": round(load15, 2)}
