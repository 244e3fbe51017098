"""Deployments over SSH: what was asked for and how it ended on each host."""

from typing import Any

from sqlalchemy import Connection, Row, case, delete, func, insert, select, update

from fleetwire_server.model import Deployment, DeploymentHost, DeploymentStatus, DeploymentSummary, HostStatus

from .tables import AGENTS, DEPLOYMENT_HOSTS, DEPLOYMENTS

_INTERRUPTED = "the server stopped before this host was done: deploy to it again"
_OPEN = (HostStatus.WAITING.value, HostStatus.RUNNING.value)


def add_deployment(connection: Connection, deployment: Deployment) -> None:
    connection.execute(
        insert(DEPLOYMENTS).values(
            id=deployment.id,
            status=deployment.status.value,
            created_at=deployment.created_at,
            created_by=deployment.created_by,
            finished_at=deployment.finished_at,
        )
    )
    connection.execute(
        insert(DEPLOYMENT_HOSTS),
        [
            {"deployment_id": deployment.id, "position": position, **_values(host)}
            for position, host in enumerate(deployment.hosts)
        ],
    )


def update_host(connection: Connection, deployment_id: str, position: int, host: DeploymentHost) -> None:
    """Store how far the deployment to one of its hosts is."""
    connection.execute(
        update(DEPLOYMENT_HOSTS)
        .where(DEPLOYMENT_HOSTS.c.deployment_id == deployment_id, DEPLOYMENT_HOSTS.c.position == position)
        .values(_values(host))
    )


def finish_deployment(connection: Connection, deployment_id: str, status: DeploymentStatus, finished_at: float) -> None:
    connection.execute(
        update(DEPLOYMENTS)
        .where(DEPLOYMENTS.c.id == deployment_id)
        .values(status=status.value, finished_at=finished_at)
    )


def get_deployment(connection: Connection, deployment_id: str) -> Deployment | None:
    row = connection.execute(select(DEPLOYMENTS).where(DEPLOYMENTS.c.id == deployment_id)).one_or_none()
    if row is None:
        return None
    hosts = connection.execute(
        select(DEPLOYMENT_HOSTS)
        .where(DEPLOYMENT_HOSTS.c.deployment_id == deployment_id)
        .order_by(DEPLOYMENT_HOSTS.c.position)
    )
    return Deployment(
        id=row.id,
        status=DeploymentStatus(row.status),
        created_at=row.created_at,
        created_by=row.created_by,
        finished_at=row.finished_at,
        hosts=tuple(_host_from(host) for host in hosts),
    )


def list_deployments(connection: Connection, limit: int) -> list[DeploymentSummary]:
    """Return the last deployments, newest first."""
    newest = select(DEPLOYMENTS).order_by(DEPLOYMENTS.c.sequence.desc()).limit(limit).subquery()
    status = DEPLOYMENT_HOSTS.c.status
    rows = connection.execute(
        select(
            newest,
            func.count(status).label("hosts"),
            func.sum(case((status == HostStatus.DEPLOYED.value, 1), else_=0)).label("deployed"),
            func.sum(case((status.in_((*_OPEN, HostStatus.DEPLOYED.value)), 0), else_=1)).label("failed"),
        )
        .join_from(newest, DEPLOYMENT_HOSTS, newest.c.id == DEPLOYMENT_HOSTS.c.deployment_id)
        .group_by(newest.c.sequence)
        .order_by(newest.c.sequence.desc())
    )
    return [
        DeploymentSummary(
            id=row.id,
            status=DeploymentStatus(row.status),
            created_at=row.created_at,
            created_by=row.created_by,
            finished_at=row.finished_at,
            hosts=row.hosts,
            deployed=row.deployed,
            failed=row.failed,
        )
        for row in rows
    ]


def interrupt_running(connection: Connection, now: float) -> list[str]:
    """End what a server that is no more had begun, and remove the agents of it that never connected; return their ids.

    An agent that did connect stays: its host has it installed."""
    running = select(DEPLOYMENTS.c.id).where(DEPLOYMENTS.c.status == DeploymentStatus.RUNNING.value)
    open_hosts = DEPLOYMENT_HOSTS.c.deployment_id.in_(running) & DEPLOYMENT_HOSTS.c.status.in_(_OPEN)
    begun = select(DEPLOYMENT_HOSTS.c.agent_id).where(open_hosts, DEPLOYMENT_HOSTS.c.agent_id.is_not(None))
    removed = connection.execute(
        delete(AGENTS).where(AGENTS.c.id.in_(begun), AGENTS.c.last_seen.is_(None)).returning(AGENTS.c.id)
    )
    agent_ids = list(removed.scalars())
    connection.execute(
        update(DEPLOYMENT_HOSTS)
        .where(open_hosts)
        .values(
            status=HostStatus.INTERRUPTED.value,
            reason="interrupted",
            detail=_INTERRUPTED,
            finished_at=now,
            agent_id=case((DEPLOYMENT_HOSTS.c.agent_id.in_(agent_ids), None), else_=DEPLOYMENT_HOSTS.c.agent_id),
        )
    )
    connection.execute(
        update(DEPLOYMENTS)
        .where(DEPLOYMENTS.c.status == DeploymentStatus.RUNNING.value)
        .values(status=DeploymentStatus.INTERRUPTED.value, finished_at=now)
    )
    return agent_ids


def delete_old(connection: Connection, keep: int, limit: int) -> int:
    """Remove up to `limit` deployments that are over and older than the newest `keep`; return how many."""
    newest = connection.execute(select(func.max(DEPLOYMENTS.c.sequence))).scalar_one() or 0
    old = (
        select(DEPLOYMENTS.c.sequence)
        .where(DEPLOYMENTS.c.sequence <= newest - keep, DEPLOYMENTS.c.status != DeploymentStatus.RUNNING.value)
        .limit(limit)
    )
    return connection.execute(delete(DEPLOYMENTS).where(DEPLOYMENTS.c.sequence.in_(old))).rowcount


def _values(host: DeploymentHost) -> dict[str, Any]:
    return {
        "host": host.host,
        "port": host.port,
        "ssh_user": host.ssh_user,
        "label": host.label,
        "profile": host.profile,
        "status": host.status.value,
        "step": host.step,
        "reason": host.reason,
        "detail": host.detail,
        "agent_id": host.agent_id,
        "host_key": host.host_key,
        "started_at": host.started_at,
        "finished_at": host.finished_at,
    }


def _host_from(row: Row[Any]) -> DeploymentHost:
    return DeploymentHost(
        host=row.host,
        port=row.port,
        ssh_user=row.ssh_user,
        label=row.label,
        profile=row.profile,
        status=HostStatus(row.status),
        step=row.step,
        reason=row.reason,
        detail=row.detail,
        agent_id=row.agent_id,
        host_key=row.host_key,
        started_at=row.started_at,
        finished_at=row.finished_at,
    )
