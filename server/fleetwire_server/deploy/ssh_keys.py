"""Keys that lie on this server: the private key to log in with, and known_hosts. Blocking; imports asyncssh."""

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

import asyncssh

from fleetwire_server.deploy.errors import DeployError, deploy_error
from fleetwire_server.deploy.host_keys import PublicKey, is_fingerprint

STEP = "key"
MAX_KEY_BYTES = 64 * 1024
MAX_NAMES = 20


def read_private_key(given: str | None, directory: Path) -> asyncssh.SSHKey:
    """Return the private key that a request names.

    Args:
        given: a path as people write it, `~/.ssh/id_ed25519`, or one relative to `directory`.
        directory: the only place keys are read from, after following links.
    Raises:
        DeployError: there is no such file, it lies elsewhere, or it is no private key that can be used."""
    if given is None:
        raise deploy_error(STEP, "key_missing", f"ssh_key is missing: name the key to log in with; {_offer(directory)}")
    path = directory / os.path.expanduser(given)  # noqa: PTH111 - pathlib's fails where there is no home
    try:
        resolved, allowed = path.resolve(strict=True), directory.resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as err:  # a loop of links; a NUL
        raise deploy_error(STEP, "key_missing", f"ssh_key {given} cannot be found here; {_offer(directory)}") from err
    if not resolved.is_relative_to(allowed):
        raise deploy_error(
            STEP, "key_refused", f"ssh_key {given} lies outside the key directory {directory}; {_offer(directory)}"
        )
    return _import(_read_regular(resolved, given), given)


def _read_regular(path: Path, given: str) -> bytes:
    try:
        # The last part is no link (it is resolved), and a FIFO must not hold this thread.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise _refused(given, "is not a regular file")
            content = os.read(descriptor, MAX_KEY_BYTES + 1)
        finally:
            os.close(descriptor)
    except OSError as err:
        raise _refused(given, f"cannot be read by the server: {err.strerror}") from err
    if len(content) > MAX_KEY_BYTES:
        raise _refused(given, "is too large for a key")
    return content


def _import(content: bytes, given: str) -> asyncssh.SSHKey:
    try:
        return asyncssh.import_private_key(content)
    except asyncssh.KeyEncryptionError as err:
        raise _passphrase(given) from err
    except (asyncssh.KeyImportError, ValueError) as err:
        if "assphrase" in str(err):
            raise _passphrase(given) from err
        # Without the parser's words: they might quote the file.
        raise _refused(given, "is not a private SSH key") from None


def _passphrase(given: str) -> DeployError:
    return _refused(given, "has a passphrase, which the server cannot ask for: make a key without one for deployments")


def _refused(given: str, problem: str) -> DeployError:
    return deploy_error(STEP, "key_refused", f"ssh_key {given} {problem}")


def _offer(directory: Path) -> str:
    """Say which keys there are: names of private keys that have their public one beside them."""
    try:
        names = sorted(path.name for path in directory.iterdir() if directory.joinpath(f"{path.name}.pub").is_file())
    except OSError:
        return f"the key directory {directory} cannot be read: make it, or set ssh_key_dir"
    if not names:
        return f"no key with its .pub lies in {directory}: make one with ssh-keygen -t ed25519 -f {directory}/NAME"
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return f"in {directory} there are {', '.join(names[:MAX_NAMES])}{more}"


def public_key_of(key: asyncssh.SSHKey) -> PublicKey:
    line = " ".join(key.export_public_key("openssh").decode("ascii").split()[:2])
    return PublicKey(line, key.get_fingerprint())


def parse_expected_key(text: str) -> PublicKey:
    """Return what a request's `host_key` means: a fingerprint, or a line as in a host's *.pub or known_hosts.

    Raises:
        DeployError: it is neither."""
    stripped = text.strip()
    if is_fingerprint(stripped):
        return PublicKey("", stripped)
    try:
        return public_key_of(asyncssh.import_public_key(stripped))
    except (asyncssh.KeyImportError, ValueError) as err:
        raise deploy_error(
            "host_key",
            "host_key_invalid",
            "host_key must be a fingerprint (SHA256:…) or a public key (ssh-ed25519 AAAA…), as ssh-keygen -lf and"
            " the host's /etc/ssh/ssh_host_*.pub have them",
        ) from err


@dataclass(slots=True)
class KnownHosts:
    """The entries of a known_hosts file that are for one server."""

    listed: list[asyncssh.SSHKey] = field(default_factory=list)
    authorities: list[asyncssh.SSHKey] = field(default_factory=list)  # whose host certificates are accepted
    revoked: list[asyncssh.SSHKey] = field(default_factory=list)


def read_known_hosts(path: Path, host: str, port: int) -> KnownHosts:
    """Return what the file says of a server; nothing where there is no file. Hashed names are found too.

    A port of its own has entries of its own: those of port 22 say nothing about another SSH server on that host.

    Raises:
        DeployError: the file is there and cannot be read or understood: going on might accept a key it refuses."""
    try:
        entries = asyncssh.import_known_hosts(path.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        return KnownHosts()
    except (OSError, ValueError) as err:
        reason = err.strerror if isinstance(err, OSError) else err
        raise deploy_error(
            "host_key", "server_failed", f"this server's known_hosts {path} cannot be used: {reason}"
        ) from err
    listed, authorities, revoked, *_ = entries.match(host if port == 22 else f"[{host}]:{port}", "", None)
    return KnownHosts(list(listed), list(authorities), list(revoked))
