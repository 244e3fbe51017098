"""The history of one agent's metrics, the server's own metrics, and its health."""

import asyncio
from functools import partial

from aiohttp import web

from fleetwire_server.core.metrics import build_history
from fleetwire_server.http.agents import require_agent
from fleetwire_server.http.bodies import HealthAnswer, HistoryAnswer, HistoryQuery
from fleetwire_server.http.requests import answer, parse_query
from fleetwire_server.keys import METRICS, NOW, STORE, TELEMETRY
from fleetwire_server.storage import metrics as stored_metrics
from fleetwire_shared import __version__
from fleetwire_shared.errors import InvalidError, UnavailableError

MAX_POINTS = 10_000


async def show_history(request: web.Request) -> web.Response:
    query = parse_query(request, HistoryQuery)
    end = request.app[NOW]() if query.end is None else query.end
    start = end - 3600 if query.start is None else query.start
    if start >= end:
        raise InvalidError("from: must be earlier than to")
    if (end - start) / query.step > MAX_POINTS:
        raise InvalidError(f"step: gives more than {MAX_POINTS} points; take a longer step or a shorter time")
    agent = await require_agent(request)
    metrics = request.app[METRICS]
    stored = await request.app[STORE].read(
        partial(stored_metrics.list_rollups, agent_id=agent.id, from_minute=int(start), to_minute=int(end) + 60)
    )
    points = build_history(metrics.samples(agent.id), stored, start=start, end=end, step_seconds=query.step)
    return answer(HistoryAnswer(step=query.step, points=points))


async def show_telemetry(request: web.Request) -> web.Response:
    return web.Response(
        body=await asyncio.to_thread(request.app[TELEMETRY].exposition),  # it reads /proc
        headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8", "Cache-Control": "no-store"},
    )


async def show_health(request: web.Request) -> web.Response:
    if not await request.app[STORE].is_healthy():
        raise UnavailableError("the database does not answer")
    return answer(HealthAnswer(status="ok", version=__version__))
