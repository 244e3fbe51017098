"""How many processes there are."""

import os


def collect_processes() -> dict[str, int]:
    """Count the directories of /proc; psutil.process_iter would cost 50 to 100 us for each process."""
    return {"process_count": sum(name.isdigit() for name in os.listdir("/proc"))}  # noqa: PTH208 - names suffice
