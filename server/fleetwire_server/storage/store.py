"""The database behind one writer and several readers.

Jobs are plain functions of a SQLAlchemy Connection (the other files of this folder). What queued while the last
commit ran is the next transaction, so that one fsync pays for many jobs; there is no timer."""

import asyncio
import sqlite3
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine

from fleetwire_shared.errors import UnavailableError

from .engines import check_sqlite, create_read_engine, create_write_engine, database_file
from .engines import prepare_file as prepare_database_file
from .migrations import upgrade

# Connection too: core names it in its jobs' signatures, and knows no SQLAlchemy.
__all__ = ["Connection", "Store", "open_store", "running_store"]

T = TypeVar("T")

MAX_QUEUED_JOBS = 10_000
"""With more waiting, the disk does not keep up and `submit` refuses."""

MAX_JOBS_IN_TRANSACTION = 500
"""Past some hundred jobs the fsync is paid for; more would only hold the lock longer."""

HEALTH_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class _Queued:
    job: Callable[[Connection], Any]
    done: asyncio.Future[Any]


@dataclass(frozen=True, slots=True)
class _Outcome:
    """How one job ended: committed with a result, or undone with an error."""

    result: Any = None
    error: Exception | None = None


class Store:
    """Reads and writes of one database. Made by `open_store`; writes need `run_writer` to be running."""

    def __init__(self, writer: Engine, reader: AsyncEngine, *, max_queued_jobs: int = MAX_QUEUED_JOBS) -> None:
        self._writer = writer
        self._reader = reader
        # Jobs run in a thread of their own: through aiosqlite each statement would be a round trip between
        # two threads, which measured 3 to 8 times slower and kept the event loop busy.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store-writer")
        self._max_queued_jobs = max_queued_jobs
        self._queue: deque[_Queued] = deque()
        self._wakeup = asyncio.Event()
        self._is_stopping = False
        self._is_writable = True

    async def write(self, job: Callable[[Connection], T]) -> T:
        """Run a job in the writer and return its result when it is committed, that is, safe from a power cut.

        The job runs in the writer's thread, and once more when the transaction it shared failed because of another:
        it must do nothing but use the connection. An error it raises is raised here and undoes this job alone.
        A caller that is cancelled while it waits does not take the job back.

        Raises:
            UnavailableError: the database cannot be written now, the queue is full, or the store was stopped."""
        return await self.submit(job)

    def submit(self, job: Callable[[Connection], T]) -> "asyncio.Future[T]":
        """Queue a job as `write` does, and return at once; jobs are run in the order of these calls.

        The future must be looked at: an error of the job is told only there.

        Raises:
            UnavailableError: the queue is full, or the store was stopped."""
        if self._is_stopping:
            raise UnavailableError("the database is not written any more: the server is stopping")
        if len(self._queue) >= self._max_queued_jobs:
            raise UnavailableError("the database does not keep up with what is to be written; try again later")
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._queue.append(_Queued(job, done))
        self._wakeup.set()
        return done

    async def read(self, job: Callable[[Connection], T]) -> T:
        """Run a job that only reads, on a connection of its own and in one state of the database.

        Raises:
            UnavailableError: the database cannot be read now."""
        try:
            async with self._reader.connect() as connection:
                return await connection.run_sync(job)
        except (DBAPIError, PoolTimeoutError) as err:
            raise _as_told(err, "read") from err

    async def is_healthy(self) -> bool:
        """Return whether the database answers a read in time and the last transaction could be written."""
        try:
            async with asyncio.timeout(HEALTH_SECONDS):
                await self.read(_read_one)
        except (UnavailableError, TimeoutError):
            return False
        return self._is_writable

    async def run_writer(self) -> None:
        """Write what is queued until `stop` is called or this is cancelled; either way, all that was queued first."""
        try:
            while self._queue or not self._is_stopping:
                await self._wakeup.wait()
                self._wakeup.clear()
                while self._queue:
                    await _to_its_end(self._write_batch())
        finally:
            self._is_stopping = True
            await _to_its_end(self._write_queued())

    def stop(self) -> None:
        """Refuse further writes, and let `run_writer` return when those queued are written."""
        self._is_stopping = True
        self._wakeup.set()

    async def close(self) -> None:
        """Write what is still queued (nothing, when `run_writer` ran) and close all connections."""
        self.stop()
        await _to_its_end(self._close())

    async def _close(self) -> None:
        try:
            await self._write_queued()
        finally:
            # aiosqlite's threads are no daemons: a connection left open would hang the exit.
            await self._reader.dispose()
            await asyncio.get_running_loop().run_in_executor(self._thread, self._writer.dispose)
            self._thread.shutdown()

    async def _write_queued(self) -> None:
        while self._queue:
            await self._write_batch()

    async def _write_batch(self) -> None:
        count = min(len(self._queue), MAX_JOBS_IN_TRANSACTION)
        batch = [self._queue.popleft() for _ in range(count)]
        jobs = [queued.job for queued in batch]
        outcomes = await asyncio.get_running_loop().run_in_executor(self._thread, _commit, self._writer, jobs)
        for queued, outcome in zip(batch, outcomes, strict=True):
            self._tell(queued.done, outcome)

    def _tell(self, done: asyncio.Future[Any], outcome: _Outcome) -> None:
        told = outcome.error and _as_told(outcome.error, "written")
        self._is_writable = told is outcome.error  # else the database is to blame
        if done.done():
            return  # its caller was cancelled
        if told is not None:
            if told is not outcome.error:
                told.__cause__ = outcome.error
            done.set_exception(told)
        else:
            done.set_result(outcome.result)


