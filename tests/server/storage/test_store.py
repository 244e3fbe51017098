import asyncio
import contextlib
import os
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import Connection, text
from tests.support.stored import make_user

from fleetwire_server.storage import users
from fleetwire_server.storage.engines import database_file, parse_database_url
from fleetwire_server.storage.store import Store, open_store, running_store
from fleetwire_shared.errors import ConflictError, InvalidError, UnavailableError


def add(name: str) -> Callable[[Connection], None]:
    return partial(users.add_user, user=make_user(name))


async def names(store: Store) -> list[str]:
    return [user.name for user in await store.read(users.list_users)]


def names_in(url: str) -> list[str]:
    """Return what another process would see."""
    connection = sqlite3.connect(database_file(url))
    try:
        return [name for (name,) in connection.execute("SELECT name FROM users ORDER BY name")]
    finally:
        connection.close()


async def test_what_was_written_is_read(store: Store, database_url: str) -> None:
    await store.write(add("ada"))
    assert await names(store) == names_in(database_url) == ["ada"]


async def test_jobs_are_run_in_the_order_of_submission(store: Store) -> None:
    order: list[int] = []
    futures = [store.submit(lambda _, number=number: order.append(number)) for number in range(1500)]  # type: ignore[misc]
    await asyncio.gather(*futures)
    assert order == list(range(1500))


async def test_what_queued_during_a_commit_is_one_transaction(store: Store) -> None:
    def transaction(connection: Connection) -> int:
        return id(connection.get_transaction())

    assert len(set(await asyncio.gather(*(store.write(transaction) for _ in range(100))))) == 1


async def test_an_error_of_one_job_fails_it_alone(store: Store) -> None:
    await store.write(add("ada"))
    outcomes = await asyncio.gather(*(store.write(add(name)) for name in ("bob", "ada", "cy")), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [type(None), ConflictError, type(None)]
    assert await names(store) == ["ada", "bob", "cy"]
    assert await store.is_healthy()


async def test_a_failed_job_leaves_no_half(store: Store) -> None:
    def half(connection: Connection) -> None:
        add("bob")(connection)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await store.write(half)
    outcomes = await asyncio.gather(store.write(half), store.write(add("ada")), return_exceptions=True)
    assert isinstance(outcomes[0], ZeroDivisionError)
    assert await names(store) == ["ada"]


async def test_a_cancelled_writer_of_a_job_leaves_no_transaction_open(store: Store, database_url: str) -> None:
    async with asyncio.TaskGroup() as group:
        waiting = [group.create_task(store.write(add(f"user{number}"))) for number in range(20)]
        await asyncio.sleep(0)
        for task in waiting:
            task.cancel()
    # Another process gets the lock, and the store goes on.
    other = sqlite3.connect(database_file(database_url), isolation_level=None, timeout=5)
    other.execute("BEGIN IMMEDIATE")
    other.execute("ROLLBACK")
    other.close()
    await store.write(add("ada"))
    assert len(await names(store)) == 21


async def test_a_cancelled_reader_leaves_its_connection_to_others(store: Store) -> None:
    def slow(connection: Connection) -> None:
        endless = (
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 100000) SELECT max(i) FROM n"
        )
        connection.execute(text(endless))

    for _ in range(3):
        async with asyncio.TaskGroup() as group:
            reading = [group.create_task(store.read(slow)) for _ in range(6)]
            await asyncio.sleep(0)
            for task in reading:
                task.cancel()
    async with asyncio.timeout(10):
        await asyncio.gather(*(store.read(users.list_users) for _ in range(10)))
        await store.write(add("ada"))
    assert await names(store) == ["ada"]


async def test_a_reader_cannot_write(store: Store) -> None:
    with pytest.raises(UnavailableError, match="readonly"):
        await store.read(add("ada"))


async def test_a_read_sees_one_state(store: Store) -> None:
    has_read, may_go_on = asyncio.Event(), asyncio.Event()

    def count(connection: Connection) -> int:
        return int(connection.execute(text("SELECT count(*) FROM users")).scalar_one())

    def twice(connection: Connection) -> tuple[int, int]:
        from sqlalchemy.util import await_only

        first = count(connection)
        has_read.set()
        await_only(may_go_on.wait())
        return first, count(connection)

    async with asyncio.TaskGroup() as group:
        reading = group.create_task(store.read(twice))
        await has_read.wait()
        await store.write(add("ada"))
        may_go_on.set()
    assert reading.result() == (0, 0)
    assert await store.read(count) == 1


