"""Questions of the server, answered one frame each."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from fleetwire_agent.requests import MAX_REQUESTS, Requests
from fleetwire_shared.errors import ConflictError, UnavailableError
from fleetwire_shared.messages import AgentMessage, ListUnits, RequestFailed, Uninstall, Uninstalled, Unit, UnitList

UNITS = (Unit(name="a.service", load="loaded", active="active", sub="running", description=""),)


@dataclass
class Host:
    """What the agent can do, as a record of what it did."""

    events: list[str] = field(default_factory=list)
    sent: asyncio.Queue[AgentMessage] = field(default_factory=asyncio.Queue)
    is_link_lost: bool = False
    failure: Exception | None = None
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    async def send(self, message: AgentMessage) -> None:
        self.events.append(message.type)
        self.sent.put_nowait(message)

    async def flush(self) -> bool:
        self.events.append("flush")
        return not self.is_link_lost

    async def list_units(self) -> tuple[tuple[Unit, ...], bool]:
        await self.gate.wait()
        if self.failure:
            raise self.failure
        return UNITS, True

    async def remove(self, purge: bool) -> tuple[str, ...]:
        self.events.append(f"remove {purge}")
        await self.gate.wait()
        if self.failure:
            raise self.failure
        return ("/opt/fleetwire-agent",)

    async def leave(self) -> None:
        self.events.append("leave")

    async def answer(self) -> AgentMessage:
        async with asyncio.timeout(5):
            return await self.sent.get()


@pytest.fixture
def host() -> Host:
    host = Host()
    host.gate.set()
    return host


@asynccontextmanager
async def serve(host: Host) -> AsyncIterator[Requests]:
    requests = Requests(answers=host, list_units=host.list_units, remove_agent=host.remove, leave=host.leave)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(requests.serve())
        await asyncio.sleep(0)
        yield requests
        task.cancel()


async def test_units_are_listed(host: Host) -> None:
    async with serve(host) as requests:
        requests.open(ListUnits(request_id="req_1"))
        assert await host.answer() == UnitList(request_id="req_1", units=UNITS, is_truncated=True)


@pytest.mark.parametrize(
    ("failure", "code", "text"),
    [
        (UnavailableError("no systemd at \udcff"), "unavailable", "no systemd at \\udcff"),
        (KeyError("x"), "internal", "the agent failed; see its log"),
    ],
)
async def test_a_failure_is_answered_and_the_next_question_too(
    host: Host, failure: Exception, code: str, text: str
) -> None:
    host.failure = failure
    async with serve(host) as requests:
        requests.open(ListUnits(request_id="req_1"))
        assert await host.answer() == RequestFailed(request_id="req_1", code=code, message=text)
        host.failure = None
        requests.open(ListUnits(request_id="req_2"))
        assert isinstance(await host.answer(), UnitList)


async def test_too_many_at_once_are_refused(host: Host) -> None:
    host.gate.clear()
    async with serve(host) as requests:
        for number in range(MAX_REQUESTS + 200):
            requests.open(ListUnits(request_id=f"req_{number}"))
        for _ in range(64):
            refusal = await host.answer()
            assert isinstance(refusal, RequestFailed)
            assert refusal.code == "unavailable"
        host.gate.set()
        for _ in range(MAX_REQUESTS):
            assert isinstance(await host.answer(), UnitList)


@pytest.mark.parametrize("is_link_lost", [False, True])
async def test_the_agent_leaves_when_it_is_removed_and_has_said_so(host: Host, is_link_lost: bool) -> None:
    host.is_link_lost = is_link_lost
    async with serve(host) as requests:
        requests.open(Uninstall(request_id="req_1", purge=True))
        assert await host.answer() == Uninstalled(request_id="req_1", removed=("/opt/fleetwire-agent",))
        await asyncio.sleep(0)
    assert host.events == ["remove True", "uninstalled", "flush", "leave"]


async def test_an_agent_that_cannot_be_removed_stays(host: Host) -> None:
    host.failure = ConflictError("not installed by the installer")
    async with serve(host) as requests:
        requests.open(Uninstall(request_id="req_1"))
        assert await host.answer() == RequestFailed(
            request_id="req_1", code="conflict", message="not installed by the installer"
        )
    assert host.events == ["remove False", "request_failed"]


async def test_it_is_removed_once_at_a_time(host: Host) -> None:
    host.gate.clear()
    async with serve(host) as requests:
        requests.open(Uninstall(request_id="req_1"))
        requests.open(Uninstall(request_id="req_2"))
        refusal = await host.answer()
        assert isinstance(refusal, RequestFailed)
        assert (refusal.request_id, refusal.code) == ("req_2", "conflict")
        host.gate.set()
        assert isinstance(await host.answer(), Uninstalled)
