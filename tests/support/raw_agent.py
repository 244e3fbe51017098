"""An agent that says what a test wants it to say, well-behaved or not."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import ClientSession, ClientWebSocketResponse, WSMsgType

from fleetwire_shared.codec import decode, encode
from fleetwire_shared.messages import FROM_SERVER, SUBPROTOCOL, Hello, HostFacts, Message, ServerMessage, Welcome


def make_hello(**fields: Any) -> Hello:
    host = HostFacts(
        hostname="raw",
        os="Test OS 1",
        kernel="6.1",
        architecture="x86_64",
        boot_id="boot",
        cpu_count=2,
        memory_bytes=1024,
        python="3.11.2",
    )
    defaults: dict[str, Any] = {
        "protocol_oldest": 1,
        "protocol_newest": 1,
        "agent_version": "0.0.1",
        "instance_id": "instance",
        "host": host,
    }
    return Hello(**defaults | fields)


class RawAgent:
    """One control socket."""

    def __init__(self, ws: ClientWebSocketResponse) -> None:
        self.ws = ws

    async def say(self, message: Message) -> None:
        await self.ws.send_str(encode(message))

    async def greet(self) -> Welcome:
        await self.say(make_hello())
        welcome = await self.hear()
        assert isinstance(welcome, Welcome)
        return welcome

    async def hear(self) -> ServerMessage:
        return decode(await self.ws.receive_str(), FROM_SERVER)

    async def hear_close(self) -> int | None:
        """Return the close code, whatever is said before it."""
        while (await self.ws.receive()).type not in (WSMsgType.CLOSE, WSMsgType.CLOSED, WSMsgType.ERROR):
            pass
        return self.ws.close_code


@asynccontextmanager
async def raw_agent(url: str, key: str, **options: Any) -> AsyncIterator[RawAgent]:
    """Connect, and say nothing yet."""
    async with (
        ClientSession() as session,
        session.ws_connect(
            f"{url}/api/agents/connect", headers={"X-Agent-Key": key}, protocols=(SUBPROTOCOL,), **options
        ) as ws,
    ):
        yield RawAgent(ws)
