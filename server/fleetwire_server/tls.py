"""The server's own certificate: how it speaks TLS with it, and what agents pin where nobody vouches for it."""

import ssl
from pathlib import Path
from urllib.parse import urlsplit

from fleetwire_server.config import ServerConfig
from fleetwire_shared.errors import UnavailableError
from fleetwire_shared.pins import public_key_pin


def server_context(config: ServerConfig) -> ssl.SSLContext | None:
    """Return the context to listen with, None without TLS. Raises UnavailableError."""
    if config.tls_cert is None or config.tls_key is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(config.tls_cert, config.tls_key)
    except (OSError, ssl.SSLError) as err:
        raise UnavailableError(
            f"the TLS certificate {config.tls_cert} or key {config.tls_key} cannot be used: {err}"
        ) from err
    return context


def find_pin(config: ServerConfig) -> str | None:
    """Return what agents pin, in curl's syntax; None where they need not, as an authority they know vouches for it.

    Blocking: reads files, opens no connection.

    Raises:
        UnavailableError: the certificate cannot be used."""
    if config.tls_pin == "off":
        return None
    if config.tls_pin != "auto":
        return config.tls_pin
    context = server_context(config)
    if context is None or config.tls_cert is None or _is_vouched_for(context, urlsplit(config.public_url).hostname):
        return None
    return public_key_pin(_read_certificate(config.tls_cert))


def _is_vouched_for(context: ssl.SSLContext, name: str | None) -> bool:
    """Whether a client with this machine's certificates would accept the server: a handshake in memory tells."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(to_client, to_server, server_hostname=name)
    server = context.wrap_bio(to_server, to_client, server_side=True)
    waiting = [client, server]
    while waiting:
        side = waiting.pop(0)
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            waiting.append(side)
        except (ssl.SSLError, ValueError):  # ValueError: no name that could be checked
            return False
        if side is client and client not in waiting:
            return True
    return False


def _read_certificate(path: Path) -> bytes:
    """Return the first certificate of a PEM file, the server's own, as DER."""
    text = path.read_text(encoding="ascii", errors="replace")
    begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    _, found, rest = text.partition(begin)
    if not found:
        raise UnavailableError(f"the TLS certificate {path} holds no certificate")
    return ssl.PEM_cert_to_DER_cert(f"{begin}{rest.partition(end)[0]}{end}\n")
