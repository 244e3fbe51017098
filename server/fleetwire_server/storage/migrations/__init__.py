"""The history of tables.py as Alembic migrations, which are part of the package and run at every start."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from fleetwire_shared.errors import ConflictError


def upgrade(connection: Connection) -> None:
    """Bring the database to this version, within the caller's transaction.

    Raises:
        ConflictError: a newer version of this program has migrated it already."""
    config = Config()
    # The option is read with %-interpolation.
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = connection
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    present = MigrationContext.configure(connection).get_current_heads()
    unknown = sorted(set(present) - known)
    if unknown:
        raise ConflictError(
            f"the database is of a newer version (its schema is {', '.join(unknown)}, this version knows up to"
            f" {max(known)}): install that version again, or restore a backup made before the upgrade"
        )
    command.upgrade(config, "head")
