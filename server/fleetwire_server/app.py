"""create_app: the one place where the server's parts are joined."""

import time
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import partial

from aiohttp import web

from fleetwire_server.config import ServerConfig
from fleetwire_server.core.access import Access
from fleetwire_server.core.channels import Channels
from fleetwire_server.core.clock import Clock
from fleetwire_server.core.deployments import Deployments
from fleetwire_server.core.dispatch import Dispatch
from fleetwire_server.core.fanout import Fanout
from fleetwire_server.core.ingest import Ingest
from fleetwire_server.core.logs import Logs
from fleetwire_server.core.metrics import Metrics
from fleetwire_server.core.requests import Requests
from fleetwire_server.core.sessions import Sessions
from fleetwire_server.core.streams import OpenStreams
from fleetwire_server.core.telemetry import Telemetry
from fleetwire_server.core.throttle import LoginThrottle
from fleetwire_server.core.tokens import new_channel_id, new_request_id
from fleetwire_server.deploy.bundle import read_bundle
from fleetwire_server.deploy.order import Terms, build_terms
from fleetwire_server.http.agents import remove_agent
from fleetwire_server.http.connections import CONNECTIONS, ConnectionGuard
from fleetwire_server.http.middleware import errors_to_problems, identify, note_answer, secure_headers
from fleetwire_server.http.routes import add_routes
from fleetwire_server.keys import (
    ACCESS,
    BUNDLE,
    CHANNELS,
    CONFIG,
    DEPLOYMENTS,
    DISPATCH,
    FANOUT,
    INGEST,
    LOGIN_THROTTLE,
    LOGS,
    METRICS,
    NOW,
    REQUESTS,
    SESSIONS,
    STORE,
    STREAMS,
    TELEMETRY,
    TLS_PIN,
)
from fleetwire_server.storage.store import open_store
from fleetwire_server.tls import find_pin
from fleetwire_shared.errors import UnavailableError

MAX_BODY_BYTES = 1024 * 1024
"""Of a JSON body; files are streamed and have no limit."""


def create_app(config: ServerConfig, *, now: Clock = time.time) -> web.Application:
    """Return the application; its loops are `main.serve`'s to run."""
    app = web.Application(middlewares=[identify, secure_headers, errors_to_problems], client_max_size=MAX_BODY_BYTES)
    app[CONFIG] = config
    app[NOW] = now
    app[CONNECTIONS] = ConnectionGuard(config)
    app[BUNDLE] = read_bundle(config.agent_bundle)
    app[TLS_PIN] = find_pin(config)
    app[FANOUT] = Fanout()
    app[METRICS] = Metrics()
    app[SESSIONS] = Sessions(now=now)
    app[STREAMS] = OpenStreams()
    app[CHANNELS] = Channels(new_channel_id=new_channel_id, max_per_agent=config.max_channels_per_agent)
    app[REQUESTS] = Requests(new_request_id=new_request_id)
    app[LOGS] = Logs(sessions=app[SESSIONS], channels=app[CHANNELS])
    app[LOGIN_THROTTLE] = LoginThrottle(failures_per_minute=config.login_failures_per_minute)
    app[TELEMETRY] = Telemetry(partial(_read_gauges, app))
    app.cleanup_ctx.append(_open_storage)  # opened first, closed last
    app.on_shutdown.append(_wake_streams_and_close_sockets)  # else stopping waits for each of them
    app.on_response_prepare.append(note_answer)
    add_routes(app)
    return app


async def _open_storage(app: web.Application) -> AsyncIterator[None]:
    """Open the database and make the parts that rest on it."""
    now = app[NOW]
    async with open_store(app[CONFIG].database_url) as store:
        app[STORE] = store
        app[ACCESS] = Access(store=store, streams=app[STREAMS], now=now)
        app[INGEST] = Ingest(store=store, sessions=app[SESSIONS], metrics=app[METRICS], fanout=app[FANOUT], now=now)
        app[DISPATCH] = Dispatch(store=store, sessions=app[SESSIONS], fanout=app[FANOUT], now=now)
        app[DEPLOYMENTS] = Deployments(
            store=store,
            sessions=app[SESSIONS],
            fanout=app[FANOUT],
            make_terms=partial(_make_terms, app),
            drop_agent=partial(remove_agent, app),
            announce=app[INGEST].announce_agent,
            now=now,
        )
        yield
        with suppress(UnavailableError):  # a full disk must not keep the server from stopping
            await app[INGEST].flush(before=float("inf"))


def _make_terms(app: web.Application) -> Terms:
    config = app[CONFIG]
    return build_terms(
        bundle=app[BUNDLE],
        public_url=config.public_url,
        tls_pin=app[TLS_PIN],
        key_directory=config.ssh_key_dir,
        known_hosts=config.ssh_known_hosts,
        host_key_rule=config.deploy_host_keys,
    )


async def _wake_streams_and_close_sockets(app: web.Application) -> None:
    app[STREAMS].end_all("the server is stopping")
    await app[DEPLOYMENTS].stop()  # while agents are connected and the database is written
    for session in app[SESSIONS].all():
        session.link.close(1012, "the server is restarting")


def _read_gauges(app: web.Application) -> dict[str, tuple[str, float]]:
    return {
        "fleetwire_agents_connected": ("Agents with an open control socket.", len(app[SESSIONS].all())),
        "fleetwire_channels_open": ("Files and logs under way.", len(app[CHANNELS])),
        "fleetwire_streams_open": ("Event streams that are viewed.", len(app[STREAMS])),
        "fleetwire_connections_open": ("TCP connections.", len(app[CONNECTIONS])),
    }
