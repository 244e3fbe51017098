"""Run by Alembic for each upgrade; the connection and its transaction are the caller's (see upgrade)."""

from alembic import context

from fleetwire_server.storage.tables import METADATA

# SQLite's DDL is transactional; Alembic assumes the driver's old habit of committing before it.
context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
    transactional_ddl=True,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
