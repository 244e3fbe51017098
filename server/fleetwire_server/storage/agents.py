"""Enrolled hosts and their keys. Only hashes of keys are stored."""

import json
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, Row, bindparam, delete, insert, or_, select, update

from fleetwire_server.model import Agent, AgentKey
from fleetwire_shared.errors import ConflictError, NotFoundError

from .tables import AGENT_KEYS, AGENTS

_GET = select(AGENTS).where(AGENTS.c.id == bindparam("agent_id"))


def add_agent(connection: Connection, agent: Agent, key: AgentKey) -> None:
    """Raises ConflictError when the id is taken."""
    if get_agent(connection, agent.id) is not None:
        raise ConflictError(f"there is already an agent {agent.id}")
    connection.execute(
        insert(AGENTS).values(
            id=agent.id,
            label=agent.label,
            tags=_json(list(agent.tags)),
            hostname=agent.hostname,
            ip=agent.ip,
            os=agent.os,
            version=agent.version,
            facts=_json(dict(agent.facts)),
            created_at=agent.created_at,
            last_seen=agent.last_seen,
        )
    )
    _add_key(connection, key)


def get_agent(connection: Connection, agent_id: str) -> Agent | None:
    row = connection.execute(_GET, {"agent_id": agent_id}).one_or_none()
    return None if row is None else _agent_from(row)


def list_agents(connection: Connection) -> list[Agent]:
    """Return all agents by label, then id."""
    return [_agent_from(row) for row in connection.execute(select(AGENTS).order_by(AGENTS.c.label, AGENTS.c.id))]


def update_label_tags(
    connection: Connection, agent_id: str, *, label: str | None = None, tags: tuple[str, ...] | None = None
) -> Agent:
    """Change what is not None and return the agent as it is now. Raises NotFoundError."""
    values: dict[str, str] = {}
    if label is not None:
        values["label"] = label
    if tags is not None:
        values["tags"] = _json(list(tags))
    if values:
        connection.execute(update(AGENTS).where(AGENTS.c.id == agent_id).values(values))
    agent = get_agent(connection, agent_id)
    if agent is None:
        raise _no_agent(agent_id)
    return agent


def record_seen(
    connection: Connection,
    agent_id: str,
    *,
    hostname: str,
    ip: str,
    os: str,
    version: str,
    facts: Mapping[str, str | int] | None,
    last_seen: float,
) -> bool:
    """Store what an agent said of itself; `facts` of None leaves the known ones.

    Returns:
        False when there is no such agent (any more)."""
    values: dict[str, str | float] = {
        "hostname": hostname, "ip": ip, "os": os, "version": version, "last_seen": last_seen
    }  # fmt: skip
    if facts is not None:
        values["facts"] = _json(dict(facts))
    return connection.execute(update(AGENTS).where(AGENTS.c.id == agent_id).values(values)).rowcount > 0


def record_last_seen(connection: Connection, seen: Mapping[str, float]) -> None:
    """Store when agents, by id, were last heard of; never goes back. Ids of no agent are passed over."""
    if not seen:
        return
    connection.execute(
        update(AGENTS)
        .where(
            AGENTS.c.id == bindparam("seen_id"),
            or_(AGENTS.c.last_seen.is_(None), AGENTS.c.last_seen < bindparam("seen_at")),
        )
        .values(last_seen=bindparam("seen_at")),
        [{"seen_id": agent_id, "seen_at": at} for agent_id, at in seen.items()],
    )


def revoke_keys(connection: Connection, agent_id: str) -> int:
    """Remove all keys of the agent, so that it is let in no more; return how many."""
    return connection.execute(delete(AGENT_KEYS).where(AGENT_KEYS.c.agent_id == agent_id)).rowcount


def delete_agent(connection: Connection, agent_id: str) -> bool:
    """Remove an agent with its keys, commands, their output and its metrics; return whether it was there."""
    return connection.execute(delete(AGENTS).where(AGENTS.c.id == agent_id)).rowcount > 0


def get_agent_by_key(connection: Connection, key_hash: str, now: float) -> Agent | None:
    """Return the agent whose key this is; None when there is none or the key has expired."""
    row = connection.execute(
        select(AGENTS).join_from(AGENTS, AGENT_KEYS).where(AGENT_KEYS.c.key_hash == key_hash, _is_valid(now))
    ).one_or_none()
    return None if row is None else _agent_from(row)


def rotate_key(connection: Connection, key: AgentKey, *, others_expire_at: float) -> None:
    """Add a key and let the agent's other keys expire, at the given time or sooner where that was set.

    Raises:
        NotFoundError: no such agent."""
    if get_agent(connection, key.agent_id) is None:
        raise _no_agent(key.agent_id)
    connection.execute(
        update(AGENT_KEYS)
        .where(
            AGENT_KEYS.c.agent_id == key.agent_id,
            or_(AGENT_KEYS.c.expires_at.is_(None), AGENT_KEYS.c.expires_at > others_expire_at),
        )
        .values(expires_at=others_expire_at)
    )
    _add_key(connection, key)


def retire_other_keys(connection: Connection, agent_id: str, key_hash: str) -> int:
    """Remove all keys of the agent that were made before this one; return how many.

    For when the agent has used its new key: the old one is needed no more. A key that is itself being replaced
    retires none of its successors."""
    made_at = select(AGENT_KEYS.c.created_at).where(AGENT_KEYS.c.key_hash == key_hash).scalar_subquery()
    return connection.execute(
        delete(AGENT_KEYS).where(
            AGENT_KEYS.c.agent_id == agent_id,
            AGENT_KEYS.c.key_hash != key_hash,
            AGENT_KEYS.c.expires_at.is_not(None),
            AGENT_KEYS.c.created_at <= made_at,
        )
    ).rowcount


def delete_expired_keys(connection: Connection, now: float) -> int:
    return connection.execute(delete(AGENT_KEYS).where(AGENT_KEYS.c.expires_at <= now)).rowcount


def _add_key(connection: Connection, key: AgentKey) -> None:
    connection.execute(
        insert(AGENT_KEYS).values(
            key_hash=key.key_hash, agent_id=key.agent_id, created_at=key.created_at, expires_at=key.expires_at
        )
    )


def _is_valid(now: float) -> Any:
    return or_(AGENT_KEYS.c.expires_at.is_(None), AGENT_KEYS.c.expires_at > now)


def _no_agent(agent_id: str) -> NotFoundError:
    return NotFoundError(f"there is no agent {agent_id}")


def _json(value: list[str] | dict[str, str | int]) -> str:
    return json.dumps(value, separators=(",", ":"))


def _agent_from(row: Row[Any]) -> Agent:
    return Agent(
        id=row.id,
        label=row.label,
        tags=tuple(json.loads(row.tags)),
        hostname=row.hostname,
        ip=row.ip,
        os=row.os,
        version=row.version,
        facts=json.loads(row.facts),
        created_at=row.created_at,
        last_seen=row.last_seen,
    )
