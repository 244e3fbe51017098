"""Real commands, from the offer to the result. What would go to the server is a list."""

import asyncio
import base64
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from fleetwire_agent.commands import Commands, split_incomplete_character
from fleetwire_agent.config import Profile
from fleetwire_agent.ledger import CommandMessage, Ledger
from fleetwire_agent.processes import Spawner, read_process
from fleetwire_shared.limits import CHUNK_BYTES, OUTPUT_WINDOW_BYTES
from fleetwire_shared.messages import (
    CommandAccepted,
    CommandCancel,
    CommandFinished,
    CommandOffer,
    CommandOutput,
    CommandRejected,
    CommandStarted,
    Settlement,
)


def make_offer(command: str, *, command_id: str = "cmd_1", timeout_seconds: float = 30.0) -> CommandOffer:
    return CommandOffer(
        command_id=command_id, kind="shell", command=command, timeout_seconds=timeout_seconds, remaining_seconds=60.0
    )


class Rig:
    """Commands with a ledger, and a server that is a list of what it was told."""

    def __init__(self, commands: Commands, ledger: Ledger) -> None:
        self.commands = commands
        self.ledger = ledger
        self.told: list[CommandMessage] = []
        self.stores_output = True
        self._changed = asyncio.Event()

    async def receive(self, message: CommandMessage) -> None:
        self.told.append(message)
        if isinstance(message, CommandOutput) and self.stores_output:
            end = message.position + len(base64.b64decode(message.base64))
            self.ledger.note_output_stored(message.command_id, end)
        self._changed.set()

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    def finished(self, command_id: str = "cmd_1") -> list[CommandFinished]:
        return [item for item in self.told if isinstance(item, CommandFinished) and item.command_id == command_id]

    def pieces(self, command_id: str = "cmd_1") -> list[CommandOutput]:
        return [item for item in self.told if isinstance(item, CommandOutput) and item.command_id == command_id]

    def output(self, stream: str, command_id: str = "cmd_1") -> bytes:
        pieces = self.pieces(command_id)
        return b"".join(base64.b64decode(piece.base64) for piece in pieces if piece.stream == stream)

    async def result_of(self, command_id: str = "cmd_1") -> CommandFinished:
        await self.wait_until(lambda: bool(self.finished(command_id)))
        return self.finished(command_id)[0]

    async def run(self, command: str, *, timeout_seconds: float = 30.0) -> CommandFinished:
        assert self.commands.offer(make_offer(command, timeout_seconds=timeout_seconds)) is None
        return await self.result_of()


@asynccontextmanager
async def open_rig(*, max_at_once: int = 32, profile: Profile = "manage") -> AsyncIterator[Rig]:
    with Spawner({"PATH": os.environ["PATH"]}) as spawner:
        ledger = Ledger()
        rig = Rig(Commands(spawner=spawner, ledger=ledger, max_at_once=max_at_once, profile=profile), ledger)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(rig.commands.serve()), group.create_task(rig.commands.deliver(rig.receive))]
            await asyncio.sleep(0)
            ledger.connect()
            try:
                yield rig
            finally:
                await rig.commands.stop()
                for task in tasks:
                    task.cancel()


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with open_rig() as rig:
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


