"""What the agent holds of its commands, through restarts, reboots and a quota."""

import asyncio
import json
import os
import queue
import shutil
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from tests.agent.command_rig import make_offer

from fleetwire_agent.command_states import Event, State
from fleetwire_agent.ledger import SPOOL_BYTES, Entry, Ledger
from fleetwire_agent.ledger_file import LedgerFile
from fleetwire_agent.moments import Moment
from fleetwire_agent.runner.spool import SEGMENT_BYTES, SpoolWriter, list_segments
from fleetwire_shared.codec import encode
from fleetwire_shared.errors import ConflictError, UnavailableError
from fleetwire_shared.messages import (
    CommandAccepted,
    CommandFinished,
    CommandOffer,
    CommandOutput,
    CommandRejected,
    CommandStarted,
    LedgerEntry,
)


@dataclass
class Clocks:
    now: float = 1_000_000.0
    boottime: float = 500.0


def make_ending(command_id: str = "cmd_1", *, seconds_ago: float = 0.0) -> CommandFinished:
    return CommandFinished(
        command_id=command_id,
        status="succeeded",
        exit_code=0,
        stdout_bytes=0,
        stderr_bytes=0,
        seconds_ago=seconds_ago,
        duration_seconds=1.0,
    )


REFUSED: dict[str, tuple[tuple[State, ...], str]] = {
    "starting": ((State.STARTING, State.RUNNING, State.FINISHED), "accepted"),
    "running": ((State.ACCEPTED, State.RUNNING, State.FINISHED), "starting"),
    "never_ran": ((State.RUNNING, State.FINISHED), "accepted or starting"),
    "finished": ((State.FINISHED,), "accepted or starting or running"),
    "withdrawn": ((State.STARTING, State.RUNNING, State.FINISHED), "unknown or accepted"),
}
"""What is not written of a command, in which states, and of what it is."""


@dataclass
class Opened:
    ledger: Ledger
    found: list[Entry] = field(default_factory=list)

    async def add(self, command_id: str = "cmd_1", *, remaining_seconds: float = 60.0) -> Entry:
        entry, saved = self.ledger.add(make_offer("true", command_id=command_id, remaining_seconds=remaining_seconds))
        await saved
        return entry

    async def add_started(self, command_id: str = "cmd_1", *, started_boottime: float | None = 7.0) -> Entry:
        entry = await self.add(command_id)
        await self.ledger.record_starting(entry)
        if started_boottime is not None:
            self.ledger.record_running(entry, started_boottime)
        return entry

    def get(self, command_id: str) -> Entry:
        entry = self.ledger.get(command_id)
        assert entry is not None
        return entry

    async def wait_for_message(
        self,
    ) -> CommandAccepted | CommandStarted | CommandOutput | CommandFinished | CommandRejected:
        async with asyncio.timeout(5):
            while not (messages := self.ledger.next_messages()):
                self.ledger.news.clear()
                await self.ledger.news.wait()
        [message] = messages
        return message


@asynccontextmanager
async def open_ledger(
    directory: Path,
    *,
    boot_id: str = "boot",
    new_instance_id: str = "first",
    spool_bytes: int = SPOOL_BYTES,
    clocks: Clocks | None = None,
) -> AsyncIterator[Opened]:
    clocks = clocks or Clocks()
    ledger = Ledger(
        directory,
        boot_id=boot_id,
        new_instance_id=new_instance_id,
        spool_bytes=spool_bytes,
        now=lambda: clocks.now,
        boottime=lambda: clocks.boottime,
    )
    found = ledger.open()
    ledger.begin()
    try:
        yield Opened(ledger, found)
    finally:
        ledger.close()


async def test_a_command_is_told_of_when_it_is_on_disk_and_not_before(tmp_path: Path) -> None:
    async with open_ledger(tmp_path) as opened:
        _, saved = opened.ledger.add(make_offer("true"))
        assert opened.ledger.next_messages() == []
        assert opened.ledger.list_entries() == ()
        await saved
        assert opened.ledger.next_messages() == [CommandAccepted(command_id="cmd_1")]
        assert opened.ledger.next_messages() == []


async def test_a_start_that_nobody_waits_for_any_more_is_written_all_the_same(tmp_path: Path) -> None:
    problems: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
    async with open_ledger(tmp_path) as opened:
        entry = await opened.add()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await opened.ledger.record_starting(entry)
        await opened.add("cmd_2")  # is on disk after it
    assert problems == []
    async with open_ledger(tmp_path) as opened:
        assert opened.get("cmd_1").state is State.STARTING


