"""Every open event stream, so that whoever must end one can: a lost login, a deleted agent, a server that stops."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager


class StreamEndedError(Exception):
    """The stream was ended from outside; the text is for its viewer."""


class OpenStream:
    def __init__(self, session_token_hash: str, agent_id: str | None, scope: asyncio.Timeout) -> None:
        self.session_token_hash = session_token_hash
        self.agent_id = agent_id
        self.reason: str | None = None
        self.is_over = False
        self._scope = scope

    def end(self, reason: str) -> None:
        """Make the stream's task leave its `open` block with StreamEndedError, at its next await."""
        if self.reason is None and not self.is_over:
            self.reason = reason
            self._scope.reschedule(asyncio.get_running_loop().time())


class OpenStreams:
    def __init__(self) -> None:
        self._streams: set[OpenStream] = set()
        self._closing_reason: str | None = None

    @asynccontextmanager
    async def open(self, session_token_hash: str, agent_id: str | None) -> AsyncIterator[OpenStream]:
        """Run the block as a stream of that login.

        Raises:
            StreamEndedError: the stream was ended from outside while the block ran."""
        stream: OpenStream | None = None
        try:
            async with asyncio.timeout(None) as scope:
                stream = OpenStream(session_token_hash, agent_id, scope)
                self._streams.add(stream)
                if self._closing_reason is not None:
                    stream.end(self._closing_reason)
                try:
                    yield stream
                finally:
                    stream.is_over = True
        except TimeoutError:
            if stream is None or stream.reason is None:
                raise
            raise StreamEndedError(stream.reason) from None
        finally:
            if stream is not None:
                self._streams.discard(stream)

    def session_token_hashes(self) -> set[str]:
        return {stream.session_token_hash for stream in self._streams}

    def end_sessions(self, token_hashes: Iterable[str], reason: str) -> None:
        ended = set(token_hashes)
        for stream in self._streams:
            if stream.session_token_hash in ended:
                stream.end(reason)

    def end_agent(self, agent_id: str, reason: str) -> None:
        for stream in self._streams:
            if stream.agent_id == agent_id:
                stream.end(reason)

    def end_all(self, reason: str) -> None:
        """End every stream, and every one that opens from now on."""
        self._closing_reason = reason
        for stream in self._streams:
            stream.end(reason)

    def __len__(self) -> int:
        return len(self._streams)
