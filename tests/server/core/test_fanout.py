"""Topics: who subscribed gets what is published, and nobody can make the server hold more than a bound."""

import asyncio

import pytest

from fleetwire_server.core.fanout import Fanout, Keep, SubscriberTooSlowError


async def test_every_subscriber_gets_all_in_order() -> None:
    fanout = Fanout()
    with fanout.subscribe("topic", Keep.ALL) as first, fanout.subscribe("topic", Keep.ALL) as second:
        for number in range(3):
            fanout.publish("topic", b"%d;" % number)
        assert await first.get() == await second.get() == b"0;1;2;"


async def test_a_slow_subscriber_of_snapshots_gets_the_newest_only() -> None:
    fanout = Fanout()
    with fanout.subscribe("topic", Keep.NEWEST) as subscription:
        for number in range(1000):
            fanout.publish("topic", b"%d" % number)
        assert await subscription.get() == b"999"


async def test_a_subscriber_that_misses_events_is_told_so() -> None:
    fanout = Fanout(max_pending=10)
    with fanout.subscribe("topic", Keep.ALL) as slow, fanout.subscribe("topic", Keep.ALL) as quick:
        for _ in range(11):
            fanout.publish("topic", b"x")
            assert await quick.get() == b"x"
        with pytest.raises(SubscriberTooSlowError):
            await slow.get()


async def test_a_waiting_subscriber_is_woken() -> None:
    fanout = Fanout()
    with fanout.subscribe("topic", Keep.ALL) as subscription:
        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(subscription.get())
            await asyncio.sleep(0)
            fanout.publish("topic", b"late")
        assert waiting.result() == b"late"


async def test_nothing_is_left_of_a_topic_without_subscribers() -> None:
    fanout = Fanout()
    with fanout.subscribe("topic", Keep.ALL):
        assert fanout.has_subscribers("topic")
    assert not fanout.has_subscribers("topic")
    fanout.publish("topic", b"to nobody")