async def test_an_ending_is_told_when_it_is_on_disk(tmp_path: Path) -> None:
    async with open_ledger(tmp_path) as opened:
        entry = await opened.add_started()
        assert isinstance(await opened.wait_for_message(), CommandAccepted)
        assert isinstance(await opened.wait_for_message(), CommandStarted)
        opened.ledger.finish(entry, make_ending())
        assert opened.ledger.next_messages() == []
        assert await opened.wait_for_message() == make_ending()
        assert not opened.ledger.is_reported.is_set()
        opened.ledger.note_stored("cmd_1")
        assert opened.ledger.is_reported.is_set()


async def test_a_ledger_that_is_opened_again_knows_its_commands(tmp_path: Path) -> None:
    async with open_ledger(tmp_path) as opened:
        await opened.add("cmd_accepted")
        await opened.add_started("cmd_starting", started_boottime=None)
        await opened.add_started("cmd_running")
        opened.ledger.finish(await opened.add_started("cmd_finished"), make_ending("cmd_finished"))
        opened.ledger.finish(await opened.add_started("cmd_ended"), make_ending("cmd_ended"))
        opened.ledger.note_stored("cmd_ended")
        opened.ledger.remember(CommandRejected(command_id="cmd_never", reason="cancelled", message="cancelled"))
        again = await opened.add_started("cmd_again", started_boottime=None)
        opened.ledger.record_never_ran(again)
        await opened.add("cmd_last")
    for _ in range(2):
        async with open_ledger(tmp_path, new_instance_id="second") as opened:
            ledger = opened.ledger
            assert ledger.instance_id == "first"
            assert {entry.command_id: entry.state for entry in opened.found} == {
                "cmd_accepted": State.ACCEPTED,
                "cmd_starting": State.STARTING,
                "cmd_running": State.RUNNING,
                "cmd_again": State.ACCEPTED,
                "cmd_last": State.ACCEPTED,
            }
            assert ledger.state_of("cmd_finished") is State.FINISHED
            assert ledger.state_of("cmd_ended") is ledger.state_of("cmd_never") is State.ENDED
            assert ledger.state_of("cmd_other") is State.UNKNOWN
            running = opened.get("cmd_running")
            assert running.started == Moment("boot", 7.0, Clocks().now - (Clocks().boottime - 7.0))
            assert (running.boot_id, running.offer.timeout_seconds) == ("boot", 30.0)
            assert opened.get("cmd_again").attempt == 2
            assert (
                LedgerEntry(command_id="cmd_finished", state="finished", command="true", timeout_seconds=30.0)
                in ledger.list_entries()
            )
            assert not ledger.is_reported.is_set()
            ledger.answer_again("cmd_ended")
            assert make_ending("cmd_ended") in ledger.next_messages()


@pytest.mark.parametrize(
    ("what", "state"), [(what, state) for what, (states, _) in REFUSED.items() for state in states]
)
async def test_what_cannot_happen_to_a_command_is_not_written(tmp_path: Path, what: str, state: State) -> None:
    """Or the next agent would run again what has run, or tell another end of it."""
    async with open_ledger(tmp_path) as opened:
        ledger = opened.ledger
        if state is State.ACCEPTED:
            entry = await opened.add()
        else:
            entry = await opened.add_started(started_boottime=None if state is State.STARTING else 7.0)
        if state is State.FINISHED:
            ledger.finish(entry, make_ending())
        assert entry.state is state
        before = replace(entry)
        right = REFUSED[what][1]
        with pytest.raises(RuntimeError, match=f"^cmd_1 is {state}: .* is written only of what is {right}$"):
            await write_down(ledger, entry, what)
        await opened.add("cmd_2")  # is on disk after all that was written
        assert replace(entry, is_ending_on_disk=before.is_ending_on_disk) == before
    async with open_ledger(tmp_path) as opened:
        after = opened.get("cmd_1")
        assert (after.state, after.attempt, after.started) == (state, 1, before.started)
        assert (after.ending, after.ended) == (before.ending, before.ended)


async def write_down(ledger: Ledger, entry: Entry, what: str) -> None:
    match what:
        case "starting":
            await ledger.record_starting(entry)
        case "running":
            ledger.record_running(entry, 9.0)
        case "never_ran":
            ledger.record_never_ran(entry)
        case "finished":
            ledger.finish(entry, replace(make_ending(), status="interrupted"))
        case _:
            withdrawn = CommandRejected(command_id=entry.command_id, reason="cancelled", message="cancelled")
            ledger.finish(entry, withdrawn, Event.CANCELLED)


