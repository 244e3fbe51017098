"""Following a log file: real files, rotated the ways they are rotated."""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleetwire_agent.lines import LineSplitter, RawLine, format_line
from fleetwire_agent.logs import EMPTY_SUCCESSOR_POLLS, FileFollower
from fleetwire_shared.codec import decode, encode
from fleetwire_shared.errors import InvalidError, NotFoundError
from fleetwire_shared.limits import CHUNK_BYTES, MAX_LINE_BYTES, MAX_LINES_PER_FRAME
from fleetwire_shared.messages import ON_CHANNEL, FollowLog, LogGap, LogLines, LogRotated

REPLACED, TRUNCATED = LogRotated(reason="replaced"), LogRotated(reason="truncated")


class Followed:
    """A follower and what came from it: lines as text, other events as they are."""

    def __init__(
        self, path: Path | str, *, lines: int = 10, grep: str | None = None, cursor: str | None = None
    ) -> None:
        self.cursors: list[str] = []
        self.follower = FileFollower(
            FollowLog(channel_id="c", source="file", path=str(path), lines=lines, grep=grep, cursor=cursor)
        )

    def read(self, *, polls: int = 1) -> list[str | LogGap | LogRotated]:
        """Everything that comes until this many polls found nothing to do."""
        seen: list[str | LogGap | LogRotated] = []
        while polls:
            events = self.follower.read()
            if events is None:
                polls -= 1
                continue
            for event in events:
                if isinstance(event, LogLines):
                    assert len(event.texts) == len(event.cursors) <= MAX_LINES_PER_FRAME
                    seen += event.texts
                    self.cursors += event.cursors
                else:
                    seen.append(event)
        return seen


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "app.log"


@pytest.fixture(autouse=True)
def _no_descriptor_is_left() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    for followed in _FOLLOWED:
        followed.follower.close()
        followed.follower.close()
    _FOLLOWED.clear()
    assert len(os.listdir("/proc/self/fd")) == before


_FOLLOWED: list[Followed] = []


def follow(path: Path | str, *, lines: int = 10, grep: str | None = None, cursor: str | None = None) -> Followed:
    followed = Followed(path, lines=lines, grep=grep, cursor=cursor)
    _FOLLOWED.append(followed)
    return followed


def append(path: Path, text: str | bytes) -> None:
    with path.open("ab") as file:
        file.write(text.encode() if isinstance(text, str) else text)


def number_lines(first: int, last: int) -> str:
    return "".join(f"line {number}\n" for number in range(first, last + 1))


def expect_lines(first: int, last: int) -> list[str | LogGap | LogRotated]:
    return [f"line {number}" for number in range(first, last + 1)]


# ---------------------------------------------------------------- the beginning


@pytest.mark.parametrize("lines", [0, 1, 2, 10, 11, 100_000])
def test_the_last_lines_come_first(log: Path, lines: int) -> None:
    log.write_text(number_lines(1, 10))
    followed = follow(log, lines=lines)
    assert followed.read() == expect_lines(max(1, 11 - lines), 10)
    append(log, "next\n")
    assert followed.read() == ["next"]


def test_the_last_lines_of_a_large_file_are_found_across_blocks(log: Path) -> None:
    log.write_text(number_lines(1, 100_000))
    assert follow(log, lines=70_001).read() == expect_lines(30_000, 100_000)


def test_the_last_matching_lines_are_counted(log: Path) -> None:
    log.write_text("".join(f"{'ERROR é' if number % 1000 == 0 else 'fine'} {number}\n" for number in range(100_000)))
    followed = follow(log, lines=3, grep="ERROR é")
    assert followed.read() == ["ERROR é 97000", "ERROR é 98000", "ERROR é 99000"]
    append(log, "fine\nERROR é last\n")
    assert followed.read() == ["ERROR é last"]
    assert follow(log, lines=3, grep="nowhere").read() == []


def test_a_line_without_its_newline_waits_for_it(log: Path) -> None:
    log.write_text("one\ntw")
    for lines in (0, 1):
        followed = follow(log, lines=lines)
        assert followed.read() == ["one"][:lines]
    append(log, "o\n")
    assert followed.read() == ["two"]


def test_an_empty_file_is_followed(log: Path) -> None:
    log.touch()
    followed = follow(log)
    assert followed.read() == []
    append(log, "first\n\nthird\n")
    assert followed.read() == ["first", "", "third"]


def test_what_is_no_log_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(NotFoundError):
        follow(tmp_path / "missing")
    for path, message in {"/var/log": "a directory", f"{tmp_path}/fifo": "a FIFO", "/dev/zero": "device"}.items():
        with pytest.raises(InvalidError, match=message):
            follow(path)
    with pytest.raises(InvalidError, match="absolute"):
        follow("var/log/syslog")
    with pytest.raises(InvalidError, match="cursor must be"):
        follow("/etc/passwd", cursor="s=1;i=2")


# ---------------------------------------------------------------- lines


