"""Logins and the one-use tickets of their streams. Only hashes of tokens are stored."""

from collections.abc import Collection
from itertools import islice

from sqlalchemy import Connection, bindparam, delete, insert, select

from fleetwire_server.model import Role, StreamTicket, UserSession
from fleetwire_shared.errors import UnauthorizedError

from .tables import SESSIONS, STREAM_TICKETS, USERS

_HASHES_PER_QUERY = 1000  # SQLite takes some ten thousand values in one statement; PostgreSQL fewer with comfort

# Read at every request: building the statement would take longer than running it.
_GET = (
    select(SESSIONS, USERS.c.role)
    .join_from(SESSIONS, USERS)
    .where(SESSIONS.c.token_hash == bindparam("token_hash"), SESSIONS.c.expires_at > bindparam("now"))
)


def add_session(connection: Connection, session: UserSession) -> None:
    """Store a login. `session.role` is not stored: a session has the role its user has.

    Raises:
        UnauthorizedError: the user was removed meanwhile."""
    if connection.execute(select(USERS.c.name).where(USERS.c.name == session.username)).one_or_none() is None:
        raise UnauthorizedError("wrong username or password")
    connection.execute(
        insert(SESSIONS).values(
            token_hash=session.token_hash,
            username=session.username,
            created_at=session.created_at,
            expires_at=session.expires_at,
        )
    )


def get_session(connection: Connection, token_hash: str, now: float) -> UserSession | None:
    """Return the session with its user's present role; None when there is none or it has expired."""
    row = connection.execute(_GET, {"token_hash": token_hash, "now": now}).one_or_none()
    if row is None:
        return None
    return UserSession(
        token_hash=row.token_hash,
        username=row.username,
        role=Role(row.role),
        created_at=row.created_at,
        expires_at=row.expires_at,
    )


def list_valid(connection: Connection, token_hashes: Collection[str], now: float) -> set[str]:
    """Return those of the given sessions that exist and have not expired."""
    valid: set[str] = set()
    left = iter(token_hashes)
    while some := list(islice(left, _HASHES_PER_QUERY)):
        found = select(SESSIONS.c.token_hash).where(SESSIONS.c.token_hash.in_(some), SESSIONS.c.expires_at > now)
        valid.update(connection.execute(found).scalars())
    return valid


def delete_session(connection: Connection, token_hash: str) -> bool:
    """Return whether there was such a session."""
    return connection.execute(delete(SESSIONS).where(SESSIONS.c.token_hash == token_hash)).rowcount > 0


def delete_expired(connection: Connection, now: float) -> int:
    """Remove expired sessions and tickets; return how many."""
    tickets = connection.execute(delete(STREAM_TICKETS).where(STREAM_TICKETS.c.expires_at <= now)).rowcount
    return tickets + connection.execute(delete(SESSIONS).where(SESSIONS.c.expires_at <= now)).rowcount


def add_ticket(connection: Connection, ticket: StreamTicket) -> None:
    """Raises UnauthorizedError when the ticket's session has ended meanwhile."""
    session = select(SESSIONS.c.token_hash).where(SESSIONS.c.token_hash == ticket.session_token_hash)
    if connection.execute(session).one_or_none() is None:
        raise UnauthorizedError("the session has ended; log in again")
    connection.execute(
        insert(STREAM_TICKETS).values(
            ticket_hash=ticket.ticket_hash,
            session_token_hash=ticket.session_token_hash,
            expires_at=ticket.expires_at,
        )
    )


def take_ticket(connection: Connection, ticket_hash: str, now: float) -> UserSession | None:
    """Use up a ticket and return the session it stands for; None when it was used, has expired or never was.

    This writes: of two requests with one ticket, one gets it."""
    row = connection.execute(
        delete(STREAM_TICKETS)
        .where(STREAM_TICKETS.c.ticket_hash == ticket_hash)
        .returning(STREAM_TICKETS.c.session_token_hash, STREAM_TICKETS.c.expires_at)
    ).one_or_none()
    if row is None or row.expires_at <= now:
        return None
    return get_session(connection, row.session_token_hash, now)
