from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, MetaData, Table, insert, inspect, text
from sqlalchemy.schema import CreateTable
from tests.support.stored import make_agent, make_key

from fleetwire_server.storage import agents, commands, migrations
from fleetwire_server.storage.engines import create_write_engine, prepare_file
from fleetwire_server.storage.migrations import upgrade
from fleetwire_server.storage.store import running_store
from fleetwire_server.storage.tables import METADATA
from fleetwire_shared.errors import ConflictError


def test_migrations_make_the_tables_as_declared(connection: Connection) -> None:
    context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
    assert compare_metadata(context, METADATA) == []


@pytest.mark.parametrize("name", sorted(METADATA.tables))
def test_migrations_make_each_table_with_the_same_words(connection: Connection, name: str) -> None:
    """What no comparison of Alembic sees: ON DELETE, AUTOINCREMENT, WITHOUT ROWID."""
    made = connection.execute(text("SELECT sql FROM sqlite_master WHERE name = :name"), {"name": name}).scalar_one()
    declared = str(CreateTable(METADATA.tables[name]).compile(connection))
    assert _words(made) == _words(declared)


def _words(sql: str) -> list[str]:
    return sorted(sql.replace(",", " ").replace("(", " ( ").replace(")", " ) ").replace('"', "").split())


def test_every_foreign_key_deletes_and_has_an_index(connection: Connection) -> None:
    inspector = inspect(connection)
    for name in METADATA.tables:
        keys = inspector.get_pk_constraint(name)["constrained_columns"]
        indexed = {index["column_names"][0] for index in inspector.get_indexes(name)} | set(keys[:1])
        for key in inspector.get_foreign_keys(name):
            assert key["options"] == {"ondelete": "CASCADE"}
            assert key["constrained_columns"][0] in indexed


def test_a_second_start_changes_nothing(connection: Connection) -> None:
    upgrade(connection)


def test_what_was_lost_before_acceptance_was_recorded_is_never_offered_again(tmp_path: Path) -> None:
    prepare_file(tmp_path / "old.db")
    engine = create_write_engine(f"sqlite:///{tmp_path}/old.db")
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    row = {
        "agent_id": "agent_1", "type": "shell", "params": "{}", "timeout_seconds": 1.0, "created_at": 5.0,
        "created_by": "ada", "expires_at": 9.0, "offered_to": "i", "stdout_bytes": 0, "stderr_bytes": 0,
        "output_end": 0, "truncated": False, "late": False,
    }  # fmt: skip
    rows = [("queued", None), ("offered", None), ("accepted", None), ("running", 7.0), ("lost", None), ("failed", 8.0)]
    try:
        with engine.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "0002")
            old = Table("commands", MetaData(), autoload_with=connection)
            agents.add_agent(connection, make_agent(), make_key())
            for status, started_at in rows:
                ids = {"id": f"cmd_{status}", "status": status, "started_at": started_at}
                connection.execute(insert(old).values(row | ids))
            upgrade(connection)
            found = commands.list_commands(connection, "agent_1")
            assert [(each.status, each.accepted_at) for each in found[::-1]] == [
                ("queued", None), ("offered", None), ("accepted", 5.0), ("running", 7.0), ("lost", 5.0), ("failed", 8.0)
            ]  # fmt: skip
            assert commands.list_unsettled(connection, "agent_1", "i")[-1].status != "lost"
            assert not any(each.is_orphan or each.killed or each.killed_count for each in found)
    finally:
        engine.dispose()


async def test_a_database_of_a_newer_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/fleetwire.db"
    async with running_store(url) as store:
        await store.write(
            lambda connection: connection.execute(text("UPDATE alembic_version SET version_num = '9999'")) and None
        )
    before = (tmp_path / "fleetwire.db").read_bytes()
    with pytest.raises(ConflictError, match=r"newer version .* 9999, .* up to 0003.*backup"):
        async with running_store(url):
            pass
    assert (tmp_path / "fleetwire.db").read_bytes() == before
