"""serve(): opens the port, owns the background loops, stops cleanly."""

import asyncio
import gc
import signal
import sys
from collections.abc import Coroutine
from functools import partial
from typing import Any

from aiohttp import web

from fleetwire_server.app import create_app
from fleetwire_server.config import ServerConfig
from fleetwire_server.core.passwords import hash_password, random_password
from fleetwire_server.core.retention import run_retention
from fleetwire_server.http.connections import CONNECTIONS, KEEP_ALIVE_SECONDS
from fleetwire_server.keys import ACCESS, CONFIG, DEPLOYMENTS, DISPATCH, INGEST, LOGS, NOW, STORE
from fleetwire_server.logs import configure_logging
from fleetwire_server.model import Role, User
from fleetwire_server.storage import users
from fleetwire_server.storage.engines import prepare_directory
from fleetwire_server.storage.store import Connection
from fleetwire_server.tls import server_context
from fleetwire_shared.errors import FleetwireError, UnavailableError

SHUTDOWN_SECONDS = 5.0
"""How long requests under way may take to end when the server stops."""

LISTEN_BACKLOG = 1024

MAX_REQUEST_LINE_BYTES = 64 * 1024
"""Takes every path a host may have, percent-encoded; aiohttp refuses longer ones itself, and in plain text."""


async def serve(config: ServerConfig) -> None:
    """Run the server until SIGTERM or SIGINT.

    Raises:
        FleetwireError: it cannot start, and why."""
    configure_logging(config)
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    app = create_app(config)
    runner = web.AppRunner(
        app,
        access_log=None,
        shutdown_timeout=SHUTDOWN_SECONDS,
        keepalive_timeout=KEEP_ALIVE_SECONDS,
        max_line_size=MAX_REQUEST_LINE_BYTES,
    )
    for directory in (config.data_dir, config.spool_dir):  # one by one: the mode is not that of parents
        prepare_directory(directory)
    await runner.setup()
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(loop) for loop in _loops(app)]
            try:
                await _ensure_admin(app)
                server = await _listen(app, runner)
                _freeze_start_up_objects()
                await stopped.wait()
                server.close()
            finally:
                await runner.cleanup()
                for task in tasks:
                    task.cancel()
    except* FleetwireError as errors:
        raise errors.exceptions[0] from None


def _loops(app: web.Application) -> list[Coroutine[Any, Any, None]]:
    config = app[CONFIG]
    return [
        app[STORE].run_writer(),
        app[DISPATCH].run_expiry(),
        app[INGEST].run_flush(),
        app[LOGS].run(),
        app[DEPLOYMENTS].run(),
        app[ACCESS].run_sweep(),
        run_retention(
            app[STORE],
            command_days=config.command_retention_days,
            metrics_days=config.metrics_retention_days,
            now=app[NOW],
        ),
    ]


async def _listen(app: web.Application, runner: web.AppRunner) -> asyncio.Server:
    config = app[CONFIG]
    if runner.server is None:
        raise UnavailableError("the application was not set up")
    tls = server_context(config)
    factory = app[CONNECTIONS].protocol_factory(runner.server)
    try:
        server = await asyncio.get_running_loop().create_server(
            factory, config.listen_host, config.listen_port, ssl=tls, backlog=LISTEN_BACKLOG
        )
    except OSError as err:
        raise UnavailableError(
            f"cannot listen on {config.listen}: {err.strerror or err}; choose another address with --listen HOST:PORT"
        ) from err
    port = server.sockets[0].getsockname()[1]
    host = f"[{config.listen_host}]" if ":" in config.listen_host else config.listen_host
    _say(f"Fleetwire listens on {'https' if tls else 'http'}://{host}:{port}")
    return server


async def _ensure_admin(app: web.Application) -> None:
    """At the very first start, make the user `admin`."""
    if await app[STORE].read(users.list_users):
        return
    given = app[CONFIG].admin_password
    password = given or random_password()
    password_hash = await asyncio.to_thread(hash_password, password)
    admin = User(name="admin", role=Role.ADMIN, password_hash=password_hash, created_at=app[NOW]())
    await app[STORE].write(partial(_add_first_user, user=admin))
    if given is None:
        _say(f"The user admin was made; its password, shown this once, is: {password}")


def _add_first_user(connection: Connection, *, user: User) -> None:
    if not users.list_users(connection):
        users.add_user(connection, user)


def _freeze_start_up_objects() -> None:
    """Take all that lives from start to end out of the garbage collector's rounds."""
    gc.collect()
    gc.freeze()


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
