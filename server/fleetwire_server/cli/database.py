"""How commands reach the database: through a store of their own, for one job."""

import asyncio
import os
import time
from collections.abc import Callable
from typing import TypeVar

from sqlalchemy import Connection

from fleetwire_server.config import ServerConfig
from fleetwire_server.model import AuditEntry
from fleetwire_server.storage.engines import database_file
from fleetwire_server.storage.store import running_store
from fleetwire_shared.errors import NotFoundError

T = TypeVar("T")


def run_in_database(config: ServerConfig, job: Callable[[Connection], T], *, is_made: bool = False) -> T:
    """Run a job in the database and return its result.

    Args:
        is_made: the database is made where there is none.
    Raises:
        NotFoundError: there is no database."""
    file = database_file(config.database_url)
    if not is_made and not file.is_file():
        raise NotFoundError(f"there is no database {file}: name the server's directory with --data-dir")
    return asyncio.run(_write_in_store(config.database_url, job))


def audit_entry(action: str, subject: str, **detail: object) -> AuditEntry:
    """Return what is recorded of a command; who gave it is known to the operating system alone."""
    return AuditEntry(
        at=time.time(), actor=f"command line, uid {os.getuid()}", action=action, subject=subject, detail=detail
    )


async def _write_in_store(url: str, job: Callable[[Connection], T]) -> T:
    async with running_store(url) as store:
        return await store.write(job)
