"""Following the journal: the real journalctl on real journal files."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tests.support.eventually import eventually
from tests.support.journals import FIRST_MICROSECONDS, JOURNAL_REMOTE, make_entry, write_journal

from fleetwire_agent.journal import MAX_ENTRY_BYTES, JournalFollower
from fleetwire_agent.journal_entries import format_entry
from fleetwire_agent.processes import Spawner
from fleetwire_shared.errors import InvalidError, NotFoundError, UnavailableError
from fleetwire_shared.limits import MAX_LINE_BYTES
from fleetwire_shared.messages import FollowLog, LogGap, LogLines

needs_journal_files = pytest.mark.skipif(
    not JOURNAL_REMOTE.exists(), reason="no systemd-journal-remote: apt-get install systemd-journal-remote"
)


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "test.journal"


class Followed:
    """What a running follower has sent: texts of lines and gaps, in order."""

    def __init__(self) -> None:
        self.events: asyncio.Queue[tuple[str, str] | LogGap] = asyncio.Queue()
        self.cursors: dict[str, str] = {}

    async def put(self, event: LogLines | LogGap) -> None:
        if isinstance(event, LogLines):
            for pair in zip(event.cursors, event.texts, strict=True):
                self.events.put_nowait(pair)
        else:
            self.events.put_nowait(event)

    async def next(self, count: int) -> list[str | LogGap]:
        """The next events; a line as its message."""
        seen: list[str | LogGap] = []
        async with asyncio.timeout(10):
            while len(seen) < count:
                event = await self.events.get()
                if isinstance(event, LogGap):
                    seen.append(event)
                else:
                    message = event[1].partition("]: ")[2]
                    self.cursors[message] = event[0]
                    seen.append(message)
        assert self.events.qsize() == 0 or count == 0
        return seen


@asynccontextmanager
async def follow(
    journal: Path,
    *,
    lines: int = 10,
    unit: str | None = None,
    priority: int | None = None,
    since: float | None = None,
    grep: str | None = None,
    cursor: str | None = None,
    boot: str | None = None,
    kernel: bool = False,
) -> AsyncIterator[Followed]:
    request = FollowLog(
        channel_id="c", source="journald", lines=lines, unit=unit, priority=priority, since=since, grep=grep,
        cursor=cursor, boot=boot, kernel=kernel,
    )  # fmt: skip
    followed = Followed()
    with Spawner(os.environ) as spawner:
        follower = JournalFollower(request, spawner=spawner, directory=str(journal.parent))
        await follower.find_boot()
        async with asyncio.TaskGroup() as group:
            task = group.create_task(follower.run(followed.put))
            yield followed
            task.cancel()
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)  # nothing is left running


def messages(first: int, last: int) -> list[str | LogGap]:
    return [f"message {number}" for number in range(first, last + 1)]


async def cursor_of(journal: Path, message: str) -> str:
    async with follow(journal, since=0.0) as followed:
        async with asyncio.timeout(10):
            while message not in followed.cursors:
                event = await followed.events.get()
                assert not isinstance(event, LogGap)
                followed.cursors[event[1].partition("]: ")[2]] = event[0]
    return followed.cursors[message]


@needs_journal_files
async def test_the_last_entries_come_first_and_new_ones_follow(journal: Path) -> None:
    write_journal(journal, *map(make_entry, range(20)))
    async with follow(journal, lines=3) as followed:
        assert await followed.next(3) == messages(17, 19)
        write_journal(journal, make_entry(20))
        assert await followed.next(1) == messages(20, 20)


@needs_journal_files
async def test_without_lines_only_new_entries_come(journal: Path) -> None:
    write_journal(journal, *map(make_entry, range(5)))
    async with follow(journal, lines=0) as followed:
        numbers = iter(range(5, 1000))

        async def write_and_look() -> int:  # when the follower has begun cannot be seen before the first entry
            write_journal(journal, make_entry(next(numbers)))
            return followed.events.qsize()

        await eventually(write_and_look)
        first = followed.events.get_nowait()
        assert not isinstance(first, LogGap)
        assert int(first[1].rpartition(" ")[2]) >= 5


@needs_journal_files
async def test_an_entry_is_one_line_of_text(journal: Path) -> None:
    write_journal(journal, make_entry(0))
    async with follow(journal) as followed:
        event = await asyncio.wait_for(followed.events.get(), 10)
        assert not isinstance(event, LogGap)
        assert event[1] == "2023-11-14T22:13:20.000000+00:00 web-01 nginx[12]: message 0"


@needs_journal_files
async def test_filters_apply_before_entries_are_counted(journal: Path) -> None:
    # The known trap: journalctl --priority with --lines counts before it filters.
    write_journal(
        journal,
        *(make_entry(n, PRIORITY="3" if n % 10 == 0 else "6", _SYSTEMD_UNIT=f"u{n % 2}.service") for n in range(60)),
    )
    async with follow(journal, lines=2, priority=3) as followed:
        assert await followed.next(2) == ["message 40", "message 50"]
    async with follow(journal, lines=2, unit="u1") as followed:
        assert await followed.next(2) == ["message 57", "message 59"]
    async with follow(journal, lines=2, grep="7") as followed:
        assert await followed.next(2) == ["message 47", "message 57"]


@needs_journal_files
async def test_grep_that_matches_nothing_yet_waits_for_new_entries(journal: Path) -> None:
    write_journal(journal, *map(make_entry, range(5)))
    async with follow(journal, grep="wanted") as followed:
        write_journal(journal, make_entry(5), make_entry(6, MESSAGE="wanted"))
        assert await followed.next(1) == ["wanted"]


@needs_journal_files
async def test_a_unit_that_does_not_exist_yet_is_waited_for(journal: Path) -> None:
    write_journal(journal, make_entry(0))
    async with follow(journal, unit="later") as followed:
        write_journal(journal, make_entry(1), make_entry(2, _SYSTEMD_UNIT="later.service"))
        assert await followed.next(1) == messages(2, 2)


@needs_journal_files
async def test_since_begins_at_that_time(journal: Path) -> None:
    write_journal(journal, *map(make_entry, range(20)))
    async with follow(journal, since=FIRST_MICROSECONDS / 1e6 + 7.5) as followed:
        assert await followed.next(12) == messages(8, 19)


@needs_journal_files
async def test_a_cursor_goes_on_after_its_entry_with_all_that_follows(journal: Path) -> None:
    # The known trap: journalctl --cursor --follow prints only ten entries.
    write_journal(journal, *map(make_entry, range(50)))
    async with follow(journal, cursor=await cursor_of(journal, "message 9")) as followed:
        assert await followed.next(40) == messages(10, 49)
        write_journal(journal, make_entry(50))
        assert await followed.next(1) == messages(50, 50)


@needs_journal_files
async def test_a_cursor_at_the_end_waits(journal: Path) -> None:
    write_journal(journal, *map(make_entry, range(3)))
    async with follow(journal, cursor=await cursor_of(journal, "message 2")) as followed:
        write_journal(journal, make_entry(3))
        assert await followed.next(1) == messages(3, 3)


@needs_journal_files
async def test_a_cursor_of_a_vacuumed_entry_is_a_gap_and_drops_nothing(journal: Path) -> None:
    # The known trap: --after-cursor drops the first entry that is still there.
    write_journal(journal, *map(make_entry, range(3)))
    cursor = await cursor_of(journal, "message 1")
    journal.unlink()
    write_journal(journal.parent / "next.journal", *map(make_entry, range(10, 13)))
    async with follow(journal, cursor=cursor) as followed:
        gap, *rest = await followed.next(4)
        assert isinstance(gap, LogGap)
        assert gap.count is None
        assert rest == messages(10, 12)


@needs_journal_files
async def test_a_cursor_of_another_units_entry_is_no_gap_and_drops_nothing(journal: Path) -> None:
    write_journal(journal, *(make_entry(n, _SYSTEMD_UNIT=f"u{n % 2}.service") for n in range(10)))
    async with follow(journal, unit="u1", cursor=await cursor_of(journal, "message 4")) as followed:
        assert await followed.next(3) == ["message 5", "message 7", "message 9"]


@needs_journal_files
async def test_a_cursor_from_the_future_is_a_gap_and_new_entries_come(journal: Path) -> None:
    # The known trap: journalctl shows nothing at all and calls it success.
    write_journal(journal, *map(make_entry, range(3)))
    later = journal.parent / "later.journal"
    write_journal(later, make_entry(100_000))
    cursor = await cursor_of(journal, "message 100000")
    later.unlink()
    async with follow(journal, cursor=cursor) as followed:
        (gap,) = await followed.next(1)
        assert isinstance(gap, LogGap)
        write_journal(journal, make_entry(3))
        assert await followed.next(1) == messages(3, 3)


@needs_journal_files
async def test_what_was_not_read_of_an_earlier_boot_is_read_after_it(journal: Path) -> None:
    # The known trap: journalctl --follow shows the present boot only.
    write_journal(journal, *(make_entry(n, _BOOT_ID=f"{1 + n // 10:032x}") for n in range(30)))
    async with follow(journal, cursor=await cursor_of(journal, "message 4")) as followed:
        assert await followed.next(25) == messages(5, 29)
    async with follow(journal, lines=25) as followed:
        assert await followed.next(25) == messages(5, 29)


@needs_journal_files
async def test_boots_are_told_apart_by_offset_and_by_id(journal: Path) -> None:
    boots = [f"{number:032x}" for number in range(1, 4)]
    write_journal(journal, *(make_entry(n, _BOOT_ID=boots[n // 10], PRIORITY=str(n % 8)) for n in range(30)))
    for boot, first in (("0", 20), ("-1", 10), ("-2", 0), (boots[1], 10)):
        async with follow(journal, lines=100, boot=boot) as followed:
            assert await followed.next(10) == messages(first, first + 9)
    async with follow(journal, lines=100, boot="-1", priority=3) as followed:
        assert await followed.next(6) == [f"message {number}" for number in (10, 11, 16, 17, 18, 19)]
    with pytest.raises(NotFoundError, match=rf"boot -3: .* it has 0 \({boots[2]}\), -1 \({boots[1]}\), -2 "):
        async with follow(journal, boot="-3"):
            pass
    with pytest.raises(NotFoundError):
        async with follow(journal, boot="f" * 32):
            pass


@needs_journal_files
async def test_a_boot_by_offset_goes_on_in_the_next_boot_from_its_beginning(journal: Path) -> None:
    write_journal(journal, *(make_entry(n, _BOOT_ID=f"{1 + n // 10:032x}") for n in range(20)))
    cursor = await cursor_of(journal, "message 4")
    async with follow(journal, boot="-1", cursor=cursor) as followed:
        assert await followed.next(5) == messages(5, 9)
    async with follow(journal, boot="0", cursor=cursor) as followed:
        assert await followed.next(10) == messages(10, 19)


@needs_journal_files
async def test_messages_of_the_kernel_are_told_apart(journal: Path) -> None:
    write_journal(journal, *(make_entry(n, _TRANSPORT="kernel" if n % 3 == 0 else "syslog") for n in range(9)))
    async with follow(journal, kernel=True) as followed:
        assert await followed.next(3) == ["message 0", "message 3", "message 6"]
        write_journal(journal, make_entry(9), make_entry(10, _TRANSPORT="kernel"))
        assert await followed.next(1) == messages(10, 10)


def journalctl_pids() -> list[int]:
    """Children of this process that are journalctl and follow."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return [int(pid) for pid in children if b"--follow" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@needs_journal_files
