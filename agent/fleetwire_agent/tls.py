"""How the agent knows its server: by a certificate it trusts, or by the public key it was given at installation."""

import ssl
from collections.abc import Sequence

from fleetwire_shared.pins import public_key_pin


def build_tls_context(ca_file: str | None, pins: Sequence[str]) -> ssl.SSLContext:
    """Return the context for connections to the server. Blocking: reads certificates.

    Args:
        ca_file: PEM file of the certificates to trust; None for the system's.
        pins: as `parse_pins` returns them. With any, the server's public key must be one of them, and neither its chain
            nor its name matters: as with `curl --insecure --pinnedpubkey`."""
    if not pins:
        return ssl.create_default_context(cafile=ca_file)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # the pin is checked instead, within the handshake: before anything is sent
    expected = frozenset(pins)

    class PinnedObject(ssl.SSLObject):  # what asyncio wraps
        def do_handshake(self) -> None:
            super().do_handshake()
            _check_pin(self.getpeercert(binary_form=True), expected)

    class PinnedSocket(ssl.SSLSocket):
        def do_handshake(self, block: bool = False) -> None:
            super().do_handshake(block)
            _check_pin(self.getpeercert(binary_form=True), expected)

    context.sslobject_class = PinnedObject
    context.sslsocket_class = PinnedSocket
    return context


def _check_pin(certificate: bytes | None, expected: frozenset[str]) -> None:
    found = public_key_pin(certificate) if certificate else "none"
    if found not in expected:
        raise ssl.SSLCertVerificationError(
            f"the server's public key is {found}, not {' or '.join(sorted(expected))} as tls_pin says"
        )
