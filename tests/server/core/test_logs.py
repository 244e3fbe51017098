"""Tails and their viewers, against an agent made of queues."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Self

import pytest
from tests.support.eventually import eventually

from fleetwire_server.core.channels import Channels
from fleetwire_server.core.log_ring import LogEndedError
from fleetwire_server.core.logs import LogQuery, Logs, LogStart, LogViewer
from fleetwire_server.core.sessions import AgentSession, Sessions
from fleetwire_shared.errors import InvalidError, NotFoundError, UnavailableError
from fleetwire_shared.messages import (
    ChannelMessage,
    ChannelRefused,
    End,
    FollowLog,
    HostFacts,
    LogGap,
    LogLines,
    LogOpened,
    ServerMessage,
)

AGENT = "agent_1"
QUERY = LogQuery(source="file", path="/log")
HOST = HostFacts(
    hostname="web-01",
    os="Debian",
    kernel="6",
    architecture="x86_64",
    boot_id="b",
    cpu_count=1,
    memory_bytes=1,
    python="3",
)


class Channel:
    """One channel of the agent: what the test puts into it comes out at the server."""

    def __init__(self, request: FollowLog) -> None:
        self.request = request
        self.is_closed = False
        self._frames: asyncio.Queue[ChannelMessage | None] = asyncio.Queue()
        self._frames.put_nowait(LogOpened())

    def put(self, *messages: ChannelMessage) -> None:
        for message in messages:
            self._frames.put_nowait(message)

    def put_lines(self, *numbers: int) -> None:
        self.put(LogLines(cursors=tuple(map(str, numbers)), texts=tuple(f"line {number}" for number in numbers)))

    async def receive(self) -> ChannelMessage | bytes:
        frame = None if self.is_closed else await self._frames.get()
        if frame is None:
            raise UnavailableError("the agent closed the channel")
        return frame

    async def send(self, message: ChannelMessage) -> None:
        raise AssertionError("nothing is sent on a log channel")

    async def send_bytes(self, chunk: bytes) -> None:
        raise AssertionError("nothing is sent on a log channel")

    async def close(self) -> None:
        self.is_closed = True
        self._frames.put_nowait(None)


class Agent:
    """The agent's link: opens a channel for each request, or refuses it."""

    def __init__(self, channels: Channels, group: asyncio.TaskGroup) -> None:
        self.channels: list[Channel] = []
        self.refusals: list[tuple[str, str]] = []
        self._server_channels = channels
        self._group = group
        self.on_open: Callable[[Channel], None] = lambda _: None

    def send(self, message: ServerMessage) -> None:
        assert isinstance(message, FollowLog)
        if self.refusals:
            code, text = self.refusals.pop(0)
            self._server_channels.refuse(AGENT, ChannelRefused(channel_id=message.channel_id, code=code, message=text))
            return
        channel = Channel(message)
        self.channels.append(channel)
        self.on_open(channel)
        self._group.create_task(self._server_channels.attach(AGENT, message.channel_id, channel))

    def close(self, code: int, reason: str) -> None:
        raise AssertionError("not closed here")

    @property
    def open_channels(self) -> list[Channel]:
        return [channel for channel in self.channels if not channel.is_closed]


class House:
    """The parts, joined."""

    def __init__(self, group: asyncio.TaskGroup, linger_seconds: float) -> None:
        numbers = iter(range(10**6))
        self.sessions = Sessions(now=lambda: 100.0)
        channels = Channels(new_channel_id=lambda: f"ch_{next(numbers)}")
        self.agent = Agent(channels, group)
        self.logs = Logs(sessions=self.sessions, channels=channels, linger_seconds=linger_seconds)
        self.session = AgentSession(
            agent_id=AGENT,
            instance_id="i",
            link=self.agent,
            host=HOST,
            agent_version="1",
            ip="127.0.0.1",
            connected_at=100.0,
        )

    def view(self, **start: Any) -> AbstractAsyncContextManager[LogViewer]:
        return self.logs.view(AGENT, QUERY, LogStart(**start))


@pytest.fixture(params=[0.05])
async def house(request: pytest.FixtureRequest) -> AsyncIterator[House]:
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        house = House(group, request.param)
        house.sessions.add(house.session)
        running = group.create_task(house.logs.run())
        await asyncio.sleep(0)
        yield house
        running.cancel()


class Reader:
    """What a viewer has seen, one text for each event."""

    def __init__(self, viewer: LogViewer) -> None:
        self._frames = viewer.follow()
        self.seen: list[str] = []

    async def until(self, last: str) -> list[str]:
        while not self.seen or self.seen[-1] != last:
            frames = await anext(self._frames)
            for event in frames.decode().split("\n\n")[:-1]:
                head, _, data = event.rpartition("data: ")
                self.seen.append(head.partition("\n")[0].removeprefix("event: ") if "event: " in head else data)
        return self.seen

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._frames.aclose()


async def test_viewers_share_one_channel_which_ends_a_while_after_the_last_left(house: House) -> None:
    async with house.view(lines=0), house.view(lines=0):
        assert len(house.agent.channels) == 1
    assert len(house.agent.open_channels) == 1
    await eventually(lambda: asyncio.sleep(0, house.agent.open_channels), lambda channels: not channels)


