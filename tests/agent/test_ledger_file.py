"""The ledger's file: what was appended is there again, whatever a kill or a power cut left of it."""

import asyncio
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from tests.agent.command_rig import no_room

from fleetwire_agent.ledger_file import FILE_BYTES, NAMES, LedgerFile

HEADER_BYTES = 20
FRAME_BYTES = 16


def list_nothing() -> Iterable[bytes]:
    return ()


def read_back(directory: Path, *, size_bytes: int = FILE_BYTES) -> tuple[list[bytes], bool]:
    file = LedgerFile(directory, list_nothing, size_bytes=size_bytes)
    try:
        return file.open()
    finally:
        file.close()


async def write(
    directory: Path,
    records: Iterable[bytes],
    *,
    list_live: Callable[[], Iterable[bytes]] = list_nothing,
    size_bytes: int = FILE_BYTES,
) -> None:
    file = LedgerFile(directory, list_live, size_bytes=size_bytes)
    file.open()
    try:
        async with asyncio.timeout(10):
            await asyncio.gather(*[file.append(record) for record in records])
    finally:
        file.close()


async def write_and_compact(directory: Path) -> list[bytes]:
    """Fill a file of 4096 bytes until it is compacted, once; return what is live then."""
    live: list[bytes] = []
    file = LedgerFile(directory, lambda: live[-3:], size_bytes=4096)
    file.open()
    async with asyncio.timeout(10):
        for number in range(40):  # 40 frames of 116 bytes: 35 fit
            live.append(b"%03d" % number + b"x" * 97)
            await file.append(live[-1])
    file.close()
    return live[32:36] + live[36:]


async def test_what_is_appended_is_read_back_in_order(tmp_path: Path) -> None:
    await write(tmp_path, [b"one", b"", b"x" * 100_000])
    assert read_back(tmp_path) == ([b"one", b"", b"x" * 100_000], False)
    await write(tmp_path, [b"four"])
    assert read_back(tmp_path) == ([b"one", b"", b"x" * 100_000, b"four"], False)


async def test_a_new_ledger_is_empty_and_has_room_on_the_disk(tmp_path: Path) -> None:
    assert read_back(tmp_path / "state") == ([], False)
    for name in NAMES:
        status = (tmp_path / "state" / name).stat()
        assert status.st_size == FILE_BYTES
        assert status.st_blocks * 512 >= FILE_BYTES


async def test_a_record_without_durability_is_written_too(tmp_path: Path) -> None:
    file = LedgerFile(tmp_path, list_nothing)
    file.open()
    assert file.append(b"at once", is_durable=False).done()
    async with asyncio.timeout(5):
        await file.append(b"later")
    file.close()
    assert read_back(tmp_path) == ([b"at once", b"later"], False)


async def test_closing_writes_what_is_queued(tmp_path: Path) -> None:
    file = LedgerFile(tmp_path, list_nothing)
    file.open()
    for number in range(3):
        file.append(b"%d" % number, is_durable=False)
        await asyncio.sleep(0)  # the first is being written while the others wait
    file.close()
    await asyncio.sleep(0.01)  # whatever the loop has still to do must not fail
    assert read_back(tmp_path) == ([b"0", b"1", b"2"], False)


async def test_a_tail_torn_at_any_byte_loses_only_the_last_record(tmp_path: Path) -> None:
    await write(tmp_path / "whole", [b"first", b"second"])
    last = b"the last one"
    before = (tmp_path / "whole" / NAMES[0]).read_bytes()
    await write(tmp_path / "whole", [last])
    after = (tmp_path / "whole" / NAMES[0]).read_bytes()
    place = HEADER_BYTES + 2 * FRAME_BYTES + len(b"firstsecond")
    for cut in range(FRAME_BYTES + len(last)):
        torn = tmp_path / "torn"
        shutil.copytree(tmp_path / "whole", torn)
        (torn / NAMES[0]).write_bytes(after[: place + cut] + before[place + cut :])
        assert read_back(torn) == ([b"first", b"second"], False), cut
        await write(torn, [b"next"])
        assert read_back(torn) == ([b"first", b"second", b"next"], False), cut
        shutil.rmtree(torn)


async def test_a_file_cut_short_at_any_byte_is_readable(tmp_path: Path) -> None:
    await write(tmp_path / "whole", [b"first", b"second"])
    size_bytes = HEADER_BYTES + 2 * FRAME_BYTES + len(b"firstsecond")
    for cut in range(size_bytes - FRAME_BYTES - len(b"second"), size_bytes):
        torn = tmp_path / "torn"
        shutil.copytree(tmp_path / "whole", torn)
        os.truncate(torn / NAMES[0], cut)
        assert read_back(torn) == ([b"first"], False), cut
        shutil.rmtree(torn)


