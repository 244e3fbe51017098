from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Connection

from fleetwire_server.storage.engines import create_write_engine, prepare_file
from fleetwire_server.storage.migrations import upgrade
from fleetwire_server.storage.store import Store, running_store


@pytest.fixture
def database_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/db/fleetwire.db"


@pytest.fixture
async def store(database_url: str) -> AsyncIterator[Store]:
    async with running_store(database_url) as store:
        yield store


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[Connection]:
    """A transaction of the writer's kind on a migrated database."""
    prepare_file(tmp_path / "fleetwire.db")
    engine = create_write_engine(f"sqlite:///{tmp_path}/fleetwire.db")
    try:
        with engine.begin() as connection:
            upgrade(connection)
            yield connection
    finally:
        engine.dispose()
