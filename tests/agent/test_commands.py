"""Real commands, from the offer to the result. What would go to the server is a list."""

import asyncio
import base64
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.agent.command_rig import Rig, make_offer, no_room, open_rig

from fleetwire_agent.command_states import State
from fleetwire_agent.commands import Commands
from fleetwire_agent.ledger import Ledger
from fleetwire_agent.process_table import read_process
from fleetwire_agent.processes import Spawner
from fleetwire_agent.runner.shell import split_incomplete_character
from fleetwire_agent.runners import find_launcher
from fleetwire_shared.limits import CHUNK_BYTES, OUTPUT_WINDOW_BYTES
from fleetwire_shared.messages import (
    CommandAccepted,
    CommandCancel,
    CommandOffer,
    CommandStarted,
    Settlement,
)


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with open_rig(tmp_path / "state") as rig:
        yield rig


async def test_a_command_is_accepted_started_heard_and_finished(rig: Rig) -> None:
    result = await rig.run("echo 'é|x' | tr x y; echo oops >&2; exit 3")
    assert (result.status, result.exit_code) == ("failed", 3)
    assert rig.output("stdout") == "é|y\n".encode()
    assert rig.output("stderr") == b"oops\n"
    assert (result.stdout_bytes, result.stderr_bytes) == (5, 5)
    assert isinstance(rig.told[0], CommandAccepted)
    assert isinstance(rig.told[1], CommandStarted)
    assert rig.told[-1] is result


async def test_success(rig: Rig) -> None:
    result = await rig.run("true")
    assert (result.status, result.exit_code, result.error) == ("succeeded", 0, None)


async def test_a_shell_ended_by_a_signal_is_128_plus_the_signal(rig: Rig) -> None:
    assert (await rig.run("kill -9 $$")).exit_code == 137


async def test_a_command_runs_in_the_root_with_its_id_and_an_empty_stdin(rig: Rig) -> None:
    await rig.run('cat; pwd; echo "$FLEETWIRE_COMMAND_ID"')
    assert rig.output("stdout") == b"/\ncmd_1\n"


async def test_much_output_arrives_whole_and_in_order(rig: Rig) -> None:
    result = await rig.run("seq 1 1000000")
    assert rig.output("stdout") == b"".join(b"%d\n" % number for number in range(1, 1_000_001))
    assert result.stdout_bytes == 6_888_896
    assert all(len(base64.b64decode(piece.base64)) <= CHUNK_BYTES for piece in rig.pieces())


async def test_every_piece_ends_with_a_whole_character(rig: Rig) -> None:
    await rig.run("for i in $(seq 1 20000); do printf 'a€é😀'; done")
    assert rig.output("stdout").decode() == "a€é😀" * 20000
    for piece in rig.pieces():
        base64.b64decode(piece.base64).decode()


async def test_bytes_that_are_no_utf8_arrive_as_they_are(rig: Rig) -> None:
    await rig.run(r"printf '\377\xe2\x82'")
    assert rig.output("stdout") == b"\xff\xe2\x82"


async def test_a_server_that_stores_nothing_is_told_a_window_and_gets_the_rest_later(rig: Rig) -> None:
    rig.stores_output = False
    rig.commands.offer(make_offer("head -c 5000000 /dev/zero; echo done >&2"))
    await rig.wait_until(lambda: len(rig.output("stdout")) >= OUTPUT_WINDOW_BYTES)
    assert len(rig.output("stdout")) < OUTPUT_WINDOW_BYTES + CHUNK_BYTES
    assert not rig.finished()
    rig.stores_output = True
    rig.commands.note_output_stored("cmd_1", len(rig.output("stdout")))
    assert (await rig.result_of()).stdout_bytes == 5_000_000
    assert len(rig.output("stdout")) == 5_000_000


async def test_a_command_waits_for_a_server_that_is_slow_and_not_for_one_that_is_away(rig: Rig, tmp_path: Path) -> None:
    rig.stores_output = False
    rig.commands.offer(make_offer(f"head -c 60000000 /dev/zero; touch {tmp_path}/done"))
    await rig.wait_until(lambda: len(rig.output("stdout")) >= OUTPUT_WINDOW_BYTES)
    await asyncio.sleep(1)
    assert not (tmp_path / "done").exists()
    rig.commands.disconnect()
    async with asyncio.timeout(10):
        while not (tmp_path / "done").exists():
            await asyncio.sleep(0.05)
    entry = rig.ledger.get("cmd_1")
    assert entry
    assert entry.directory
    assert sum(path.stat().st_size for path in entry.directory.glob("output.*")) <= 33 * 1024 * 1024
    rig.stores_output = True
    rig.commands.note_output_stored("cmd_1", len(rig.output("stdout")))
    result = await rig.result_of()
    assert result.stdout_bytes == 60_000_000  # counted, also what was dropped in the middle
    assert 30_000_000 < len(rig.output("stdout")) < 35_000_000
    assert rig.pieces()[-1].position + len(base64.b64decode(rig.pieces()[-1].base64)) == 60_000_000