@pytest.mark.parametrize("unit", [None, "nginx"])
async def test_a_journalctl_that_dies_is_followed_by_another_without_loss_or_repetition(
    journal: Path, unit: str | None
) -> None:
    write_journal(journal, *map(make_entry, range(20)))
    async with follow(journal, lines=3, unit=unit) as followed:
        assert await followed.next(3) == messages(17, 19)
        for number in (20, 22):
            (pid,) = journalctl_pids()
            write_journal(journal, make_entry(number))
            assert await followed.next(1) == messages(number, number)
            os.kill(pid, signal.SIGKILL)
            write_journal(journal, make_entry(number + 1))
            assert await followed.next(1) == messages(number + 1, number + 1)


@needs_journal_files
async def test_a_journalctl_that_is_killed_again_and_again_is_given_up(journal: Path) -> None:
    write_journal(journal, *map(make_entry, range(3)))
    with Spawner(os.environ) as spawner:
        request = FollowLog(channel_id="c", source="journald", unit="nginx", lines=0)
        follower = JournalFollower(request, spawner=spawner, directory=str(journal.parent))

        async def kill_each() -> None:
            while True:
                for pid in journalctl_pids():
                    os.kill(pid, signal.SIGKILL)
                await asyncio.sleep(0.02)

        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            killing = group.create_task(kill_each())
            with pytest.raises(UnavailableError, match="journalctl ended with status -9"):
                await follower.run(Followed().put)
            killing.cancel()


