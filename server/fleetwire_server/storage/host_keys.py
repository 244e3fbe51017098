"""Keys that SSH servers were first seen with."""

from typing import Any

from sqlalchemy import Connection, Row, delete, insert, select

from fleetwire_server.model import HostKey

from .tables import HOST_KEYS


def pin_host_key(connection: Connection, key: HostKey) -> HostKey:
    """Pin the key unless that host has one; return the one that is pinned now, which may be another."""
    pinned = get_host_key(connection, key.host, key.port)
    if pinned is not None:
        return pinned
    connection.execute(
        insert(HOST_KEYS).values(
            host=key.host,
            port=key.port,
            public_key=key.public_key,
            fingerprint=key.fingerprint,
            pinned_at=key.pinned_at,
            pinned_by=key.pinned_by,
        )
    )
    return key


def get_host_key(connection: Connection, host: str, port: int) -> HostKey | None:
    row = connection.execute(select(HOST_KEYS).where(HOST_KEYS.c.host == host, HOST_KEYS.c.port == port)).one_or_none()
    return None if row is None else _host_key_from(row)


def list_host_keys(connection: Connection) -> list[HostKey]:
    """Return all by host, then port."""
    rows = connection.execute(select(HOST_KEYS).order_by(HOST_KEYS.c.host, HOST_KEYS.c.port))
    return [_host_key_from(row) for row in rows]


def delete_host_key(connection: Connection, host: str, port: int) -> bool:
    """Return whether there was one."""
    removed = delete(HOST_KEYS).where(HOST_KEYS.c.host == host, HOST_KEYS.c.port == port)
    return connection.execute(removed).rowcount > 0


def _host_key_from(row: Row[Any]) -> HostKey:
    return HostKey(
        host=row.host,
        port=row.port,
        public_key=row.public_key,
        fingerprint=row.fingerprint,
        pinned_at=row.pinned_at,
        pinned_by=row.pinned_by,
    )
