"""Power cuts: what reached the disk at fifty moments of one run is booted again, and must hold what was promised.

All that runs is frozen and the disks are copied underneath; the run goes on, and each copy is tried afterwards. The
disks are slow, so that many cuts find something that is not durable yet. The other side
did not lose power: it is continued from a plain copy of that moment. Of a host whose server lost power only what ran
cannot be continued, as no copy holds processes."""

import asyncio
import random
import secrets
import shutil
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

import pytest
from scripts.lib.chaos.checker import OVER, UNPROVED, Evidence, Violation
from scripts.lib.chaos.client import Client
from scripts.lib.chaos.faults import Target
from scripts.lib.chaos.parts import RUN_VARIABLE, Agent, Part, Server, closing, resume_all, stop_all
from scripts.lib.chaos.record import Record
from scripts.lib.chaos.report import find_traces
from scripts.lib.chaos.run import Fleet, Run, make_plan
from tests.support.disks import (
    booted_again,
    copy_as_a_power_cut_leaves_it,
    mounted,
    new_disk,
)
from tests.support.syncs import needs_strace, slowing

from fleetwire_agent.command_states import State
from fleetwire_agent.ledger import Ledger
from fleetwire_agent.runner.files import SOCKET, read_result

pytestmark = needs_strace

CUTS = 50
COMMANDS = 120
STRIKES = 10  # three seconds each, over which the commands are spread; none is struck
AT_ONCE = 5
SERVER_SYNC_SECONDS = 0.1  # disks so slow that many cuts fall into a sync: what goes on without waiting for it is found
AGENT_SYNC_SECONDS = 0.25  # more: else the server has not stored yet what it was told too early


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """One moment: copies of all that matters, and what the client knew then."""

    directory: Path
    at: float
    evidences: Sequence[Evidence]  # of what was submitted by then

    @property
    def agent_image(self) -> Path:
        return self.directory / "agent.img"

    @property
    def server_image(self) -> Path:
        return self.directory / "server.img"

    @property
    def server_data(self) -> Path:
        return self.directory / "server"

    @property
    def agent_state(self) -> Path:
        return self.directory / "state"

    @property
    def canary(self) -> Path:
        return self.directory / "canary"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cuts:
    """All cuts of one run."""

    directory: Path
    token: str
    password: str
    agent_id: str
    key: str
    cuts: Sequence[Cut]
    record: Record


Attempt: TypeAlias = Callable[[Cuts, Cut], Awaitable[list[str]]]


@pytest.fixture(scope="module")
def cuts(power_cuts: None, tmp_path_factory: pytest.TempPathFactory) -> Cuts:
    return asyncio.run(run_and_cut(tmp_path_factory.mktemp("power")))


async def run_and_cut(directory: Path) -> Cuts:
    """Run commands on disks, and copy those fifty times."""
    random_moments = random.Random(4)
    orders = make_plan(COMMANDS, seed=4, strikes=STRIKES).orders
    async with AsyncExitStack() as stack:
        disks = {
            name: stack.enter_context(new_disk(directory / f"{name}.img", directory / name, mebibytes=size))
            for name, size in (("agent", 32), ("server", 24))
        }
        fleet, password, key = await stack.enter_async_context(running_on(directory, disks["agent"], disks["server"]))
        run = Run(fleet, orders, Record())
        made: list[Cut] = []

        async def cut_all() -> None:
            for number in range(CUTS):
                await asyncio.sleep(random_moments.uniform(0.1, 0.6))
                made.append(cut(run, directory, number))

        async with asyncio.TaskGroup() as group:
            group.create_task(run.go([]))
            group.create_task(cut_all())
        violations = await run.finish()
        assert not violations, f"wrong even without a power cut: {violations}"
        agent = fleet.target.agents[0]
        assert fleet.client.token is not None
        return Cuts(
            directory=directory,
            token=fleet.client.token,
            password=password,
            agent_id=agent.agent_id,
            key=key,
            cuts=made,
            record=run.record,
        )