async def test_a_ledger_that_was_compacted_knows_the_same(tmp_path: Path) -> None:
    async with open_ledger(tmp_path) as opened:
        await opened.add_started("cmd_running")
        again = await opened.add_started("cmd_again", started_boottime=None)
        opened.ledger.record_never_ran(again)
        opened.ledger.finish(await opened.add_started("cmd_finished"), make_ending("cmd_finished"))
        big = "x" * 60_000
        for number in range(90):  # more than one file holds
            entry, saved = opened.ledger.add(make_offer(f": {big}", command_id=f"cmd_{number}"))
            await saved
            opened.ledger.finish(
                entry, CommandRejected(command_id=entry.command_id, reason="cancelled", message="m"), Event.CANCELLED
            )
            opened.ledger.note_stored(entry.command_id)
    async with open_ledger(tmp_path, new_instance_id="second") as opened:
        assert opened.ledger.instance_id == "first"
        assert {entry.command_id: (entry.state, entry.attempt) for entry in opened.found} == {
            "cmd_running": (State.RUNNING, 1),
            "cmd_again": (State.ACCEPTED, 2),
        }
        assert opened.ledger.state_of("cmd_finished") is State.FINISHED
        assert all(opened.ledger.state_of(f"cmd_{number}") is State.ENDED for number in range(90))


async def test_a_damaged_ledger_is_another_instance_and_keeps_what_it_can(tmp_path: Path) -> None:
    async with open_ledger(tmp_path) as opened:
        for number in range(3):
            await opened.add(f"cmd_{number}")
    path = tmp_path / "ledger.0"
    path.write_bytes(path.read_bytes().replace(b"cmd_1", b"cmd_?"))
    async with open_ledger(tmp_path, new_instance_id="second") as opened:
        assert opened.ledger.instance_id == "second"
        assert [entry.command_id for entry in opened.found] == ["cmd_0", "cmd_2"]
    async with open_ledger(tmp_path, new_instance_id="third") as opened:
        assert opened.ledger.instance_id == "second"


async def test_records_that_are_not_understood_are_damage_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_ledger(tmp_path) as opened:
        for name in ("waiting", "starting", "running"):
            await opened.add(f"cmd_{name}")
        await opened.ledger.record_starting(opened.get("cmd_starting"))
        await opened.ledger.record_starting(opened.get("cmd_running"))
        opened.ledger.record_running(opened.get("cmd_running"), 7.0)
    await append_raw(
        tmp_path,
        b"not JSON",
        b"[]",
        b'{"record": "accepted", "offer": "{}"}',
        b'{"record": "starting", "command_id": "cmd_waiting"}',
        b'{"record": "starting", "command_id": "cmd_waiting", "attempt": "1/../..", "boot_id": "boot"}',
        build_record(make_offer("true", command_id="../../victim")),
        b'{"record": "finished", "command_id": "cmd_running", "ending": "{\\"type\\": \\"command_vanished\\"}"}',
        b'{"record": "of a newer agent"}',
    )
    for new_instance_id in ("second", "third"):
        async with open_ledger(tmp_path, new_instance_id=new_instance_id) as opened:
            assert opened.ledger.instance_id == "second"
            assert {entry.command_id: (entry.state, entry.started_boot_id) for entry in opened.found} == {
                "cmd_waiting": (State.STARTING, None),
                "cmd_starting": (State.STARTING, None),
                "cmd_running": (State.RUNNING, "boot"),
            }
    said = [record.getMessage() for record in caplog.records]
    assert sum("cannot be read" in text for text in said) == 8  # once each, as the next ledger is without them
    assert any("command_vanished" in text for text in said)


def build_record(offer: CommandOffer) -> bytes:
    times = {"boot_id": "boot", "expires_at": 1e10, "expires_boottime": 1e10}
    return json.dumps({"record": "accepted", "offer": encode(offer), **times}).encode()


