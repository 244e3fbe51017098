"""Deployments over SSH: of one host, waited for; of many, followed."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from functools import partial

from aiohttp import web

from fleetwire_server.core.deployments import RunningDeployment, host_document
from fleetwire_server.core.events import frame_json
from fleetwire_server.core.fanout import Keep, deployment_topic
from fleetwire_server.deploy.errors import DeployError
from fleetwire_server.deploy.order import Order
from fleetwire_server.http.bodies import (
    DeployAnswer,
    DeploymentAnswer,
    DeploymentHostAnswer,
    DeploymentHostRequest,
    DeploymentListed,
    DeploymentRequest,
    DeploymentStarted,
    DeploymentStartedHost,
    DeployRequest,
)
from fleetwire_server.http.requests import USER, answer, read_json
from fleetwire_server.http.sse import EventStream, serve_events
from fleetwire_server.keys import DEPLOYMENTS, FANOUT, STORE
from fleetwire_server.model import Deployment
from fleetwire_server.storage import deployments
from fleetwire_shared.errors import InvalidError, NotFoundError

LISTED = 100
MAX_LABEL_CHARACTERS = 100
FRAMES_AT_ONCE = 256


async def deploy_agent(request: web.Request) -> web.Response:
    """Answers when the agent has dialled in, or with the step that failed. It goes on when the client leaves."""
    body = await read_json(request, DeployRequest)
    order = Order(
        host=body.host.lower(),
        port=body.ssh_port,
        ssh_user=body.ssh_user,
        ssh_key=body.ssh_key,
        label=body.label or _label_of(body.host),
        tags=tuple(dict.fromkeys(body.tags)),
        profile=body.profile,
        sudo_password=body.sudo_password,
        host_key=body.host_key,
        is_replacing=body.replace,
    )
    running = await request.app[DEPLOYMENTS].start([order], request[USER].name)
    outcome = await asyncio.shield(running.outcomes[0])
    if isinstance(outcome, DeployError):
        raise outcome
    return answer(
        DeployAnswer(
            agent_id=outcome.agent_id,
            key=outcome.key,
            status="deployed",
            deployment_id=running.id,
            host_key=outcome.host_key,
        )
    )


async def start_deployment(request: web.Request) -> web.Response:
    body = await read_json(request, DeploymentRequest)
    orders = [_order(body, host) for host in body.hosts]
    _refuse_repeated(orders)
    running = await request.app[DEPLOYMENTS].start(orders, request[USER].name)
    hosts = [DeploymentStartedHost(host=host.host, port=host.port, status=host.status) for host in running.hosts]
    return answer(DeploymentStarted(deployment_id=running.id, hosts=hosts), status=202)


def _order(body: DeploymentRequest, host: DeploymentHostRequest) -> Order:
    tags = body.tags if host.tags is None else host.tags
    return Order(
        host=host.host.lower(),
        port=host.ssh_port or body.ssh_port,
        ssh_user=host.ssh_user or body.ssh_user,
        ssh_key=host.ssh_key or body.ssh_key,
        label=host.label or _label_of(host.host),
        tags=tuple(dict.fromkeys(tags)),
        profile=host.profile or body.profile,
        sudo_password=host.sudo_password or body.sudo_password,
        host_key=host.host_key,
        is_replacing=body.replace if host.replace is None else host.replace,
    )


def _label_of(host: str) -> str:
    return host[:MAX_LABEL_CHARACTERS]


def _refuse_repeated(orders: Sequence[Order]) -> None:
    repeated = [where for where, count in Counter(order.where for order in orders).items() if count > 1]
    if repeated:
        raise InvalidError(f"hosts: {', '.join(repeated)} is there more than once; name each host once")


async def list_deployments(request: web.Request) -> web.Response:
    listed = await request.app[STORE].read(partial(deployments.list_deployments, limit=LISTED))
    return answer(
        [
            DeploymentListed(
                deployment_id=each.id,
                status=each.status,
                created_at=each.created_at,
                created_by=each.created_by,
                finished_at=each.finished_at,
                hosts=each.hosts,
                deployed=each.deployed,
                failed=each.failed,
            )
            for each in listed
        ]
    )


async def show_deployment(request: web.Request) -> web.Response:
    return answer(_deployment_answer(await _require_deployment(request)))


async def stream_deployment(request: web.Request) -> web.StreamResponse:
    """Events `deployment` (as it is now), then all `step` and `host` so far and as they come, `end` when it is over.

    `Last-Event-ID` leaves out those seen. Of a deployment of long ago there are its hosts, and no steps."""
    seen = _seen_events(request)
    running = request.app[DEPLOYMENTS].get(request.match_info["deployment_id"])
    if running is None:
        stored = await _require_deployment(request)
        return await serve_events(request, partial(_show_stored, deployment=stored))

    async def feed(stream: EventStream) -> None:
        await _follow(request, stream, running, seen)

    return await serve_events(request, feed)


async def _follow(request: web.Request, stream: EventStream, running: RunningDeployment, seen: int) -> None:
    with request.app[FANOUT].subscribe(deployment_topic(running.id), Keep.NEWEST) as changes:
        await stream.send_frames(_deployment_frame(running.record))
        position = min(seen, len(running.frames))
        while True:
            while frames := running.frames[position : position + FRAMES_AT_ONCE]:
                await stream.send_frames(b"".join(frames))
                position += len(frames)
            if running.is_over:
                return
            await changes.get()


async def _show_stored(stream: EventStream, deployment: Deployment) -> None:
    await stream.send_frames(_deployment_frame(deployment))
    for host in deployment.hosts:
        await stream.send_frames(frame_json(host_document(host), event="host"))
    await stream.send_frames(frame_json({"reason": deployment.status}, event="end"))


def _deployment_frame(deployment: Deployment) -> bytes:
    return frame_json(_deployment_answer(deployment), event="deployment")


def _seen_events(request: web.Request) -> int:
    text = request.headers.get("Last-Event-ID", "") or "0"
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise InvalidError(f"Last-Event-ID must be the id of an event of this stream, got {text[:50]!r}")
    return int(text)


async def _require_deployment(request: web.Request) -> Deployment:
    deployment_id = request.match_info["deployment_id"]
    found = await request.app[STORE].read(partial(deployments.get_deployment, deployment_id=deployment_id))
    if found is None:
        raise NotFoundError(f"there is no deployment {deployment_id}; GET /api/deployments lists the last")
    return found


def _deployment_answer(deployment: Deployment) -> DeploymentAnswer:
    return DeploymentAnswer(
        deployment_id=deployment.id,
        status=deployment.status,
        created_at=deployment.created_at,
        created_by=deployment.created_by,
        finished_at=deployment.finished_at,
        hosts=[
            DeploymentHostAnswer(
                host=host.host,
                port=host.port,
                ssh_user=host.ssh_user,
                label=host.label,
                profile=host.profile,
                status=host.status,
                agent_id=host.agent_id,
                host_key=host.host_key,
                step=host.step,
                reason=host.reason,
                detail=host.detail,
                started_at=host.started_at,
                finished_at=host.finished_at,
            )
            for host in deployment.hosts
        ],
    )
