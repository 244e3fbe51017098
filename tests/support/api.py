"""The HTTP API as a test uses it."""

import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from ssl import SSLContext
from types import TracebackType
from typing import Any, Self

from aiohttp import ClientResponse, ClientSession, ClientTimeout, TCPConnector
from tests.support.eventually import eventually

FINAL_STATUSES = frozenset(
    {"succeeded", "failed", "timed_out", "cancelled", "expired", "rejected", "interrupted", "lost"}
)


@dataclass(frozen=True, slots=True)
class Event:
    """One server-sent event. `event` is "message" where the server named none, `id` the last id seen so far."""

    data: str
    event: str = "message"
    id: str | None = None

    def json(self) -> Any:
        return json.loads(self.data)


class Api:
    """A client with one login; open it with `async with`.

    Answers are decoded JSON; `status` is what the test expects, and another one fails it with the answer's text."""

    def __init__(
        self, url: str, *, token: str | None = None, timeout_seconds: float = 30.0, tls: SSLContext | None = None
    ) -> None:
        self.url = url
        self.token = token
        self._timeout = ClientTimeout(total=timeout_seconds)
        self._tls = tls
        self._session: ClientSession | None = None

    async def __aenter__(self) -> Self:
        connector = TCPConnector(ssl=self._tls or True)
        self._session = ClientSession(self.url, timeout=self._timeout, connector=connector)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.session.close()

    @property
    def session(self) -> ClientSession:
        assert self._session is not None, "open it with `async with`"
        return self._session

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.token is None else {"Authorization": f"Bearer {self.token}"}

    async def login(self, username: str, password: str) -> str:
        """Log in; later calls carry the token, which is returned."""
        answer = await self.post("/api/login", {"username": username, "password": password}, token=None)
        self.token = str(answer["token"])
        return self.token

    async def get(self, path: str, /, *, status: int = 200, **params: str | int | float) -> Any:
        return await self.call("GET", path, status=status, params=params)

    async def post(self, path: str, body: object = None, *, status: int = 200, token: str | None = "") -> Any:
        return await self.call("POST", path, body, status=status, token=token)

    async def patch(self, path: str, body: object, *, status: int = 200) -> Any:
        return await self.call("PATCH", path, body, status=status)

    async def delete(self, path: str, *, status: int = 200) -> Any:
        return await self.call("DELETE", path, status=status)

    async def call(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        status: int = 200,
        params: Mapping[str, str | int | float] | None = None,
        headers: Mapping[str, str] | None = None,
        token: str | None = "",
    ) -> Any:
        """Return the decoded answer, or its text where it is no JSON.

        Args:
            body: sent as JSON when not None.
            token: another token than this client's; None for no token at all."""
        sent = self._authorization(token) | dict(headers or {})
        async with self.session.request(method, path, json=body, params=params, headers=sent) as response:
            text = (await response.read()).decode(errors="replace")
            assert response.status == status, f"{method} {path}: {response.status}, expected {status}: {text}"
            return json.loads(text) if "json" in response.content_type else text

    @asynccontextmanager
    async def open(
        self, method: str, path: str, *, headers: Mapping[str, str] | None = None, **options: Any
    ) -> AsyncIterator[ClientResponse]:
        """Yield the response as it is, without a limit on its duration: for files and streams."""
        sent = self.headers | dict(headers or {})
        timeout = ClientTimeout(total=None, sock_connect=10)
        async with self.session.request(method, path, headers=sent, timeout=timeout, **options) as response:
            yield response

    @asynccontextmanager
    async def sse(
        self, path: str, /, *, last_event_id: str | None = None, status: int = 200, **params: str | int | float
    ) -> AsyncIterator[AsyncGenerator[Event, None]]:
        """Open an event stream; what is yielded gives its events until the server ends it.

        async with asyncio.timeout(5), api.sse(path) as events:
            first = await anext(events)"""
        headers = {"Accept": "text/event-stream"}
        if last_event_id is not None:
            headers["Last-Event-ID"] = last_event_id
        async with self.open("GET", path, headers=headers, params=params) as response:
            if response.status != status or status != 200:
                text = await response.text()
                assert response.status == status, f"GET {path}: {response.status}, expected {status}: {text}"
            events = parse_events(response)
            try:
                yield events
            finally:
                await events.aclose()

    # ------------------------------------------------------------ what many tests do

    async def enrol(self, label: str, *tags: str) -> tuple[str, str]:
        """Return the new agent's id and key."""
        answer = await self.post("/api/agents", {"label": label, "tags": tags}, status=201)
        return answer["agent_id"], answer["key"]

    async def wait_for_agent(self, agent_id: str, agent_status: str = "online", timeout_seconds: float = 30.0) -> Any:
        """Return the agent's detail once it has that status."""
        return await eventually(
            lambda: self.get(f"/api/agents/{agent_id}"),
            lambda agent: agent["status"] == agent_status,
            timeout_seconds=timeout_seconds,
        )

    async def submit(self, agent_id: str, command: str, **params: Any) -> str:
        """Return the id of a new shell command. `params` go beside `command`, such as `timeout=5`."""
        body = {"type": "shell", "params": {"command": command, **params}}
        answer = await self.post(f"/api/agents/{agent_id}/commands", body)
        return str(answer["command_id"])

    async def wait_for_command(
        self, agent_id: str, command_id: str, *statuses: str, timeout_seconds: float = 30.0
    ) -> Any:
        """Return the command once it has one of these statuses; by default, once it has ended."""
        wanted = set(statuses) or FINAL_STATUSES
        return await eventually(
            lambda: self.get(f"/api/agents/{agent_id}/commands/{command_id}"),
            lambda command: command["status"] in wanted,
            timeout_seconds=timeout_seconds,
        )

    async def run(self, agent_id: str, command: str, **params: Any) -> Any:
        """Run a shell command to its end and return it."""
        return await self.wait_for_command(agent_id, await self.submit(agent_id, command, **params))

    def _authorization(self, token: str | None) -> dict[str, str]:
        if token is None:
            return {}
        return {"Authorization": f"Bearer {token}"} if token else self.headers


async def parse_events(response: ClientResponse) -> AsyncGenerator[Event, None]:
    """Yield the events of a `text/event-stream`, as the HTML standard parses them (9.2.6); comments are skipped."""
    last_id: str | None = None
    name, lines = "", list[str]()
    async for line in _lines(response):
        if not line:
            if lines:
                yield Event("\n".join(lines), name or "message", last_id)
            name, lines = "", []
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "data":
            lines.append(value)
        elif field == "event":
            name = value
        elif field == "id" and "\0" not in value:
            last_id = value


async def _lines(response: ClientResponse) -> AsyncGenerator[str, None]:
    """Yield lines of any length without their end: \\n, \\r\\n or \\r, which may be split between two chunks."""
    rest = b""
    async for chunk in response.content.iter_any():
        rest += chunk
        # A \r at the very end may be the first half of \r\n.
        held = b"\r" if rest.endswith(b"\r") else b""
        lines = rest.removesuffix(held).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        rest = lines.pop() + held
        for line in lines:
            yield line.decode()
