"""Deployments over SSH: each is on up to ten hosts at a time, is stored as it goes, and shows its steps to viewers."""

import asyncio
import importlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TypeAlias

from fleetwire_server.core.clock import Clock
from fleetwire_server.core.events import frame_json
from fleetwire_server.core.fanout import Fanout, deployment_topic
from fleetwire_server.core.sessions import Sessions
from fleetwire_server.core.tokens import hash_token, new_agent_key, new_deployment_id
from fleetwire_server.deploy.errors import DeployError, deploy_error
from fleetwire_server.deploy.host_keys import PublicKey
from fleetwire_server.deploy.order import Deployed, Order, ServerSide, Terms
from fleetwire_server.model import (
    Agent,
    AgentKey,
    AuditEntry,
    Deployment,
    DeploymentHost,
    DeploymentStatus,
    HostKey,
    HostStatus,
)
from fleetwire_server.storage import agents, deployments, host_keys
from fleetwire_server.storage.audit import add_entry, audited
from fleetwire_server.storage.store import Connection, Store
from fleetwire_shared.errors import FleetwireError, UnavailableError

logger = logging.getLogger(__name__)

HOSTS_AT_ONCE = 10
"""Of one deployment: each is an SSH connection and a megabyte to send."""

MAX_RUNNING = 8
MAX_STEPS_OF_HOST = 100
"""Further ones are not shown: a host must not fill the server's memory."""

KEPT_ENDED = 10
"""Deployments whose steps are still shown after their end; of older ones the outcome is stored."""

RETRY_SECONDS = 5.0
STOP_SECONDS = 8.0
"""How long hosts may take to be cleaned up when the server stops."""

Outcome: TypeAlias = Deployed | DeployError
DropAgent: TypeAlias = Callable[[str, AuditEntry], Awaitable[object]]
_Deploy: TypeAlias = Callable[[Order, Terms, ServerSide], Awaitable[Deployed]]

_STOPPING = "the server is stopping: deploy again when it is back"


@dataclass(slots=True, kw_only=True)
class RunningDeployment:
    """A deployment under way, or one of the last that were. `frames` are its events so far, for viewers."""

    id: str
    created_at: float
    created_by: str
    hosts: list[DeploymentHost]
    outcomes: "list[asyncio.Future[Outcome]]"
    slots: asyncio.Semaphore
    frames: list[bytes] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)  # of each host, how many were shown
    status: DeploymentStatus = DeploymentStatus.RUNNING
    finished_at: float | None = None

    @property
    def is_over(self) -> bool:
        return self.status is not DeploymentStatus.RUNNING

    @property
    def record(self) -> Deployment:
        return Deployment(
            id=self.id,
            status=self.status,
            created_at=self.created_at,
            created_by=self.created_by,
            finished_at=self.finished_at,
            hosts=tuple(self.hosts),
        )


