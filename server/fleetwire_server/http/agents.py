"""Agents: list, detail, enrolment, labels, keys, deletion; and the report an agent may send over plain HTTP."""

import asyncio
import logging
from functools import partial

from aiohttp import web

from fleetwire_server.core.metrics import report_document
from fleetwire_server.core.tokens import hash_token, new_agent_key, new_key_for
from fleetwire_server.deploy.install_script import build_install_command, is_reachable_url
from fleetwire_server.http.agent_socket import CLOSE_KEY_REVOKED
from fleetwire_server.http.audit import audit_entry
from fleetwire_server.http.bodies import (
    AgentAnswer,
    AgentDetail,
    AgentFilter,
    AgentPatch,
    AgentRequest,
    DeletionAnswer,
    DeletionQuery,
    EnrolAnswer,
    KeyRequest,
    ReportAnswer,
    ReportRequest,
)
from fleetwire_server.http.requests import AGENT, CLIENT_ADDRESS, answer, parse_query, read_json
from fleetwire_server.keys import CHANNELS, CONFIG, INGEST, METRICS, NOW, REQUESTS, SESSIONS, STORE, STREAMS, TLS_PIN
from fleetwire_server.model import Agent, AgentKey, AuditEntry
from fleetwire_server.storage import agents, commands
from fleetwire_server.storage.audit import add_entry, audited
from fleetwire_server.storage.store import Connection
from fleetwire_shared.errors import ForbiddenError, InvalidError, NotFoundError
from fleetwire_shared.messages import MetricsReport, Uninstall, Uninstalled

logger = logging.getLogger(__name__)

UNINSTALL_SECONDS = 60.0
"""How long an agent may take to remove itself from its host."""


async def require_agent(request: web.Request) -> Agent:
    """Return the agent the address names.

    Raises:
        NotFoundError: there is none of that id."""
    agent_id = request.match_info["agent_id"]
    agent = await request.app[STORE].read(partial(agents.get_agent, agent_id=agent_id))
    if agent is None:
        raise NotFoundError(f"there is no agent {agent_id}; GET /api/agents lists those there are")
    return agent


async def list_agents(request: web.Request) -> web.Response:
    query = parse_query(request, AgentFilter)
    answers = [_agent_answer(request, agent) for agent in await request.app[STORE].read(agents.list_agents)]
    return answer(
        sorted((item for item in answers if _matches(item, query)), key=lambda item: (item.label.casefold(), item.id))
    )


def _matches(item: AgentAnswer, query: AgentFilter) -> bool:
    text = "" if query.q is None else query.q.casefold()
    return (
        (query.tag is None or query.tag in item.tags)
        and (query.status is None or query.status == item.status)
        and any(text in value.casefold() for value in (item.id, item.label, item.hostname, item.ip, item.os))
    )


async def show_agent(request: web.Request) -> web.Response:
    return answer(_agent_detail(request, await require_agent(request)))


async def enrol_agent(request: web.Request) -> web.Response:
    body = await read_json(request, AgentRequest)
    agent_id, key = new_agent_key()
    now = request.app[NOW]()
    agent = Agent(id=agent_id, label=body.label, tags=tuple(dict.fromkeys(body.tags)), created_at=now)
    agent_key = AgentKey(key_hash=hash_token(key), agent_id=agent_id, created_at=now, expires_at=None)
    entry = audit_entry(request, "agent.enrolled", agent_id, label=body.label)
    await request.app[STORE].write(audited(partial(agents.add_agent, agent=agent, key=agent_key), entry))
    request.app[INGEST].announce_agent(agent_id, "pending")
    return answer(_enrol_answer(request, agent_id, key), status=201)


async def change_agent(request: web.Request) -> web.Response:
    body = await read_json(request, AgentPatch)
    if body.label is None and body.tags is None:
        raise InvalidError("nothing to change: give label, tags or both")
    tags = None if body.tags is None else tuple(dict.fromkeys(body.tags))
    changed = await request.app[STORE].write(
        partial(agents.update_label_tags, agent_id=request.match_info["agent_id"], label=body.label, tags=tags)
    )
    return answer(_agent_detail(request, changed))


async def rotate_key(request: web.Request) -> web.Response:
    """Give the agent a new key. The old one works until the new one is first used, at most for `grace_seconds`."""
    body = await read_json(request, KeyRequest, default=KeyRequest())
    agent = await require_agent(request)
    key, now = new_key_for(agent.id), request.app[NOW]()
    agent_key = AgentKey(key_hash=hash_token(key), agent_id=agent.id, created_at=now, expires_at=None)
    rotate = partial(agents.rotate_key, key=agent_key, others_expire_at=now + body.grace_seconds)
    entry = audit_entry(request, "agent.key_rotated", agent.id, grace_seconds=body.grace_seconds)
    await request.app[STORE].write(audited(rotate, entry))
    session = request.app[SESSIONS].get(agent.id)
    if session is not None:  # it was let in by an old key: with the new one the agent will have a link of its own
        close = partial(session.link.close, CLOSE_KEY_REVOKED, "the key was replaced")
        asyncio.get_running_loop().call_later(body.grace_seconds, close)
    return answer(_enrol_answer(request, agent.id, key))