async def test_a_timeout_kills_everything(rig: Rig) -> None:
    rig.commands.offer(make_offer("setsid sh -c 'echo $$; exec sleep 600' & wait", timeout_seconds=0.3))
    result = await rig.result_of()
    assert (result.status, result.exit_code) == ("timed_out", None)
    assert read_process(int(rig.output("stdout"))) is None


async def test_cancel_kills_everything(rig: Rig) -> None:
    rig.commands.offer(make_offer("setsid sh -c 'echo $$; exec sleep 600' & wait"))
    await rig.wait_until(lambda: rig.output("stdout").endswith(b"\n"))
    rig.commands.cancel(CommandCancel(command_id="cmd_1"))
    result = await rig.result_of()
    assert (result.status, result.exit_code) == ("cancelled", None)
    assert read_process(int(rig.output("stdout"))) is None
    assert int(rig.output("stdout")) in [each.pid for each in result.killed]
    assert result.killed_count == len(result.killed) == 2


async def test_a_background_child_does_not_hold_the_command(rig: Rig) -> None:
    result = await rig.run("sleep 600 & echo $!")
    assert result.status == "succeeded"
    assert result.duration_seconds < 3
    pid = int(rig.output("stdout"))
    assert read_process(pid)  # left running, as ssh leaves it
    os.kill(pid, 9)


async def test_what_cannot_be_started_has_failed_and_says_why(rig: Rig) -> None:
    result = await rig.run("echo " + "x" * 200_000)
    assert (result.status, result.exit_code) == ("failed", None)
    assert result.error
    assert "Argument list too long" in result.error


async def test_a_command_with_a_nul_byte_has_failed(rig: Rig) -> None:
    assert (await rig.run("echo \0")).status == "failed"


async def test_only_so_many_run_at_once_and_the_others_wait_in_order(tmp_path: Path) -> None:
    fifo = tmp_path / "gate"
    os.mkfifo(fifo)
    async with open_rig(tmp_path / "state", max_at_once=1) as rig:
        rig.commands.offer(make_offer(f"cat {fifo}", command_id="cmd_1"))
        for number in (2, 3, 4):
            rig.commands.offer(make_offer(f"echo {number} >> {tmp_path}/order", command_id=f"cmd_{number}"))
        await rig.wait_until(lambda: sum(isinstance(item, CommandAccepted) for item in rig.told) == 4)
        await rig.wait_until(lambda: any(isinstance(item, CommandStarted) for item in rig.told))
        rig.commands.cancel(CommandCancel(command_id="cmd_3"))
        assert (await rig.rejection_of("cmd_3")).reason == "cancelled"
        await asyncio.to_thread(fifo.write_text, "go")
        await rig.result_of("cmd_4")
    assert (tmp_path / "order").read_text() == "2\n4\n"


async def test_a_slow_command_does_not_delay_a_quick_one(rig: Rig) -> None:
    rig.commands.offer(make_offer("sleep 600", command_id="cmd_slow"))
    for number in range(20):
        rig.commands.offer(make_offer(f"echo {number}", command_id=f"cmd_{number}"))
    for number in range(20):
        assert (await rig.result_of(f"cmd_{number}")).status == "succeeded"
        assert rig.output("stdout", f"cmd_{number}") == b"%d\n" % number
    assert not rig.finished("cmd_slow")


