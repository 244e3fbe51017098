"""`GET /api/agents/channels/{channel_id}`: an agent dials a channel it was asked for."""

import asyncio

from aiohttp import WebSocketError, WSMsgType, web

from fleetwire_server.http.requests import AGENT
from fleetwire_server.keys import CHANNELS
from fleetwire_shared.codec import decode, encode
from fleetwire_shared.errors import ProtocolError, UnavailableError
from fleetwire_shared.limits import MAX_CONTROL_FRAME_BYTES
from fleetwire_shared.messages import ON_CHANNEL, ChannelMessage

CLOSE_SECONDS = 2.0


class ChannelWebSocket:
    """core.channels.ChannelSocket over aiohttp."""

    def __init__(self, ws: web.WebSocketResponse) -> None:
        self._ws = ws

    async def receive(self) -> ChannelMessage | bytes:
        frame = await self._ws.receive()
        if frame.type is WSMsgType.BINARY:
            chunk: bytes = frame.data
            return chunk
        if frame.type is WSMsgType.TEXT:
            return decode(frame.data, ON_CHANNEL)
        if frame.type is WSMsgType.ERROR and isinstance(frame.data, WebSocketError):
            raise ProtocolError("frame", str(frame.data))
        raise UnavailableError("the agent closed the channel")  # or went away, or the link broke

    async def send(self, message: ChannelMessage) -> None:
        await self._send(self._ws.send_str(encode(message)))

    async def send_bytes(self, chunk: bytes) -> None:
        await self._send(self._ws.send_bytes(chunk))

    async def _send(self, sending: "asyncio.Future[None] | object") -> None:
        try:
            await sending  # type: ignore[misc]
        except ConnectionError as err:
            raise UnavailableError("the agent closed the channel") from err

    async def close(self) -> None:
        await self._ws.close()


async def connect_channel(request: web.Request) -> web.StreamResponse:
    agent_id = request[AGENT].agent_id
    channel_id = request.match_info["channel_id"]
    channels = request.app[CHANNELS]
    channels.check(agent_id, channel_id)
    ws = web.WebSocketResponse(
        timeout=CLOSE_SECONDS, compress=False, max_msg_size=MAX_CONTROL_FRAME_BYTES, writer_limit=65536
    )
    await ws.prepare(request)
    await channels.attach(agent_id, channel_id, ChannelWebSocket(ws))
    return ws