@asynccontextmanager
async def running_on(directory: Path, agent_disk: Path, server_disk: Path) -> AsyncIterator[tuple[Fleet, str, str]]:
    """Start a server and an agent; yield them with the admin's password and the agent's key."""
    password, canary = secrets.token_urlsafe(15), directory / "canary"
    canary.touch()
    parts: list[Part] = []
    environment = {RUN_VARIABLE: str(directory)}
    hidden = {"unseen": RUN_VARIABLE, "value": str(directory)}  # strace is not to be frozen, nor counted
    with closing(parts, str(directory)):
        server = Server(
            directory,
            password=password,
            data_dir=server_disk / "data",
            environment=environment,
            prefix=slowing(SERVER_SYNC_SECONDS, **hidden),
        )
        parts.append(server)
        await server.start()
        async with Client(server.url) as client:
            await client.log_in(password)
            enrolled = await client.call("POST", "/api/agents", {"label": "web-01"})
            agent = Agent(
                directory,
                server_url=server.url,
                agent_id=enrolled["agent_id"],
                key=enrolled["key"],
                canary=canary,
                state_dir=agent_disk / "state",
                environment=environment,
                prefix=slowing(AGENT_SYNC_SECONDS, **hidden),
            )
            parts.append(agent)
            await agent.start()
            await agent.wait_until_connected()
            yield Fleet(directory, Target(server, (agent,), ()), client, canary), password, enrolled["key"]


def cut(run: Run, directory: Path, number: int) -> Cut:
    """Copy all as it is at one moment. Blocking: nothing of the run, nor its client, goes on meanwhile."""
    known = [
        replace(evidence, ends_seen=list(evidence.ends_seen), other_ids=set())
        for evidence in run.evidences.values()
        if evidence.order.submit_at <= run.record.seconds
    ]
    made = Cut(directory=directory / f"cut-{number}", at=run.record.seconds, evidences=known)
    made.directory.mkdir()
    frozen = stop_all(str(directory))
    try:
        copy_as_a_power_cut_leaves_it(directory / "agent.img", made.agent_image)
        copy_as_a_power_cut_leaves_it(directory / "server.img", made.server_image)
        shutil.copytree(directory / "server/data", made.server_data)
        shutil.copytree(directory / "agent/state", made.agent_state, symlinks=True, ignore=lambda *_: [SOCKET])
        shutil.copyfile(run.fleet.canary, made.canary)
    finally:
        resume_all(frozen)
    run.record.add(f"FAULT power cut {number}, {len(frozen)} processes")
    return made


async def try_all(cuts: Cuts, attempt: Attempt) -> None:
    """Boot from each copy; fail with the story of all that was wrong."""
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(cut: Cut) -> list[str]:
        async with gate:
            return await attempt(cuts, cut)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(cut)) for cut in cuts.cuts]
    lines = [line for task in tasks for line in task.result()]
    assert not lines, "\n".join(lines)


def tell(cuts: Cuts, cut: Cut, run: Run, violations: Sequence[Violation]) -> list[str]:
    lines = []
    for violation in violations:
        lines.append(f"==== {cut.directory.name} at {cut.at:.3f}: {violation.rule}: {violation.detail}")
        if violation.token is not None:
            evidence = run.evidences[violation.token]
            lines += [f"{evidence.order}", f"{evidence.answer}"]
            lines += ["---- before the cut", *cuts.record.tell(violation.token)]
            lines += ["---- after it", *run.record.tell(violation.token)]
            lines += find_traces(run.fleet.directory, str(evidence.command_id))
    return lines


# ---------------------------------------------------------------- what is there when the power is back


async def boot(
    cuts: Cuts, cut: Cut, place: Path, *, data_dir: Path, state_dir: Path, boot_id: str, excuse: Callable[[Run], None]
) -> list[str]:
    """Start a server on its data, then an agent on its state; return what is wrong.

    Args:
        place: gets their logs.
        boot_id: what the agent reads as the host's.
        excuse: tells which commands may be interrupted, as the server shows them before the agent is here."""
    boot_id_file, canary = place / "boot_id", place / "canary"
    boot_id_file.write_text(f"{boot_id}\n")
    shutil.copyfile(cut.canary, canary)
    environment = {RUN_VARIABLE: str(place)}
    server = Server(place, password=cuts.password, data_dir=data_dir, environment=environment)
    parts: list[Part] = [server]
    with closing(parts, str(place)):
        await server.start()
        agent = Agent(
            place,
            server_url=server.url,
            agent_id=cuts.agent_id,
            key=cuts.key,
            canary=canary,
            state_dir=state_dir,
            environment=environment,
            prefix=booted_again(boot_id_file),
        )
        parts.append(agent)
        async with Client(server.url) as client:
            client.token = cuts.token
            lines = []
            run = Run(
                Fleet(place, Target(server, (agent,), ()), client, canary),
                [evidence.order for evidence in cut.evidences],
                Record(),
            )
            for evidence in cut.evidences:
                if evidence.command_id is not None:
                    lines += await find_lost(cuts, cut, client, evidence)
                    run.adopt(evidence.command_id, evidence.order.token, evidence.ends_seen)
            if lines:
                return lines
            await adopt_unheard(run)
            await run.look_at_all()
            excuse(run)
            await agent.start()
            await agent.wait_until_connected()
            for evidence in run.evidences.values():
                if evidence.order.cancel_after is not None and evidence.command_id is not None:
                    await run.cancel(evidence.order)
            await run.wait_until_over()
            return tell(cuts, cut, run, await run.finish())