async def test_a_cancel_counts_also_where_the_disk_takes_nothing(tmp_path: Path) -> None:
    async with open_rig(tmp_path / "state") as rig:
        with no_room():
            rig.commands.offer(make_offer("true", command_id="cmd_full"))
            assert (await rig.rejection_of("cmd_full")).reason == "full"
            rig.commands.offer(make_offer(f"echo ran >> {tmp_path}/runs"))
            rig.commands.cancel(CommandCancel(command_id="cmd_1"))  # before it is known that the offer is not on disk
            assert (await rig.rejection_of()).reason == "cancelled"
            rig.commands.cancel(CommandCancel(command_id="cmd_2"))
            assert (await rig.rejection_of("cmd_2")).reason == "cancelled"
        for command_id in ("cmd_1", "cmd_2"):
            rig.commands.offer(make_offer(f"echo ran >> {tmp_path}/runs", command_id=command_id))
            assert (await rig.rejection_of(command_id, count=2)).reason == "cancelled"
        rig.commands.offer(make_offer("true", command_id="cmd_full"))
        assert (await rig.result_of("cmd_full")).status == "succeeded"  # which the disk takes, and all before with it
    async with open_rig(tmp_path / "state") as rig:
        rig.commands.offer(make_offer(f"echo ran >> {tmp_path}/runs"))
        assert (await rig.rejection_of()).reason == "cancelled"
        assert rig.ledger.state_of("cmd_2") is State.ENDED
    assert not (tmp_path / "runs").exists()


async def test_the_same_id_never_runs_twice(rig: Rig, tmp_path: Path) -> None:
    offer = make_offer(f"echo ran >> {tmp_path}/runs")
    rig.commands.offer(offer)
    result = await rig.result_of()
    rig.commands.offer(offer)
    await rig.wait_until(lambda: len(rig.finished()) == 2)  # answered by its state
    rig.ledger.note_stored("cmd_1")
    rig.commands.offer(offer)
    await rig.wait_until(lambda: len(rig.finished()) == 3)  # remembered also when no longer held
    ages = [told.seconds_ago for told in rig.finished()]
    assert [replace(told, seconds_ago=ages[0]) for told in rig.finished()] == [result] * 3
    assert 0 < ages[0] < ages[1] < ages[2]
    assert (tmp_path / "runs").read_text() == "ran\n"


async def test_a_cancel_before_its_offer_keeps_the_command_from_ever_starting(rig: Rig) -> None:
    rig.commands.cancel(CommandCancel(command_id="cmd_1"))
    first = await rig.rejection_of()
    rig.commands.offer(make_offer("true"))
    assert await rig.rejection_of(count=2) == first
    assert first.reason == "cancelled"
    assert len(rig.ledger) == 0


@pytest.mark.parametrize(
    ("offer", "reason"),
    [
        (
            CommandOffer(command_id="cmd_1", kind="sql", command="x", timeout_seconds=1, remaining_seconds=1),
            "unsupported",
        ),
        (
            CommandOffer(command_id="cmd_1", kind="shell", command="x", timeout_seconds=1, remaining_seconds=0),
            "expired",
        ),
        (make_offer("x", timeout_seconds=-1), "invalid"),
        (make_offer("x", command_id="c"), "invalid"),
        (make_offer("x", command_id="cmd_1\n"), "invalid"),
    ],
)
async def test_an_offer_that_cannot_be_taken_is_rejected(rig: Rig, offer: CommandOffer, reason: str) -> None:
    rig.commands.offer(offer)
    assert (await rig.rejection_of(offer.command_id)).reason == reason


async def test_an_id_that_is_a_path_leads_nowhere(tmp_path: Path) -> None:
    victim = tmp_path / "victim.1"
    victim.mkdir()
    for command_id in ("../../victim", f"{tmp_path}/victim", "../../new"):
        async with open_rig(tmp_path / "state") as rig:
            rig.commands.offer(make_offer("true", command_id=command_id))
            assert (await rig.rejection_of(command_id)).reason == "invalid"
            rig.commands.cancel(CommandCancel(command_id=command_id))
            await rig.rejection_of(command_id, count=2)
        async with open_rig(tmp_path / "state") as rig:  # remembers the cancel
            rig.commands.offer(make_offer("true", command_id=command_id))
            assert (await rig.rejection_of(command_id)).reason == "cancelled"
            rig.ledger.note_stored(command_id)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state", "victim.1"]


async def test_the_profile_monitor_runs_no_command(tmp_path: Path) -> None:
    async with open_rig(tmp_path, profile="monitor") as rig:
        rig.commands.offer(make_offer("true"))
        answer = await rig.rejection_of()
        assert answer.reason == "policy"
        assert "profile monitor" in answer.message