@pytest.mark.parametrize("house", [30.0], indirect=True)
async def test_a_viewer_that_comes_back_soon_finds_the_tail_as_it_was(house: House) -> None:
    async with house.view(lines=2) as viewer, Reader(viewer) as reader:
        house.agent.channels[0].put_lines(1, 2)
        assert await reader.until("line 2") == ["line 1", "line 2"]
    house.agent.channels[0].put_lines(3, 4)
    async with house.view(cursor="2") as viewer, Reader(viewer) as reader:
        assert await reader.until("line 4") == ["line 3", "line 4"]
    assert len(house.agent.channels) == 1


async def test_a_viewer_of_older_lines_reads_the_host_until_it_meets_the_tail(house: House) -> None:
    async with house.view(lines=0) as first, Reader(first) as tail:
        house.agent.channels[0].put_lines(8, 9)
        await tail.until("line 9")

        def answer(channel: Channel) -> None:
            channel.put_lines(5, 6)
            channel.put_lines(7, 8)
            channel.put_lines(9)

        house.agent.on_open = answer
        async with house.view(cursor="4") as second, Reader(second) as reader:
            assert house.agent.channels[1].request.cursor == "4"
            await reader.until("line 8")
            house.agent.channels[0].put_lines(10)
            assert await reader.until("line 10") == [f"line {number}" for number in range(5, 11)]
            assert len(house.agent.open_channels) == 1


async def test_the_last_lines_are_the_hosts_while_the_tail_is_behind(house: House) -> None:
    async with house.view(cursor="0") as first, Reader(first) as tail:
        house.agent.channels[0].put_lines(1, 2, 3)  # far from the log's end
        await tail.until("line 3")
        house.agent.on_open = lambda channel: channel.put_lines(98, 99)
        async with house.view(lines=2) as second, Reader(second) as reader:
            assert house.agent.channels[1].request.lines == 2
            assert await reader.until("line 99") == ["line 98", "line 99"]


async def test_a_viewer_outside_the_ring_misses_nothing_from_its_opening_on(house: House) -> None:
    async with house.view(cursor="0"), house.view(lines=0) as second:
        assert [channel.request.lines for channel in house.agent.channels] == [10, 0]  # open before any event is sent
        house.agent.channels[1].put_lines(50)
        async with Reader(second) as reader:
            assert await reader.until("line 50") == ["line 50"]


async def test_a_refusal_comes_before_the_stream(house: House) -> None:
    house.agent.refusals = [("not_found", "/log: no such file")]
    with pytest.raises(NotFoundError, match="no such file"):
        async with house.view():
            raise AssertionError("it was opened")
    async with house.view(lines=0):
        house.agent.refusals = [("invalid", "cursor must be one")]
        with pytest.raises(InvalidError, match="cursor must be one"):
            async with house.view(cursor="nonsense"):
                raise AssertionError("it was opened")


async def test_what_was_wrong_with_one_viewers_request_is_not_the_others(house: House) -> None:
    house.agent.refusals = [("invalid", "cursor must be one")]
    results: list[str] = []

    async def view(**start: int | str) -> None:
        try:
            async with house.view(**start):
                results.append("open")
        except InvalidError:
            results.append("refused")

    async with asyncio.TaskGroup() as group:
        group.create_task(view(cursor="nonsense"))
        group.create_task(view(lines=0))
    assert sorted(results) == ["open", "refused"]


async def test_an_agent_that_is_away_is_unavailable(house: House) -> None:
    house.sessions.remove(house.session, said_goodbye=True)
    with pytest.raises(UnavailableError):
        async with house.view():
            raise AssertionError("it was opened")


async def test_an_agent_that_comes_back_is_asked_for_what_follows(house: House) -> None:
    async with house.view(lines=5) as viewer, Reader(viewer) as reader:
        house.agent.channels[0].put_lines(1, 2)
        await reader.until("line 2")
        house.sessions.remove(house.session, said_goodbye=False)
        await house.agent.channels[0].close()
        await reader.until("waiting")
        house.sessions.add(house.session)
        house.agent.on_open = lambda channel: channel.put_lines(3)
        assert await reader.until("line 3") == ["line 1", "line 2", "waiting", "line 3"]
        assert house.agent.channels[-1].request.cursor == "2"


async def test_without_a_line_to_go_on_from_a_gap_is_said(house: House) -> None:
    async with house.view(lines=0) as viewer, Reader(viewer) as reader:
        await house.agent.channels[0].close()
        assert await reader.until("gap") == ["waiting", "gap"]


async def test_gaps_pass_and_a_failure_of_the_host_ends_the_stream(house: House) -> None:
    async with house.view(lines=1) as viewer, Reader(viewer) as reader:
        house.agent.channels[0].put(LogGap(reason="rotated away", count=3), End(code="forbidden", message="no more"))
        await reader.until("gap")
        with pytest.raises(LogEndedError, match="no more"):
            await reader.until("never")


@pytest.mark.parametrize(
    "bad",
    [
        LogLines(cursors=("1", "2"), texts=("one",)),
        LogLines(cursors=("1\n\nevent: end",), texts=("one",)),
        LogLines(cursors=("",), texts=("one",)),
    ],
)
async def test_lines_that_make_no_sense_end_that_stream_only(house: House, bad: LogLines) -> None:
    async with house.view(lines=1) as viewer, Reader(viewer) as reader:
        house.agent.channels[0].put(bad)
        with pytest.raises(LogEndedError, match="the agent sent"):
            await reader.until("never")
    async with house.view(lines=1) as viewer, Reader(viewer) as reader:
        house.agent.channels[1].put_lines(1)
        await reader.until("line 1")
