"""Agent and server, each killed at every single sync of a handful of commands, and started again."""

import asyncio
import random
import secrets
import shutil
from collections.abc import Awaitable, Callable, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from scripts.lib.chaos.checker import Violation
from scripts.lib.chaos.client import Client
from scripts.lib.chaos.faults import Target
from scripts.lib.chaos.parts import RUN_VARIABLE, Agent, ChaosError, Server, closing
from scripts.lib.chaos.record import Record
from scripts.lib.chaos.report import find_traces
from scripts.lib.chaos.run import Fleet, Run, running_fleet
from scripts.lib.chaos.workload import (
    Order,
    make_cancelled,
    make_failing,
    make_output,
    make_quick,
    make_slow,
    make_token,
)
from tests.support.processes import find_free_port
from tests.support.syncs import Sync, has_killed, list_syncs, needs_strace, tracing, tracing_runners

pytestmark = needs_strace

AGENTS_AT_ONCE = 12  # they mostly wait
SERVERS_AT_ONCE = 4  # a start costs more than a second of a core
COMMANDS_AT_ONCE = {"FLEETWIRE_AGENT_MAX_COMMANDS_AT_ONCE": "2"}  # so that some wait on the agent


def make_handful() -> list[Order]:
    """Return a success, a failure, one with output, and a cancel of a running and of a waiting one."""
    choose = random.Random(5)
    makes = (make_cancelled, make_slow, make_quick, make_failing, make_output, make_cancelled)
    running, slow, quick, failing, output, waiting = (
        make(make_token(number, choose), choose) for number, make in enumerate(makes)
    )
    return [
        replace(running, cancel_after=0.8),
        slow,
        *(replace(order, submit_at=0.2) for order in (quick, failing, output)),
        replace(waiting, submit_at=0.3, cancel_after=0.1),
    ]


@dataclass(frozen=True, slots=True)
class Life:
    """What came of one run: whether the kill struck, and what was wrong."""

    name: str
    was_killed: bool
    story: Sequence[str]  # empty when nothing was wrong


def tell(name: str, run: Run, violations: Sequence[Violation], *, was_killed: bool) -> Life:
    story = []
    for violation in violations:
        story.append(f"==== {name}: {violation.rule}: {violation.detail}")
        if violation.token is not None:
            evidence = run.evidences[violation.token]
            story += [f"{evidence.order}", f"{evidence.answer}", *run.record.tell(violation.token)]
            story += find_traces(run.fleet.directory, str(evidence.command_id))
    return Life(name, was_killed, story)


def expect_truth(lives: Sequence[Life]) -> None:
    """Fail with the story of all that was wrong; and where kills did not strike, nothing was tested."""
    assert not any(life.story for life in lives), "\n".join(line for life in lives for line in life.story)
    struck = [life.name for life in lives if life.was_killed]
    assert len(struck) >= 0.8 * len(lives), f"only {struck} of {len(lives)} were killed"


async def live_all(live: Callable[[Sync], Awaitable[Life]], syncs: Sequence[Sync], *, at_once: int) -> list[Life]:
    """Return what came of a life for each of these, some of them at the same time."""
    gate = asyncio.Semaphore(at_once)

    async def one(sync: Sync) -> Life:
        async with gate:
            return await live(sync)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(sync)) for sync in syncs]
    return [task.result() for task in tasks]


# ---------------------------------------------------------------- the agent


async def live_agent(fleet: Fleet, directory: Path, prefix: Sequence[str], *, excused: Set[str] = frozenset()) -> Life:
    """Run the handful by an agent that is started by `prefix`, then once more without it. `excused`: see Evidence."""
    directory.mkdir()
    canary = directory / "canary"
    canary.touch()
    enrolled = await fleet.client.call("POST", "/api/agents", {"label": directory.name})
    agent = Agent(
        directory,
        server_url=fleet.target.server.url,
        agent_id=enrolled["agent_id"],
        key=enrolled["key"],
        canary=canary,
        environment={RUN_VARIABLE: str(directory), **COMMANDS_AT_ONCE},
        prefix=prefix,
    )
    with closing([agent], str(directory)):
        await agent.start()
        own = Fleet(directory, Target(fleet.target.server, (agent,), ()), fleet.client, canary)
        run = Run(own, make_handful(), Record(), expects_end=True)
        for evidence in run.evidences.values():
            evidence.excused = excused
        await run.go([])
        await agent.stop()
        was_killed = agent.exit_status == -9 or not agent.prefix
        agent.prefix = []
        await agent.start()
        await agent.wait_until_connected()
        return tell(directory.name, run, await run.finish(), was_killed=was_killed)


