"""One host over SSH: dial it, run commands, send a file. Every failure is a DeployError, and nothing waits for ever."""

import asyncio
import contextlib
import shlex
import socket
from collections.abc import Callable
from dataclasses import dataclass

import asyncssh
from aiohappyeyeballs import start_connection

from fleetwire_server.deploy.errors import DeployError, deploy_error
from fleetwire_server.deploy.host_keys import ALGORITHMS, KnownKeys, PublicKey, preferred_algorithms
from fleetwire_server.deploy.ssh_keys import KnownHosts, public_key_of

CONNECT_SECONDS = 15.0
HAPPY_EYEBALLS_SECONDS = 0.25  # RFC 8305, 5
LOGIN_SECONDS = 15.0
CLOSE_SECONDS = 2.0
KEEPALIVE_SECONDS = 10.0
"""A host that answers none of three is taken for lost."""

MAX_OUTPUT_BYTES = 256 * 1024
"""Of one command; a host that prints more is not what it was taken for."""
KEPT_STDERR_BYTES = 4096
READ_BYTES = 16 * 1024

Judge = Callable[[PublicKey], DeployError | None]


@dataclass(frozen=True, slots=True)
class Ran:
    """How a command ended. `exit_status` is None where a signal ended it."""

    exit_status: int | None
    stdout: str
    stderr: str  # the last of it


@dataclass(frozen=True, slots=True)
class Login:
    """Whom to log in as, and which host keys are known."""

    host: str
    port: int
    user: str
    key: asyncssh.SSHKey
    known: KnownKeys
    known_hosts: KnownHosts
    judge: Judge

    @property
    def where(self) -> str:
        return f"{self.host} port {self.port}"


# ------------------------------------------------------------ dialling


async def open_socket(host: str, port: int) -> socket.socket:
    """Return a TCP connection to the host.

    Raises:
        DeployError: there is none of that name, or it does not answer."""
    where = f"{host} port {port}"
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            return await _connect_first(host, port)
    except TimeoutError as err:
        raise _unreachable(
            f"{where} did not answer within {CONNECT_SECONDS:.0f} s: check that the host is up and that no firewall"
            " drops the connection"
        ) from err
    except socket.gaierror as err:
        raise _unreachable(f"there is no host {host} ({err.strerror}): check the name, or give its address") from err
    except ConnectionRefusedError as err:
        raise _unreachable(f"{where} refuses connections: check ssh_port and that sshd runs there") from err
    except (OSError, UnicodeError) as err:
        raise _unreachable(f"{where} cannot be reached: {getattr(err, 'strerror', None) or err}") from err


async def _connect_first(host: str, port: int) -> socket.socket:
    """Return a connection to the first of the host's addresses that accepts one; a dead one delays it a little only."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return await start_connection(found, happy_eyeballs_delay=HAPPY_EYEBALLS_SECONDS, interleave=1)


def _unreachable(detail: str) -> DeployError:
    return deploy_error("connect", "unreachable", detail)


class _Client(asyncssh.SSHClient):
    """Judges the key a server shows. asyncssh asks it for unknown and for changed keys alike, so all are judged here:
    it is given no trusted key of its own."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self.refusal: DeployError | None = None

    def validate_host_public_key(self, host: str, addr: str, port: int, key: asyncssh.SSHKey) -> bool:
        del host, addr, port  # the judge knows what was dialled
        self.refusal = self._judge(public_key_of(key))
        return self.refusal is None


