"""Failed logins are counted per address and per account; too many, and neither is heard for a while."""

import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from fleetwire_shared.errors import RateLimitedError, UnauthorizedError


class LoginThrottle:
    def __init__(self, *, failures_per_minute: int) -> None:
        self._limiter = MovingWindowRateLimiter(MemoryStorage())
        self._limit = RateLimitItemPerMinute(failures_per_minute)
        self._under_way: Counter[tuple[str, str]] = Counter()

    @contextmanager
    def attempt(self, address: str, username: str) -> Iterator[None]:
        """Run the block as one attempt to log in; it counts as a failure when it raises UnauthorizedError.

        Attempts under way count as failures until they end, so that many at once are not one more chance each.

        Raises:
            RateLimitedError: either had too many failures within the last minute."""
        keys = (("address", address), ("account", username))
        for key in keys:
            self._check(key)
        self._under_way.update(keys)
        try:
            yield
        except UnauthorizedError:
            for key in keys:
                self._limiter.hit(self._limit, *key)
            raise
        finally:
            self._under_way -= Counter(keys)  # and drops those at zero

    def _check(self, key: tuple[str, str]) -> None:
        if not self._limiter.test(self._limit, *key, cost=1 + self._under_way[key]):
            reset_at = self._limiter.get_window_stats(self._limit, *key).reset_time
            wait = min(60, max(1, math.ceil(reset_at - time.time())))  # the library's own clock
            raise RateLimitedError(
                f"too many failed logins for this {key[0]}; try again in {wait} s", retry_after_seconds=wait
            )
