import pytest
from sqlalchemy import Connection
from tests.support.stored import make_session, make_user

from fleetwire_server.model import Role, StreamTicket
from fleetwire_server.storage import sessions, users
from fleetwire_shared.errors import UnauthorizedError


@pytest.fixture
def with_session(connection: Connection) -> Connection:
    users.add_user(connection, make_user())
    sessions.add_session(connection, make_session())
    return connection


def test_a_session_has_the_role_of_its_user(with_session: Connection) -> None:
    stored = make_session(role=Role.VIEWER)
    assert sessions.get_session(with_session, "token", 150.0) == stored


def test_a_session_ends_at_its_time(with_session: Connection) -> None:
    assert sessions.get_session(with_session, "token", 199.9) is not None
    assert sessions.get_session(with_session, "token", 200.0) is None
    assert sessions.list_valid(with_session, ["token"], 200.0) == set()


def test_a_session_of_a_removed_user_is_refused(connection: Connection) -> None:
    with pytest.raises(UnauthorizedError):
        sessions.add_session(connection, make_session())


def test_the_valid_among_many_are_found(with_session: Connection) -> None:
    sessions.add_session(with_session, make_session("other"))
    unknown = [f"unknown-{number}" for number in range(2500)]
    assert sessions.list_valid(with_session, [*unknown, "token"], 150.0) == {"token"}


def test_logging_out_is_done_once(with_session: Connection) -> None:
    assert sessions.delete_session(with_session, "token")
    assert not sessions.delete_session(with_session, "token")


def test_a_ticket_is_good_for_one_use(with_session: Connection) -> None:
    sessions.add_ticket(with_session, StreamTicket(ticket_hash="ticket", session_token_hash="token", expires_at=160.0))
    assert sessions.take_ticket(with_session, "ticket", 150.0) == make_session()
    assert sessions.take_ticket(with_session, "ticket", 150.0) is None


def test_an_expired_ticket_is_used_up_for_nothing(with_session: Connection) -> None:
    sessions.add_ticket(with_session, StreamTicket(ticket_hash="ticket", session_token_hash="token", expires_at=160.0))
    assert sessions.take_ticket(with_session, "ticket", 160.0) is None
    assert sessions.take_ticket(with_session, "ticket", 150.0) is None


def test_a_ticket_needs_a_session(with_session: Connection) -> None:
    with pytest.raises(UnauthorizedError):
        sessions.add_ticket(
            with_session, StreamTicket(ticket_hash="ticket", session_token_hash="gone", expires_at=160.0)
        )


def test_expired_sessions_and_tickets_are_removed(with_session: Connection) -> None:
    sessions.add_session(with_session, make_session("longer", expires_at=300.0))
    sessions.add_ticket(with_session, StreamTicket(ticket_hash="ticket", session_token_hash="longer", expires_at=160.0))
    assert sessions.delete_expired(with_session, 200.0) == 2
    assert sessions.delete_expired(with_session, 200.0) == 0
    assert sessions.list_valid(with_session, ["token", "longer"], 0.0) == {"longer"}
