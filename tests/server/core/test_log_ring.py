"""The ring: its numbers, its bound, who waits for whom."""

import asyncio

import pytest

from fleetwire_server.core.log_ring import (
    ENTRY_BYTES,
    PATIENCE_SECONDS,
    READ_BYTES,
    Entry,
    LogEndedError,
    LogRing,
    last_cursor,
)

SMALL = 10 * (ENTRY_BYTES + 100)  # ten entries of 100 bytes


def entry(name: str | int | None, size: int = 100) -> Entry:
    return Entry(b"x" * size, None if name is None else str(name))


def entries(first: int, end: int) -> list[Entry]:
    return [entry(number) for number in range(first, end)]


async def test_readers_get_what_was_written_in_order() -> None:
    ring = LogRing()
    await ring.write(entries(0, 3))
    await ring.write(entries(3, 5))
    assert await ring.read(0) == entries(0, 5)
    assert await ring.read(3) == entries(3, 5)


async def test_a_reader_at_the_end_waits_for_more() -> None:
    ring = LogRing()
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        reading = group.create_task(ring.read(0))
        await asyncio.sleep(0)
        assert not reading.done()
        await ring.write(entries(0, 1))
    assert reading.result() == entries(0, 1)


async def test_a_read_is_bounded() -> None:
    ring = LogRing()
    await ring.write([entry(number, READ_BYTES // 2) for number in range(5)])
    assert len(await ring.read(0) or []) == 2
    await ring.write([entry(5, READ_BYTES * 3)])
    assert len(await ring.read(5) or []) == 1


async def test_without_readers_the_writer_goes_on_and_memory_is_bounded() -> None:
    ring = LogRing(ring_bytes=SMALL)
    async with asyncio.timeout(5):
        for start in range(0, 20_000, 2):
            await ring.write(entries(start, start + 2))
    assert ring.held_bytes <= SMALL
    assert (ring.first, ring.end) == (19_990, 20_000)
    assert await ring.read(19_989) is None
    assert await ring.read(19_990) == entries(19_990, 20_000)
    assert ring.newest_cursor == "19999"


async def test_an_event_larger_than_the_ring_is_held_alone() -> None:
    ring = LogRing(ring_bytes=SMALL)
    await ring.write(entries(0, 5))
    await ring.write([entry("large", 10 * SMALL)])
    assert (ring.first, ring.end) == (5, 6)


async def test_the_writer_waits_for_the_fastest_reader() -> None:
    ring = LogRing(ring_bytes=SMALL)
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        with ring.reading():
            await ring.write(entries(0, 6))
            writing = group.create_task(ring.write(entries(6, 8)))
            for _ in range(3):
                await asyncio.sleep(0)
            assert not writing.done()
            assert len(await ring.read(0) or []) == 6
            await writing
            assert await ring.read(6) == entries(6, 8)


async def test_the_writer_waits_no_more_when_the_last_reader_has_left() -> None:
    ring = LogRing(ring_bytes=SMALL)
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        with ring.reading():
            await ring.write(entries(0, 6))
            writing = group.create_task(ring.write(entries(6, 30)))
            await asyncio.sleep(0)
            assert not writing.done()
        await writing
    with ring.reading():  # and the next reader finds its count right
        async with asyncio.timeout(5):
            number = ring.first
            for start in range(30, 300, 2):
                number += len(await ring.read(number) or [])
                await ring.write(entries(start, start + 2))


async def test_a_slow_reader_is_told_that_its_place_was_overwritten() -> None:
    ring = LogRing(ring_bytes=SMALL)
    with ring.reading(), ring.reading():
        async with asyncio.timeout(5):
            for start in range(0, 100, 2):
                await ring.write(entries(start, start + 2))
                await ring.read(start)  # the fast one
    assert await ring.read(50) is None


async def test_cursors_are_found_while_they_are_held() -> None:
    ring = LogRing(ring_bytes=SMALL)
    await ring.write([*entries(0, 3), entry(None), *entries(3, 5)])
    assert (ring.number_of("2"), ring.number_of("3"), ring.number_of("9")) == (2, 4, None)
    await ring.write(entries(5, 30))
    assert ring.number_of("2") is None


async def test_a_cursor_that_comes_again_means_the_newest_line() -> None:
    ring = LogRing(ring_bytes=SMALL)
    await ring.write([entry("a"), entry("b"), entry("a")])
    assert (ring.number_of("a"), ring.newest_cursor) == (2, "a")
    await ring.write(entries(0, 9))  # the older two are dropped
    assert ring.number_of("a") == 2


async def test_the_last_lines_are_counted_without_other_events() -> None:
    ring = LogRing()
    await ring.write([entry("a"), entry("b"), entry(None), entry("c")])
    assert [ring.number_of_last_lines(count) for count in (0, 1, 2, 3, 4)] == [4, 3, 1, 0, None]


async def test_readers_get_the_rest_before_they_are_told_of_the_end() -> None:
    ring = LogRing()
    await ring.write(entries(0, 2))
    ring.fail("the host is gone")
    assert len(await ring.read(0) or []) == 2
    with pytest.raises(LogEndedError, match="the host is gone"):
        await ring.read(2)


async def test_a_cursor_is_waited_for() -> None:
    ring = LogRing()
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        waiting = group.create_task(ring.wait_for_cursor("1", 5))
        await asyncio.sleep(0)
        await ring.write(entries(0, 2))
    assert waiting.result() == 1
    assert await ring.wait_for_cursor("2", 0.01) is None


def test_the_last_cursor_skips_what_is_no_line() -> None:
    assert last_cursor([entry(1), entry(2), entry(None)]) == "2"
    assert last_cursor([entry(None)]) is None


async def test_the_writer_waits_a_while_for_a_reader_that_falls_behind() -> None:
    ring = LogRing(ring_bytes=SMALL)
    seen: list[Entry] = []

    async def read_all(pause_seconds: float) -> None:
        number = 0
        with ring.reading() as place:
            while number < 200:
                read = await ring.read(number, place)
                assert read is not None, "its place was overwritten"
                seen.extend(read if pause_seconds else [])
                number += len(read)
                await asyncio.sleep(pause_seconds)

    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        group.create_task(read_all(0))
        group.create_task(read_all(0.002))
        await asyncio.sleep(0)
        for start in range(0, 200, 2):
            await ring.write(entries(start, start + 2))
    assert seen == entries(0, 200)


async def test_patience_with_a_stuck_reader_ends() -> None:
    ring = LogRing(ring_bytes=SMALL)
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(20):
        with ring.reading() as quick, ring.reading() as stuck:
            await ring.write(entries(0, 2))
            await ring.read(0, stuck)
            began = loop.time()
            for start in range(2, 200, 2):
                await ring.write(entries(start, start + 2))
                await ring.read(start, quick)
    assert loop.time() - began < 3 * PATIENCE_SECONDS, "waited for once, not at every write"
    assert await ring.read(2) is None
