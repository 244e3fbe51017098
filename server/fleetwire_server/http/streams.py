"""Event streams of one agent's metrics and logs, and of the whole fleet."""

from contextlib import aclosing

from aiohttp import web

from fleetwire_server.core.events import frame_json
from fleetwire_server.core.fanout import FLEET_TOPIC, Keep, metrics_topic
from fleetwire_server.core.logs import LogQuery, LogStart
from fleetwire_server.core.metrics import report_document
from fleetwire_server.http.agents import require_agent
from fleetwire_server.http.bodies import LogStreamQuery
from fleetwire_server.http.files import check_path
from fleetwire_server.http.requests import parse_query, read_header
from fleetwire_server.http.sse import EventStream, serve_events
from fleetwire_server.keys import FANOUT, LOGS, METRICS
from fleetwire_shared.errors import InvalidError

MAX_CURSOR_CHARACTERS = 1024


async def stream_metrics(request: web.Request) -> web.StreamResponse:
    """A snapshot at once and at each round of the agent; a slow viewer gets the newest only."""
    agent = await require_agent(request)

    async def feed(stream: EventStream) -> None:
        with request.app[FANOUT].subscribe(metrics_topic(agent.id), Keep.NEWEST) as reports:
            newest = request.app[METRICS].newest(agent.id)
            if newest is not None:
                await stream.send_frames(frame_json(report_document(agent.id, newest)))
            while True:
                await stream.send_frames(await reports.get())

    return await serve_events(request, feed, agent.id)


async def stream_logs(request: web.Request) -> web.StreamResponse:
    """One event a line, its `id:` the line's cursor; also `gap`, `rotated`, `waiting` (the agent is away), `end`."""
    query = parse_query(request, LogStreamQuery)
    _check(query)
    cursor = read_header(request, "Last-Event-ID")
    if cursor is not None and len(cursor) > MAX_CURSOR_CHARACTERS:
        raise InvalidError("Last-Event-ID must be the id of an event of this stream")
    agent = await require_agent(request)
    log = LogQuery(
        source=query.source,
        unit=query.unit,
        path=query.path,
        priority=query.priority,
        grep=query.grep,
        boot=query.boot,
        kernel=query.kernel,
    )
    start = LogStart(lines=query.lines, since=query.since, cursor=cursor)
    async with request.app[LOGS].view(agent.id, log, start) as viewer:

        async def feed(stream: EventStream) -> None:
            async with aclosing(viewer.follow()) as batches:
                async for frames in batches:
                    await stream.send_frames(frames)

        return await serve_events(request, feed, agent.id)


def _check(query: LogStreamQuery) -> None:
    if query.path is not None:
        check_path(query.path, "path")
    if query.source == "file":
        if query.path is None:
            raise InvalidError("path: is missing; source=file needs the absolute path of a file")
        misplaced = [name for name in ("unit", "since", "priority", "boot") if getattr(query, name) is not None]
        misplaced += ["kernel"] if query.kernel else []
    else:
        misplaced = ["path"] if query.path is not None else []
    if misplaced:
        raise InvalidError(f"{', '.join(misplaced)}: cannot be used with source={query.source}")
    if query.kernel and query.unit is not None:
        raise InvalidError("unit: cannot be used with kernel=true; the kernel's messages belong to no unit")


async def stream_events(request: web.Request) -> web.StreamResponse:
    """Events `agent` and `command` of the whole fleet, each with the new status."""

    async def feed(stream: EventStream) -> None:
        with request.app[FANOUT].subscribe(FLEET_TOPIC, Keep.ALL) as events:
            while True:
                await stream.send_frames(await events.get())

    return await serve_events(request, feed)