async def test_an_unacknowledged_window_makes_the_command_wait(rig: Rig) -> None:
    rig.stores_output = False
    rig.commands.offer(make_offer("head -c 5000000 /dev/zero; echo done >&2"))
    await rig.wait_until(lambda: len(rig.output("stdout")) > OUTPUT_WINDOW_BYTES * 3 // 4)
    entry = rig.ledger.get("cmd_1")
    assert entry
    assert entry.held_bytes <= OUTPUT_WINDOW_BYTES
    assert not rig.finished()
    rig.stores_output = True
    rig.ledger.note_output_stored("cmd_1", len(rig.output("stdout")))
    assert (await rig.result_of()).stdout_bytes == 5_000_000
    assert len(rig.output("stdout")) == 5_000_000


async def test_a_command_does_not_wait_for_a_server_that_is_away(rig: Rig) -> None:
    rig.ledger.disconnect()
    rig.stores_output = False
    result = await rig.run("head -c 5000000 /dev/zero; echo end")
    assert result.stdout_bytes == 5_000_004
    entry = rig.ledger.get("cmd_1")
    assert entry
    assert entry.held_bytes <= OUTPUT_WINDOW_BYTES


async def test_a_timeout_kills_everything(rig: Rig) -> None:
    rig.commands.offer(make_offer("setsid sh -c 'echo $$; exec sleep 600' & wait", timeout_seconds=0.3))
    result = await rig.result_of()
    assert (result.status, result.exit_code) == ("timed_out", None)
    assert read_process(int(rig.output("stdout"))) is None


async def test_cancel_kills_everything(rig: Rig) -> None:
    rig.commands.offer(make_offer("setsid sh -c 'echo $$; exec sleep 600' & wait"))
    await rig.wait_until(lambda: rig.output("stdout").endswith(b"\n"))
    assert rig.commands.cancel(CommandCancel(command_id="cmd_1")) is None
    result = await rig.result_of()
    assert (result.status, result.exit_code) == ("cancelled", None)
    assert read_process(int(rig.output("stdout"))) is None


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
    async with open_rig(max_at_once=1) as rig:
        rig.commands.offer(make_offer(f"cat {fifo}", command_id="cmd_1"))
        for number in (2, 3, 4):
            rig.commands.offer(make_offer(f"echo {number} >> {tmp_path}/order", command_id=f"cmd_{number}"))
        await rig.wait_until(lambda: sum(isinstance(item, CommandAccepted) for item in rig.told) == 4)
        await rig.wait_until(lambda: any(isinstance(item, CommandStarted) for item in rig.told))
        rejection = rig.commands.cancel(CommandCancel(command_id="cmd_3"))
        assert isinstance(rejection, CommandRejected)
        assert rejection.reason == "cancelled"
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


async def test_the_same_id_never_runs_twice(rig: Rig, tmp_path: Path) -> None:
    offer = make_offer(f"echo ran >> {tmp_path}/runs")
    rig.commands.offer(offer)
    result = await rig.result_of()
    assert rig.commands.offer(offer) is None
    await rig.wait_until(lambda: len(rig.finished()) == 2)  # answered by its state
    rig.ledger.note_stored("cmd_1")
    assert rig.commands.offer(offer) == result  # remembered also when no longer held
    assert (tmp_path / "runs").read_text() == "ran\n"


async def test_a_cancel_before_its_offer_keeps_the_command_from_ever_starting(rig: Rig) -> None:
    first = rig.commands.cancel(CommandCancel(command_id="cmd_1"))
    second = rig.commands.offer(make_offer("true"))
    assert isinstance(first, CommandRejected)
    assert first == second
    assert len(rig.ledger) == 0


@pytest.mark.parametrize(
    ("offer", "reason"),
    [
        (CommandOffer(command_id="c", kind="sql", command="x", timeout_seconds=1, remaining_seconds=1), "unsupported"),
        (CommandOffer(command_id="c", kind="shell", command="x", timeout_seconds=1, remaining_seconds=0), "expired"),
        (CommandOffer(command_id="c", kind="shell", command="x", timeout_seconds=-1, remaining_seconds=1), "invalid"),
    ],
)
async def test_an_offer_that_cannot_be_taken_is_rejected(rig: Rig, offer: CommandOffer, reason: str) -> None:
    rejection = rig.commands.offer(offer)
    assert isinstance(rejection, CommandRejected)
    assert rejection.reason == reason


async def test_the_profile_monitor_runs_no_command() -> None:
    async with open_rig(profile="monitor") as rig:
        answer = rig.commands.offer(make_offer("true"))
        assert isinstance(answer, CommandRejected)
        assert answer.reason == "policy"
        assert "profile monitor" in answer.message


async def test_settling_sends_again_what_the_server_has_not_stored(rig: Rig) -> None:
    rig.stores_output = False
    await rig.run("printf abcdef")
    rig.ledger.disconnect()
    rig.told.clear()
    answers = rig.commands.settle([Settlement(command_id="cmd_1", action="keep", output_position=4)])
    rig.ledger.connect()
    await rig.result_of()
    assert answers == []
    assert [(piece.position, piece.offset) for piece in rig.pieces()] == [(4, 4)]
    assert rig.output("stdout") == b"ef"


async def test_settling_forgets_and_cancels_as_the_server_says(rig: Rig) -> None:
    await rig.run("true")
    rig.commands.offer(make_offer("sleep 600", command_id="cmd_2"))
    await rig.wait_until(lambda: CommandAccepted(command_id="cmd_2") in rig.told)
    rig.commands.settle(
        [Settlement(command_id="cmd_1", action="forget"), Settlement(command_id="cmd_2", action="cancel")]
    )
    assert rig.ledger.get("cmd_1") is None
    assert (await rig.result_of("cmd_2")).status == "cancelled"


async def test_stopping_interrupts_what_runs_and_what_waits() -> None:
    async with open_rig(max_at_once=1) as rig:
        rig.commands.offer(make_offer("trap '' TERM; echo $$; while :; do sleep 1; done", command_id="cmd_1"))
        rig.commands.offer(make_offer("true", command_id="cmd_2"))
        await rig.wait_until(lambda: rig.output("stdout").endswith(b"\n"))
        async with asyncio.timeout(1.5):
            await rig.commands.stop()
        for command_id in ("cmd_1", "cmd_2"):
            result = await rig.result_of(command_id)
            assert result.status == "interrupted"
            assert result.error
        assert read_process(int(rig.output("stdout"))) is None


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
