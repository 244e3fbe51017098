"""Event streams: how a handler holds one open, and how each may end."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial

from aiohttp import web
from aiohttp_sse import EventSourceResponse

from fleetwire_server.core.events import frame_json
from fleetwire_server.core.fanout import SubscriberTooSlowError
from fleetwire_server.core.log_ring import LogEndedError
from fleetwire_server.core.streams import StreamEndedError
from fleetwire_server.http.requests import USER
from fleetwire_server.keys import CONFIG, STREAMS
from fleetwire_shared.errors import FleetwireError, UnavailableError

PING_SECONDS = 15.0
SEND_SECONDS = 30.0
"""A viewer that takes nothing for this long is closed."""

SEND_BUFFER_BYTES = 128 * 1024
"""Bounds the kernel's share of what a viewer that stopped reading costs."""


class EventStream(EventSourceResponse):
    """An open stream that is written framed events."""

    def __init__(self) -> None:
        super().__init__(sep="\n", ping_interval=PING_SECONDS, send_timeout=SEND_SECONDS)

    async def send_frames(self, frames: bytes) -> None:
        """Write events that are framed already.

        Raises:
            ConnectionError: the viewer left.
            TimeoutError: it took nothing for SEND_SECONDS; its connection is aborted."""
        try:
            async with asyncio.timeout(self._send_timeout):
                await self.write(frames)
        except TimeoutError:
            self._abort_transport()
            raise

    def on_viewer_left(self, call: Callable[[], None]) -> None:
        """Call once a comment line could not be written: the only sign of a viewer that left an idle stream."""
        if self._ping_task is not None:
            self._ping_task.add_done_callback(lambda _: call())


async def serve_events(
    request: web.Request, feed: Callable[[EventStream], Awaitable[None]], agent_id: str | None = None
) -> EventStream:
    """Begin the answer, and let `feed` write events into it until it returns, fails or the stream is ended.

    Where a viewer is still there, it is told why in an `end` event.

    Raises:
        UnavailableError: too many streams are open."""
    limit = request.app[CONFIG].max_viewers
    if len(request.app[STREAMS]) >= limit:
        raise UnavailableError(f"{limit} event streams are open, the most allowed; close one or try again later")
    response = EventStream()
    _bound_buffers(request)
    reason: str | None = None
    try:
        async with request.app[STREAMS].open(request[USER].session.token_hash, agent_id) as stream:
            await response.prepare(request)
            response.on_viewer_left(partial(stream.end, "the viewer left"))
            await response.send_frames(b": open\n\n")
            await feed(response)
    except (StreamEndedError, LogEndedError) as err:
        reason = str(err)
    except FleetwireError as err:
        if not response.prepared:
            raise
        reason = err.message
    except SubscriberTooSlowError:
        reason = "too slow: more events came than wait for a viewer; connect again"
    except (ConnectionError, TimeoutError):
        pass  # the viewer left, or takes nothing any more
    finally:
        if response.prepared:
            await _finish(response, reason)
    return response


async def _finish(response: EventStream, reason: str | None) -> None:
    with suppress(ConnectionError, TimeoutError):
        if reason is not None:
            await response.send_frames(frame_json({"reason": reason}, event="end"))
    response.stop_streaming()


def _bound_buffers(request: web.Request) -> None:
    if request.transport is None:
        return
    peer: socket.socket | None = request.transport.get_extra_info("socket")
    if peer is not None:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