def _enrol_answer(request: web.Request, agent_id: str, key: str) -> EnrolAnswer:
    url = request.app[CONFIG].public_url
    command = build_install_command(url, key, request.app[TLS_PIN]) if is_reachable_url(url) else None
    return EnrolAnswer(agent_id=agent_id, key=key, install_command=command)


async def delete_agent(request: web.Request) -> web.Response:
    """Remove the agent and all its history; its key is void and its socket closed at once.

    With `uninstall` only when the agent has said that it is removed from its host; on any failure all stays."""
    query = parse_query(request, DeletionQuery)
    agent_id = request.match_info["agent_id"]
    if query.uninstall:
        await _uninstall(request)
    action = "agent.uninstalled" if query.uninstall else "agent.deleted"
    if not await remove_agent(request.app, agent_id, audit_entry(request, action, agent_id)):
        raise NotFoundError(f"there is no agent {agent_id}; GET /api/agents lists those there are")
    return answer(DeletionAnswer(status="deleted", uninstalled=query.uninstall))


async def remove_agent(app: web.Application, agent_id: str, entry: AuditEntry) -> bool:
    """Remove an agent, record that, and end all that is open of it; return whether it was there.

    Its key is void and its socket closed at once; its history, which may be large, goes a part at a time."""

    def remove(connection: Connection) -> bool:
        was_there = agents.delete_agent(connection, agent_id)
        if was_there:
            add_entry(connection, entry)
        return was_there

    await app[STORE].write(partial(agents.revoke_keys, agent_id=agent_id))
    session = app[SESSIONS].forget(agent_id)
    if session is not None:
        session.link.close(CLOSE_KEY_REVOKED, "the agent was deleted")
    app[STREAMS].end_agent(agent_id, "the agent was deleted")
    await app[CHANNELS].close_agent(agent_id)
    while await app[STORE].write(partial(commands.delete_output_of_agent, agent_id=agent_id)):
        continue
    if not await app[STORE].write(remove):
        return False
    app[METRICS].forget(agent_id)
    app[INGEST].announce_agent(agent_id, "deleted")
    return True


async def _uninstall(request: web.Request) -> None:
    agent = await require_agent(request)
    session = request.app[SESSIONS].require(agent.id)
    logger.info("agent %s is asked to remove itself from its host", agent.id)
    uninstalled = await request.app[REQUESTS].ask(
        session,
        lambda request_id: Uninstall(request_id=request_id, purge=True),
        Uninstalled,
        timeout_seconds=UNINSTALL_SECONDS,
    )
    logger.info("agent %s removed itself: %s", agent.id, ", ".join(uninstalled.removed))


async def receive_report(request: web.Request) -> web.Response:
    """Take a snapshot over plain HTTP, from a host where WebSocket is blocked."""
    agent_id = request.match_info["agent_id"]
    if agent_id != request[AGENT].agent_id:
        raise ForbiddenError("this key belongs to another agent")
    body = await read_json(request, ReportRequest)
    store, now = request.app[STORE], request.app[NOW]()
    agent = await require_agent(request)
    await store.write(
        partial(
            agents.record_seen,
            agent_id=agent_id,
            hostname=body.hostname,
            ip=request[CLIENT_ADDRESS],
            os=body.os,
            version=agent.version,
            facts=None,
            last_seen=now,
        )
    )
    request.app[SESSIONS].heard(agent_id, is_report=True)
    request.app[INGEST].receive_metrics(
        agent_id,
        MetricsReport(
            sampled_at=now,
            cpu_percent=body.cpu_percent,
            mem_percent=body.mem_percent,
            disk_percent=body.disk_percent,
            uptime_s=body.uptime_s,
        ),
    )
    pending = await store.read(partial(commands.count_open, agent_id=agent_id))
    return answer(ReportAnswer(status="ok", pending_commands=pending))


def _agent_answer(request: web.Request, agent: Agent) -> AgentAnswer:
    sessions = request.app[SESSIONS]
    last_seen = sessions.last_seen(agent.id, agent.last_seen)
    return AgentAnswer(
        id=agent.id,
        label=agent.label,
        hostname=agent.hostname,
        ip=agent.ip,
        os=agent.os,
        version=agent.version,
        status=sessions.status(agent.id, agent.last_seen),
        last_seen=None if last_seen is None else int(last_seen),
        tags=list(agent.tags),
    )


def _agent_detail(request: web.Request, agent: Agent) -> AgentDetail:
    item = _agent_answer(request, agent)
    newest = request.app[METRICS].newest(agent.id)
    return AgentDetail(
        **{name: getattr(item, name) for name in item.__struct_fields__},
        created_at=int(agent.created_at),
        uptime_s=None if newest is None else newest.report.uptime_s,
        metrics=None if newest is None else dict(report_document(agent.id, newest)),
        agent=dict(agent.facts),
    )
