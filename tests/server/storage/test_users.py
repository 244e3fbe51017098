import pytest
from sqlalchemy import Connection
from tests.support.stored import make_session, make_user

from fleetwire_server.model import Role
from fleetwire_server.storage import sessions, users
from fleetwire_shared.errors import ConflictError, NotFoundError


def test_an_added_user_is_returned_as_it_was(connection: Connection) -> None:
    users.add_user(connection, make_user())
    assert users.get_user(connection, "ada") == make_user()
    assert users.get_user(connection, "bob") is None


def test_users_are_listed_by_name(connection: Connection) -> None:
    for name in ("cy", "ada", "bob"):
        users.add_user(connection, make_user(name))
    assert [user.name for user in users.list_users(connection)] == ["ada", "bob", "cy"]


def test_a_name_is_taken_once(connection: Connection) -> None:
    users.add_user(connection, make_user())
    with pytest.raises(ConflictError, match="already a user ada"):
        users.add_user(connection, make_user())


def test_a_changed_role_ends_the_sessions_of_that_user_only(connection: Connection) -> None:
    for name in ("ada", "bob"):
        users.add_user(connection, make_user(name))
        sessions.add_session(connection, make_session(f"of-{name}", username=name))
    changed = users.update_user(connection, "ada", role=Role.OPERATOR)
    assert changed == make_user(role=Role.OPERATOR)
    assert sessions.list_valid(connection, ["of-ada", "of-bob"], 150.0) == {"of-bob"}


def test_a_changed_password_ends_sessions(connection: Connection) -> None:
    users.add_user(connection, make_user())
    sessions.add_session(connection, make_session())
    assert users.update_user(connection, "ada", password_hash="new").password_hash == "new"
    assert sessions.get_session(connection, "token", 150.0) is None


def test_a_new_hash_of_the_same_password_keeps_sessions(connection: Connection) -> None:
    users.add_user(connection, make_user())
    sessions.add_session(connection, make_session())
    assert users.update_password_hash(connection, "ada", old_hash="hash", new_hash="stronger")
    assert not users.update_password_hash(connection, "ada", old_hash="hash", new_hash="late")
    assert users.get_user(connection, "ada") == make_user(password_hash="stronger")
    assert sessions.get_session(connection, "token", 150.0) is not None


def test_a_removed_user_takes_sessions_and_tickets_along(connection: Connection) -> None:
    users.add_user(connection, make_user())
    sessions.add_session(connection, make_session())
    users.delete_user(connection, "ada")
    assert users.get_user(connection, "ada") is None
    assert sessions.get_session(connection, "token", 150.0) is None


def test_unknown_users_are_not_found(connection: Connection) -> None:
    with pytest.raises(NotFoundError, match="no user ada"):
        users.delete_user(connection, "ada")
    with pytest.raises(NotFoundError, match="no user ada"):
        users.update_user(connection, "ada", role=Role.VIEWER)


def test_the_last_admin_stays(connection: Connection) -> None:
    users.add_user(connection, make_user(role=Role.ADMIN))
    with pytest.raises(ConflictError, match="last admin"):
        users.delete_user(connection, "ada")
    with pytest.raises(ConflictError, match="last admin"):
        users.update_user(connection, "ada", role=Role.OPERATOR)
    users.update_user(connection, "ada", role=Role.ADMIN, password_hash="new")
    users.add_user(connection, make_user("bob", role=Role.ADMIN))
    users.delete_user(connection, "ada")