async def test_the_profile_monitor_runs_nothing_that_waits_in_its_ledger(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    ledger = Ledger(tmp_path / "state", boot_id="boot", new_instance_id="instance")
    ledger.open()
    for number in (1, 2):
        await ledger.add(make_offer(f"echo ran >> {runs}", command_id=f"cmd_{number}"))[1]
    started = ledger.get("cmd_2")
    assert started is not None
    directory = ledger.directory_of(started)
    await ledger.record_starting(started)  # and its runner never came up
    ledger.close()
    directory.mkdir()
    async with open_rig(tmp_path / "state", profile="monitor") as rig:
        for command_id in ("cmd_1", "cmd_2"):
            answer = await rig.rejection_of(command_id)
            assert answer.reason == "policy"
            assert "profile monitor" in answer.message
    assert not runs.exists()


async def test_settling_sends_again_what_the_server_has_not_stored(rig: Rig) -> None:
    rig.stores_output = False
    await rig.run("printf abcdef")
    rig.commands.disconnect()
    rig.told.clear()
    rig.commands.settle([Settlement(command_id="cmd_1", action="keep", output_position=4)])
    rig.commands.connect()
    await rig.result_of()
    assert [(piece.position, piece.offset) for piece in rig.pieces()] == [(4, 4)]
    assert rig.output("stdout") == b"ef"


async def test_settling_forgets_and_cancels_as_the_server_says(rig: Rig) -> None:
    await rig.run("true")
    rig.commands.offer(make_offer("sleep 600", command_id="cmd_2"))
    await rig.wait_until(
        lambda: any(isinstance(item, CommandStarted) and item.command_id == "cmd_2" for item in rig.told)
    )
    rig.commands.settle(
        [Settlement(command_id="cmd_1", action="forget"), Settlement(command_id="cmd_2", action="cancel")]
    )
    assert rig.ledger.get("cmd_1") is None
    assert (await rig.result_of("cmd_2")).status == "cancelled"


async def test_the_agents_removal_interrupts_what_runs_and_withdraws_what_waits(tmp_path: Path) -> None:
    async with open_rig(tmp_path, max_at_once=1) as rig:
        rig.commands.offer(make_offer("trap '' TERM; echo $$; while :; do sleep 1; done", command_id="cmd_1"))
        rig.commands.offer(make_offer("true", command_id="cmd_2"))
        await rig.wait_until(lambda: rig.output("stdout").endswith(b"\n"))
        await rig.commands.stop()
        assert (await rig.result_of("cmd_1")).status == "interrupted"
        assert "removed" in (await rig.rejection_of("cmd_2")).message
        assert read_process(int(rig.output("stdout"))) is None


async def test_another_agent_finds_a_running_command_again(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with Spawner({"PATH": os.environ["PATH"]}) as spawner:
        ledger = Ledger(tmp_path / "state", boot_id="boot", new_instance_id="instance")
        ledger.open()
        ledger.begin()
        commands = Commands(launcher=find_launcher(spawner), ledger=ledger, environment={"PATH": os.environ["PATH"]})
        first = Rig(commands, ledger)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(commands.serve()), group.create_task(commands.deliver(first.receive))]
            await asyncio.sleep(0)
            commands.offer(make_offer(f"echo $$; until [ -e {gate} ]; do sleep 0.05; done; echo $$"))
            await first.wait_until(lambda: first.output("stdout").endswith(b"\n"))
            for task in tasks:  # as in an agent that was killed: nothing is told to anybody
                task.cancel()
        await asyncio.to_thread(ledger.close)
    async with open_rig(tmp_path / "state") as rig:
        assert [entry.state for entry in rig.ledger.list_entries()] == ["running"]
        assert rig.ledger.instance_id == "instance"
        gate.touch()
        result = await rig.result_of()
    assert (result.status, result.exit_code) == ("succeeded", 0)
    pid = first.output("stdout")
    assert rig.output("stdout") == pid * 2
    assert result.stdout_bytes == len(pid) * 2


@pytest.mark.parametrize(
    ("content", "whole", "rest"),
    [
        (b"", b"", b""),
        (b"abc", b"abc", b""),
        (b"a\xe2", b"a", b"\xe2"),
        (b"a\xe2\x82", b"a", b"\xe2\x82"),
        ("a€".encode(), "a€".encode(), b""),
        (b"\xf0\x9f\x98", b"", b"\xf0\x9f\x98"),
        (b"\xff", b"\xff", b""),
        (b"\x80\x80\x80\x80", b"\x80\x80\x80\x80", b""),
    ],
)
def test_split_incomplete_character(content: bytes, whole: bytes, rest: bytes) -> None:
    assert split_incomplete_character(content) == (whole, rest)
