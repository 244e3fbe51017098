from typing import Any

import pytest
from sqlalchemy import Connection, func, select
from tests.support.stored import make_agent, make_command, make_key, make_piece

from fleetwire_server.model import MinuteRollup
from fleetwire_server.storage import agents, commands, metrics
from fleetwire_server.storage.tables import METADATA
from fleetwire_shared.errors import ConflictError, NotFoundError

SEEN: dict[str, Any] = {
    "hostname": "web-01",
    "ip": "10.0.0.1",
    "os": "Debian GNU/Linux 12",
    "version": "0.1.0",
    "facts": {"kernel": "6.1", "cpu_count": 2},
    "last_seen": 120.0,
}


@pytest.fixture
def with_agent(connection: Connection) -> Connection:
    agents.add_agent(connection, make_agent(), make_key())
    return connection


def test_an_enrolled_agent_is_returned_as_it_was(connection: Connection) -> None:
    agent = make_agent(label="wéb", tags=("b", "a", 'quo"ted'))
    agents.add_agent(connection, agent, make_key())
    assert agents.get_agent(connection, "agent_1") == agent
    assert agents.get_agent(connection, "agent_2") is None
    with pytest.raises(ConflictError):
        agents.add_agent(connection, agent, make_key("other"))


def test_agents_are_listed_by_label(connection: Connection) -> None:
    for number, label in enumerate(("c", "a", "b")):
        agents.add_agent(
            connection, make_agent(f"agent_{number}", label=label), make_key(f"key{number}", f"agent_{number}")
        )
    assert [agent.label for agent in agents.list_agents(connection)] == ["a", "b", "c"]


def test_label_and_tags_are_changed_one_by_one(with_agent: Connection) -> None:
    assert agents.update_label_tags(with_agent, "agent_1", tags=("x",)) == make_agent(tags=("x",))
    assert agents.update_label_tags(with_agent, "agent_1", label="db") == make_agent(label="db", tags=("x",))
    assert agents.update_label_tags(with_agent, "agent_1") == make_agent(label="db", tags=("x",))
    with pytest.raises(NotFoundError, match="no agent agent_2"):
        agents.update_label_tags(with_agent, "agent_2", label="db")


def test_what_an_agent_says_of_itself_is_stored(with_agent: Connection) -> None:
    assert agents.record_seen(with_agent, "agent_1", **SEEN)
    assert agents.get_agent(with_agent, "agent_1") == make_agent(**SEEN)
    assert agents.record_seen(with_agent, "agent_1", **SEEN | {"facts": None, "ip": "10.0.0.2"})
    assert agents.get_agent(with_agent, "agent_1") == make_agent(**SEEN | {"ip": "10.0.0.2"})
    assert not agents.record_seen(with_agent, "agent_2", **SEEN)


def test_last_seen_never_goes_back(with_agent: Connection) -> None:
    for at, expected in ((120.5, 120.5), (110.0, 120.5), (130.0, 130.0)):
        agents.record_last_seen(with_agent, {"agent_1": at, "agent_2": at})
        agent = agents.get_agent(with_agent, "agent_1")
        assert agent is not None
        assert agent.last_seen == expected
    agents.record_last_seen(with_agent, {})


def test_a_key_opens_until_it_expires(with_agent: Connection) -> None:
    assert agents.get_agent_by_key(with_agent, "key", 1e12) == make_agent()
    assert agents.get_agent_by_key(with_agent, "other", 150.0) is None
    agents.rotate_key(with_agent, make_key("new", created_at=150.0), others_expire_at=200.0)
    assert agents.get_agent_by_key(with_agent, "key", 199.0) == make_agent()
    assert agents.get_agent_by_key(with_agent, "key", 200.0) is None
    assert agents.get_agent_by_key(with_agent, "new", 200.0) == make_agent()


def test_a_second_rotation_does_not_lengthen_the_life_of_the_first_key(with_agent: Connection) -> None:
    agents.rotate_key(with_agent, make_key("second", created_at=150.0), others_expire_at=200.0)
    agents.rotate_key(with_agent, make_key("third", created_at=160.0), others_expire_at=300.0)
    for key, ends_at in (("key", 200.0), ("second", 300.0)):
        assert agents.get_agent_by_key(with_agent, key, ends_at - 1) == make_agent()
        assert agents.get_agent_by_key(with_agent, key, ends_at) is None
    assert agents.get_agent_by_key(with_agent, "third", 1e12) == make_agent()
    assert agents.delete_expired_keys(with_agent, 200.0) == 1
    with pytest.raises(NotFoundError):
        agents.rotate_key(with_agent, make_key("x", "agent_2"), others_expire_at=300.0)


def test_the_use_of_a_new_key_retires_the_older_ones(with_agent: Connection) -> None:
    agents.rotate_key(with_agent, make_key("new", created_at=150.0), others_expire_at=200.0)
    assert agents.retire_other_keys(with_agent, "agent_1", "key") == 0
    assert agents.retire_other_keys(with_agent, "agent_1", "new") == 1
    assert agents.get_agent_by_key(with_agent, "key", 150.0) is None
    assert agents.get_agent_by_key(with_agent, "new", 150.0) == make_agent()


def test_a_deleted_agent_leaves_nothing_behind(with_agent: Connection) -> None:
    commands.add_command(with_agent, make_command())
    commands.add_output(with_agent, "cmd_1", [make_piece(b"output")], 1000)
    rollup = MinuteRollup(
        agent_id="agent_1", minute=60, counts={"load1": 1}, sums={"load1": 1.0}, maxima={"load1": 1.0}
    )
    metrics.add_rollups(with_agent, [rollup])
    assert agents.delete_agent(with_agent, "agent_1")
    assert not agents.delete_agent(with_agent, "agent_1")
    for table in METADATA.sorted_tables:
        assert with_agent.execute(select(func.count()).select_from(table)).scalar_one() == 0, table.name
