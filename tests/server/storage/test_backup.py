import contextlib
import sqlite3
import stat
from functools import partial
from pathlib import Path

import pytest
from tests.support.stored import make_user

from fleetwire_server.storage import users
from fleetwire_server.storage.backup import write_backup
from fleetwire_server.storage.store import Store, running_store
from fleetwire_shared.errors import ConflictError, NotFoundError, UnavailableError


async def test_a_backup_of_a_running_store_can_be_opened(store: Store, database_url: str, tmp_path: Path) -> None:
    await store.write(partial(users.add_user, user=make_user()))
    target = tmp_path / "it's a copy.db"
    write_backup(database_url, target)
    await store.write(partial(users.delete_user, name="ada"))
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    async with running_store(f"sqlite:///{target}") as copy:
        assert await copy.read(users.list_users) == [make_user()]


async def test_nothing_is_overwritten(store: Store, database_url: str, tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("precious")
    with pytest.raises(ConflictError, match="exists already"):
        write_backup(database_url, target)
    assert target.read_text() == "precious"


def test_without_a_database_there_is_no_backup(database_url: str, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="there is no database"):
        write_backup(database_url, tmp_path / "copy.db")
    assert list(tmp_path.iterdir()) == []


def test_a_backup_that_fails_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "fleetwire.db").write_bytes(b"no database" * 1000)
    with pytest.raises(UnavailableError, match="not a database"):
        write_backup(f"sqlite:///{tmp_path}/fleetwire.db", tmp_path / "copy.db")
    assert not (tmp_path / "copy.db").exists()
    with pytest.raises(UnavailableError, match="cannot be written"):
        write_backup(f"sqlite:///{tmp_path}/fleetwire.db", tmp_path / "missing/copy.db")


def test_a_backup_of_an_empty_database_is_one(tmp_path: Path) -> None:
    (tmp_path / "fleetwire.db").touch()
    write_backup(f"sqlite:///{tmp_path}/fleetwire.db", tmp_path / "copy.db")
    with contextlib.closing(sqlite3.connect(tmp_path / "copy.db")) as copy:
        assert copy.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)