class Deployments:
    """Starts deployments and owns their tasks.

    Args:
        make_terms: what holds for all hosts now; raises DeployError where the server cannot deploy.
        drop_agent: removes an agent, records that, and ends all that is open of it.
        announce: tells viewers of the fleet the status of an agent."""

    def __init__(
        self,
        *,
        store: Store,
        sessions: Sessions,
        fanout: Fanout,
        make_terms: Callable[[], Terms],
        drop_agent: DropAgent,
        announce: Callable[[str, str], None],
        now: Clock,
    ) -> None:
        self._store = store
        self._sessions = sessions
        self._fanout = fanout
        self._make_terms = make_terms
        self._drop_agent = drop_agent
        self._announce = announce
        self._now = now
        self._group: asyncio.TaskGroup | None = None
        self._is_stopping = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._busy: set[tuple[str, int]] = set()
        self._running: dict[str, RunningDeployment] = {}  # those that ended come before the others

    async def run(self) -> None:
        """End what a server before this one left, then hold the deployments' tasks. Runs until cancelled."""
        await self._end_interrupted()
        async with asyncio.TaskGroup() as self._group:
            await asyncio.Event().wait()

    async def _end_interrupted(self) -> None:
        """End what a server before this one left. With a database that cannot be written, the rest of the server goes
        on meanwhile, and deployments are refused."""
        while True:
            try:
                removed = await self._store.write(partial(_interrupt_running, now=self._now()))
            except UnavailableError as err:
                logger.error("deployments cannot begin: %s; the next attempt is in %.0f s", err.message, RETRY_SECONDS)
                await asyncio.sleep(RETRY_SECONDS)
                continue
            for agent_id in removed:
                self._announce(agent_id, "deleted")
            return

    async def stop(self) -> None:
        """End all deployments in order: hosts are cleaned up, as far as STOP_SECONDS reach."""
        self._is_stopping = True
        for seconds in (STOP_SECONDS, 1.0):
            if not self._tasks:
                return
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks, timeout=seconds)

    def get(self, deployment_id: str) -> RunningDeployment | None:
        """Return a deployment whose steps are still here."""
        return self._running.get(deployment_id)

    async def start(self, orders: Sequence[Order], actor: str) -> RunningDeployment:
        """Store a new deployment and begin it.

        Raises:
            DeployError: this server cannot deploy now, or one to such a host is under way.
            UnavailableError: the server starts or stops, or too many are running."""
        group = self._group
        if group is None or self._is_stopping:
            raise UnavailableError("the server is starting or stopping; try again in a moment")
        if sum(not each.is_over for each in self._running.values()) >= MAX_RUNNING:
            raise UnavailableError(f"{MAX_RUNNING} deployments are running, the most allowed; wait for one to end")
        terms = self._make_terms()
        places = {(order.host, order.port) for order in orders}
        if busy := sorted(places & self._busy):
            where = ", ".join(f"{host} port {port}" for host, port in busy)
            raise deploy_error("check", "busy", f"a deployment to {where} is under way: wait for its end")
        running = self._make_running(orders, actor)
        self._busy |= places
        self._running[running.id] = running  # counts from here on
        try:
            started = AuditEntry(
                at=running.created_at,
                actor=actor,
                action="deployment.started",
                subject=running.id,
                detail={"hosts": [f"{host.host}:{host.port}" for host in running.hosts]},
            )
            add = partial(deployments.add_deployment, deployment=running.record)
            await self._store.write(audited(add, started))
            if self._is_stopping:
                raise UnavailableError("the server is stopping; try again in a moment")
        except BaseException:
            self._busy -= places
            del self._running[running.id]
            raise
        for position, order in enumerate(orders):
            task = group.create_task(self._run_host(running, position, order, terms))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return running

    def _make_running(self, orders: Sequence[Order], actor: str) -> RunningDeployment:
        loop = asyncio.get_running_loop()
        return RunningDeployment(
            id=new_deployment_id(),
            created_at=self._now(),
            created_by=actor,
            hosts=[
                DeploymentHost(
                    host=order.host,
                    port=order.port,
                    ssh_user=order.ssh_user,
                    label=order.label,
                    profile=order.profile,
                )
                for order in orders
            ],
            outcomes=[loop.create_future() for _ in orders],
            slots=asyncio.Semaphore(HOSTS_AT_ONCE),
            steps=[0] * len(orders),
        )

    # ------------------------------------------------------------ one host

    async def _run_host(self, running: RunningDeployment, position: int, order: Order, terms: Terms) -> None:
        outcome: Outcome = deploy_error("waiting", "interrupted", _STOPPING)
        status = HostStatus.INTERRUPTED
        side = _HostSide(self, running, position, order)
        try:
            async with running.slots:
                await self._change_host(running, position, status=HostStatus.RUNNING, started_at=self._now())
                deploy = await _load_deploy()
                outcome = await deploy(order, terms, side)
            status = HostStatus.DEPLOYED
        except DeployError as err:
            outcome, status = err, HostStatus.FAILED
        except FleetwireError as err:
            outcome, status = deploy_error(side.step, "server_failed", err.message), HostStatus.FAILED
        except asyncio.CancelledError:
            outcome = deploy_error(side.step, "interrupted", _STOPPING)
            raise
        except Exception:  # the border of one host
            logger.exception("deployment %s: %s failed", running.id, order.where)
            detail = f"internal error; the server's log has more under the deployment's id {running.id}"
            outcome, status = deploy_error(side.step, "server_failed", detail), HostStatus.FAILED
        finally:
            self._busy.discard((order.host, order.port))
            await self._end_host(running, position, side, status, outcome)

    async def _end_host(
        self, running: RunningDeployment, position: int, side: "_HostSide", status: HostStatus, outcome: Outcome
    ) -> None:
        """Store and tell how it ended; of one that failed no agent stays."""
        # Noted before its record is written: a cancelled write is carried out all the same.
        agent_id = running.hosts[position].agent_id
        ended = replace(running.hosts[position], status=status, finished_at=self._now())
        if isinstance(outcome, Deployed):
            ended = replace(ended, host_key=outcome.host_key)
        else:
            ended = replace(ended, step=outcome.step, reason=outcome.reason, detail=outcome.message)
            if not outcome.is_agent_kept:
                ended = replace(ended, agent_id=None)
            logger.info("deployment %s: %s: %s", running.id, side.order.where, outcome.message)
        running.hosts[position] = ended
        self._add_event(running, host_document(ended), event="host")
        try:
            if agent_id is not None and ended.agent_id is None:
                await self._drop_agent(agent_id, self._dropped(running, agent_id))
            store = partial(deployments.update_host, deployment_id=running.id, position=position, host=ended)
            await self._store.write(store)
        except UnavailableError as err:  # as at a crash, the next start of the server puts it right
            logger.error("deployment %s: its end on %s is not stored: %s", running.id, side.order.where, err.message)
        finally:
            if not running.outcomes[position].done():
                running.outcomes[position].set_result(outcome)
        if all(host.status.is_end for host in running.hosts):
            await self._finish(running)

    async def _finish(self, running: RunningDeployment) -> None:
        if running.is_over:
            return
        is_interrupted = any(host.status is HostStatus.INTERRUPTED for host in running.hosts)
        running.status = DeploymentStatus.INTERRUPTED if is_interrupted else DeploymentStatus.FINISHED
        running.finished_at = self._now()
        self._add_event(running, {"reason": running.status}, event="end")
        over = [each for each in self._running.values() if each.is_over]
        for each in over[: max(0, len(over) - KEPT_ENDED)]:
            del self._running[each.id]
        deployed = sum(host.status is HostStatus.DEPLOYED for host in running.hosts)
        entry = AuditEntry(
            at=running.finished_at,
            actor=running.created_by,
            action="deployment.ended",
            subject=running.id,
            detail={"status": running.status, "deployed": deployed, "failed": len(running.hosts) - deployed},
        )
        finish = partial(
            deployments.finish_deployment,
            deployment_id=running.id,
            status=running.status,
            finished_at=running.finished_at,
        )
        try:
            await self._store.write(audited(finish, entry))
        except UnavailableError as err:
            logger.error("deployment %s: its end is not stored: %s", running.id, err.message)

    async def _change_host(
        self, running: RunningDeployment, position: int, *, status: HostStatus, started_at: float
    ) -> None:
        host = running.hosts[position] = replace(running.hosts[position], status=status, started_at=started_at)
        await self._store.write(
            partial(deployments.update_host, deployment_id=running.id, position=position, host=host)
        )

    def _add_event(self, running: RunningDeployment, document: object, *, event: str) -> None:
        """Keep an event for viewers that come later, its id the number of those before and itself; wake the others."""
        running.frames.append(frame_json(document, event=event, event_id=str(len(running.frames) + 1)))
        self._fanout.publish(deployment_topic(running.id), b"")

    def _dropped(self, running: RunningDeployment, agent_id: str) -> AuditEntry:
        detail = {"why": "its deployment failed", "deployment_id": running.id}
        return AuditEntry(
            at=self._now(), actor=running.created_by, action="agent.deleted", subject=agent_id, detail=detail
        )

    # ------------------------------------------------------------ what a host's deployment asks of the server

    def note(self, running: RunningDeployment, position: int, step: str, detail: str) -> None:
        running.steps[position] += 1
        if running.steps[position] > MAX_STEPS_OF_HOST:
            return
        host = running.hosts[position]
        document = {"host": host.host, "port": host.port, "at": self._now(), "step": step, "detail": detail}
        self._add_event(running, document, event="step")

    async def get_pinned(self, order: Order) -> HostKey | None:
        return await self._store.read(partial(host_keys.get_host_key, host=order.host, port=order.port))

    async def pin(self, running: RunningDeployment, order: Order, key: PublicKey) -> HostKey:
        pinned = HostKey(
            host=order.host,
            port=order.port,
            public_key=key.line,
            fingerprint=key.fingerprint,
            pinned_at=self._now(),
            pinned_by=running.created_by,
        )
        return await self._store.write(partial(_pin, key=pinned))

    async def enrol(self, running: RunningDeployment, position: int, order: Order) -> tuple[str, str]:
        """Make the agent's record, in the transaction that notes it with the deployment: should the server die now,
        its next start finds it."""
        agent_id, key = new_agent_key()
        now = self._now()
        agent = Agent(id=agent_id, label=order.label, tags=order.tags, created_at=now)
        agent_key = AgentKey(key_hash=hash_token(key), agent_id=agent_id, created_at=now, expires_at=None)
        host = running.hosts[position] = replace(running.hosts[position], agent_id=agent_id)
        entry = AuditEntry(
            at=now,
            actor=running.created_by,
            action="agent.enrolled",
            subject=agent_id,
            detail={"label": order.label, "deployment_id": running.id},
        )

        def add(connection: Connection) -> None:
            agents.add_agent(connection, agent, agent_key)
            deployments.update_host(connection, running.id, position, host)
            add_entry(connection, entry)

        await self._store.write(add)
        self._announce(agent_id, "pending")
        return agent_id, key

    async def wait_connected(self, agent_id: str) -> None:
        await self._sessions.wait_for(agent_id)


