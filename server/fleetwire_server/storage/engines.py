"""Opening the database: its file, its connections and their settings."""

import os
import sqlite3
from pathlib import Path

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry

from fleetwire_shared.errors import InvalidError, UnavailableError

BUSY_TIMEOUT_SECONDS = 5.0
"""How long a statement waits for another process that holds the database, such as `fleetwire-server user add`."""

READ_CONNECTIONS = 4
"""More reads at once wait their turn. Each connection is a thread; two cores gain nothing from more."""

WAL_KEPT_BYTES = 64 * 1024 * 1024
"""A write-ahead log that grew past this is cut back after its checkpoint."""


def parse_database_url(url: str) -> URL:
    """Return the parts of a database URL.

    Raises:
        InvalidError: not a URL of an SQLite file."""
    expected = f"the database URL must be like sqlite:////var/lib/fleetwire-server/fleetwire.db, got {url}"
    try:
        parts = make_url(url)
    except ArgumentError as err:
        # Without the text: what is no URL may still hold a password.
        raise InvalidError("the database URL must be like sqlite:////var/lib/fleetwire-server/fleetwire.db") from err
    if parts.get_backend_name() != "sqlite":
        raise InvalidError(f"the database must be SQLite (sqlite:///FILE), got {parts.get_backend_name()}")
    if parts.query:
        raise InvalidError("the database URL must have no question mark: SQLite takes no options from it here")
    if not parts.database or parts.database == ":memory:":
        # Each connection would have a database of its own.
        raise InvalidError(expected)
    return parts


def database_file(url: str) -> Path:
    """Return the file that an SQLite URL names. Raises InvalidError as `parse_database_url`."""
    database = parse_database_url(url).database
    assert database is not None  # noqa: S101 - parse_database_url refuses it
    return Path(database)


def prepare_directory(path: Path) -> None:
    """Make a directory (0700), and those above it, where they are missing. Raises UnavailableError."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as err:
        raise UnavailableError(f"the directory cannot be made: {err}") from err


def prepare_file(path: Path) -> None:
    """Make the database's directory (0700) and an empty file (0600) where they are missing.

    SQLite gives its -wal and -shm files the mode of the database.

    Raises:
        UnavailableError: the operating system refused it."""
    prepare_directory(path.parent)
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as err:
        raise UnavailableError(f"the database cannot be opened: {err}") from err


def create_write_engine(url: str) -> Engine:
    """Return the blocking engine of migrations and of the one writer.

    Its transactions take the write lock when they begin: one that upgrades later is refused at once, unwaited."""
    engine = create_engine(parse_database_url(url).set(drivername="sqlite+pysqlite"), **_CONNECT)
    _set_up(
        engine,
        begin="BEGIN IMMEDIATE",
        pragmas=(
            "PRAGMA journal_mode = WAL",
            # With NORMAL a power cut lost acknowledged rows; the grouping writer pays for FULL.
            "PRAGMA synchronous = FULL",
            "PRAGMA foreign_keys = ON",
            f"PRAGMA journal_size_limit = {WAL_KEPT_BYTES}",
        ),
    )
    return engine


def create_read_engine(url: str) -> AsyncEngine:
    """Return the engine of all readers; each of its transactions sees one state of the database."""
    engine = create_async_engine(
        parse_database_url(url).set(drivername="sqlite+aiosqlite"),
        pool_size=READ_CONNECTIONS,
        max_overflow=0,
        **_CONNECT,
    )
    _set_up(engine.sync_engine, begin="BEGIN", pragmas=("PRAGMA query_only = ON",))
    return engine


_CONNECT = {"connect_args": {"timeout": BUSY_TIMEOUT_SECONDS}}


def _set_up(engine: Engine, *, begin: str, pragmas: tuple[str, ...]) -> None:
    @event.listens_for(engine, "connect")
    def prepare(connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
        connection.isolation_level = None  # we say BEGIN, not the driver
        cursor = connection.cursor()
        try:
            for pragma in pragmas:
                cursor.execute(pragma)
        finally:
            cursor.close()

    @event.listens_for(engine, "begin")
    def do_begin(connection: Connection) -> None:
        connection.exec_driver_sql(begin)


SQLITE_MINIMUM = (3, 35, 0)
"""RETURNING came with it."""


def check_sqlite() -> None:
    """Raises UnavailableError when this Python's SQLite is too old."""
    if sqlite3.sqlite_version_info < SQLITE_MINIMUM:
        wanted = ".".join(map(str, SQLITE_MINIMUM))
        raise UnavailableError(f"SQLite {wanted} or later is needed, this Python has {sqlite3.sqlite_version}")