async def log_in(login: Login, opened: socket.socket) -> "SshHost":
    """Return the host, logged in to, over that socket. Its key is judged before anything else is sent.

    Raises:
        DeployError: the key or the login was refused, or what answers is no SSH server we can speak with."""
    client = _Client(login.judge)
    connection: asyncssh.SSHClientConnection | None = None
    try:
        async with asyncio.timeout(LOGIN_SECONDS):
            connection = await asyncssh.connect(
                login.host,
                login.port,
                sock=opened,
                config=None,  # else the server user's own SSH settings would have a say
                client_factory=lambda: client,
                known_hosts=([], login.known_hosts.authorities, _revoked(login.known_hosts)),
                server_host_key_algs=_algorithms(login),
                x509_trusted_certs=None,
                username=login.user,
                client_keys=[login.key],
                agent_path=None,
                preferred_auth="publickey",
                gss_auth=False,
                gss_kex=False,
                keepalive_interval=KEEPALIVE_SECONDS,
            )
    except TimeoutError as err:
        raise _unreachable(
            f"{login.where} accepts connections and did not complete a login within {LOGIN_SECONDS:.0f} s: check that"
            " it is an SSH server, and that it is not overloaded"
        ) from err
    except asyncssh.HostKeyNotVerifiable as err:
        raise client.refusal or deploy_error("host_key", "host_key_changed", f"{login.where}: {err.reason}") from err
    except asyncssh.PermissionDenied as err:
        raise deploy_error(
            "login",
            "ssh_auth",
            f"{login.user}@{login.host} does not accept the key {login.key.get_fingerprint()}: check ssh_user and"
            f" ssh_key, or add the key to that user's authorized_keys: {public_key_of(login.key).line}",
        ) from err
    except (asyncssh.Error, OSError, ValueError) as err:
        raise deploy_error(
            "login",
            "ssh",
            f"{login.where} closed the connection or speaks no SSH that this server speaks:"
            f" {getattr(err, 'reason', '') or err}",
        ) from err
    finally:
        if connection is None:
            opened.close()
    return SshHost(login, connection)


def _algorithms(login: Login) -> list[str]:
    """Certificates are asked for only where known_hosts names an authority and no key is known: a server that has one
    would show it, and it could not be judged."""
    plain = preferred_algorithms(login.known)
    if not login.known_hosts.authorities or login.known.is_any:
        return plain
    return [f"{name}-cert-v01@openssh.com" for name in ALGORITHMS] + plain


def _revoked(known_hosts: KnownHosts) -> list[asyncssh.SSHKey]:
    """Plain keys are judged by us; asyncssh is told of revoked ones for the sake of certificates."""
    return known_hosts.revoked if known_hosts.authorities else []


# ------------------------------------------------------------ working on it


