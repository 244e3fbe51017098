import time

import pytest
from argon2 import PasswordHasher

from fleetwire_server.core.passwords import (
    DUMMY_HASH,
    hash_password,
    needs_rehash,
    random_password,
    verify_password,
)
from fleetwire_shared.errors import InvalidError


def test_the_password_fits_its_hash_and_no_other_does() -> None:
    stored = hash_password("correct hörse")
    assert stored.startswith("$argon2id$")
    assert verify_password(stored, "correct hörse")
    assert not verify_password(stored, "correct horse")
    assert not verify_password(stored, "")
    assert hash_password("correct hörse") != stored


@pytest.mark.parametrize("password", ["", "seven77", "x" * 1025, "é" * 600])
def test_passwords_out_of_bounds_are_refused(password: str) -> None:
    with pytest.raises(InvalidError, match="a password must have"):
        hash_password(password)


def test_a_refusal_does_not_tell_the_password() -> None:
    with pytest.raises(InvalidError) as refusal:
        hash_password("secret")
    assert "secret" not in str(refusal.value)


def test_whatever_is_sent_as_a_password_is_only_wrong() -> None:
    stored = hash_password("correct horse")
    for password in ("\ud800", "\0", "x" * 1_000_000):
        assert not verify_password(stored, password)
    assert not verify_password("no hash", "correct horse")


def test_a_password_that_is_too_long_is_not_cut_to_one_that_fits() -> None:
    assert not verify_password(hash_password("x" * 1024), "x" * 1025)


def test_no_user_takes_as_long_as_a_wrong_password() -> None:
    stored = hash_password("correct horse")

    def seconds(password_hash: str | None) -> float:
        started = time.perf_counter()
        assert not verify_password(password_hash, "wrong password")
        return time.perf_counter() - started

    known = min(seconds(stored) for _ in range(3))
    unknown = min(seconds(None) for _ in range(3))
    assert known / 2 < unknown < known * 2


def test_only_hashes_of_other_parameters_are_made_anew() -> None:
    assert not needs_rehash(hash_password("correct horse"))
    assert not needs_rehash(DUMMY_HASH)
    assert needs_rehash(PasswordHasher(time_cost=1, memory_cost=8, parallelism=1).hash("correct horse"))


def test_a_random_password_can_be_used() -> None:
    password = random_password()
    assert len(password) == 24
    assert password != random_password()
    hash_password(password)
