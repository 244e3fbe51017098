import pytest

from fleetwire_server.core.usernames import check_username
from fleetwire_shared.errors import InvalidError


@pytest.mark.parametrize("name", ["a", "ada", "Ada.Lovelace-1_2", "ada@example.org", "0", "x" * 64])
def test_usual_names_are_accepted(name: str) -> None:
    check_username(name)


@pytest.mark.parametrize("name", ["", "x" * 65, "-a", ".a", "a b", "a/b", "a\n", "é", "a\x00", "٣"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidError, match="username must have"):
        check_username(name)
