"""A copy of the database while it is in use."""

import contextlib
import os
import sqlite3
from pathlib import Path

from fleetwire_shared.errors import ConflictError, NotFoundError, UnavailableError

from .engines import BUSY_TIMEOUT_SECONDS, database_file


def write_backup(database_url: str, target: Path) -> None:
    """Write one consistent state of the database to a new file that only its owner can read; blocks.

    The server may run meanwhile: all that was committed when this began is in the copy. Durable at return.

    Raises:
        NotFoundError: there is no database.
        ConflictError: the target exists.
        UnavailableError: the database cannot be read or the target not be written; no target is left."""
    source = database_file(database_url)
    if not source.is_file():
        raise NotFoundError(f"there is no database {source}")
    try:
        # VACUUM INTO takes an empty file, and keeps its mode.
        descriptor = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError as err:
        raise ConflictError(f"{target} exists already: name a file that does not") from err
    except OSError as err:
        raise UnavailableError(f"the backup cannot be written: {err}") from err
    try:
        _vacuum_into(source, target)
        os.fsync(descriptor)
    except (sqlite3.Error, OSError) as err:
        with contextlib.suppress(OSError):
            target.unlink()
        raise UnavailableError(f"the backup cannot be written: {err}") from err
    finally:
        os.close(descriptor)


def _vacuum_into(source: Path, target: Path) -> None:
    uri = f"{source.absolute().as_uri()}?mode=rw"
    with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=BUSY_TIMEOUT_SECONDS)) as connection:
        connection.execute("VACUUM INTO ?", (str(target),))
