"""Agent and server, each killed at every single sync of a handful of commands, and started again."""

import asyncio
import random
import secrets
import shutil
import sqlite3
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import pytest
from scripts.lib.chaos.checker import Violation
from scripts.lib.chaos.client import Client
from scripts.lib.chaos.faults import Target
from scripts.lib.chaos.parts import RUN_VARIABLE, Agent, ChaosError, Part, Server, closing
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
from tests.support import small_ledger
from tests.support.processes import find_free_port
from tests.support.syncs import (
    Sync,
    count_syncs,
    has_killed,
    list_syncs,
    needs_strace,
    read_syncs,
    tracing,
    tracing_runners,
)

from fleetwire_agent.ledger_file import NAMES
from fleetwire_server.storage.store import open_store

pytestmark = needs_strace

AGENTS_AT_ONCE = 16  # they mostly wait
SERVERS_AT_ONCE = 6  # a start costs more than a second of a core
ATTEMPTS = 5
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
    """Fail with the story of all that was wrong."""
    assert not any(life.story for life in lives), "\n".join(line for life in lives for line in life.story)


async def stop(part: Part) -> bool:
    """Ask it to end; return whether it was killed instead, or had been before. Raises ChaosError: it died otherwise."""
    await part.stop()
    if part.exit_status != 0 and not part.was_killed:
        raise ChaosError(f"the {part.name} ended with status {part.exit_status}:\n{part.last_words()}")
    return part.was_killed or not part.prefix


Live: TypeAlias = Callable[[Sync, str], Awaitable[Life]]
FindLogs: TypeAlias = Callable[[str], Sequence[Path]]


async def live_all(live: Live, syncs: Sequence[Sync], find_logs: FindLogs, *, at_once: int) -> list[Life]:
    """Kill at each of these and return what came of it. `live` gets a name that nothing else has.

    A machine that is busy makes one sync of two, so that a life may end before its n-th: its logs, which `find_logs`
    returns by the life's name, prove that it did. It is repeated until every number has killed, from the first to the
    last that did; were that last far from the expected, little was tested."""
    assert syncs, "it never synced: what it says is not durable"
    gate = asyncio.Semaphore(at_once)
    struck = set[Sync]()
    lives: list[Life] = []

    async def one(sync: Sync, attempt: int) -> None:
        async with gate:
            life = await live(sync, name := f"{sync}.{attempt}")
        lives.append(life)
        if life.was_killed:
            struck.add(sync)
        else:
            assert sync not in list_syncs(*find_logs(name)), f"{name}: it came to that sync, and was not killed at it"

    missed = list(syncs)
    for attempt in range(1, ATTEMPTS + 1):
        async with asyncio.TaskGroup() as group:
            for sync in missed:
                group.create_task(one(sync, attempt))
        missed = [sync for sync in syncs if sync not in struck and any(is_later(other, sync) for other in struck)]
        if not missed:
            break
    print(f"killed at {len(struck)} syncs in {len(lives)} lives")
    assert not missed, f"never killed at {', '.join(map(str, missed))}, in {ATTEMPTS} attempts"
    assert len(struck) >= 0.6 * len(syncs), (
        f"killed only at {', '.join(map(str, sorted(struck)))}, not at all of {syncs}"
    )
    return lives


def is_later(one: Sync, other: Sync) -> bool:
    return one.call == other.call and one.number > other.number


# ---------------------------------------------------------------- the agent


async def live_agent(
    fleet: Fleet,
    directory: Path,
    prefix: Sequence[str],
    *,
    expects_kill: bool = False,
    excused: Set[str] = frozenset(),
    is_first_start: bool = True,
    program: Sequence[str] = (),
) -> Life:
    """Run the handful by an agent that is started by `prefix`, then once more without it.

    Args:
        program: the agent's, where it is another than the installed one.
        expects_kill: see Run; of the agent itself.
        excused: see Evidence."""
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
    )
    if program:
        agent.arguments[:1] = program
    with closing([agent], str(directory)):
        if not is_first_start:
            await agent.start()
            await agent.wait_until_connected()
            await agent.stop()
        agent.prefix = list(prefix)
        await agent.start()
        own = Fleet(directory, Target(fleet.target.server, (agent,), ()), fleet.client, canary)
        run = Run(own, make_handful(), Record(), expects_kill=expects_kill)
        for evidence in run.evidences.values():
            evidence.excused = excused
        await run.go([])
        if (was_killed := await stop(agent)) and not expects_kill:
            raise ChaosError(f"the agent was killed, and only its runners were to be:\n{agent.last_words()}")
        agent.prefix = []
        await agent.start()
        await agent.wait_until_connected()
        return tell(directory.name, run, await run.finish(), was_killed=was_killed)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("is_first_start", [True, False], ids=["first start", "later start"])
