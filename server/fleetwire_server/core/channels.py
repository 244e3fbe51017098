"""Channels: one socket for one file or one log tail, dialled by the agent when the server asks for it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from fleetwire_server.core.sessions import AgentSession
from fleetwire_shared.errors import (
    NotFoundError,
    PeerFailedError,
    PeerTimeoutError,
    UnavailableError,
    error_from_code,
)
from fleetwire_shared.messages import ChannelMessage, ChannelRefused, End, ServerMessage

DIAL_SECONDS = 15.0
"""How long an agent may take to open a file and dial."""

M = TypeVar("M", bound=ChannelMessage)


class ChannelSocket(Protocol):
    """The socket of a channel, as core sees it."""

    async def receive(self) -> ChannelMessage | bytes:
        """Return the next frame.

        Raises:
            UnavailableError: the socket closed.
            ProtocolError: the frame is not of the protocol."""

    async def send(self, message: ChannelMessage) -> None: ...

    async def send_bytes(self, chunk: bytes) -> None: ...

    async def close(self) -> None: ...


@dataclass(eq=False, slots=True)
class _Channel:
    agent_id: str
    socket: asyncio.Future[ChannelSocket]
    released: asyncio.Event = field(default_factory=asyncio.Event)  # the one who asked for it is done


class Channels:
    def __init__(self, *, new_channel_id: Callable[[], str], max_per_agent: int = 64) -> None:
        self._new_channel_id = new_channel_id
        self._max_per_agent = max_per_agent
        self._channels: dict[str, _Channel] = {}

    @asynccontextmanager
    async def open(
        self, session: AgentSession, request: Callable[[str], ServerMessage]
    ) -> AsyncIterator[ChannelSocket]:
        """Ask the agent for a channel and yield its socket; it is closed when the block ends.

        Args:
            request: builds the message that asks, from the channel's id.
        Raises:
            FleetwireError: the agent refused, with its reason.
            PeerTimeoutError: it did not dial within DIAL_SECONDS.
            UnavailableError: it has too many channels open, or went away."""
        if sum(channel.agent_id == session.agent_id for channel in self._channels.values()) >= self._max_per_agent:
            raise UnavailableError(f"the agent has {self._max_per_agent} transfers and streams open, the most allowed")
        channel_id = self._new_channel_id()
        channel = _Channel(session.agent_id, asyncio.get_running_loop().create_future())
        self._channels[channel_id] = channel
        socket: ChannelSocket | None = None
        try:
            session.link.send(request(channel_id))
            try:
                async with asyncio.timeout(DIAL_SECONDS):
                    socket = await channel.socket
            except TimeoutError as err:
                raise PeerTimeoutError(f"the agent did not open the channel within {DIAL_SECONDS:.0f} s") from err
            yield socket
        finally:
            del self._channels[channel_id]
            channel.released.set()
            if socket is not None:
                await socket.close()

    async def attach(self, agent_id: str, channel_id: str, socket: ChannelSocket) -> None:
        """Give an agent's socket to the one who waits for it; returns when that one is done with it."""
        channel = self._require(agent_id, channel_id)
        channel.socket.set_result(socket)
        await channel.released.wait()

    def check(self, agent_id: str, channel_id: str) -> None:
        """Raise NotFoundError unless that agent is awaited on that channel."""
        self._require(agent_id, channel_id)

    def _require(self, agent_id: str, channel_id: str) -> _Channel:
        channel = self._channels.get(channel_id)
        if channel is None or channel.agent_id != agent_id or channel.socket.done():
            raise NotFoundError("no channel of that id waits for this agent")
        return channel

    def refuse(self, agent_id: str, refusal: ChannelRefused) -> None:
        """The agent will not dial."""
        channel = self._channels.get(refusal.channel_id)
        if channel is not None and channel.agent_id == agent_id and not channel.socket.done():
            error = error_from_code(refusal.code, refusal.message, size_bytes=refusal.size_bytes)
            channel.socket.set_exception(error)

    def __len__(self) -> int:
        return len(self._channels)

    async def close_agent(self, agent_id: str) -> None:
        """Close all channels of an agent whose link is gone: one that was cut off would never end by itself."""
        for channel in [channel for channel in self._channels.values() if channel.agent_id == agent_id]:
            if not channel.socket.done():
                channel.socket.set_exception(UnavailableError("the agent went away"))
            elif not channel.socket.cancelled() and channel.socket.exception() is None:
                await channel.socket.result().close()


async def receive_message(socket: ChannelSocket, kind: type[M], *, timeout_seconds: float) -> M:
    """Return the next frame, which must be a `kind`.

    Raises:
        FleetwireError: the agent ended the channel with an error.
        PeerTimeoutError, PeerFailedError: nothing came, or something else."""
    try:
        async with asyncio.timeout(timeout_seconds):
            frame = await socket.receive()
    except TimeoutError as err:
        raise PeerTimeoutError(f"the agent sent nothing for {timeout_seconds:.0f} s") from err
    if isinstance(frame, kind):
        return frame
    if isinstance(frame, End) and frame.code is not None:
        raise error_from_code(frame.code, frame.message or "the agent gave no reason")
    raise PeerFailedError(f"the agent sent {type(frame).__name__} where {kind.__name__} was due")
