"""Metrics history: one row for each agent and minute."""

from collections.abc import Iterable
from itertools import islice
from typing import Any

from sqlalchemy import Connection, Row, case, delete, select, tuple_
from sqlalchemy.dialects.sqlite import insert

from fleetwire_server.model import METRIC_NAMES, MinuteRollup

from .tables import AGENTS, METRICS_MINUTES

_IDS_PER_QUERY = 1000


def add_rollups(connection: Connection, rollups: Iterable[MinuteRollup]) -> None:
    """Store rollups, added to what is stored of the same minutes. Those of deleted agents are passed over."""
    wanted = list(rollups)
    existing = _existing_agents(connection, {rollup.agent_id for rollup in wanted})
    values = [_values_of(rollup) for rollup in wanted if rollup.agent_id in existing]
    if values:
        connection.execute(_MERGE, values)


def list_rollups(connection: Connection, agent_id: str, from_minute: int, to_minute: int) -> list[MinuteRollup]:
    """Return an agent's rollups with from_minute <= minute < to_minute, oldest first."""
    minute = METRICS_MINUTES.c.minute
    wanted = select(METRICS_MINUTES).where(
        METRICS_MINUTES.c.agent_id == agent_id, minute >= from_minute, minute < to_minute
    )
    return [_rollup_from(row) for row in connection.execute(wanted.order_by(minute))]


def delete_old(connection: Connection, before: float, limit: int) -> int:
    """Remove the oldest rollups of minutes before then; return how many.

    With `limit`, each call is a short transaction: call again while it returns that many."""
    key = (METRICS_MINUTES.c.agent_id, METRICS_MINUTES.c.minute)
    oldest = select(*key).where(METRICS_MINUTES.c.minute < before).order_by(METRICS_MINUTES.c.minute).limit(limit)
    return connection.execute(delete(METRICS_MINUTES).where(tuple_(*key).in_(oldest))).rowcount


def _existing_agents(connection: Connection, agent_ids: set[str]) -> set[str]:
    existing: set[str] = set()
    left = iter(agent_ids)
    while some := list(islice(left, _IDS_PER_QUERY)):
        existing.update(connection.execute(select(AGENTS.c.id).where(AGENTS.c.id.in_(some))).scalars())
    return existing


def _build_merge() -> Any:
    statement = insert(METRICS_MINUTES)
    merged: dict[str, Any] = {}
    for name in METRIC_NAMES:
        count, total, high = (METRICS_MINUTES.c[f"{name}_{part}"] for part in ("count", "sum", "max"))
        more = statement.excluded
        merged[count.name] = count + more[count.name]
        merged[total.name] = total + more[total.name]
        # Not max(): PostgreSQL calls it greatest(), and SQLite's gives NULL when one is.
        merged[high.name] = case(
            (high.is_(None), more[high.name]), (more[high.name] > high, more[high.name]), else_=high
        )
    return statement.on_conflict_do_update(index_elements=["agent_id", "minute"], set_=merged)


_MERGE = _build_merge()


def _values_of(rollup: MinuteRollup) -> dict[str, str | int | float | None]:
    values: dict[str, str | int | float | None] = {"agent_id": rollup.agent_id, "minute": rollup.minute}
    for name in METRIC_NAMES:
        values[f"{name}_count"] = rollup.counts.get(name, 0)
        values[f"{name}_sum"] = rollup.sums.get(name, 0.0)
        values[f"{name}_max"] = rollup.maxima.get(name)
    return values


def _rollup_from(row: Row[Any]) -> MinuteRollup:
    stored = row._mapping  # noqa: SLF001 - SQLAlchemy's public name for it
    known = [name for name in METRIC_NAMES if stored[f"{name}_count"]]
    return MinuteRollup(
        agent_id=row.agent_id,
        minute=row.minute,
        counts={name: stored[f"{name}_count"] for name in known},
        sums={name: stored[f"{name}_sum"] for name in known},
        maxima={name: stored[f"{name}_max"] for name in known},
    )