async def test_an_agent_may_be_killed_at_any_sync(tmp_path: Path, *, is_first_start: bool) -> None:
    """Its first start makes the ledger, and hides the same syncs of the thread that writes to that afterwards."""
    (tmp_path / "server").mkdir()
    async with running_fleet(tmp_path / "server", 0) as fleet:

        async def live(sync: Sync | None, name: str) -> Life:
            prefix = tracing(tmp_path / f"syncs-{name}", kill_at=sync)
            return await live_agent(
                fleet,
                tmp_path / f"agent-{name}",
                prefix,
                expects_kill=sync is not None,
                is_first_start=is_first_start,
            )

        expect_truth([await live(None, "undisturbed")])
        syncs = list_syncs(tmp_path / "syncs-undisturbed")
        assert is_first_start or count_syncs(tmp_path / "syncs-undisturbed") == len(syncs)
        expect_truth(await live_all(live, syncs, lambda name: [tmp_path / f"syncs-{name}"], at_once=AGENTS_AT_ONCE))


@pytest.mark.timeout(300)
async def test_an_agent_may_be_killed_at_any_sync_while_its_ledger_is_compacted_often(tmp_path: Path) -> None:
    """Which number a sync of a compaction has is a matter of chance: all are tried until both of its kinds were hit."""
    (tmp_path / "server").mkdir()
    program = [sys.executable, "-P", small_ledger.__file__]  # its directory holds more than programs: not on the path
    async with running_fleet(tmp_path / "server", 0) as fleet:

        async def live(sync: Sync | None, name: str) -> Life:
            directory = tmp_path / f"agent-{name}"
            prefix = tracing(tmp_path / f"syncs-{name}", kill_at=sync)
            life = await live_agent(
                fleet, directory, prefix, expects_kill=sync is not None, is_first_start=False, program=program
            )
            assert read_generation(directory / "agent-state") > 2, f"{name}: compacted less than twice"
            return life

        expect_truth([await live(None, "undisturbed")])
        syncs = list_syncs(tmp_path / "syncs-undisturbed")
        for attempt in range(ATTEMPTS):

            async def live_again(sync: Sync, name: str, attempt: int = attempt) -> Life:
                return await live(sync, f"{attempt}-{name}")

            def find_logs(name: str, attempt: int = attempt) -> list[Path]:
                return [tmp_path / f"syncs-{attempt}-{name}"]

            expect_truth(await live_all(live_again, syncs, find_logs, at_once=AGENTS_AT_ONCE))
            struck = [kind for log in tmp_path.glob("syncs-*") for kind in find_struck_compactions(log)]
            if {"content", "header"} <= set(struck):
                return
    pytest.fail(f"a compaction has two syncs, of its content and of its header; killed at {struck} only")


def read_generation(state_dir: Path) -> int:
    """Return how often the ledger was begun: the number stands in the header, behind eight bytes."""
    headers = [(state_dir / name).read_bytes()[:16] for name in NAMES]
    return max(int.from_bytes(header[8:]) for header in headers)


def find_struck_compactions(log: Path) -> Iterator[str]:
    """Yield which sync of a compaction, if any, was never finished: that of the content, or of the header after it.

    A later start syncs a file of the ledger by `fsync` for nothing else."""
    for *before, last in read_syncs(log):
        if not last.endswith("= ?"):
            continue
        if is_content(last):
            yield "content"
        elif before and is_content(before[-1]):
            yield "header"


def is_content(call: str) -> bool:
    return call.startswith("fsync(") and any(f"/{name}>" in call for name in NAMES)


# ---------------------------------------------------------------- what watches a command