async def test_a_record_of_a_kind_that_only_a_newer_agent_knows_is_damage(tmp_path: Path) -> None:
    """It may have said that the command was started."""
    async with open_ledger(tmp_path) as opened:
        opened.ledger.finish(await opened.add_started("cmd_over"), make_ending("cmd_over"))
        opened.ledger.note_stored("cmd_over")
        await opened.add("cmd_waiting")
    known = (b"starting", b"never_ran", b"running", b"finished", b"stored")  # of a command that is over
    await append_raw(tmp_path, *(b'{"record": "%s", "command_id": "cmd_over"}' % kind for kind in known))
    async with open_ledger(tmp_path, new_instance_id="second") as opened:
        assert opened.ledger.instance_id == "first"
        assert [(entry.state, entry.started_boot_id) for entry in opened.found] == [(State.ACCEPTED, None)]
    await append_raw(tmp_path, b'{"record": "launching", "command_id": "cmd_waiting"}')
    async with open_ledger(tmp_path, new_instance_id="second") as opened:
        assert opened.ledger.instance_id == "second"
        assert [(entry.state, entry.started_boot_id) for entry in opened.found] == [(State.STARTING, None)]


async def append_raw(directory: Path, *records: bytes) -> None:
    file = LedgerFile(directory, lambda: ())
    file.open()
    async with asyncio.timeout(5):
        await asyncio.gather(*(file.append(record) for record in records))
    file.close()


