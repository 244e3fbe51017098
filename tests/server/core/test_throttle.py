"""Failed logins: few a minute, however many are tried at once."""

import pytest

from fleetwire_server.core.throttle import LoginThrottle
from fleetwire_shared.errors import RateLimitedError, UnauthorizedError


def fail(throttle: LoginThrottle, address: str, username: str) -> None:
    with pytest.raises(UnauthorizedError), throttle.attempt(address, username):
        raise UnauthorizedError("wrong")


@pytest.mark.parametrize("changing", ["address", "account"])
def test_failures_count_for_each_address_and_each_account(changing: str) -> None:
    throttle = LoginThrottle(failures_per_minute=5)
    for number in range(5):
        fail(throttle, *((f"10.0.0.{number}", "admin") if changing == "address" else ("10.0.0.1", f"user{number}")))
    with pytest.raises(RateLimitedError) as limited, throttle.attempt("10.0.0.1", "admin"):
        pass
    assert 1 <= limited.value.retry_after_seconds <= 60
    with throttle.attempt("10.0.0.99", "somebody"):
        pass


def test_a_success_counts_for_nothing() -> None:
    throttle = LoginThrottle(failures_per_minute=5)
    for _ in range(50):
        with throttle.attempt("10.0.0.1", "admin"):
            pass


def test_attempts_at_once_are_no_more_chances() -> None:
    throttle = LoginThrottle(failures_per_minute=5)
    under_way = [throttle.attempt("10.0.0.1", "admin") for _ in range(5)]
    for attempt in under_way:
        attempt.__enter__()
    with pytest.raises(RateLimitedError), throttle.attempt("10.0.0.1", "admin"):
        pass
    for attempt in under_way:
        attempt.__exit__(None, None, None)
    with throttle.attempt("10.0.0.1", "admin"):
        pass