class SshHost:
    def __init__(self, login: Login, connection: asyncssh.SSHClientConnection) -> None:
        self.login = login
        self._connection = connection

    @property
    def host_key(self) -> PublicKey:
        key = self._connection.get_server_host_key()
        if key is None:  # of a key exchange without one, which is not asked for
            raise deploy_error("host_key", "ssh", f"{self.login.where} showed no host key")
        return public_key_of(key)

    @property
    def is_this_machine(self) -> bool:
        """Whether the SSH server has the address that we dialled it from."""
        own, peer = (self._connection.get_extra_info(name) for name in ("sockname", "peername"))
        return bool(own and peer and own[0] == peer[0])

    async def run(
        self,
        step: str,
        command: str,
        *,
        stdin: bytes = b"",
        seconds: float,
        on_line: Callable[[str], None] | None = None,
    ) -> Ran:
        """Run a command line in the login shell and return how it ended.

        Args:
            on_line: is given each whole line of standard output as it comes.
        Raises:
            DeployError: it took too long or printed too much, or the connection broke."""
        try:
            async with asyncio.timeout(seconds):
                return await self._run(step, command, stdin, on_line)
        except TimeoutError as err:
            raise deploy_error(
                step, "timeout", f"{self.login.where} was not done with it within {seconds:.0f} s: look at its load"
            ) from err
        except asyncssh.ChannelOpenError as err:
            if self._connection.is_closed():
                raise self._lost(step, err) from err
            raise deploy_error(step, "no_shell", f"{self.login.where} runs no commands: {err.reason}") from err
        except (asyncssh.Error, OSError) as err:
            raise self._lost(step, err) from err

    async def _run(self, step: str, command: str, stdin: bytes, on_line: Callable[[str], None] | None) -> Ran:
        process: asyncssh.SSHClientProcess[bytes] = await self._connection.create_process(command, encoding=None)
        stdout, stderr = bytearray(), bytearray()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(_feed(process, stdin))
                group.create_task(_drain(process.stderr, stderr))
                await self._collect(step, process.stdout, stdout, on_line)
            await process.wait_closed()
        except* (DeployError, asyncssh.Error, OSError) as errors:
            refusals = [err for err in errors.exceptions if isinstance(err, DeployError)]
            raise (refusals or errors.exceptions)[0] from None
        finally:
            process.close()
        status = process.exit_status
        return Ran(
            status if status is not None and status >= 0 else None,
            stdout.decode(errors="replace"),
            stderr.decode(errors="replace"),
        )

    async def _collect(
        self,
        step: str,
        reader: asyncssh.SSHReader[bytes],
        collected: bytearray,
        on_line: Callable[[str], None] | None,
    ) -> None:
        begin_of_line = 0
        while piece := await reader.read(READ_BYTES):
            collected += piece
            if len(collected) > MAX_OUTPUT_BYTES:
                raise deploy_error(
                    step,
                    "ssh",
                    f"{self.login.where} printed more than {MAX_OUTPUT_BYTES // 1024} KiB: look at the start-up files"
                    f" of the shell of {self.login.user}",
                )
            while on_line is not None and (end := collected.find(b"\n", begin_of_line)) >= 0:
                on_line(collected[begin_of_line:end].decode(errors="replace"))
                begin_of_line = end + 1

    async def upload(self, step: str, path: str, content: bytes, *, seconds: float) -> None:
        """Write a new file that only its owner can read; over SFTP, or where the host has none through a shell.

        Raises:
            DeployError: it could not be written."""
        try:
            async with asyncio.timeout(seconds), self._connection.start_sftp_client() as sftp:
                attributes = asyncssh.SFTPAttrs(permissions=0o600)
                async with sftp.open(path, "xb", attributes) as file:
                    await file.write(content)
                return
        except TimeoutError as err:
            raise deploy_error(
                step, "timeout", f"{self.login.where} did not take the agent in {seconds:.0f} s"
            ) from err
        except (asyncssh.SFTPError, asyncssh.ChannelOpenError):
            pass  # no SFTP there, or a reason that SFTP does not tell: a shell says it in words
        except (asyncssh.Error, OSError) as err:
            raise self._lost(step, err) from err
        ran = await self.run(step, f"umask 077; cat >{shlex.quote(path)}", stdin=content, seconds=seconds)
        if ran.exit_status != 0:
            is_full = "No space left" in ran.stderr
            detail = f"the agent could not be written to {path} on the host: {last_line(ran.stderr)}"
            raise deploy_error(step, "disk_full" if is_full else "install_failed", detail)

    def _lost(self, step: str, error: Exception) -> DeployError:
        return deploy_error(
            step,
            "connection_lost",
            f"the connection to {self.login.where} broke: {getattr(error, 'reason', '') or error}; deploy again",
        )

    async def close(self) -> None:
        """Close the connection; at once where the host does not answer."""
        self._connection.close()
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_SECONDS):
                    await self._connection.wait_closed()
        finally:
            self._connection.abort()


async def _feed(process: asyncssh.SSHClientProcess[bytes], content: bytes) -> None:
    """Write standard input and close it. A command that does not read it is no failure of ours."""
    with contextlib.suppress(BrokenPipeError):
        if content:
            process.stdin.write(content)
            await process.stdin.drain()
        process.stdin.write_eof()


async def _drain(reader: asyncssh.SSHReader[bytes], kept: bytearray) -> None:
    while piece := await reader.read(READ_BYTES):
        kept += piece
        del kept[:-KEPT_STDERR_BYTES]


def last_line(text: str) -> str:
    """Return the last line that says something, for people; short."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"
