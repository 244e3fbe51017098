"""Users. Sync functions for the store; times come as arguments."""

from typing import Any

from sqlalchemy import Connection, Row, delete, func, insert, select, update

from fleetwire_server.model import Role, User
from fleetwire_shared.errors import ConflictError, NotFoundError

from .tables import SESSIONS, USERS


def get_user(connection: Connection, name: str) -> User | None:
    row = connection.execute(select(USERS).where(USERS.c.name == name)).one_or_none()
    return None if row is None else _user_from(row)


def list_users(connection: Connection) -> list[User]:
    """Return all users by name."""
    return [_user_from(row) for row in connection.execute(select(USERS).order_by(USERS.c.name))]


def add_user(connection: Connection, user: User) -> None:
    """Raises ConflictError when the name is taken."""
    if get_user(connection, user.name) is not None:
        raise ConflictError(f"there is already a user {user.name}")
    connection.execute(
        insert(USERS).values(
            name=user.name, role=user.role.value, password_hash=user.password_hash, created_at=user.created_at
        )
    )


def update_user(
    connection: Connection, name: str, *, role: Role | None = None, password_hash: str | None = None
) -> User:
    """Change what is not None, end all of the user's sessions, and return the user as it is now.

    Raises:
        NotFoundError: no such user.
        ConflictError: the last admin would lose that role."""
    user = _existing(connection, name)
    if role is not None and role is not Role.ADMIN:
        _refuse_last_admin(connection, user)
    changes = {"role": role and role.value, "password_hash": password_hash}
    values = {column: value for column, value in changes.items() if value is not None}
    if values:
        connection.execute(update(USERS).where(USERS.c.name == name).values(values))
    connection.execute(delete(SESSIONS).where(SESSIONS.c.username == name))
    return _existing(connection, name)


def update_password_hash(connection: Connection, name: str, *, old_hash: str, new_hash: str) -> bool:
    """Replace the hash of an unchanged password by one with present parameters; sessions stay.

    Returns:
        False when the hash was no longer `old_hash`: the password was changed meanwhile."""
    changed = update(USERS).where(USERS.c.name == name, USERS.c.password_hash == old_hash)
    return connection.execute(changed.values(password_hash=new_hash)).rowcount > 0


def delete_user(connection: Connection, name: str) -> None:
    """Remove a user with all sessions.

    Raises:
        NotFoundError: no such user.
        ConflictError: it is the last admin."""
    _refuse_last_admin(connection, _existing(connection, name))
    connection.execute(delete(USERS).where(USERS.c.name == name))


def _existing(connection: Connection, name: str) -> User:
    user = get_user(connection, name)
    if user is None:
        raise NotFoundError(f"there is no user {name}")
    return user


def _refuse_last_admin(connection: Connection, user: User) -> None:
    if user.role is not Role.ADMIN:
        return
    admins = connection.execute(select(func.count()).where(USERS.c.role == Role.ADMIN.value)).scalar_one()
    if admins == 1:
        raise ConflictError(f"{user.name} is the last admin: make another user admin first")


def _user_from(row: Row[Any]) -> User:
    return User(name=row.name, role=Role(row.role), password_hash=row.password_hash, created_at=row.created_at)
