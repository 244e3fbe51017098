"""Open streams end when they must: with the login, the agent, the server."""

import asyncio

import pytest

from fleetwire_server.core.streams import OpenStreams, StreamEndedError


async def view(streams: OpenStreams, token_hash: str, agent_id: str | None = None) -> str:
    """View a stream that never ends by itself; return why it ended."""
    with pytest.raises(StreamEndedError) as ended:
        async with streams.open(token_hash, agent_id):
            await asyncio.Event().wait()
    return str(ended.value)


async def test_a_stream_ends_with_its_login_and_the_others_go_on() -> None:
    streams = OpenStreams()
    async with asyncio.TaskGroup() as group:
        gone = group.create_task(view(streams, "a"))
        kept = group.create_task(view(streams, "b", "agent_1"))
        await asyncio.sleep(0)
        assert streams.session_token_hashes() == {"a", "b"}
        streams.end_sessions(["a"], "the login is over")
        assert await gone == "the login is over"
        assert not kept.done()
        streams.end_agent("agent_1", "the agent was deleted")
        assert await kept == "the agent was deleted"
    assert len(streams) == 0


async def test_a_stream_that_opens_while_the_server_stops_ends_at_once() -> None:
    streams = OpenStreams()
    streams.end_all("the server is stopping")
    async with asyncio.timeout(5):
        assert await view(streams, "a") == "the server is stopping"


async def test_ending_a_stream_twice_or_too_late_is_harmless() -> None:
    streams = OpenStreams()
    async with streams.open("a", None) as stream:
        pass
    stream.end("too late")
    assert stream.reason is None


async def test_a_timeout_within_a_stream_stays_a_timeout() -> None:
    streams = OpenStreams()
    with pytest.raises(TimeoutError):
        async with streams.open("a", None), asyncio.timeout(0):
            await asyncio.Event().wait()
