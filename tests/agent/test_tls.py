"""The agent and its installer know the server by its public key, before they tell it anything."""

import asyncio
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from fleetwire_agent.config import AgentConfig
from fleetwire_agent.install.failures import InstallError
from fleetwire_agent.install.host import check_reach
from fleetwire_agent.session import Dialer
from fleetwire_shared.pins import public_key_pin

KEY = "agt_" + "a" * 16 + "_" + "B" * 43
WRONG_PIN = "sha256//" + "A" * 43 + "="


class Listener:
    """A TLS server that remembers what it is told, and answers no WebSocket."""

    def __init__(self, port: int, pin: str, certificate: Path) -> None:
        self.url = f"https://127.0.0.1:{port}"
        self.pin = pin
        self.certificate = certificate
        self.heard = b""
        self.has_ended = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            self.heard += await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n")
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()
            self.has_ended.set()


@asynccontextmanager
async def listen(directory: Path) -> AsyncIterator[Listener]:
    certificate, key = directory / "server.pem", directory / "server.key"
    subject = ("-subj", "/CN=somebody else", "-addext", "subjectAltName=DNS:else.example")  # no name is looked at
    kind = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2")
    files = ("-keyout", str(key), "-out", str(certificate))
    subprocess.run(["openssl", "req", "-x509", *kind, *subject, *files], check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    pin = public_key_pin(ssl.PEM_cert_to_DER_cert(certificate.read_text()))
    holder: list[Listener] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await holder[0].serve(reader, writer)

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    async with server:
        holder.append(Listener(server.sockets[0].getsockname()[1], pin, certificate))
        yield holder[0]


async def dial(listener: Listener, tls_pin: str | None) -> Exception:
    """Return why no WebSocket was opened."""
    dialer = Dialer(AgentConfig(server=listener.url, key=KEY, tls_pin=tls_pin))
    with pytest.raises(Exception) as caught:  # noqa: PT011 - the caller looks at it
        async with asyncio.timeout(10), dialer.control():
            pass
    assert isinstance(caught.value, Exception)
    return caught.value


@pytest.mark.parametrize("pins", ["{pin}", WRONG_PIN + ";{pin}"])
async def test_the_key_is_sent_to_the_server_that_has_a_pinned_key(pins: str, tmp_path: Path) -> None:
    async with listen(tmp_path) as listener:
        error = await dial(listener, pins.format(pin=listener.pin))
        assert "401" in str(error)
        assert KEY.encode() in listener.heard


@pytest.mark.parametrize("pins", [WRONG_PIN, None])
async def test_the_key_is_never_sent_to_another(pins: str | None, tmp_path: Path) -> None:
    async with listen(tmp_path) as listener:
        error = await dial(listener, pins)
        assert isinstance(error, ssl.SSLCertVerificationError)
        if pins:
            assert listener.pin in str(error), "what it found is said"
            assert WRONG_PIN in str(error), "and what it expected"
        assert listener.heard == b""


async def test_the_installer_tells_what_is_wrong_with_the_way_to_the_server(tmp_path: Path) -> None:
    async with listen(tmp_path) as listener:

        async def reach(server: str, tls_pin: str | None = None) -> str:
            return await asyncio.to_thread(check_reach, server, tls_pin=tls_pin, ca_file=None)

        assert await reach(listener.url, listener.pin) == "127.0.0.1"
        assert await reach(listener.url, f"{WRONG_PIN};{listener.pin}") == "127.0.0.1"
        with pytest.raises(InstallError, match="key has changed") as caught:
            await reach(listener.url, WRONG_PIN)
        assert caught.value.reason == "tls"
        with pytest.raises(InstallError, match=r"not trusted.*--tls-pin") as caught:
            await reach(listener.url)
        assert caught.value.reason == "tls"
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            port = unused.getsockname()[1]
            with pytest.raises(InstallError, match=rf"127\.0\.0\.1 port {port}.*refused.*--public-url") as caught:
                await reach(f"http://127.0.0.1:{port}")
        assert caught.value.reason == "no_route"
        with pytest.raises(InstallError, match=r"nowhere\.invalid.*cannot be resolved.*DNS") as caught:
            await reach("http://nowhere.invalid")
        assert caught.value.reason == "no_route"