@needs_journal_files
async def test_files_of_several_writers_are_followed_without_gaps(journal: Path) -> None:
    # Each has a series of numbers of its own, so a number that does not follow the last says nothing.
    other = journal.parent / "other.journal"
    write_journal(journal, *(make_entry(n) for n in range(0, 40, 2)))
    write_journal(other, *(make_entry(n) for n in range(1, 40, 2)))
    async with follow(journal, since=0.0) as followed:
        assert await followed.next(40) == messages(0, 39)
        write_journal(other, make_entry(40))
        assert await followed.next(1) == messages(40, 40)
        write_journal(journal, make_entry(41))
        assert await followed.next(1) == messages(41, 41)


@needs_journal_files
async def test_messages_of_every_kind_are_shown(journal: Path) -> None:
    # The known traps: null for large fields without --all, lists of integers for what is no plain text.
    write_journal(
        journal,
        make_entry(0, MESSAGE="two\nlines"),
        make_entry(1, MESSAGE=b"\xff\x1b[1m \xc3\xa9"),
        make_entry(2, MESSAGE="x" * 20_000),
        make_entry(3, MESSAGE="é" * 100_000),
        make_entry(4, MESSAGE=""),
    )
    async with follow(journal) as followed:
        two_lines, binary, large, cut, empty = await followed.next(5)
        assert two_lines == "two\nlines"
        assert binary == "\ufffd\x1b[1m é"
        assert large == "x" * 20_000
        assert isinstance(cut, str)
        assert cut.endswith(" bytes in all]")
        assert len(cut.encode()) < MAX_LINE_BYTES + 50
        assert empty == ""


