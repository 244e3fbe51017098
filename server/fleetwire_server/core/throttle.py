"""Failed logins are counted per address and per account; too many, and neither is heard for a while."""

import math

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from fleetwire_server.core.clock import Clock
from fleetwire_shared.errors import RateLimitedError


class LoginThrottle:
    def __init__(self, *, failures_per_minute: int, now: Clock) -> None:
        self._limiter = MovingWindowRateLimiter(MemoryStorage())
        self._limit = RateLimitItemPerMinute(failures_per_minute)
        self._now = now

    def check(self, address: str, username: str) -> None:
        """Raise RateLimitedError while either had too many failures within the last minute."""
        for kind, value in (("address", address), ("account", username)):
            if not self._limiter.test(self._limit, kind, value):
                reset_at = self._limiter.get_window_stats(self._limit, kind, value).reset_time
                wait = max(1, math.ceil(reset_at - self._now()))
                raise RateLimitedError(
                    f"too many failed logins for this {kind}; try again in {wait} s", retry_after_seconds=wait
                )

    def note_failure(self, address: str, username: str) -> None:
        self._limiter.hit(self._limit, "address", address)
        self._limiter.hit(self._limit, "account", username)