async def test_a_state_directory_that_others_can_change_is_refused(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    (victim / "kept").mkdir(parents=True)
    (victim / "file").write_text("kept")

    def refuse(name: str, match: str) -> None:
        with pytest.raises(UnavailableError, match=match):
            Ledger(tmp_path / name, boot_id="boot", new_instance_id="first").open()

    for name in ("linked", "linked-commands", "shared"):
        (tmp_path / name).mkdir()
    (tmp_path / "linked/ledger.0").symlink_to(victim / "file")
    refuse("linked", match="symbolic links")
    (tmp_path / "linked-commands/commands").symlink_to(victim)
    refuse("linked-commands", match="commands is a link")
    (tmp_path / "shared/commands").mkdir()
    (tmp_path / "shared/commands").chmod(0o770)
    refuse("shared", match="others may write")
    if os.geteuid() == 0:
        for name, part in (("given-ledger", "ledger.1"), ("given-commands", "commands")):
            async with open_ledger(tmp_path / name):
                pass
            os.chown(tmp_path / name / part, 12345, 12345)
            refuse(name, match=part)
    assert (victim / "file").read_text() == "kept"
    assert (victim / "kept").is_dir()


async def test_two_agents_do_not_share_a_directory(tmp_path: Path) -> None:
    async with open_ledger(tmp_path):
        with pytest.raises(ConflictError, match="--state-dir"):
            Ledger(tmp_path, boot_id="boot", new_instance_id="second").open()


Change = Callable[[Clocks], None]


def wait_59_seconds(clocks: Clocks) -> None:
    clocks.now += 59
    clocks.boottime += 59


def wait_a_minute(clocks: Clocks) -> None:
    clocks.now += 60
    clocks.boottime += 60


def set_clock_ahead(clocks: Clocks) -> None:
    clocks.now += 86400


def set_clock_back(clocks: Clocks) -> None:
    clocks.now -= 86400
    clocks.boottime += 60


@pytest.mark.parametrize(
    ("change", "is_expired"),
    [(wait_59_seconds, False), (wait_a_minute, True), (set_clock_ahead, False), (set_clock_back, True)],
)
async def test_within_one_boot_a_command_expires_by_the_time_since_the_boot(
    tmp_path: Path, change: Change, is_expired: bool
) -> None:
    clocks = Clocks()
    async with open_ledger(tmp_path, clocks=clocks) as opened:
        await opened.add(remaining_seconds=60.0)
    change(clocks)
    async with open_ledger(tmp_path, clocks=clocks) as opened:
        assert opened.ledger.is_expired(opened.found[0]) is is_expired


@pytest.mark.parametrize(("passed_seconds", "is_expired"), [(59, False), (60, True)])
async def test_after_another_boot_a_command_expires_by_the_clock(
    tmp_path: Path, passed_seconds: float, is_expired: bool
) -> None:
    async with open_ledger(tmp_path) as opened:
        await opened.add(remaining_seconds=60.0)
    clocks = Clocks(now=Clocks().now + passed_seconds, boottime=10_000.0 - 9_990.0 * (not is_expired))
    async with open_ledger(tmp_path, boot_id="another", clocks=clocks) as opened:
        assert opened.ledger.is_expired(opened.found[0]) is is_expired


async def test_what_never_ran_after_another_boot_expires_by_the_clock_still(tmp_path: Path) -> None:
    """The runner of a command that was accepted before the boot did not come up: nothing is known of its boottime."""
    async with open_ledger(tmp_path, clocks=Clocks(boottime=1e6)) as opened:
        await opened.add(remaining_seconds=60.0)
    clocks = Clocks(boottime=5.0)
    async with open_ledger(tmp_path, boot_id="another", clocks=clocks) as opened:
        entry = opened.found[0]
        await opened.ledger.record_starting(entry)
        opened.ledger.record_never_ran(entry)
        assert not opened.ledger.is_expired(entry)
        clocks.now += 60
        clocks.boottime += 60
        assert opened.ledger.is_expired(entry)
    async with open_ledger(tmp_path, boot_id="another", clocks=clocks) as opened:
        assert opened.ledger.is_expired(opened.found[0])


@pytest.mark.parametrize(
    ("change", "boot_id", "started_ago", "ended_ago"),
    [
        (wait_a_minute, "boot", 70.0, 60.0),
        (set_clock_back, "boot", 70.0, 60.0),
        (set_clock_ahead, "boot", 10.0, 0.0),
        (wait_a_minute, "another", 70.0, 60.0),
        (set_clock_ahead, "another", 86410.0, 86400.0),  # by that clock a day has passed, and there is no other
        (set_clock_back, "another", 0.0, 0.0),
    ],
)
async def test_the_server_is_told_how_long_ago_a_command_started_and_ended(
    tmp_path: Path, change: Change, boot_id: str, started_ago: float, ended_ago: float
) -> None:
    """Of what ended before the last connect, of what an agent reads again from a ledger, and of what it remembers."""
    clocks = Clocks()
    async with open_ledger(tmp_path, clocks=clocks) as opened:
        for command_id in ("cmd_held", "cmd_remembered"):
            entry = await opened.add_started(command_id, started_boottime=clocks.boottime - 10)
            opened.ledger.finish(entry, make_ending(command_id), ended=opened.ledger.moment())
        opened.ledger.note_stored("cmd_remembered")
    change(clocks)
    for _ in range(2):  # the second is told from what the first has made of the ledger
        async with open_ledger(tmp_path, boot_id=boot_id, clocks=clocks) as opened:
            opened.ledger.answer_again("cmd_remembered")
            opened.ledger.send_again(opened.get("cmd_held"))
            assert opened.ledger.next_messages() == [
                make_ending("cmd_remembered", seconds_ago=ended_ago),
                CommandStarted(command_id="cmd_held", seconds_ago=started_ago),
            ]
            assert opened.ledger.next_messages() == [make_ending("cmd_held", seconds_ago=ended_ago)]
            opened.ledger._file.compact()


async def write_spool(opened: Opened, entry: Entry, *, segments: int) -> Path:
    directory = opened.ledger.directory_of(entry)
    directory.mkdir()
    writer = SpoolWriter(str(directory), head_segments=16, make_room=lambda: False)
    for _ in range(segments * (SEGMENT_BYTES // 65536)):
        writer.add("stdout", bytes(65536 - 64))
    writer.close()
    entry.open_output(directory)
    entry.spool_bytes = segments * SEGMENT_BYTES
    return directory


async def test_the_quota_drops_what_ended_first_before_what_runs(tmp_path: Path) -> None:
    async with open_ledger(tmp_path, spool_bytes=6 * SEGMENT_BYTES) as opened:
        directories = {}
        for command_id in ("cmd_running", "cmd_old", "cmd_new"):
            entry = await opened.add_started(command_id)
            directories[command_id] = await write_spool(opened, entry, segments=2)
        for command_id in ("cmd_old", "cmd_new"):
            opened.ledger.finish(opened.get(command_id), make_ending(command_id))
        running = opened.get("cmd_running")
        opened.ledger.note_output(running)
        assert count(directories) == {"cmd_running": 2, "cmd_old": 2, "cmd_new": 2}
        late = await opened.add_started("cmd_late")
        directories["cmd_late"] = await write_spool(opened, late, segments=1)
        opened.ledger.note_output(late)
        assert count(directories) == {"cmd_running": 2, "cmd_old": 0, "cmd_new": 2, "cmd_late": 1}


async def test_the_quota_leaves_what_runs_its_newest_segment(tmp_path: Path) -> None:
    async with open_ledger(tmp_path, spool_bytes=SEGMENT_BYTES) as opened:
        entry = await opened.add_started()
        directory = await write_spool(opened, entry, segments=5)
        starts = list_segments(str(directory))
        opened.ledger.note_output(entry)
        assert list_segments(str(directory)) == starts[-1:]


async def test_the_quota_takes_the_oldest_ending_although_its_command_was_accepted_later(tmp_path: Path) -> None:
    async with open_ledger(tmp_path, spool_bytes=2 * SEGMENT_BYTES) as opened:
        directories = {}
        for command_id in ("cmd_1", "cmd_2", "cmd_3"):
            entry = await opened.add_started(command_id)
            directories[command_id] = await write_spool(opened, entry, segments=1)
        earlier = opened.ledger.moment()._replace(boottime=10.0)
        opened.ledger.finish(opened.get("cmd_1"), make_ending("cmd_1"), ended=earlier._replace(boottime=20.0))
        opened.ledger.finish(opened.get("cmd_2"), make_ending("cmd_2"), ended=earlier)
        running = opened.get("cmd_3")
        opened.ledger.note_output(running)
        assert count(directories) == {"cmd_1": 1, "cmd_2": 0, "cmd_3": 1}


async def test_the_quota_counts_what_is_on_disk_and_not_what_was(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_ledger(tmp_path, spool_bytes=5 * SEGMENT_BYTES) as opened:
        directories = {}
        for command_id in ("cmd_1", "cmd_2"):
            entry = await opened.add_started(command_id)
            directories[command_id] = await write_spool(opened, entry, segments=4)
            opened.ledger.note_output(entry)
            opened.ledger.note_output_stored("cmd_1", 4 * SEGMENT_BYTES)
        assert count(directories) == {"cmd_1": 1, "cmd_2": 4}
    assert not caplog.records
    async with open_ledger(tmp_path, spool_bytes=3 * SEGMENT_BYTES):  # holds also what was written without an agent
        assert count(directories) == {"cmd_1": 1, "cmd_2": 1}
    [said] = [record.getMessage() for record in caplog.records]
    waiting_bytes = int(said.split(" dropped, as ")[1].split()[0])
    assert 4.9 * SEGMENT_BYTES < waiting_bytes <= 5 * SEGMENT_BYTES


def count(directories: dict[str, Path]) -> dict[str, int]:
    return {command_id: len(list_segments(str(directory))) for command_id, directory in directories.items()}


async def test_directories_of_no_command_are_removed(tmp_path: Path) -> None:
    async with open_ledger(tmp_path) as opened:
        entry = await opened.add_started()
        directory = await write_spool(opened, entry, segments=1)
        (tmp_path / "commands" / "cmd_gone.1").mkdir()
    async with open_ledger(tmp_path):
        assert list((tmp_path / "commands").iterdir()) == [directory]


async def test_directories_are_removed_in_a_thread_and_a_proof_not_before_its_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed: queue.SimpleQueue[tuple[Path, bool, bool]] = queue.SimpleQueue()

    def remove(path: Path, *, ignore_errors: bool) -> None:
        is_recorded = b'"never_ran"' in (tmp_path / "ledger.0").read_bytes()
        removed.put((path, threading.current_thread() is threading.main_thread(), is_recorded))

    monkeypatch.setattr(shutil, "rmtree", remove)
    async with open_ledger(tmp_path) as opened:
        stored = await opened.add_started("cmd_stored")
        opened.ledger.finish(stored, make_ending("cmd_stored"))
        opened.ledger.note_stored("cmd_stored")
        again = await opened.add_started("cmd_again", started_boottime=None)
        proof = opened.ledger.directory_of(again)
        opened.ledger.record_never_ran(again)
        await opened.add()  # is on disk after it
        directory = opened.ledger.directory_of(stored)
        seen = [await asyncio.to_thread(removed.get, timeout=5) for _ in range(2)]  # by two threads: in any order
        assert {path: is_main for path, is_main, _ in seen} == {directory: False, proof: False}
        assert all(is_recorded for path, _, is_recorded in seen if path == proof)


async def test_output_is_told_again_from_what_the_server_has(tmp_path: Path) -> None:
    async with open_ledger(tmp_path) as opened:
        entry = await opened.add_started()
        directory = opened.ledger.directory_of(entry)
        directory.mkdir()
        writer = SpoolWriter(str(directory), head_segments=16, make_room=lambda: False)
        writer.add("stdout", b"abc")
        writer.add("stderr", b"defg")
        writer.close()
    async with open_ledger(tmp_path) as opened:
        entry = opened.found[0]
        opened.ledger.send_again(entry, position=4)
        assert isinstance(await opened.wait_for_message(), CommandStarted)
        output = await opened.wait_for_message()
        assert output == CommandOutput(command_id="cmd_1", stream="stderr", position=4, offset=1, base64="ZWZn")
