"""Public key pins are those that curl takes."""

import base64
import hashlib
import subprocess
from pathlib import Path

import pytest

from fleetwire_shared.errors import InvalidError
from fleetwire_shared.pins import parse_pins, public_key_pin

PIN = "sha256//" + base64.b64encode(bytes(32)).decode()
OTHER_PIN = "sha256//" + base64.b64encode(bytes(range(32))).decode()


def openssl(*arguments: str | Path, content: bytes | None = None) -> bytes:
    return subprocess.run(["openssl", *map(str, arguments)], input=content, check=True, capture_output=True).stdout


def make_certificate(key: Path, *options: str) -> bytes:
    """Return a self-signed certificate of the key, as DER."""
    return openssl("req", "-x509", "-key", key, "-days", "2", "-subj", "/CN=a", "-outform", "DER", *options)


@pytest.mark.parametrize(
    "kind",
    [
        ("RSA", "-pkeyopt", "rsa_keygen_bits:2048"),
        ("EC", "-pkeyopt", "ec_paramgen_curve:P-256"),
        ("ED25519",),
    ],
    ids=lambda kind: kind[0],
)
def test_the_pin_of_a_certificate_is_that_of_its_key_as_openssl_makes_it(kind: tuple[str, ...], tmp_path: Path) -> None:
    key = tmp_path / "key.pem"
    key.write_bytes(openssl("genpkey", "-algorithm", *kind))
    public = openssl("pkey", "-in", key, "-pubout", "-outform", "DER")
    pin = "sha256//" + base64.b64encode(hashlib.sha256(public).digest()).decode()
    assert public_key_pin(make_certificate(key)) == pin
    long_names = ("-addext", "subjectAltName=" + ",".join(f"DNS:host-{number}.example" for number in range(200)))
    assert public_key_pin(make_certificate(key, *long_names)) == pin, "a renewed certificate keeps it"


def test_what_is_no_certificate_is_refused(tmp_path: Path) -> None:
    key = tmp_path / "key.pem"
    key.write_bytes(openssl("genpkey", "-algorithm", "ED25519"))
    certificate = make_certificate(key)
    for wrong in (b"", b"\x30", b"no certificate", certificate[:60], certificate[:-300]):
        with pytest.raises(InvalidError):
            public_key_pin(wrong)


def test_pins_are_separated_by_semicolons() -> None:
    assert parse_pins(PIN) == (PIN,)
    assert parse_pins(f"{PIN};{OTHER_PIN};") == (PIN, OTHER_PIN)


@pytest.mark.parametrize(
    "text", ["", ";", "sha256//", "sha256//AAAA", PIN.replace("sha256", "sha1"), PIN[8:], f"{PIN},{PIN}"]
)
def test_wrong_pins_are_refused_with_what_would_be_right(text: str) -> None:
    with pytest.raises(InvalidError, match="sha256//BASE64"):
        parse_pins(text)
