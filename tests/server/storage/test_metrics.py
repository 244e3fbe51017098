from collections.abc import Mapping

import pytest
from sqlalchemy import Connection
from tests.support.stored import make_agent, make_key

from fleetwire_server.model import METRIC_NAMES, MinuteRollup
from fleetwire_server.storage import agents, metrics


@pytest.fixture
def with_agent(connection: Connection) -> Connection:
    agents.add_agent(connection, make_agent(), make_key())
    return connection


def rollup(minute: int, values: Mapping[str, tuple[int, float, float]], agent_id: str = "agent_1") -> MinuteRollup:
    return MinuteRollup(
        agent_id=agent_id,
        minute=minute,
        counts={name: count for name, (count, _, _) in values.items()},
        sums={name: total for name, (_, total, _) in values.items()},
        maxima={name: high for name, (_, _, high) in values.items()},
    )


def listed(connection: Connection) -> list[MinuteRollup]:
    return metrics.list_rollups(connection, "agent_1", 0, 10**9)


def test_a_rollup_is_returned_as_it_was(with_agent: Connection) -> None:
    whole = rollup(60, {name: (12, index * 1.5, index * 0.5) for index, name in enumerate(METRIC_NAMES)})
    metrics.add_rollups(with_agent, [whole])
    assert listed(with_agent) == [whole]


def test_two_halves_of_a_minute_are_added(with_agent: Connection) -> None:
    metrics.add_rollups(with_agent, [rollup(60, {"load1": (6, 3.0, 0.9), "cpu_percent": (1, 5.0, 5.0)})])
    metrics.add_rollups(with_agent, [rollup(60, {"load1": (5, 2.0, 1.5), "mem_percent": (1, 7.0, 7.0)})])
    assert listed(with_agent) == [
        rollup(60, {"load1": (11, 5.0, 1.5), "cpu_percent": (1, 5.0, 5.0), "mem_percent": (1, 7.0, 7.0)})
    ]
    metrics.add_rollups(with_agent, [rollup(60, {"load1": (1, 1.0, 1.0)})])
    assert listed(with_agent)[0].maxima["load1"] == 1.5


def test_a_range_has_its_start_and_not_its_end(with_agent: Connection) -> None:
    metrics.add_rollups(with_agent, [rollup(minute, {"load1": (1, 1.0, 1.0)}) for minute in (180, 60, 120)])
    assert [each.minute for each in metrics.list_rollups(with_agent, "agent_1", 60, 180)] == [60, 120]


def test_rollups_of_deleted_agents_are_passed_over(with_agent: Connection) -> None:
    here, gone = rollup(60, {"load1": (1, 1.0, 1.0)}), rollup(60, {"load1": (1, 1.0, 1.0)}, "agent_gone")
    metrics.add_rollups(with_agent, [gone, here])
    metrics.add_rollups(with_agent, [gone])
    assert listed(with_agent) == [here]


def test_old_rollups_are_removed_a_few_at_a_time(with_agent: Connection) -> None:
    metrics.add_rollups(with_agent, [rollup(minute * 60, {"load1": (1, 1.0, 1.0)}) for minute in range(5)])
    assert [metrics.delete_old(with_agent, 180.0, 2) for _ in range(3)] == [2, 1, 0]
    assert [each.minute for each in listed(with_agent)] == [180, 240]
