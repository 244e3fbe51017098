"""The HTTP API, called until it answers: the server may be gone, frozen or behind a cut link at any moment."""

import asyncio
import json
from collections.abc import AsyncIterator, Collection, Mapping
from types import TracebackType
from typing import Any, Final, Self

from aiohttp import ClientError, ClientSession, ClientTimeout, TCPConnector
from scripts.lib.chaos.parts import ChaosError

CALL_SECONDS: Final = 8.0
STREAM_SECONDS: Final = 20.0  # without a byte: the server says something every 15
AGAIN_SECONDS: Final = 0.15
_LATER: Final = frozenset({429, 502, 503, 504})


class Unanswered(Exception):  # noqa: N818 - a word for what it is
    """Nobody knows whether the server did it."""


class Client:
    """One login; open it with `async with`."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.token: str | None = None
        self._session: ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = ClientSession(timeout=ClientTimeout(total=CALL_SECONDS), connector=TCPConnector(limit=64))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.session.close()

    @property
    def session(self) -> ClientSession:
        assert self._session is not None, "open it with `async with`"
        return self._session

    async def log_in(self, password: str) -> None:
        answer = await self.call("POST", "/api/login", {"username": "admin", "password": password})
        self.token = str(answer["token"])

    async def ask(
        self, method: str, path: str, body: object = None, *, headers: Mapping[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Return status and body of one answer. Raises Unanswered."""
        try:
            async with self.session.request(
                method, self.url + path, json=body, headers=self._headers | dict(headers or {})
            ) as response:
                return response.status, await response.read()
        except (ClientError, OSError, TimeoutError) as err:
            raise Unanswered(f"{type(err).__name__}: {err}") from err

    async def call(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        headers: Mapping[str, str] | None = None,
        statuses: Collection[int] = (200, 201, 202),
    ) -> Any:
        """Repeat a call until it is answered; return the JSON. Raises ChaosError: the answer is another than wanted."""
        return json.loads(await self.fetch(method, path, body, headers=headers, statuses=statuses))

    async def fetch(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        headers: Mapping[str, str] | None = None,
        statuses: Collection[int] = (200,),
    ) -> bytes:
        while True:
            try:
                status, answer = await self.ask(method, path, body, headers=headers)
            except Unanswered:
                await asyncio.sleep(AGAIN_SECONDS)
                continue
            if status in statuses:
                return answer
            if status not in _LATER:
                raise ChaosError(f"{method} {path}: {status} {answer.decode(errors='replace')}")
            await asyncio.sleep(AGAIN_SECONDS)

    async def events(self, path: str) -> AsyncIterator[tuple[str, Any]]:
        """Yield name and data of a stream's events until it ends or breaks."""
        timeout = ClientTimeout(total=None, sock_connect=CALL_SECONDS, sock_read=STREAM_SECONDS)
        name, data = "message", ""
        try:
            async with self.session.get(self.url + path, headers=self._headers, timeout=timeout) as response:
                if response.status != 200:
                    return
                buffer = b""
                async for piece in response.content.iter_any():
                    *lines, buffer = (buffer + piece).split(b"\n")
                    for line in (line.decode().rstrip("\r") for line in lines):
                        if line.startswith("event:"):
                            name = line[6:].strip()
                        elif line.startswith("data:"):
                            data += line[5:].strip()
                        elif not line and data:
                            yield name, json.loads(data)
                            name, data = "message", ""
        except (ClientError, OSError, TimeoutError):
            return

    @property
    def _headers(self) -> dict[str, str]:
        return {} if self.token is None else {"Authorization": f"Bearer {self.token}"}
