"""One run: commands are submitted while faults strike, all is healed, and what the server then says is collected."""

import asyncio
import json
import random
import re
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, TypeAlias

from scripts.lib.chaos.checker import OVER, Evidence, Violation, check
from scripts.lib.chaos.client import AGAIN_SECONDS, Client, Unanswered
from scripts.lib.chaos.faults import Strike, Target, plan_strikes, strike
from scripts.lib.chaos.link import CuttableLink
from scripts.lib.chaos.parts import RUN_VARIABLE, Agent, ChaosError, Part, Server, closing, find_living
from scripts.lib.chaos.record import Record
from scripts.lib.chaos.workload import KINDS, Order, make_token

COMMANDS_PER_STRIKE: Final = 38
SECONDS_PER_STRIKE: Final = 3.0  # about what one takes: submits are spread over them
SETTLE_SECONDS: Final = 150.0
"""How long all may take to end once all is healed; an agent's backoff alone can be 60."""

LEAVE_SECONDS: Final = 15.0
"""How long what ran commands may stay once all are over."""

_AT_ONCE: Final = 8  # calls, while answers are collected
_LOOK_AT: Final = 40  # commands in a round of waiting

Work: TypeAlias = Callable[[Evidence], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is going to happen, as far as a seed can decide it."""

    seed: int
    agents: int
    orders: Sequence[Order]
    strikes: Sequence[Strike]


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What happened.

    Args:
        faults: how many of each kind struck.
        strikes: how many there were, and how many of them while a command was acknowledged and not over."""

    plan: Plan
    evidences: Sequence[Evidence]
    violations: Sequence[Violation]
    executions: Sequence[str]
    faults: Counter[str]
    strikes: int
    strikes_at_work: int
    record: Record
    seconds: float


def make_plan(commands: int, *, seed: int, agents: int = 1, strikes: int | None = None) -> Plan:
    """Return the schedule of a seed. `strikes`: how often faults strike, None for as often as usual."""
    count = commands // COMMANDS_PER_STRIKE + 1 if strikes is None else strikes
    choose, choose_fault = random.Random(f"orders {seed}"), random.Random(f"faults {seed}")
    last_at = count * SECONDS_PER_STRIKE
    orders = [_make_order(number, agents, last_at, choose) for number in range(commands)]
    orders.sort(key=lambda order: order.submit_at)
    return Plan(seed=seed, agents=agents, orders=orders, strikes=plan_strikes(count, agents, choose_fault))


def _make_order(number: int, agents: int, last_at: float, choose: random.Random) -> Order:
    make = choose.choices(list(KINDS), list(KINDS.values()))[0]
    order = make(make_token(number, choose), choose)
    return replace(order, agent=choose.randrange(agents), submit_at=choose.uniform(0, last_at))


async def run_plan(plan: Plan, directory: Path) -> Outcome:
    """Carry out a plan in an empty directory. Raises ChaosError: it could not be carried out at all."""
    record = Record()
    try:
        async with running_fleet(directory, plan.agents) as fleet:
            run = Run(fleet, plan.orders, record)
            await run.go(plan.strikes)
            violations = await run.finish()
    except ExceptionGroup as group:
        raise find_cause(group) from group
    return Outcome(
        plan=plan,
        evidences=list(run.evidences.values()),
        violations=violations,
        executions=fleet.read_executions(),
        faults=run.faults,
        strikes=run.strikes,
        strikes_at_work=run.strikes_at_work,
        record=record,
        seconds=record.seconds,
    )


def find_cause(error: BaseException) -> BaseException:
    """Return the first error in a group of groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


# ---------------------------------------------------------------- the fleet


@dataclass(frozen=True, slots=True)
class Fleet:
    """A server, its agents behind links, and a client that is logged in."""

    directory: Path
    target: Target
    client: Client
    canary: Path

    @property
    def parts(self) -> tuple[Part, ...]:
        return (self.target.server, *self.target.agents)

    def read_executions(self) -> list[str]:
        return self.canary.read_text().splitlines()


@asynccontextmanager
async def running_fleet(directory: Path, agents: int) -> AsyncIterator[Fleet]:
    """Start all of a fleet; nothing of it is left afterwards, nor of what it started."""
    password = secrets.token_urlsafe(15)
    canary = directory / "canary"
    canary.touch()
    parts: list[Part] = []
    environment = {RUN_VARIABLE: str(directory)}
    async with AsyncExitStack() as stack:
        stack.enter_context(closing(parts, str(directory)))
        server = Server(directory, password=password, environment=environment)
        parts.append(server)
        await server.start()
        client = await stack.enter_async_context(Client(server.url))
        await client.log_in(password)
        started, links = list[Agent](), list[CuttableLink]()
        for number in range(agents):
            links.append(await stack.enter_async_context(CuttableLink(server.url)))
            name = f"agent-{number}"
            enrolled = await client.call("POST", "/api/agents", {"label": name})
            agent = Agent(
                directory,
                name=name,
                server_url=links[-1].url,
                agent_id=enrolled["agent_id"],
                key=enrolled["key"],
                canary=canary,
                environment=environment,
            )
            parts.append(agent)
            started.append(agent)
            await agent.start()
        yield Fleet(directory, Target(server, tuple(started), tuple(links)), client, canary)


# ---------------------------------------------------------------- the run


@dataclass(slots=True)
class Run:
    """Carries orders through a fleet, and knows what it was told about each."""

    fleet: Fleet
    orders: Sequence[Order]
    record: Record
    expects_kill: bool = False  # of a part that `prefix` starts: SIGKILL ends it, and it is started again without
    evidences: dict[str, Evidence] = field(init=False)
    crashes: list[Violation] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)  # those that struck
    strikes: int = 0
    strikes_at_work: int = 0  # of them, those that fell while a command was acknowledged and not over
    _by_id: dict[str, Evidence] = field(default_factory=dict)
    _events: dict[str, list[str]] = field(default_factory=dict)  # of ids that no submit was answered with, so far

    def __post_init__(self) -> None:
        self.evidences = {order.token: Evidence(order=order) for order in self.orders}

    def adopt(self, command_id: str, token: str, ends_seen: Sequence[str]) -> Evidence:
        """Take over a command that was submitted elsewhere, and what was seen of it."""
        evidence = self.evidences[token]
        self._note_id(evidence, command_id)
        evidence.ends_seen = list(ends_seen)
        return evidence

    async def go(self, strikes: Sequence[Strike]) -> None:
        """Submit all orders, cancel those that are to be, while faults strike; return when all of them are healed."""
        async with asyncio.TaskGroup() as group:
            background = [group.create_task(self.watch_events()), group.create_task(self.revive())]
            async with asyncio.TaskGroup() as work:
                work.create_task(self._strike(strikes))
                for order in self.orders:
                    work.create_task(self.carry(order))
            await self.wait_until_over()
            for task in background:
                task.cancel()

    async def finish(self) -> list[Violation]:
        """Collect what the server says and what is left on the host, and judge it."""
        await self.collect()
        await self.find_left()
        strangers = [f"{command_id} ({', '.join(told)})" for command_id, told in self._events.items()]
        found = check(self.evidences.values(), self.fleet.read_executions(), strangers=strangers)
        return self.crashes + found + self._find_unattributed()

    async def _strike(self, strikes: Sequence[Strike]) -> None:
        for planned in strikes:
            await asyncio.sleep(planned.after)
            self.strikes += 1
            self.strikes_at_work += any(not evidence.ends_seen for evidence in self._by_id.values())
            self.faults.update(await strike(self.fleet.target, planned, self.record))
        for agent in self.fleet.target.agents:  # the last backoff need not be waited for
            if strikes:
                await agent.stop()
                await agent.start()
        self.record.add("all is healed")

    async def carry(self, order: Order) -> None:
        """Submit one order until that is acknowledged, and cancel it when its time has come."""
        await asyncio.sleep(max(0.0, order.submit_at - self.record.seconds))
        await self.submit(order)
        if order.cancel_after is not None:
            await asyncio.sleep(order.cancel_after)
            await self.cancel(order)
        if random.Random(order.token).random() < 0.05:
            await self.submit(order)  # once more: the key must give the same command

    async def submit(self, order: Order) -> None:
        evidence = self.evidences[order.token]
        path = f"{self.fleet.target.agents[order.agent].path}/commands"
        unanswered = 0
        while True:
            if unanswered < 3:
                self.record.add("POST", order.token)
            try:
                status, answer = await self.fleet.client.ask(
                    "POST", path, order.body, headers={"Idempotency-Key": order.token}
                )
            except Unanswered as err:
                unanswered += 1
                if unanswered < 3:
                    self.record.add(f"no answer: {err}", order.token)
            else:
                self.record.add(f"{status} {answer.decode(errors='replace')}", order.token)
                if status == 200:
                    self._note_id(evidence, str(json.loads(answer)["command_id"]))
                    return
                if status < 500:
                    raise ChaosError(f"POST {path}: {status} {answer.decode(errors='replace')}")
            await asyncio.sleep(AGAIN_SECONDS)

    async def cancel(self, order: Order) -> None:
        path = f"{self._path(self.evidences[order.token])}/cancel"
        self.record.add("POST cancel", order.token)
        answer = await self.fleet.client.fetch("POST", path, statuses=(200, 202, 404, 409))
        self.record.add(f"cancel: {answer.decode(errors='replace')[:300]}", order.token)

    def _note_id(self, evidence: Evidence, command_id: str) -> None:
        if evidence.command_id not in (None, command_id):
            evidence.other_ids.add(command_id)
            return
        evidence.command_id = command_id
        self._by_id[command_id] = evidence
        for status in self._events.pop(command_id, ()):
            self._note_status(evidence, status)

    def _note_status(self, evidence: Evidence, status: str) -> None:
        self.record.add(f"is {status}", evidence.order.token)
        if status in OVER and evidence.ends_seen[-1:] != [status]:
            evidence.ends_seen.append(status)

    async def watch_events(self) -> None:
        """Note each status the server tells of, until cancelled."""
        own = {agent.agent_id for agent in self.fleet.target.agents}
        while True:
            async for name, data in self.fleet.client.events("/api/events"):
                if name != "command" or data["agent_id"] not in own:
                    continue
                evidence = self._by_id.get(data["command_id"])
                if evidence is None:  # told before its submit was answered, or nobody's
                    self._events.setdefault(data["command_id"], []).append(data["status"])
                else:
                    self._note_status(evidence, data["status"])
            await asyncio.sleep(AGAIN_SECONDS)

    async def revive(self) -> None:
        """Start again, as systemd would, what ended by itself, and remember that it did; until cancelled."""
        while True:
            for part in self.fleet.parts:
                if not part.is_wanted or part.is_running:
                    continue
                part.is_wanted = False
                if self.expects_kill and part.prefix and part.was_killed:
                    self.record.add(f"FAULT the {part.name} was killed")
                    part.prefix = []
                else:
                    detail = f"the {part.name} ended by itself with status {part.exit_status}:\n{part.last_words()}"
                    self.crashes.append(Violation("crash", detail))
                    self.record.add(detail)
                await part.start()
            await asyncio.sleep(0.1)

    async def wait_until_over(self) -> None:
        """Return when the server says of all acknowledged commands that they are over, or they take too long."""
        pending = [evidence for evidence in self._by_id.values() if not evidence.ends_seen]
        deadline = self.record.seconds + SETTLE_SECONDS
        while pending and self.record.seconds < deadline:
            await self._at_once(self._look, pending[:_LOOK_AT])  # of most an event tells
            pending = [evidence for evidence in pending if not evidence.ends_seen]
            await asyncio.sleep(0.5)

    async def look_at_all(self) -> None:
        """Get all commands as they are now."""
        await self._at_once(self._look, list(self._by_id.values()))

    async def _look(self, evidence: Evidence) -> None:
        answer = await self.fleet.client.fetch("GET", self._path(evidence), statuses=(200, 404))
        document = json.loads(answer)
        evidence.answer = document if "command_id" in document else None
        if evidence.status in OVER and evidence.ends_seen[-1:] != [evidence.status]:
            self._note_status(evidence, evidence.status)

    # ------------------------------------------------------------ what is there at the end

    async def collect(self) -> None:
        """Get each command, and the output of those that ran to their end."""
        await self._at_once(self._collect_one, list(self._by_id.values()))

    async def _collect_one(self, evidence: Evidence) -> None:
        await self._look(evidence)
        if evidence.status not in ("succeeded", "failed"):
            return
        assert evidence.answer is not None
        total = evidence.answer["stdout_bytes"] + evidence.answer["stderr_bytes"]
        if total == 0:
            evidence.stdout = evidence.stderr = b""
            return
        path = self._path(evidence)
        evidence.stdout = await self.fleet.client.fetch("GET", f"{path}/output?stream=stdout")
        evidence.stderr = await self.fleet.client.fetch("GET", f"{path}/output?stream=stderr")
        if len(evidence.stdout) + len(evidence.stderr) < total:
            async for name, data in self.fleet.client.events(f"{path}/stream"):
                if name == "gap":
                    evidence.said_missing += data["count"]
                    self.record.add(f"gap: {data}", evidence.order.token)

    async def find_left(self) -> None:
        """Note the processes of each command that have not gone after a while."""
        deadline = self.record.seconds + LEAVE_SECONDS
        while self._find_processes() and self.record.seconds < deadline:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.3)
        for evidence in self.evidences.values():
            evidence.living = ()
        for process, found in self._find_processes():
            if found is not None:
                found.living = [*found.living, process]

    def _find_unattributed(self) -> list[Violation]:
        left = [process for process, found in self._find_processes() if found is None]
        return [Violation("processes left", process) for process in left]

    def _find_processes(self) -> list[tuple[str, Evidence | None]]:
        """Return what of this run still lives, beside the parts themselves, and whose it is."""
        own = tuple(" ".join(part.arguments) for part in self.fleet.parts)  # a prefix may have made it another's child
        found = []
        for living in find_living(str(self.fleet.directory)):
            if living.command_line.endswith(own):
                continue
            named = re.findall(r"cmd_[0-9a-z]{20}", f"{living.command_id} {living.command_line}")
            owners = [self._by_id[name] for name in named if name in self._by_id]
            found.append((str(living), owners[0] if owners else None))
        return found

    def _path(self, evidence: Evidence) -> str:
        return f"{self.fleet.target.agents[evidence.order.agent].path}/commands/{evidence.command_id}"

    async def _at_once(self, work: Work, evidences: Iterable[Evidence]) -> None:
        gate = asyncio.Semaphore(_AT_ONCE)

        async def one(evidence: Evidence) -> None:
            async with gate:
                await work(evidence)

        async with asyncio.TaskGroup() as group:
            for evidence in evidences:
                group.create_task(one(evidence))