@pytest.mark.timeout(300)
async def test_a_runner_may_be_killed_at_any_sync(tmp_path: Path) -> None:
    """Its agent lives, and says that the command was interrupted: it ends what is left of it, and runs it no more."""
    (tmp_path / "server").mkdir()

    async with running_fleet(tmp_path / "server", 0) as fleet:

        async def live(sync: Sync | None, name: str) -> Life:
            prefix = tracing_runners(tmp_path / f"python-{name}", tmp_path / f"syncs-{name}", kill_at=sync)
            excused = {"interrupted"} if sync else set[str]()
            life = await live_agent(fleet, tmp_path / f"agent-{name}", prefix, excused=excused)
            return replace(life, was_killed=has_killed(*find_logs(name)))

        def find_logs(name: str) -> list[Path]:
            return list(tmp_path.glob(f"syncs-{name}-[0-9]*"))

        expect_truth([await live(None, "undisturbed")])
        syncs = list_syncs(*find_logs("undisturbed"))
        expect_truth(await live_all(live, syncs, find_logs, at_once=AGENTS_AT_ONCE))


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
        fold_log(server.data_dir / "fleetwire.db")
        return Prepared(server.data_dir, password, client.token, enrolled["agent_id"], enrolled["key"])


def fold_log(database: Path) -> None:
    """Move into the database what its log still holds, if anything: the next start would, with syncs of its own."""
    connection = sqlite3.connect(database)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()


async def live_server(prepared: Prepared, directory: Path, prefix: Sequence[str], *, expects_kill: bool) -> Life:
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
            if not server.was_killed:
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
                expects_kill=expects_kill,
            )
            await run.go([])
            if was_killed := not server.prefix:
                return tell(directory.name, run, await run.finish(), was_killed=was_killed)
            was_killed = await stop(server)
            server.prefix = []
            await server.start()
            await agent.stop()
            await agent.start()  # its backoff need not be waited for
            await agent.wait_until_connected()
            return tell(directory.name, run, await run.finish(), was_killed=was_killed)


@pytest.mark.timeout(600)
async def test_a_server_may_be_killed_at_any_sync(tmp_path: Path) -> None:
    prepared = await prepare(tmp_path / "prepared")

    async def live(sync: Sync | None, name: str) -> Life:
        prefix = tracing(tmp_path / f"syncs-{name}", kill_at=sync)
        return await live_server(prepared, tmp_path / f"server-{name}", prefix, expects_kill=sync is not None)

    expect_truth([await live(None, "undisturbed")])
    syncs = list_syncs(tmp_path / "syncs-undisturbed")
    assert count_syncs(tmp_path / "syncs-undisturbed") == len(syncs)
    expect_truth(await live_all(live, syncs, lambda name: [tmp_path / f"syncs-{name}"], at_once=SERVERS_AT_ONCE))


async def start_first(directory: Path, prefix: Sequence[str]) -> Life:
    """Start a server by `prefix`, on what the directory holds, and once more without; it must be usable then."""
    password = secrets.token_urlsafe(15)
    environment = {RUN_VARIABLE: str(directory)}
    server = Server(directory, password=password, port=find_free_port(), environment=environment, prefix=prefix)
    with closing([server], str(directory)):
        try:
            await server.start()
            was_killed = await stop(server)
        except ChaosError:
            if not server.was_killed:
                raise
            was_killed = True
        server.prefix = []
        await server.start()
        async with Client(server.url) as client:
            await client.log_in(password)
            enrolled = await client.call("POST", "/api/agents", {"label": "web-01"})
            listed = await client.call("GET", "/api/agents")
    assert [agent["id"] for agent in listed] == [enrolled["agent_id"]], listed
    return Life(directory.name, was_killed, [])


@pytest.mark.timeout(300)
@pytest.mark.parametrize("has_tables", [False, True], ids=["makes the tables", "has the tables"])
async def test_a_server_may_be_killed_at_any_sync_of_its_first_start(tmp_path: Path, *, has_tables: bool) -> None:
    """The thread that makes the tables hides the same syncs of the one that fills them: so once without it."""

    (prepared := tmp_path / "prepared").mkdir()
    if has_tables:
        async with open_store(f"sqlite:///{prepared}/fleetwire.db"):
            pass

    async def live(sync: Sync | None, name: str) -> Life:
        directory = tmp_path / f"server-{name}"
        shutil.copytree(prepared, directory / "server")
        return await start_first(directory, tracing(tmp_path / f"syncs-{name}", kill_at=sync))

    await live(None, "undisturbed")
    syncs = list_syncs(tmp_path / "syncs-undisturbed")
    assert not has_tables or count_syncs(tmp_path / "syncs-undisturbed") == len(syncs)
    await live_all(live, syncs, lambda name: [tmp_path / f"syncs-{name}"], at_once=SERVERS_AT_ONCE)