@pytest.mark.timeout(300)
async def test_an_agent_may_be_killed_at_any_sync(tmp_path: Path) -> None:
    (tmp_path / "server").mkdir()
    async with running_fleet(tmp_path / "server", 0) as fleet:
        undisturbed = await live_agent(fleet, tmp_path / "agent-0", tracing(tmp_path / "syncs"))
        assert not undisturbed.story, "\n".join(undisturbed.story)

        async def live(sync: Sync) -> Life:
            prefix = tracing(tmp_path / f"syncs-{sync}", kill_at=sync)
            return await live_agent(fleet, tmp_path / f"agent-{sync}", prefix)

        lives = await live_all(live, list_syncs(tmp_path / "syncs"), at_once=AGENTS_AT_ONCE)
    print(f"{len(lives)} syncs of an agent")
    assert lives, "it never synced: its ledger is not durable"
    expect_truth(lives)


# ---------------------------------------------------------------- what watches a command


@pytest.mark.timeout(300)
async def test_a_runner_may_be_killed_at_any_sync(tmp_path: Path) -> None:
    """Its agent lives, and says that the command was interrupted: it ends what is left of it, and runs it no more."""
    (tmp_path / "server").mkdir()

    async with running_fleet(tmp_path / "server", 0) as fleet:

        async def live(sync: Sync | None) -> Life:
            name = str(sync or "undisturbed")
            prefix = tracing_runners(tmp_path / f"python-{name}", tmp_path / f"syncs-{name}", kill_at=sync)
            excused = {"interrupted"} if sync else set[str]()
            life = await live_agent(fleet, tmp_path / f"agent-{name}", prefix, excused=excused)
            return replace(life, was_killed=has_killed(*tmp_path.glob(f"syncs-{name}-[0-9]*")))

        undisturbed = await live(None)
        assert not undisturbed.story, "\n".join(undisturbed.story)
        syncs = list_syncs(*tmp_path.glob("syncs-undisturbed-*"))
        lives = await live_all(live, syncs, at_once=AGENTS_AT_ONCE)
    print(f"{len(lives)} syncs of a runner")
    assert lives, "no runner synced: results are not durable"
    expect_truth(lives)


# ---------------------------------------------------------------- the server


@dataclass(frozen=True, slots=True)
class Prepared:
    """The data of a server that knows one agent and one login."""

    data_dir: Path
    password: str
    token: str
    agent_id: str
    key: str


async def prepare(directory: Path) -> Prepared:
    directory.mkdir()
    password = secrets.token_urlsafe(15)
    server = Server(directory, password=password, environment={RUN_VARIABLE: str(directory)})
    with closing([server], str(directory)):
        await server.start()
        async with Client(server.url) as client:
            await client.log_in(password)
            enrolled = await client.call("POST", "/api/agents", {"label": "web-01"})
            assert client.token is not None
        await server.stop()
        return Prepared(server.data_dir, password, client.token, enrolled["agent_id"], enrolled["key"])


async def live_server(prepared: Prepared, directory: Path, prefix: Sequence[str]) -> Life:
    """Run the handful through a server that is started by `prefix`, and once more without it."""
    directory.mkdir()
    canary = directory / "canary"
    canary.touch()
    shutil.copytree(prepared.data_dir, directory / "server")
    environment = {RUN_VARIABLE: str(directory)}
    server = Server(
        directory, password=prepared.password, port=find_free_port(), environment=environment, prefix=prefix
    )
    agent = Agent(
        directory,
        server_url=server.url,
        agent_id=prepared.agent_id,
        key=prepared.key,
        canary=canary,
        environment=environment | COMMANDS_AT_ONCE,
    )
    with closing([server, agent], str(directory)):
        try:
            await server.start()
        except ChaosError:
            if server.exit_status != -9:
                raise
            server.prefix = []
            await server.start()
        await agent.start()
        async with Client(server.url) as client:
            client.token = prepared.token
            run = Run(
                Fleet(directory, Target(server, (agent,), ()), client, canary),
                make_handful(),
                Record(),
                expects_end=True,
            )
            await run.go([])
            if was_killed := not server.prefix:
                return tell(directory.name, run, await run.finish(), was_killed=was_killed)
            await server.stop()
            was_killed = server.exit_status == -9
            server.prefix = []
            await server.start()
            await agent.stop()
            await agent.start()  # its backoff need not be waited for
            await agent.wait_until_connected()
            return tell(directory.name, run, await run.finish(), was_killed=was_killed)


@pytest.mark.timeout(400)
async def test_a_server_may_be_killed_at_any_sync(tmp_path: Path) -> None:
    prepared = await prepare(tmp_path / "prepared")
    undisturbed = await live_server(prepared, tmp_path / "server-0", tracing(tmp_path / "syncs"))
    assert not undisturbed.story, "\n".join(undisturbed.story)

    async def live(sync: Sync) -> Life:
        prefix = tracing(tmp_path / f"syncs-{sync}", kill_at=sync)
        return await live_server(prepared, tmp_path / f"server-{sync}", prefix)

    lives = await live_all(live, list_syncs(tmp_path / "syncs"), at_once=SERVERS_AT_ONCE)
    print(f"{len(lives)} syncs of a server")
    assert lives, "it never synced: its database is not durable"
    expect_truth(lives)
