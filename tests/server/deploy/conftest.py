"""A real SSH server on this machine that runs what it is told, and whatever a deployment needs besides."""

import asyncio
import contextlib
import hashlib
import os
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import asyncssh
import pytest

from fleetwire_server.deploy.bundle import Bundle
from fleetwire_server.deploy.host_keys import PublicKey
from fleetwire_server.deploy.order import Order, Terms
from fleetwire_server.model import HostKey

PRETENDER = """
import json, pathlib, sys, time
HERE = pathlib.Path(sys.argv[0]).parent
SEEN = pathlib.Path({seen!r})
def say(**report): print(json.dumps(report), flush=True)
with SEEN.open("a") as seen: seen.write(" ".join(sys.argv[1:]) + chr(10))
if sys.argv[1] == "install":
    with SEEN.open("a") as seen: seen.write("stdin " + sys.stdin.read())
    say(step="check", detail="all is well")
{body}
"""
"""Takes the place of the agent's bundle: it installs nothing, and notes what it was asked for."""

INSTALLS = 'if sys.argv[1] == "install": say(result="installed", version="1", agent_id="x", reason=None, detail="done")'


def make_bundle(seen: Path, body: str = INSTALLS) -> Bundle:
    content = PRETENDER.format(seen=str(seen), body=body).encode()
    return Bundle(content, hashlib.sha256(content).hexdigest(), "0.1.0-pretended")


@dataclass
class SshServer:
    """Where it listens, and what was seen of those who came."""

    port: int = 0
    logins: list[str] = field(default_factory=list)  # names that got as far as authentication
    commands: list[str] = field(default_factory=list)
    connections: list[asyncssh.SSHServerConnection] = field(default_factory=list)
    drops_at: str | None = None  # a command with this text loses its connection, once
    is_gone: bool = False  # each time
    tasks: set[asyncio.Task[object]] = field(default_factory=set)


class _Doorkeeper(asyncssh.SSHServer):
    def __init__(self, server: SshServer) -> None:
        self._server = server

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self._server.connections.append(conn)

    def begin_auth(self, username: str) -> bool:
        self._server.logins.append(username)
        return True


@asynccontextmanager
async def running_ssh_server(
    keys: Sequence[Any], authorized: asyncssh.SSHKey, *, port: int = 0, has_sftp: bool = True
) -> AsyncIterator[SshServer]:
    server = SshServer()

    async def run(process: asyncssh.SSHServerProcess[bytes]) -> None:
        command = process.command or ""
        server.commands.append(command)
        if server.drops_at is not None and server.drops_at in command:
            process.channel.get_connection().abort()
            if not server.is_gone:
                server.drops_at = None
            return
        task = asyncio.current_task()
        assert task is not None
        server.tasks.add(task)
        with contextlib.suppress(asyncssh.Error, OSError):
            await _run_command(process, command)

    listener = await asyncssh.listen(
        "127.0.0.1",
        port,
        config=None,
        server_factory=lambda: _Doorkeeper(server),
        server_host_keys=list(keys),
        authorized_client_keys=asyncssh.import_authorized_keys(authorized.export_public_key().decode()),
        process_factory=run,
        sftp_factory=has_sftp,
        encoding=None,
    )
    server.port = listener.get_port()
    try:
        yield server
    finally:
        listener.close()
        for connection in server.connections:
            connection.abort()
        await listener.wait_closed()
        if server.tasks:
            await asyncio.wait(server.tasks, timeout=10)


async def _run_command(process: asyncssh.SSHServerProcess[bytes], command: str) -> None:
    """Run it as sshd does; unlike there, it ends with its connection."""
    child = await asyncio.create_subprocess_exec(
        *("sh", "-c", command),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stderr is not None
    loop = asyncio.get_running_loop()
    tasks = [
        loop.create_task(_pump_in(process, child.stdin)),
        loop.create_task(_pump_out(child.stdout, process.stdout)),
        loop.create_task(_pump_out(child.stderr, process.stderr)),
        loop.create_task(process.channel.wait_closed()),
    ]
    try:
        ended = loop.create_task(child.wait())
        await asyncio.wait({ended, tasks[3]}, return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            await asyncio.wait(tasks[1:3])
            process.exit(ended.result())
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        for task in tasks:
            if not task.cancelled():
                task.exception()  # looked at: the connection was cut
        await child.communicate()  # reads what is in its pipes: with that left there, it would never count as ended


async def _pump_in(process: asyncssh.SSHServerProcess[bytes], stdin: asyncio.StreamWriter) -> None:
    try:
        while piece := await process.stdin.read(65536):
            stdin.write(piece)
            await stdin.drain()
    finally:
        stdin.close()


async def _pump_out(reader: asyncio.StreamReader, writer: asyncssh.SSHWriter[bytes]) -> None:
    while piece := await reader.read(65536):
        writer.write(piece)
        await writer.drain()


@dataclass
class Side:
    """The server's side of a deployment, as the runner sees it."""

    pinned: HostKey | None = None
    agent_id: str = "agent_0123456789abcdef"
    key: str = "agt_0123456789abcdef_" + "s" * 43
    notes: list[tuple[str, str]] = field(default_factory=list)
    enrolled: int = 0

    def note(self, step: str, detail: str) -> None:
        self.notes.append((step, detail))

    async def get_pinned(self) -> HostKey | None:
        return self.pinned

    async def pin(self, key: PublicKey) -> HostKey:
        if self.pinned is None:
            self.pinned = HostKey(
                host="127.0.0.1",
                port=22,
                public_key=key.line,
                fingerprint=key.fingerprint,
                pinned_at=1.0,
                pinned_by="admin",
            )
        return self.pinned

    async def enrol(self) -> tuple[str, str]:
        self.enrolled += 1
        return self.agent_id, self.key

    async def wait_connected(self, agent_id: str) -> None:
        assert agent_id == self.agent_id


def generate(algorithm: str = "ssh-ed25519") -> asyncssh.SSHKey:
    return asyncssh.generate_private_key(algorithm)


@dataclass
class Site:
    """Keys and settings of a server that deploys, in a directory of the test's own."""

    directory: Path
    user_key: asyncssh.SSHKey
    terms: Terms

    @property
    def seen(self) -> str:
        """What the pretended installer was asked for."""
        path = self.directory / "seen"
        return path.read_text() if path.exists() else ""

    def order(self, server: SshServer | int, **fields: Any) -> Order:
        port = server if isinstance(server, int) else server.port
        return replace(Order(host="127.0.0.1", port=port, ssh_key="id", label="web-01"), **fields)

    def with_terms(self, **fields: Any) -> Terms:
        return replace(self.terms, **fields)

    def with_body(self, body: str) -> Terms:
        return self.with_terms(bundle=make_bundle(self.directory / "seen", body))


@pytest.fixture
def site(tmp_path: Path) -> Site:
    keys = tmp_path / "keys"
    keys.mkdir()
    key = generate()
    key.write_private_key(str(keys / "id"))
    key.write_public_key(str(keys / "id.pub"))
    terms = Terms(
        bundle=make_bundle(tmp_path / "seen"),
        server_url="http://127.0.0.1:8420",
        tls_pin=None,
        key_directory=keys,
        known_hosts=tmp_path / "known_hosts",
        host_key_rule="accept-new",
    )
    return Site(tmp_path, key, terms)
