"""Who did what to the fleet. Entries are added and, when there are too many, the oldest removed; none is changed."""

import json
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from sqlalchemy import Connection, delete, func, insert, select

from fleetwire_server.model import AuditEntry

from .tables import AUDIT

T = TypeVar("T")


def audited(job: Callable[[Connection], T], entry: AuditEntry) -> Callable[[Connection], T]:
    """Return a job that does `job` and, in the same transaction, records that it was done."""
    return partial(_do_and_record, job=job, entry=entry)


def _do_and_record(connection: Connection, *, job: Callable[[Connection], T], entry: AuditEntry) -> T:
    result = job(connection)
    add_entry(connection, entry)
    return result


def add_entry(connection: Connection, entry: AuditEntry) -> None:
    connection.execute(
        insert(AUDIT).values(
            at=entry.at,
            actor=entry.actor,
            action=entry.action,
            subject=entry.subject,
            detail=json.dumps(dict(entry.detail), separators=(",", ":")),
        )
    )


def list_entries(connection: Connection, limit: int, before: int | None = None) -> list[AuditEntry]:
    """Return the newest entries, newest first; with `before`, of those with a smaller sequence."""
    newest = select(AUDIT).order_by(AUDIT.c.sequence.desc()).limit(limit)
    if before is not None:
        newest = newest.where(AUDIT.c.sequence < before)
    return [
        AuditEntry(
            at=row.at,
            actor=row.actor,
            action=row.action,
            subject=row.subject,
            detail=json.loads(row.detail),
            sequence=row.sequence,
        )
        for row in connection.execute(newest)
    ]


def delete_old(connection: Connection, keep: int, limit: int) -> int:
    """Remove up to `limit` entries older than the newest `keep`; return how many."""
    newest = connection.execute(select(func.max(AUDIT.c.sequence))).scalar_one() or 0
    old = select(AUDIT.c.sequence).where(AUDIT.c.sequence <= newest - keep).limit(limit)
    return connection.execute(delete(AUDIT).where(AUDIT.c.sequence.in_(old))).rowcount
