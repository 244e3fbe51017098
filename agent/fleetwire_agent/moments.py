"""When something happened on this host, so that its age can be told later: also where the clock was set meanwhile."""

from typing import NamedTuple


class Moment(NamedTuple):
    boot_id: str
    boottime: float  # seconds of CLOCK_BOOTTIME; counts within that boot, whatever is done to the clock
    at: float  # Unix seconds by this host's clock; counts after it

    def seconds_before(self, now: "Moment") -> float:
        """Return its age, never negative."""
        passed = now.boottime - self.boottime if now.boot_id == self.boot_id else now.at - self.at
        return max(0.0, passed)
