"""A thousand commands sent to one agent as fast as a script sends them: started in the order of the queue, and none of
them delayed by those that hang."""

import asyncio
import sqlite3
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest
from tests.conftest import OpenApi, StartAgent, StartServer
from tests.support.eventually import eventually
from tests.support.processes import ServerProcess

from fleetwire_agent.commands import TURN_SECONDS

pytestmark = pytest.mark.on_hosts

COMMANDS = 1000
STUCK = (0, 1, 40, 300)
"""Of the commands, in the order in which they are sent."""


@pytest.mark.timeout(600)
async def test_a_thousand_commands_start_in_order_and_none_waits_for_those_that_hang(
    start_server: StartServer, start_agent: StartAgent, open_api: OpenApi
) -> None:
    server = start_server()
    api = await open_api(server)
    agent = await start_agent(api)

    def text_of(number: int) -> str:
        return "echo $$; sleep 3600" if number in STUCK else f"echo $$; echo {number} >&2; exit {number % 7}"

    senders = asyncio.Semaphore(100)  # at once: each request has its time, however slow this machine is

    async def send(number: int) -> str:
        async with senders:
            return await api.submit(agent.agent_id, text_of(number), timeout=3600)

    ids = await asyncio.gather(*(send(number) for number in range(COMMANDS)))
    stuck = {ids[number] for number in STUCK}

    async def read_ends() -> int:
        return sum(row["finished_at"] is not None for row in read_commands(server))

    await eventually(read_ends, lambda count: count == COMMANDS - len(STUCK), timeout_seconds=500)
    rows = read_commands(server)
    assert {row["id"]: row["status"] for row in rows if row["id"] in stuck} == dict.fromkeys(stuck, "running")
    assert set(ids) == {row["id"] for row in rows}
    created = [row["created_at"] for row in rows]
    assert created == sorted(created)

    # The kernel numbers processes in the order in which they start, so each shell tells its place.
    outputs = read_outputs(server)
    numbers = {command_id: number for number, command_id in enumerate(ids)}
    for row in rows:
        number, shell, *rest = numbers[row["id"]], *outputs[row["id"]].split()
        assert shell.isdigit()
        if row["id"] not in stuck:
            assert rest == [str(number)]
            assert (row["status"], row["exit_code"]) == ("failed" if number % 7 else "succeeded", number % 7)
    assert "slow to start" not in agent.log_text, "this machine is too busy to tell"
    assert "full" not in agent.log_text
    pids = [int(outputs[row["id"]].split()[0]) for row in rows]
    max_pid = int(Path("/proc/sys/kernel/pid_max").read_text())
    late = [
        (place, numbers[rows[place]["id"]], before, after)
        for place, (before, after) in enumerate(pairwise(pids), 1)
        if (after - before) % max_pid > max_pid // 2  # pids begin again from the lowest when the highest is given out
    ]
    assert late == []
    # One that kept those behind it waiting would cost them a turn, and each of the four a pause of that length.
    starts = sorted(row["started_at"] for row in rows)
    assert max(after - before for before, after in pairwise(starts)) < TURN_SECONDS

    for command_id in stuck:
        await api.post(f"/api/agents/{agent.agent_id}/commands/{command_id}/cancel", status=202)
    for command_id in stuck:
        assert (await api.wait_for_command(agent.agent_id, command_id))["status"] == "cancelled"


def read_commands(server: ServerProcess) -> list[sqlite3.Row]:
    """Return what the server holds of all commands, in the order of its queue."""
    with closing(sqlite3.connect(server.data_dir / "fleetwire.db")) as connection:
        connection.row_factory = sqlite3.Row
        return connection.execute("SELECT * FROM commands ORDER BY sequence").fetchall()


def read_outputs(server: ServerProcess) -> dict[str, str]:
    with closing(sqlite3.connect(server.data_dir / "fleetwire.db")) as connection:
        pieces = connection.execute("SELECT command_id, data FROM command_output ORDER BY command_id, position")
        outputs: dict[str, str] = {}
        for command_id, data in pieces:
            outputs[command_id] = outputs.get(command_id, "") + data.decode()
    return outputs