@needs_journal_files
async def test_an_entry_of_any_size_takes_bounded_memory_and_is_a_gap(journal: Path) -> None:
    write_journal(journal, make_entry(0), make_entry(1, MESSAGE="x" * (MAX_ENTRY_BYTES + 1)), make_entry(2))
    async with follow(journal) as followed:
        before, gap, after = await followed.next(3)
        assert (before, after) == ("message 0", "message 2")
        assert isinstance(gap, LogGap)
        assert gap.count == 1


@needs_journal_files
async def test_journalctl_that_fails_is_unavailable(journal: Path) -> None:
    write_journal(journal, make_entry(0))
    with Spawner(os.environ) as spawner:
        request = FollowLog(channel_id="c", source="journald", unit="no-such-*")
        follower = JournalFollower(request, spawner=spawner, directory=str(journal.parent))
        with pytest.raises(UnavailableError, match="journalctl ended with status 1: Failed to add filter for units"):
            await asyncio.wait_for(follower.run(Followed().put), 10)


async def test_a_host_without_a_journal_is_unavailable(tmp_path: Path) -> None:
    request = FollowLog(channel_id="c", source="journald")
    with Spawner(os.environ) as spawner, pytest.raises(UnavailableError, match=f"no journal in {tmp_path}"):
        JournalFollower(request, spawner=spawner, directory=str(tmp_path))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (FollowLog(channel_id="c", source="journald", unit=""), "unit must be"),
        (FollowLog(channel_id="c", source="journald", lines=-1), "lines must be"),
        (FollowLog(channel_id="c", source="journald", since=-1.0), "since must be"),
        (FollowLog(channel_id="c", source="journald", priority=8), "priority must be"),
        (FollowLog(channel_id="c", source="journald", boot="1"), "boot must be"),
        (FollowLog(channel_id="c", source="journald", boot="-0"), "boot must be"),
        (FollowLog(channel_id="c", source="journald", unit="x", kernel=True), "unit must be left out"),
        (FollowLog(channel_id="c", source="journald", cursor="--file=/etc/shadow"), "cursor must be"),
    ],
)
async def test_wrong_parameters_are_refused(request_: FollowLog, message: str) -> None:
    with Spawner(os.environ) as spawner, pytest.raises(InvalidError, match=message):
        JournalFollower(request_, spawner=spawner, directory=None)


def test_an_entry_without_the_usual_fields_is_still_a_line() -> None:
    stamp = {"__REALTIME_TIMESTAMP": "1700000000000001"}
    assert format_entry(stamp) == "2023-11-14T22:13:20.000001+00:00 localhost unknown: "
    several = {**stamp, "_COMM": ["sh", "bash"], "MESSAGE": [104, 105, 0], "SYSLOG_PID": "7"}
    assert format_entry(several) == "2023-11-14T22:13:20.000001+00:00 localhost sh[7]: hi\ufffd"
