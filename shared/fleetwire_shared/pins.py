"""Public key pins, as curl's --pinnedpubkey has them: `sha256//BASE64`, several separated by `;`."""

import base64
import binascii
import hashlib

from fleetwire_shared.errors import InvalidError

_PREFIX = "sha256//"

_SEQUENCE = 0x30
_VERSION = 0xA0  # [0] EXPLICIT, the only optional field before the key
_FIELDS_BEFORE_KEY = 5  # serial number, signature, issuer, validity, subject (RFC 5280, 4.1)


def parse_pins(text: str) -> tuple[str, ...]:
    """Return the pins, each `sha256//` and the base64 of 32 bytes. Raises InvalidError."""
    pins = tuple(part.strip() for part in text.split(";") if part.strip())
    if not pins:
        raise InvalidError("a pin must look like sha256//BASE64, got nothing")
    for pin in pins:
        try:
            digest = base64.b64decode(pin.removeprefix(_PREFIX), validate=True)
        except (binascii.Error, ValueError) as err:
            raise InvalidError(f"a pin must look like sha256//BASE64, got {pin!r}") from err
        if not pin.startswith(_PREFIX) or len(digest) != hashlib.sha256().digest_size:
            raise InvalidError(f"a pin must look like sha256//BASE64 of 32 bytes, got {pin!r}")
    return pins


def public_key_pin(certificate_der: bytes) -> str:
    """Return the pin of a certificate's public key: of its SubjectPublicKeyInfo, so a renewed certificate keeps it.

    Raises:
        InvalidError: not a DER certificate."""
    try:
        _, start, _ = _read_element(certificate_der, 0)  # Certificate
        _, position, _ = _read_element(certificate_der, start)  # TBSCertificate
        tag, _, end = _read_element(certificate_der, position)
        if tag == _VERSION:
            position = end
        for _ in range(_FIELDS_BEFORE_KEY):
            _, _, position = _read_element(certificate_der, position)
        tag, _, end = _read_element(certificate_der, position)
    except IndexError as err:
        raise InvalidError("the certificate is cut off") from err
    if tag != _SEQUENCE or end > len(certificate_der):
        raise InvalidError("the certificate is not DER of X.509")
    digest = hashlib.sha256(certificate_der[position:end]).digest()
    return _PREFIX + base64.b64encode(digest).decode("ascii")


def _read_element(der: bytes, position: int) -> tuple[int, int, int]:
    """Return tag, start of the content and end of the DER element at `position`."""
    tag, length, start = der[position], der[position + 1], position + 2
    if length & 0x80:
        size = length & 0x7F
        length, start = int.from_bytes(der[start : start + size], "big"), start + size
    return tag, start, start + length