async def test_a_full_queue_refuses(database_url: str) -> None:
    async with open_store(database_url, max_queued_jobs=3) as store:  # nobody writes yet
        queued = [store.submit(add(f"user{number}")) for number in range(3)]
        with pytest.raises(UnavailableError, match="does not keep up"):
            store.submit(add("ada"))
    await asyncio.gather(*queued)
    assert names_in(database_url) == ["user0", "user1", "user2"]


async def test_what_is_queued_at_a_stop_is_written(database_url: str) -> None:
    async with running_store(database_url) as store:
        queued = [store.submit(add(f"user{number:04}")) for number in range(1200)]
    assert all(future.done() for future in queued)
    assert len(names_in(database_url)) == 1200
    with pytest.raises(UnavailableError, match="stopping"):
        await store.write(add("late"))


async def test_a_cancelled_writer_writes_what_is_queued(database_url: str) -> None:
    async with open_store(database_url) as store:
        async with asyncio.TaskGroup() as group:
            writer = group.create_task(store.run_writer())
            await store.write(add("first"))
            queued = [store.submit(add(f"user{number:04}")) for number in range(1200)]
            await asyncio.sleep(0)
            writer.cancel()
        assert all(future.done() for future in queued)
        assert len(names_in(database_url)) == 1201
        with pytest.raises(UnavailableError, match="stopping"):
            store.submit(add("late"))


async def test_another_process_may_write_meanwhile(store: Store, database_url: str) -> None:
    """As `fleetwire-server user add` does while the server runs."""
    program = (
        "import sys, asyncio\nfrom functools import partial\n"
        "from fleetwire_server.model import Role, User\n"
        "from fleetwire_server.storage import users\nfrom fleetwire_server.storage.store import running_store\n"
        "async def main():\n"
        "    async with running_store(sys.argv[1]) as store:\n"
        "        for number in range(40):\n"
        "            user = User(name=f'other{number}', role=Role.VIEWER, password_hash='x', created_at=1.0)\n"
        "            await store.write(partial(users.add_user, user=user))\n"
        "asyncio.run(main())\n"
    )
    async with asyncio.timeout(60):
        process = await asyncio.create_subprocess_exec(sys.executable, "-W", "error", "-c", program, database_url)
        number = 0
        async with asyncio.TaskGroup() as group:
            ended = group.create_task(process.wait())
            while not ended.done():
                await store.write(add(f"own{number}"))
                number += 1
    assert process.returncode == 0
    assert len(await names(store)) == 40 + number