def test_bytes_that_cannot_be_shown_are_replaced(log: Path) -> None:
    log.write_bytes(b"caf\xc3\xa9 \xff\xfe\0 end\r\n\x1b[1mred\n\n")
    assert follow(log).read() == ["café \ufffd\ufffd\ufffd end", "\x1b[1mred", ""]


def test_a_long_line_is_cut_and_says_so(log: Path) -> None:
    log.write_text("é" * 500_000 + "\nafter\n")
    first, after = follow(log).read()
    assert first == "é" * (MAX_LINE_BYTES // 2) + " … [cut, 1000000 bytes in all]"
    assert after == "after"


def test_a_line_of_any_length_takes_bounded_memory() -> None:
    splitter = LineSplitter(7)
    for _ in range(1000):
        assert splitter.feed(b"x" * 1_000_000) == []
    (line,) = splitter.feed(b"\n")
    assert (line.offset, len(line.kept), line.full_bytes) == (7, MAX_LINE_BYTES, 1_000_000_000)
    assert splitter.feed(b"a\n") == [RawLine(1_000_000_008, b"a", 1)]


def test_a_cut_never_splits_a_character() -> None:
    assert format_line(RawLine(0, "aé".encode()[:2], 100)) == "a … [cut, 100 bytes in all]"


def test_frames_stay_small(log: Path) -> None:
    log.write_text("\x01" * 60_000 + "\n" + "y" * 60_000 + "\n" + number_lines(1, 1000))
    followed = follow(log, lines=5000)
    events = []
    while (read := followed.follower.read()) is not None:
        events += read
    for event in events:
        assert isinstance(event, LogLines)
        assert sum(map(len, event.texts)) <= CHUNK_BYTES
        assert decode(encode(event), ON_CHANNEL) == event


# ---------------------------------------------------------------- rotation while following


def test_rename_and_create_loses_nothing(log: Path) -> None:
    log.write_text(number_lines(1, 3))
    followed = follow(log)
    followed.read()
    append(log, number_lines(4, 5))
    with log.open("ab") as writer:
        log.rename(f"{log}.1")
        log.touch()
        writer.write(b"line 6\n")  # the writer has not been told yet
        writer.flush()
        assert followed.read(polls=3) == expect_lines(4, 6)
        writer.write(b"line 7\nlast without newline")
    append(log, number_lines(8, 9))
    assert followed.read() == ["line 7", "last without newline", REPLACED, *expect_lines(8, 9)]


def test_an_empty_successor_is_followed_after_a_while(log: Path) -> None:
    log.write_text("one\n")
    followed = follow(log)
    followed.read()
    log.rename(f"{log}.1")
    assert followed.read(polls=3) == []  # no file at all: the next one will come
    log.touch()
    assert followed.read(polls=EMPTY_SUCCESSOR_POLLS + 1) == [REPLACED]


def test_several_rotations_at_once_are_read_in_order(log: Path) -> None:
    log.write_text(number_lines(1, 2))
    followed = follow(log)
    followed.read()
    for first in (3, 5, 7):
        for older in (2, 1):
            if (numbered := Path(f"{log}.{older}")).exists():
                numbered.rename(f"{log}.{older + 1}")
        log.rename(f"{log}.1")
        log.write_text(number_lines(first, first + 1))
    expected = [REPLACED, *expect_lines(3, 4), REPLACED, *expect_lines(5, 6), REPLACED, *expect_lines(7, 8)]
    assert followed.read() == expected


def test_a_deleted_file_that_comes_back_is_followed(log: Path) -> None:
    log.write_text("one\n")
    followed = follow(log)
    followed.read()
    log.unlink()
    assert followed.read(polls=2) == []
    log.write_text("two\n")
    assert followed.read() == [REPLACED, "two"]


def test_copytruncate_is_read_on_in_the_copy(log: Path) -> None:
    log.write_text(number_lines(1, 3))
    followed = follow(log)
    followed.read()
    append(log, number_lines(4, 6))
    shutil.copyfile(log, f"{log}.1")
    os.truncate(log, 0)
    append(log, number_lines(7, 8))
    assert followed.read() == [*expect_lines(4, 6), TRUNCATED, *expect_lines(7, 8)]


def test_truncation_without_a_copy_is_a_gap(log: Path) -> None:
    log.write_text(number_lines(1, 3))
    followed = follow(log)
    followed.read()
    os.truncate(log, 0)
    append(log, "new\n")
    assert followed.read() == [TRUNCATED, LogGap(reason="the file was truncated"), "new"]


def test_truncation_is_noticed_when_the_file_is_longer_again(log: Path) -> None:
    log.write_text(number_lines(1, 3))
    followed = follow(log)
    followed.read()
    log.write_text("other\n" * 100)
    assert followed.read() == [TRUNCATED, LogGap(reason="the file was truncated"), *["other"] * 100]


# ---------------------------------------------------------------- resuming


def resume_point(log: Path, line: str) -> str:
    followed = follow(log, lines=100_000)
    return followed.cursors[followed.read().index(line)]


def test_a_cursor_goes_on_after_its_line(log: Path) -> None:
    log.write_text(number_lines(1, 9))
    cursor = resume_point(log, "line 4")
    status = log.stat()
    assert cursor == f"{status.st_dev}:{status.st_ino}:{3 * len('line 1') + 3}"
    assert follow(log, cursor=cursor).read() == expect_lines(5, 9)
    assert follow(log, cursor=resume_point(log, "line 9")).read() == []


def test_a_cursor_with_grep_goes_on_after_its_line(log: Path) -> None:
    log.write_text(number_lines(1, 19))
    assert follow(log, cursor=resume_point(log, "line 11"), grep="line 1").read() == expect_lines(12, 19)


def test_a_cursor_of_a_rotated_file_reads_the_rest_of_it(log: Path) -> None:
    log.write_text(number_lines(1, 4))
    cursor = resume_point(log, "line 2")
    log.rename(f"{log}.1")
    log.write_text(number_lines(5, 6))
    assert follow(log, cursor=cursor).read() == [*expect_lines(3, 4), REPLACED, *expect_lines(5, 6)]


def test_a_cursor_before_several_rotations_reads_all_between(log: Path) -> None:
    moment = time.time_ns()
    for number, (first, suffix) in enumerate([(1, ".3"), (3, ".2"), (5, ".1"), (7, "")]):
        path = Path(f"{log}{suffix}")
        path.write_text(number_lines(first, first + 1))
        os.utime(path, ns=(moment, moment + number // 2))  # two by two of the same age
    Path(f"{log}.bak").write_text("not of this log\n")
    cursor = resume_point(Path(f"{log}.3"), "line 1")
    expected = ["line 2", REPLACED, *expect_lines(3, 4), REPLACED, *expect_lines(5, 6), REPLACED, *expect_lines(7, 8)]
    assert follow(log, cursor=cursor).read() == expected


def test_a_compressed_file_between_is_a_gap(log: Path) -> None:
    log.write_text("one\n")
    cursor = resume_point(log, "one")
    log.rename(f"{log}.2")
    os.utime(f"{log}.2", (1, 1))
    Path(f"{log}.1.gz").write_bytes(b"compressed")
    log.write_text("three\n")
    reason = "a rotated file between was compressed already"
    assert follow(log, cursor=cursor).read() == [REPLACED, LogGap(reason=reason), "three"]


def test_a_cursor_of_a_file_that_is_gone_is_a_gap(log: Path) -> None:
    log.write_text(number_lines(1, 2))
    status = log.stat()
    cursor = f"{status.st_dev}:{status.st_ino + 1_000_000}:0"
    assert follow(log, cursor=cursor).read() == [
        LogGap(reason="the file that was read last is gone"), *expect_lines(1, 2)
    ]  # fmt: skip


def test_a_cursor_of_a_truncated_file_is_a_gap(log: Path) -> None:
    log.write_text(number_lines(1, 3))
    for line in ("line 1", "line 3"):
        log.write_text(number_lines(1, 3))
        cursor = resume_point(log, line)
        os.truncate(log, 0)
        gap = LogGap(reason="the file was truncated")
        followed = follow(log, cursor=cursor)
        assert followed.read() == [TRUNCATED, gap]
        append(log, "new\n")
        assert followed.read() == ["new"]


def test_a_cursor_within_a_rewritten_file_is_a_gap(log: Path) -> None:
    log.write_text(number_lines(1, 3))
    cursor = resume_point(log, "line 3")
    log.write_text("a single line that is longer than all before\n")
    expected = [TRUNCATED, LogGap(reason="the file was truncated"), "a single line that is longer than all before"]
    assert follow(log, cursor=cursor).read() == expected


def test_a_cursor_before_copytruncate_reads_the_copy(log: Path) -> None:
    log.write_text(number_lines(1, 6))
    cursor = resume_point(log, "line 3")
    shutil.copyfile(log, f"{log}.1")
    os.truncate(log, 0)
    append(log, "new\n")
    assert follow(log, cursor=cursor).read() == [*expect_lines(4, 6), TRUNCATED, "new"]


def test_every_cursor_resumes_exactly(log: Path) -> None:
    texts = ["", "a", "é", "x" * 100, "", "end"]
    log.write_text("".join(f"{text}\n" for text in texts))
    first = follow(log)
    assert first.read() == texts
    for index, cursor in enumerate(first.cursors):
        assert follow(log, cursor=cursor).read() == texts[index + 1 :]


def test_two_hundred_thousand_lines_across_rotations_come_once_and_in_order(log: Path) -> None:
    log.touch()
    followed = follow(log, lines=0)
    seen: list[str | LogGap | LogRotated] = []
    for part in range(20):
        append(log, number_lines(part * 10_000, part * 10_000 + 9_999))
        if part % 3 == 0:
            seen += followed.read()
        if part % 4 == 1:
            log.rename(f"{log}.{part}")
            log.touch()
        elif part % 4 == 3:
            shutil.copyfile(log, f"{log}.1{part}")
            os.truncate(log, 0)
    seen += followed.read(polls=EMPTY_SUCCESSOR_POLLS + 2)
    assert [event for event in seen if isinstance(event, str)] == expect_lines(0, 199_999)
    assert not [event for event in seen if isinstance(event, LogGap)]