class _HostSide:
    """deploy.order.ServerSide for one host of one deployment."""

    def __init__(self, server: Deployments, running: RunningDeployment, position: int, order: Order) -> None:
        self._server = server
        self._running = running
        self._position = position
        self.order = order
        self.step = "waiting"  # the newest

    def note(self, step: str, detail: str) -> None:
        if step != "clean_up":
            self.step = step
        self._server.note(self._running, self._position, step, detail)

    async def get_pinned(self) -> HostKey | None:
        return await self._server.get_pinned(self.order)

    async def pin(self, key: PublicKey) -> HostKey:
        return await self._server.pin(self._running, self.order, key)

    async def enrol(self) -> tuple[str, str]:
        self.note("enrol", "making the agent's record and key")
        return await self._server.enrol(self._running, self._position, self.order)

    async def wait_connected(self, agent_id: str) -> None:
        self.note("connected", "waiting for the agent to be seen here")
        await self._server.wait_connected(agent_id)


def host_document(host: DeploymentHost) -> dict[str, object]:
    """Return a host of a deployment as viewers of its events get it."""
    return asdict(host)


async def _load_deploy() -> _Deploy:
    """Return deploy.runner's deploy_to_host. Loading it, with asyncssh, takes a while the first time: in a thread."""
    module = await asyncio.to_thread(importlib.import_module, "fleetwire_server.deploy.runner")
    deploy: _Deploy = module.deploy_to_host
    return deploy


# ------------------------------------------------------------ changes, each within one transaction


def _pin(connection: Connection, *, key: HostKey) -> HostKey:
    pinned = host_keys.pin_host_key(connection, key)
    if pinned is key:
        entry = AuditEntry(
            at=key.pinned_at,
            actor=key.pinned_by,
            action="host_key.pinned",
            subject=f"{key.host}:{key.port}",
            detail={"fingerprint": key.fingerprint},
        )
        add_entry(connection, entry)
    return pinned


def _interrupt_running(connection: Connection, *, now: float) -> list[str]:
    removed = deployments.interrupt_running(connection, now)
    for agent_id in removed:
        detail = {"why": "its deployment was interrupted before it connected"}
        entry = AuditEntry(at=now, actor="server", action="agent.deleted", subject=agent_id, detail=detail)
        add_entry(connection, entry)
    return removed