async def adopt_unheard(run: Run) -> None:
    """Take over what the server had stored and had not told its client when the power went."""
    listed = await run.fleet.client.call("GET", f"{run.fleet.target.agents[0].path}/commands")
    for command in listed:
        (token,) = (token for token in run.evidences if token in command["params"]["command"])
        if run.evidences[token].command_id is None:
            run.adopt(command["command_id"], token, [])


def excuse_what_was_offered(run: Run) -> None:
    """It may have run, and ended with the host; its agent can prove which."""
    for evidence in run.evidences.values():
        if evidence.status not in OVER | {"queued"}:
            evidence.excused = {"interrupted"}


def excuse_what_ran(run: Run, state_dir: Path) -> None:
    """Its processes are not there any more. What had not been started is to be run, and what had a result to be told.

    Args:
        state_dir: the agent's at the moment of the cut; a copy is opened."""
    copy = run.fleet.directory / "state at the cut"
    shutil.copytree(state_dir, copy, symlinks=True)
    ledger = Ledger(copy, boot_id=read_boot_id(), new_instance_id="")
    try:
        started = [entry for entry in ledger.open() if entry.state in (State.STARTING, State.RUNNING)]
        ran = {entry.command_id for entry in started if read_result(str(ledger.directory_of(entry))) is None}
    finally:
        ledger.close()
        shutil.rmtree(copy)
    for evidence in run.evidences.values():
        if evidence.command_id in ran:
            evidence.excused = {"interrupted"}


def read_boot_id() -> str:
    """Return that of this machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


async def find_lost(cuts: Cuts, cut: Cut, client: Client, evidence: Evidence) -> list[str]:
    """Return what the server does not know though it once said so."""
    path = f"/api/agents/{cuts.agent_id}/commands/{evidence.command_id}"
    status, answer = await client.ask("GET", path)
    proved = [end for end in evidence.ends_seen if end not in UNPROVED]
    if status == 200 and all(f'"status":"{end}"'.encode() in answer.replace(b" ", b"") for end in proved):
        return []
    wanted = f"acknowledged, {evidence.ends_seen}"
    return [f"{cut.directory.name} at {cut.at:.3f}: {evidence.order.token}: {wanted}; now {status} {answer!r}"]


async def boot_agent(cuts: Cuts, cut: Cut) -> list[str]:
    (place := cut.directory / "host").mkdir()
    with mounted(cut.agent_image, place / "disk") as disk:
        return await boot(
            cuts,
            cut,
            place,
            data_dir=cut.server_data,
            state_dir=disk / "state",
            boot_id=str(uuid.uuid4()),
            excuse=excuse_what_was_offered,
        )


async def boot_server(cuts: Cuts, cut: Cut) -> list[str]:
    (place := cut.directory / "power").mkdir()
    with mounted(cut.server_image, place / "disk") as disk:
        return await boot(
            cuts,
            cut,
            place,
            data_dir=disk / "data",
            state_dir=cut.agent_state,
            boot_id=read_boot_id(),
            excuse=partial(excuse_what_ran, state_dir=cut.agent_state),
        )


@pytest.mark.timeout(600)
async def test_a_host_may_lose_power(cuts: Cuts) -> None:
    await try_all(cuts, boot_agent)


@pytest.mark.timeout(600)
async def test_a_server_may_lose_power(cuts: Cuts) -> None:
    await try_all(cuts, boot_server)