@asynccontextmanager
async def open_store(url: str, *, max_queued_jobs: int = MAX_QUEUED_JOBS) -> AsyncIterator[Store]:
    """Open the database, made or migrated as needed; `run_writer` is the caller's to run.

    At the exit everything queued is written before the connections are closed.

    Raises:
        InvalidError: `url` is not of an SQLite file.
        UnavailableError: the database cannot be opened.
        ConflictError: the database is of a newer version of this program."""
    await asyncio.to_thread(_prepare, url)
    store = Store(create_write_engine(url), create_read_engine(url), max_queued_jobs=max_queued_jobs)
    try:
        yield store
    finally:
        await store.close()


@asynccontextmanager
async def running_store(url: str) -> AsyncIterator[Store]:
    """Open the database and run its writer too: for commands and tests, which have no TaskGroup to run it in.

    No TaskGroup here: it would stay open across the yield, and a failing writer would cancel the caller.
    A writer that fails refuses all writes, and its error is raised at the exit."""
    async with open_store(url) as store:
        writer = asyncio.get_running_loop().create_task(store.run_writer())
        try:
            yield store
        finally:
            store.stop()
            await writer


def _prepare(url: str) -> None:
    check_sqlite()
    prepare_database_file(database_file(url))
    engine = create_write_engine(url)
    try:
        with engine.begin() as connection:
            upgrade(connection)
    except (DBAPIError, sqlite3.Error) as err:
        raise UnavailableError(f"the database cannot be opened: {getattr(err, 'orig', None) or err}") from err
    finally:
        engine.dispose()


def _commit(engine: Engine, jobs: Sequence[Callable[[Connection], Any]]) -> list[_Outcome]:
    """Run all jobs in one transaction, or, when that fails, each in its own."""
    has_begun = False
    try:
        with engine.begin() as connection:
            has_begun = True
            outcomes = [_Outcome(result=job(connection)) for job in jobs]
    except Exception as err:  # noqa: BLE001 - the border of a job: its error is its caller's
        if has_begun and len(jobs) > 1:
            return [outcome for job in jobs for outcome in _commit(engine, [job])]
        return [_Outcome(error=err)] * len(jobs)
    return outcomes


def _read_one(connection: Connection) -> None:
    connection.execute(text("SELECT 1"))


def _as_told(error: Exception, verb: str) -> Exception:
    """Return the error a caller is told: what the database is to blame for, now, becomes UnavailableError.

    A violated constraint or a malformed statement is a mistake of the job and stays as it is."""
    if isinstance(error, PoolTimeoutError):
        return UnavailableError(f"the database cannot be {verb}: all connections are busy")
    if isinstance(error, DBAPIError) and not isinstance(error, IntegrityError | ProgrammingError | DataError):
        return UnavailableError(f"the database cannot be {verb}: {error.orig}")
    return error


async def _to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Await `work` until it is done, also when cancelled meanwhile; the cancellation is raised afterwards.

    A commit that was interrupted would be neither known as done nor safe to do again."""
    task = asyncio.get_running_loop().create_task(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as err:
            cancelled = err
    task.result()
    if cancelled is not None:
        raise cancelled