async def test_a_lock_that_is_held_too_long_is_told_and_passes(store: Store, database_url: str) -> None:
    await store.write(lambda connection: connection.exec_driver_sql("PRAGMA busy_timeout = 100") and None)
    other = sqlite3.connect(database_file(database_url), isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    outcomes = await asyncio.gather(*(store.write(add(name)) for name in ("ada", "bob")), return_exceptions=True)
    for outcome in outcomes:
        assert isinstance(outcome, UnavailableError)
        assert str(outcome) == "the database cannot be written: database is locked"
    assert await names(store) == []
    assert not await store.is_healthy()
    other.execute("ROLLBACK")
    other.close()
    await store.write(add("ada"))
    assert await store.is_healthy()


def test_kill_9_loses_nothing_acknowledged(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/fleetwire.db"
    program = (
        "import sys, asyncio\nfrom functools import partial\n"
        "from fleetwire_server.model import Role, User\n"
        "from fleetwire_server.storage import users\nfrom fleetwire_server.storage.store import running_store\n"
        "async def add(store, name):\n"
        "    user = User(name=name, role=Role.VIEWER, password_hash='x', created_at=1.0)\n"
        "    await store.write(partial(users.add_user, user=user))\n"
        "    print(name, flush=True)\n"
        "async def main():\n"
        "    async with running_store(sys.argv[1]) as store:\n"
        "        for batch in range(1000):\n"
        "            await asyncio.gather(*(add(store, f'user{batch}.{number}') for number in range(5)))\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, url], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        acknowledged = [process.stdout.readline().strip() for _ in range(107)]
        process.send_signal(signal.SIGKILL)
        acknowledged += [line.strip() for line in process.stdout if line.endswith("\n")]
    assert process.returncode == -signal.SIGKILL
    assert set(acknowledged) <= set(names_in(url))


def test_a_process_that_used_the_store_ends() -> None:
    """A connection that is not closed would keep its thread, and the process with it."""
    program = (
        "import asyncio, sys, tempfile\n"
        "from fleetwire_server.storage.store import open_store\nfrom fleetwire_server.storage import users\n"
        "async def main():\n"
        "    with tempfile.TemporaryDirectory() as folder:\n"
        "        async with open_store(f'sqlite:///{folder}/f.db') as store, asyncio.TaskGroup() as group:\n"
        "            group.create_task(store.run_writer())\n"
        "            await asyncio.gather(*(store.read(users.list_users) for _ in range(20)))\n"
        "            await store.write(users.list_users)\n"
        "            raise SystemExit(7)\n"
        "asyncio.run(main())\n"
    )
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], timeout=30, check=False, capture_output=True, text=True
    )
    assert ended.returncode == 7, ended.stderr


def test_the_database_is_for_its_owner_only(tmp_path: Path) -> None:
    async def open_and_write() -> None:
        async with running_store(f"sqlite:///{tmp_path}/a/b/fleetwire.db") as store:
            await store.write(add("ada"))
            for file in (tmp_path / "a/b").iterdir():
                assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
            assert len(list((tmp_path / "a/b").iterdir())) == 3

    before = os.umask(0)
    try:
        asyncio.run(open_and_write())
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a/b").stat().st_mode) == 0o700


async def test_the_writer_is_durable_and_checks_references(store: Store) -> None:
    def pragmas(connection: Connection) -> list[object]:
        names = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout", "journal_size_limit")
        return [connection.exec_driver_sql(f"PRAGMA {name}").scalar_one() for name in names]

    assert await store.write(pragmas) == ["wal", 2, 1, 5000, 64 * 1024 * 1024]


async def test_what_is_no_database_is_told(tmp_path: Path) -> None:
    file = tmp_path / "fleetwire.db"
    file.write_bytes(b"This is no database at all. " * 100)
    with pytest.raises(UnavailableError, match="cannot be opened: file is not a database"):
        async with running_store(f"sqlite:///{file}"):
            pass
    with pytest.raises(UnavailableError, match="cannot be made"):
        async with running_store(f"sqlite:///{file}/db/fleetwire.db"):
            pass
    with pytest.raises(UnavailableError, match="cannot be opened"):
        async with running_store(f"sqlite:///{tmp_path}"):
            pass


@pytest.mark.parametrize(
    "url", ["", "nonsense", "postgresql://db/fleet", "sqlite://", "sqlite:///:memory:", "sqlite:////x?mode=ro"]
)
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(InvalidError, match="database"):
        parse_database_url(url)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 3 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root may mount")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], check=False, capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)


async def test_a_full_disk_is_told_reads_work_and_writes_come_back(small_disk: Path) -> None:
    def fill(connection: Connection) -> None:
        connection.execute(text("UPDATE users SET password_hash = :much WHERE name = 'ada'"), {"much": "x" * 6_000_000})

    async with running_store(f"sqlite:///{small_disk}/fleetwire.db") as store:
        await store.write(add("ada"))
        with pytest.raises(UnavailableError, match="cannot be written: database or disk is full"):
            await store.write(fill)
        assert not await store.is_healthy()
        filler = small_disk / "filler"
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):  # until no space is left
            while file.write(b"x" * 4096):
                pass
        outcomes = await asyncio.gather(
            *(store.write(add(f"user{number}" * 2000)) for number in range(300)), return_exceptions=True
        )
        refused = [outcome for outcome in outcomes if outcome is not None]
        assert refused
        assert all(isinstance(outcome, UnavailableError) for outcome in refused)
        assert len(await names(store)) == 301 - len(refused)
        filler.unlink()
        await store.write(add("bob"))
        assert await store.is_healthy()
        assert "bob" in await names(store)


async def test_closing_the_store_ends_its_writer(database_url: str) -> None:
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        async with open_store(database_url) as store:
            writer = group.create_task(store.run_writer())
            await store.write(add("first"))
            queued = [store.submit(add(f"user{number:04}")) for number in range(1200)]
            await asyncio.sleep(0)
        await writer
    await asyncio.gather(*queued)
    assert len(names_in(database_url)) == 1201
