"""Passwords as argon2id hashes. Each call costs tens of milliseconds by design: call these in a thread."""

import base64
import os
from collections.abc import Callable

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from fleetwire_shared.errors import InvalidError

MIN_PASSWORD_LENGTH = 8
MAX_PASSWORD_BYTES = 1024
"""Longer ones only cost time to hash."""

DUMMY_HASH = (
    "$argon2id$v=19$m=65536,t=3,p=4$AAAAAAAAAAAAAAAAAAAAAA$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
)  # fmt: skip
"""A hash with the parameters of `hash_password` that no password is known for."""

_HASHER = PasswordHasher(time_cost=3, memory_cost=65536, parallelism=4, hash_len=32, salt_len=16)  # RFC 9106, second


def hash_password(password: str) -> str:
    """Return the hash to store, with its parameters and salt.

    Raises:
        InvalidError: the password is too short or too long."""
    if len(password) < MIN_PASSWORD_LENGTH:
        raise InvalidError(f"a password must have {MIN_PASSWORD_LENGTH} characters or more, got {len(password)}")
    encoded = _encode(password)
    if len(encoded) > MAX_PASSWORD_BYTES:
        raise InvalidError(f"a password must have {MAX_PASSWORD_BYTES} bytes or less, got {len(encoded)}")
    return _HASHER.hash(encoded)


def verify_password(password_hash: str | None, password: str) -> bool:
    """Return whether it is the password of that hash.

    With None (there is no such user) this takes as long and is False: the time does not tell who exists."""
    encoded = _encode(password)[: MAX_PASSWORD_BYTES + 1]
    try:
        return _HASHER.verify(password_hash or DUMMY_HASH, encoded) and password_hash is not None
    except (VerificationError, InvalidHashError):
        return False


def needs_rehash(password_hash: str) -> bool:
    """Return whether the hash was made with other parameters than are used now."""
    return _HASHER.check_needs_rehash(password_hash)


def random_password(random_bytes: Callable[[int], bytes] = os.urandom) -> str:
    """Return 120 random bits as 24 lower-case letters and digits, fit to be read out and typed."""
    return base64.b32encode(random_bytes(15)).decode("ascii").lower()


def _encode(password: str) -> bytes:
    return password.encode("utf-8", "surrogatepass")
