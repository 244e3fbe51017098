"""The one shape of the server's periodic work."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from fleetwire_shared.errors import UnavailableError

logger = logging.getLogger(__name__)


async def run_every(seconds: float, work: Callable[[], Awaitable[object]], name: str) -> None:
    """Do the work every so many seconds, first after the first of these; until cancelled.

    A database that cannot be used now (a full disk) is said in the log, and the next round tries again: the server
    still shows and reads what it can. Any other error is a fault, and ends the process."""
    while True:
        await asyncio.sleep(seconds)
        try:
            await work()
        except UnavailableError as err:
            logger.error("%s: %s; the next attempt is in %.0f s", name, err.message, seconds)
