"""Requests as bytes, with all that a well-behaved client would never send."""

import http.client
import json
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from tests.support.processes import ServerProcess

_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class RawAnswer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    def problem(self) -> Any:
        """Return the problem document; fails where it is none that helps."""
        assert self.headers["Content-Type"].startswith("application/problem+json"), self
        document = json.loads(self.body)
        assert set(document) == {"type", "title", "status", "code", "detail", "request_id"}
        assert document["status"] == self.status
        assert all(document.values())
        return document


def open_socket(server: ServerProcess) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=_SECONDS)


def send_raw(
    server: ServerProcess, method: str, target: bytes | str, headers: Mapping[str, str | bytes], body: bytes = b""
) -> RawAnswer:
    """Send one request on a connection of its own. A server that does not answer in time raises TimeoutError."""
    head = method.encode() + b" " + _encode(target) + b" HTTP/1.1\r\n"
    sent = {"Host": "localhost", "Connection": "close", "Content-Length": str(len(body)), **headers}
    head += b"".join(_encode(name) + b": " + _encode(value) + b"\r\n" for name, value in sent.items())
    with open_socket(server) as connection:
        with suppress(ConnectionError):  # it may answer, and close, before it has read all
            connection.sendall(head + b"\r\n" + body)
        response = http.client.HTTPResponse(connection, method=method)
        response.begin()
        return RawAnswer(response.status, dict(response.getheaders()), response.read())


def _encode(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text