async def test_damage_in_the_middle_is_told_and_the_rest_kept(tmp_path: Path) -> None:
    records = [b"record %d" % number for number in range(5)]
    await write(tmp_path, records)
    path = tmp_path / NAMES[0]
    content = bytearray(path.read_bytes())
    content[content.index(b"record 2")] ^= 1
    path.write_bytes(content)
    file = LedgerFile(tmp_path, list_nothing)
    kept = [b"record 0", b"record 1", b"record 3", b"record 4"]
    assert file.open() == (kept, True)
    async with asyncio.timeout(5):
        await file.append(b"new")
    file.close()
    assert read_back(tmp_path) == ([*kept, b"new"], False)


async def test_a_full_file_is_compacted_to_what_is_live(tmp_path: Path) -> None:
    expected = await write_and_compact(tmp_path)
    records, is_damaged = read_back(tmp_path, size_bytes=4096)
    assert not is_damaged
    assert records[-4:] == expected[-4:]
    assert len(records) < 10


async def test_frames_of_an_earlier_generation_behind_the_tail_are_no_records(tmp_path: Path) -> None:
    live: list[bytes] = []
    for number in range(300):  # many compactions: both files hold old frames of the same size behind their tails
        live.append(b"%03d" % number + b"x" * 97)
        file = LedgerFile(tmp_path, lambda: live[-3:], size_bytes=4096)
        records, is_damaged = file.open()
        assert not is_damaged
        assert records[-3:] == live[:-1][-3:]
        async with asyncio.timeout(5):
            await file.append(live[-1])
        file.close()


async def test_more_than_fits_makes_the_files_larger(tmp_path: Path) -> None:
    live: list[bytes] = []
    file = LedgerFile(tmp_path, lambda: live, size_bytes=4096)
    file.open()
    async with asyncio.timeout(10):
        for number in range(200):
            live.append(b"%03d" % number + b"x" * 97)
            await file.append(live[-1])
    file.close()
    assert read_back(tmp_path, size_bytes=4096) == (live, False)


async def test_a_kill_before_the_header_leaves_the_old_generation(tmp_path: Path) -> None:
    """A compaction writes the other file with an empty header, and its header last."""
    records = [b"record %d" % number for number in range(5)]
    await write(tmp_path, records)
    await write(tmp_path / "twin", [b"unfinished"])
    content = bytearray((tmp_path / "twin" / NAMES[0]).read_bytes())
    for cut in range(HEADER_BYTES):
        (tmp_path / NAMES[1]).write_bytes(content[:cut] + bytes(HEADER_BYTES - cut) + content[HEADER_BYTES:])
        assert read_back(tmp_path) == (records, False), cut


async def test_a_damaged_header_never_brings_back_the_generation_before(tmp_path: Path) -> None:
    await write_and_compact(tmp_path)
    contents = [(tmp_path / name).read_bytes() for name in NAMES]
    newest = max(range(2), key=lambda number: int.from_bytes(contents[number][8:16]))
    (tmp_path / NAMES[newest]).write_bytes(b"?" + contents[newest][1:])
    records, _ = read_back(tmp_path, size_bytes=4096)
    assert records == []
    await write(tmp_path, [b"%03d" % 0 + b"x" * 97], size_bytes=4096)
    assert read_back(tmp_path, size_bytes=4096) == ([b"%03d" % 0 + b"x" * 97], False)


async def test_what_follows_a_failed_write_is_read_back(tmp_path: Path) -> None:
    live = [b"kept"]
    file = LedgerFile(tmp_path, lambda: live)
    file.open()
    async with asyncio.timeout(5):
        await file.append(b"kept")
        await fail_once(file, b"lost")
        live.append(b"after")
        await file.append(b"after")
        live.append(b"and on")
        await file.append(b"and on")
    file.close()
    assert read_back(tmp_path) == ([b"kept", b"after", b"and on"], False)


async def test_a_record_of_which_the_disk_takes_a_part_is_not_on_it(tmp_path: Path) -> None:
    live = [b"kept"]
    file = LedgerFile(tmp_path, lambda: live)
    file.open()
    async with asyncio.timeout(5):
        await file.append(b"kept")
        await fail_once(file, b"x" * 1000, after_bytes=HEADER_BYTES + FRAME_BYTES + len(b"kept") + 500)
        live.append(b"after")
        await file.append(b"after")
    file.close()
    assert read_back(tmp_path) == ([b"kept", b"after"], False)


async def fail_once(file: LedgerFile, record: bytes, *, after_bytes: int = 1) -> None:
    """Append a record that the disk does not take, or only up to a place."""
    with no_room(after_bytes=after_bytes), pytest.raises(OSError, match="File too large"):
        await file.append(record)


def test_two_agents_cannot_use_one_ledger(tmp_path: Path) -> None:
    first, second = LedgerFile(tmp_path, list_nothing), LedgerFile(tmp_path, list_nothing)
    first.open()
    with pytest.raises(BlockingIOError):
        second.open()
    second.close()
    first.close()
    assert read_back(tmp_path) == ([], False)
