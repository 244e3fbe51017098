"""Questions to agents: the right answer, or why there is none."""

import asyncio

import pytest

from fleetwire_server.core.requests import Requests
from fleetwire_server.core.sessions import AgentSession
from fleetwire_shared.errors import ConflictError, FleetwireError, PeerFailedError, PeerTimeoutError, UnavailableError
from fleetwire_shared.messages import HostFacts, ListUnits, RequestFailed, ServerMessage, Uninstalled, UnitList

HOST = HostFacts(
    hostname="h", os="o", kernel="k", architecture="a", boot_id="b", cpu_count=1, memory_bytes=1, python="3"
)


class Link:
    def __init__(self) -> None:
        self.sent: asyncio.Queue[ServerMessage] = asyncio.Queue()

    def send(self, message: ServerMessage) -> None:
        self.sent.put_nowait(message)

    def close(self, code: int, reason: str) -> None:
        raise AssertionError("not closed here")


def make_session(link: Link, agent_id: str = "agent_1") -> AgentSession:
    return AgentSession(
        agent_id=agent_id, instance_id="i", link=link, host=HOST, agent_version="1", ip="", connected_at=0.0
    )


class Asking:
    """One question under way."""

    def __init__(self, *, max_per_agent: int = 2) -> None:
        numbers = iter(range(100))
        self.requests = Requests(new_request_id=lambda: f"req_{next(numbers)}", max_per_agent=max_per_agent)
        self.link = Link()
        self.session = make_session(self.link)

    async def ask(self, timeout_seconds: float = 5.0) -> UnitList:
        return await self.requests.ask(
            self.session, lambda request_id: ListUnits(request_id=request_id), UnitList, timeout_seconds=timeout_seconds
        )


@pytest.fixture
def asking() -> Asking:
    return Asking()


async def test_the_answer_comes_to_who_asked(asking: Asking) -> None:
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        tasks = [group.create_task(asking.ask()) for _ in range(2)]
        questions = [await asking.link.sent.get() for _ in tasks]
        assert questions == [ListUnits(request_id="req_0"), ListUnits(request_id="req_1")]
        for request_id in ("req_1", "req_0"):
            asking.requests.receive("agent_1", UnitList(request_id=request_id, units=()))
    assert [task.result().request_id for task in tasks] == ["req_0", "req_1"]
    assert len(asking.requests) == 0


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (RequestFailed(request_id="req_0", code="conflict", message="no"), ConflictError),
        (RequestFailed(request_id="req_0", code="from the future", message="no"), PeerFailedError),
        (Uninstalled(request_id="req_0", removed=()), PeerFailedError),
    ],
)
async def test_a_refusal_is_an_error(
    asking: Asking, answer: RequestFailed | Uninstalled, error: type[FleetwireError]
) -> None:
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        task = group.create_task(_failure(asking))
        await asking.link.sent.get()
        asking.requests.receive("agent_1", answer)
    assert type(task.result()) is error
    assert len(asking.requests) == 0


async def test_what_others_say_and_what_nobody_asked_is_ignored(
    asking: Asking, caplog: pytest.LogCaptureFixture
) -> None:
    asking.requests.receive("agent_1", UnitList(request_id="req_7", units=()))
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        task = group.create_task(asking.ask())
        await asking.link.sent.get()
        asking.requests.receive("agent_2", RequestFailed(request_id="req_0", code="conflict", message="mine"))
        right = UnitList(request_id="req_0", units=(), is_truncated=True)
        asking.requests.receive("agent_1", right)
        asking.requests.receive("agent_1", UnitList(request_id="req_0", units=()))
    assert task.result() == right
    assert caplog.text.count("that nobody waits for") == 3


async def test_no_answer_in_time_is_a_timeout(asking: Asking) -> None:
    with pytest.raises(PeerTimeoutError, match=r"within 0\.01 s"):
        await asking.ask(timeout_seconds=0.01)
    assert len(asking.requests) == 0


async def test_the_end_of_the_link_ends_its_questions_only(asking: Asking) -> None:
    other = make_session(asking.link)
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        task = group.create_task(_failure(asking))
        await asking.link.sent.get()
        asking.requests.end_session(other)
        await asyncio.sleep(0)
        assert not task.done()
        asking.requests.end_session(asking.session)
    assert type(task.result()) is UnavailableError


async def test_only_so_many_wait_for_one_agent(asking: Asking) -> None:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(asking.ask()) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(UnavailableError, match="2 requests wait for this agent"):
            await asking.ask()
        for task in tasks:
            task.cancel()
    assert len(asking.requests) == 0


async def _failure(asking: Asking) -> FleetwireError:
    with pytest.raises(FleetwireError) as caught:
        await asking.ask()
    return caught.value
