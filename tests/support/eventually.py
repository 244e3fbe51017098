"""Waiting for state that has no event to wait for."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")

_POLL_SECONDS = 0.05


async def eventually(
    read: Callable[[], Awaitable[T]], is_wanted: Callable[[T], bool] = bool, *, timeout_seconds: float = 15.0
) -> T:
    """Return the first value of `read` that is wanted. Raises AssertionError with the last one when none comes."""
    last: T | None = None
    try:
        async with asyncio.timeout(timeout_seconds):
            while True:
                last = await read()
                if is_wanted(last):
                    return last
                await asyncio.sleep(_POLL_SECONDS)
    except TimeoutError as err:
        raise AssertionError(f"not within {timeout_seconds} s; last seen: {last!r}") from err
