"""Which key of an SSH server is accepted. What is known comes from three places, and all of them must agree."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from fleetwire_server.deploy.errors import DeployError, deploy_error
from fleetwire_server.model import HostKey

HostKeyRule: TypeAlias = Literal["accept-new", "pinned"]

STEP = "host_key"

FINGERPRINT_PATTERN = r"SHA256:[A-Za-z0-9+/]{43}"

ALGORITHMS = (
    "ssh-ed25519",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
    "rsa-sha2-512",
    "rsa-sha2-256",
)
"""Signatures by which a server may prove its key, in the order in which they are asked for; none of them with SHA-1."""

_ALGORITHMS_OF_KEY: Mapping[str, tuple[str, ...]] = {"ssh-rsa": ("rsa-sha2-512", "rsa-sha2-256")}
_FINGERPRINT = re.compile(FINGERPRINT_PATTERN, re.ASCII)


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A key as it is compared: `line` is in OpenSSH's format without a comment, "" where only the fingerprint is
    known."""

    line: str
    fingerprint: str

    @property
    def algorithm(self) -> str:
        return self.line.partition(" ")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownKeys:
    """What is known of one server's keys before it is dialled."""

    expected: PublicKey | None = None  # the request says so
    pinned: HostKey | None = None
    listed: tuple[PublicKey, ...] = ()  # in known_hosts
    revoked: tuple[PublicKey, ...] = ()  # in known_hosts
    has_authority: bool = False  # known_hosts names one that vouches for the server

    @property
    def is_any(self) -> bool:
        return bool(self.expected or self.pinned or self.listed)


def is_fingerprint(text: str) -> bool:
    return _FINGERPRINT.fullmatch(text) is not None


def preferred_algorithms(known: KnownKeys) -> list[str]:
    """Return the signature algorithms to ask for, those of known keys first: a server that got a key of another type
    besides then still shows the one that is known."""
    lines = [known.expected.line if known.expected else "", known.pinned.public_key if known.pinned else ""]
    lines += [key.line for key in known.listed]
    names = [line.partition(" ")[0] for line in lines if line]
    wanted = [algorithm for name in names for algorithm in _ALGORITHMS_OF_KEY.get(name, (name,))]
    return list(dict.fromkeys([name for name in wanted if name in ALGORITHMS] + list(ALGORITHMS)))


def judge_host_key(shown: PublicKey, known: KnownKeys, where: str, rule: HostKeyRule) -> DeployError | None:
    """Return why the key that a server shows is refused, None where it is accepted.

    Args:
        where: `host port 22`, for people."""
    if any(key.fingerprint == shown.fingerprint for key in known.revoked):
        return _changed(shown, "not a revoked key", f"{where} shows a key that known_hosts marks as revoked")
    if known.expected is not None and known.expected.fingerprint != shown.fingerprint:
        return _changed(
            shown,
            known.expected.fingerprint,
            f"{where} shows the key {shown.fingerprint}, and the request's host_key is {known.expected.fingerprint}:"
            " if the host's own key is the first, send that one",
        )
    if known.pinned is not None and known.pinned.fingerprint != shown.fingerprint:
        return _changed(
            shown,
            known.pinned.fingerprint,
            f"{where} shows the key {shown.fingerprint}, and {known.pinned.fingerprint} was pinned: another machine may"
            " be answering. If the host was installed anew, remove the pinned key with"
            f" DELETE /api/host-keys/{known.pinned.host}/{known.pinned.port} and deploy again",
        )
    if known.listed and all(key.fingerprint != shown.fingerprint for key in known.listed):
        fingerprints = ", ".join(key.fingerprint for key in known.listed)
        return _changed(
            shown,
            fingerprints,
            f"{where} shows the key {shown.fingerprint}, and this server's known_hosts has {fingerprints}: another"
            " machine may be answering. If the host was installed anew, correct known_hosts and deploy again",
        )
    if not known.is_any and known.has_authority:
        return deploy_error(
            STEP,
            "host_key_unknown",
            f"{where} shows the key {shown.fingerprint} without a certificate, and this server's known_hosts names an"
            " authority for it: have the host show its certificate, or send the key as host_key",
            shown_fingerprint=shown.fingerprint,
        )
    if not known.is_any and rule == "pinned":
        return deploy_error(
            STEP,
            "host_key_unknown",
            f"{where} shows the key {shown.fingerprint}, which is not known here, and deploy_host_keys is pinned:"
            " compare it with ssh-keygen -lf on the host and send it as host_key, or add it to this server's"
            " known_hosts",
            shown_fingerprint=shown.fingerprint,
        )
    return None


def _changed(shown: PublicKey, expected: str, detail: str) -> DeployError:
    return deploy_error(
        STEP,
        "host_key_changed",
        detail,
        expected_fingerprint=expected,
        shown_fingerprint=shown.fingerprint,
    )
