"""What waits for one agent, and in which order it leaves."""

import asyncio

import pytest

from fleetwire_server.http.outbox import Outbox
from fleetwire_shared.messages import CommandCancel, CommandStored, Heartbeat, OutputStored, ServerMessage


async def test_cancels_and_heartbeats_overtake_and_keep_their_order() -> None:
    outbox = Outbox(10)
    others: list[ServerMessage] = [CommandStored(command_id="a"), OutputStored(command_id="a", position=1)]
    urgent: list[ServerMessage] = [CommandCancel(command_id="b"), Heartbeat(), CommandCancel(command_id="c")]
    for message in (others[0], urgent[0], others[1], *urgent[1:]):
        outbox.put(message)
    assert [await outbox.take() for _ in range(5)] == urgent + others


async def test_both_lanes_share_one_bound() -> None:
    outbox = Outbox(2)
    outbox.put(CommandStored(command_id="a"))
    outbox.put(CommandCancel(command_id="a"))
    for message in (CommandStored(command_id="b"), CommandCancel(command_id="b")):
        with pytest.raises(asyncio.QueueFull):
            outbox.put(message)
    await outbox.take()
    outbox.put(CommandStored(command_id="b"))


async def test_who_waits_is_woken() -> None:
    outbox = Outbox(2)
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        taken = group.create_task(outbox.take())
        await asyncio.sleep(0)
        outbox.put(Heartbeat())
        assert await taken == Heartbeat()
