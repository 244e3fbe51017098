"""The HTTP API over http.client: blocking and small, so that it costs little beside what is measured."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

HOST = "127.0.0.1"
STALL_SECONDS = 120.0
PIECE_BYTES = 256 * 1024
BOUNDARY = "fleetwire-bench"


class CallError(Exception):
    """The server refused a call, or did not answer."""


class Client:
    def __init__(self, port: int) -> None:
        self.port = port
        self._headers: dict[str, str] = {}

    def log_in(self, username: str, password: str) -> None:
        answer = self.call("POST", "/api/login", {"username": username, "password": password})
        self._headers = {"Authorization": f"Bearer {answer['token']}"}

    def is_healthy(self) -> bool:
        self.call("GET", "/api/health")
        return True

    def call(self, method: str, path: str, body: object = None) -> Any:
        """Return the JSON answer. Raises CallError."""
        with self.open(method, path, body=None if body is None else json.dumps(body).encode()) as response:
            return json.loads(response.read())

    @contextmanager
    def open(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str | int] | None = None,
        headers: Mapping[str, str] | None = None,
        body: bytes | Iterator[bytes] | None = None,
    ) -> Iterator[HTTPResponse]:
        """Yield the answer, on a connection of its own. Raises CallError."""
        connection = HTTPConnection(HOST, self.port, timeout=STALL_SECONDS)
        target = f"{path}?{urlencode(query)}" if query else path
        try:
            connection.request(method, target, body=body, headers=self._headers | dict(headers or {}))
            response = connection.getresponse()
            if response.status >= 400:
                raise CallError(f"{method} {path}: {response.status} {response.read().decode(errors='replace')}")
            yield response
        except (OSError, HTTPException) as err:
            raise CallError(f"{method} {path}: {err or type(err).__name__}") from err
        finally:
            connection.close()

    def download(self, agent_path: str, path: Path) -> int:
        """Return how many bytes arrived; they are thrown away."""
        buffer = memoryview(bytearray(PIECE_BYTES))
        total = 0
        with self.open("GET", f"{agent_path}/files", query={"path": str(path)}) as response:
            while count := response.readinto(buffer):
                total += count
        return total

    def upload(self, agent_path: str, source: Path, dest: Path) -> int:
        """Return how many bytes the agent says it wrote."""
        head = (
            f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="dest"\r\n\r\n{dest}\r\n'
            f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="bench"\r\n\r\n'
        ).encode()
        tail = f"\r\n--{BOUNDARY}--\r\n".encode()
        headers = {
            "Content-Type": f"multipart/form-data; boundary={BOUNDARY}",
            "Content-Length": str(len(head) + source.stat().st_size + len(tail)),
        }

        def body() -> Iterator[bytes]:
            yield head
            with source.open("rb", buffering=0) as file:
                while piece := file.read(PIECE_BYTES):
                    yield piece
            yield tail

        with self.open("POST", f"{agent_path}/files", headers=headers, body=body()) as response:
            return int(json.loads(response.read())["bytes"])

    def submit(self, agent_path: str, command: str, timeout: int = 30) -> str:
        """Return the id of a new command."""
        body = {"type": "shell", "params": {"command": command, "timeout": timeout}}
        return str(self.call("POST", f"{agent_path}/commands", body)["command_id"])

    def run(self, agent_path: str, command: str, timeout: int = 30) -> str:
        """Submit a command, and read its event stream to the end; return the status it ended with."""
        return self._follow(f"{agent_path}/commands/{self.submit(agent_path, command, timeout)}")

    def cancel(self, agent_path: str, command_id: str) -> str:
        """Cancel a command; return the status it ended with."""
        path = f"{agent_path}/commands/{command_id}"
        self.call("POST", f"{path}/cancel")
        return self._follow(path)

    def _follow(self, command_path: str) -> str:
        with self.open("GET", f"{command_path}/stream") as response:
            last = _read_until(response, lambda tail: b"\nevent: end\ndata: " in tail and tail.endswith(b"\n\n"))
        return str(json.loads(last.rpartition(b"data: ")[2])["reason"])

    @contextmanager
    def watching_ends(self) -> Iterator[Callable[[int], None]]:
        """Yield a function that returns once so many commands of the fleet have succeeded since here."""
        with self.open("GET", "/api/events") as response:

            def wait(wanted: int) -> None:
                ended, rest, last_at = 0, b"", time.monotonic()
                while ended < wanted:
                    piece = response.read1(PIECE_BYTES)  # a comment every 15 s, if nothing else
                    if not piece or time.monotonic() > last_at + STALL_SECONDS:
                        raise CallError(f"{ended} of {wanted} commands have succeeded, and then no other did")
                    *lines, rest = (rest + piece).split(b"\n")
                    if count := sum(b'"status":"succeeded"' in line for line in lines):
                        ended, last_at = ended + count, time.monotonic()

            yield wait

    def count_lines(self, agent_path: str, path: Path, after: str, wanted: int) -> int:
        """Follow a log file from the line after that cursor on; return once `wanted` lines came."""
        query = {"source": "file", "path": str(path)}
        lines, rest = 0, b""
        with self.open("GET", f"{agent_path}/stream/logs", query=query, headers={"Last-Event-ID": after}) as response:
            while lines < wanted and (piece := response.read1(PIECE_BYTES)):
                lines += (rest + piece).count(b"\ndata: ")  # each event is `id:`, then `data:`
                rest = piece[-len(b"\ndata:") :]
        return lines


def _read_until(response: HTTPResponse, is_enough: Callable[[bytes], bool], kept_bytes: int = 4096) -> bytes:
    """Read until the last bytes that were read are enough; return them."""
    tail = b""
    while not is_enough(tail):
        piece = response.read1(PIECE_BYTES)
        if not piece:
            raise CallError(f"the stream ended early, after {tail!r}")
        tail = (tail + piece)[-kept_bytes:]
    return tail
