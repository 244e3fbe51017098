"""Keys under which users sent commands, so that a request that is sent again is not a second command."""

from sqlalchemy import ColumnElement, Connection, and_, delete, insert, select, tuple_

from fleetwire_server.model import CommandKey

from .tables import COMMAND_KEYS


def add_key(connection: Connection, key: CommandKey, command_id: str) -> None:
    """Store which command a key stands for; one that stood for another does so no longer."""
    connection.execute(delete(COMMAND_KEYS).where(_is(key)))
    connection.execute(
        insert(COMMAND_KEYS).values(
            agent_id=key.agent_id,
            username=key.username,
            key=key.key,
            body_hash=key.body_hash,
            command_id=command_id,
            created_at=key.created_at,
        )
    )


def get_key(connection: Connection, key: CommandKey, not_before: float) -> tuple[str, str] | None:
    """Return the hash of the body and the id of the command of this key, where it was stored later than that."""
    row = connection.execute(
        select(COMMAND_KEYS.c.body_hash, COMMAND_KEYS.c.command_id).where(
            _is(key), COMMAND_KEYS.c.created_at > not_before
        )
    ).one_or_none()
    return None if row is None else (row.body_hash, row.command_id)


def delete_old(connection: Connection, before: float, limit: int) -> int:
    """Remove up to `limit` keys that were stored by then; return how many."""
    names = (COMMAND_KEYS.c.agent_id, COMMAND_KEYS.c.username, COMMAND_KEYS.c.key)
    old = select(*names).where(COMMAND_KEYS.c.created_at <= before).limit(limit)
    return connection.execute(delete(COMMAND_KEYS).where(tuple_(*names).in_(old))).rowcount


def _is(key: CommandKey) -> ColumnElement[bool]:
    return and_(
        COMMAND_KEYS.c.agent_id == key.agent_id,
        COMMAND_KEYS.c.username == key.username,
        COMMAND_KEYS.c.key == key.key,
    )
