"""The ring between one log tail and its viewers. A viewer is a number in it and holds nothing of its own."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

RING_BYTES = 4 * 1024 * 1024
READ_BYTES = 128 * 1024
"""A viewer is given at most about this much at a time, which bounds what lies in its socket's buffer."""

ENTRY_BYTES = 400
"""What an entry costs beside its frame: the objects, the cursor, its place in the index (measured)."""

PATIENCE_SECONDS = 1.0
"""How long, in all, the others are held up for a reader that falls behind, until it has caught up again."""

_DROPS_BEFORE_COMPACTION = 4096


@dataclass(frozen=True, slots=True)
class Entry:
    """A framed event. `cursor` is None for what is not a line: gaps, rotations, waiting."""

    frame: bytes
    cursor: str | None

    @property
    def cost_bytes(self) -> int:
        return len(self.frame) + ENTRY_BYTES


class LogEndedError(Exception):
    """The log cannot be followed any further; the text is for the viewer."""


def last_cursor(entries: list[Entry]) -> str | None:
    """Return the cursor of the last line among `entries`."""
    return next((entry.cursor for entry in reversed(entries) if entry.cursor is not None), None)


@dataclass(eq=False, slots=True)
class Place:
    """Where one reader is; `number` is None before its first read."""

    number: int | None = None
    patience_seconds: float = PATIENCE_SECONDS


class LogRing:
    """The last events of a tail, numbered from 0 on.

    The writer waits while it is more than half the ring ahead of the fastest reader, so that reader never misses one.
    For a slower one it waits PATIENCE_SECONDS: viewers of much the same speed stay together. One that is slower still
    finds that its place was overwritten, and must fetch from the host what it missed. Without any reader the writer
    goes on, so that the ring is up to date for the next one."""

    def __init__(self, *, ring_bytes: int = RING_BYTES) -> None:
        self._ring_bytes = ring_bytes
        self._entries: list[Entry] = []  # the first `_dropped` of them are gone
        self._dropped = 0
        self._base = 0  # number of _entries[0]
        self._held_bytes = 0
        self._places: set[Place] = set()
        self._fastest = 0  # the furthest place any reader has come to
        self._ahead_bytes = 0  # held from `_fastest` on
        self._numbers: dict[str, int] = {}  # cursor -> number, oldest first
        self._changed = asyncio.Event()
        self._progress = asyncio.Event()  # a reader has read, or left
        self._failure: LogEndedError | None = None

    @property
    def first(self) -> int:
        return self._base + self._dropped

    @property
    def end(self) -> int:
        return self._base + len(self._entries)

    @property
    def held_bytes(self) -> int:
        return self._held_bytes

    @property
    def newest_cursor(self) -> str | None:
        """The cursor of the last line, None when there is none in the ring."""
        return next(reversed(self._numbers), None)

    def number_of(self, cursor: str) -> int | None:
        """Return the number of the line with that cursor, None when it is not in the ring."""
        return self._numbers.get(cursor)

    def number_of_last_lines(self, lines: int) -> int | None:
        """Return where the last `lines` lines begin, None when the ring does not hold that many."""
        if lines == 0:
            return self.end
        if len(self._numbers) < lines:
            return None
        return list(self._numbers.values())[-lines]

    @contextmanager
    def reading(self) -> Iterator[Place]:
        """Count as a reader, which the writer waits for, while the block runs; yield its place, for `read`."""
        place = Place()
        self._places.add(place)
        try:
            yield place
        finally:
            self._places.discard(place)
            self._progress.set()

    async def write(self, entries: list[Entry]) -> None:
        while self._places and self._ahead_bytes > self._ring_bytes // 2:
            self._progress.clear()
            await self._progress.wait()
        await self._wait_for_slow_readers(sum(entry.cost_bytes for entry in entries))
        for entry in entries:
            self._append(entry)
        while self._held_bytes > self._ring_bytes and self.end - self.first > 1:
            self._drop_oldest()
        self._wake()

    async def _wait_for_slow_readers(self, incoming_bytes: int) -> None:
        """Wait for readers that would lose their place to so many bytes, while there is patience with any of them."""
        loop = asyncio.get_running_loop()
        while slow := self._readers_before(self._first_after_drop(incoming_bytes)):
            began = loop.time()
            self._progress.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(max(place.patience_seconds for place in slow)):
                    await self._progress.wait()
            for place in slow:
                place.patience_seconds -= loop.time() - began

    def _first_after_drop(self, incoming_bytes: int) -> int:
        """Return what `first` would be once the ring has taken so many more bytes."""
        excess_bytes = self._held_bytes + incoming_bytes - self._ring_bytes
        first = self.first
        while excess_bytes > 0 and first < self.end:
            excess_bytes -= self._entries[first - self._base].cost_bytes
            first += 1
        return first

    def _readers_before(self, number: int) -> list[Place]:
        return [
            place
            for place in self._places
            if place.number is not None and self.first <= place.number < number and place.patience_seconds > 0
        ]

    def _append(self, entry: Entry) -> None:
        if entry.cursor is not None:
            # A truncated file has the same cursors again: the newest line of that name counts, and comes last.
            self._numbers.pop(entry.cursor, None)
            self._numbers[entry.cursor] = self.end
        self._entries.append(entry)
        self._held_bytes += entry.cost_bytes
        self._ahead_bytes += entry.cost_bytes

    def _drop_oldest(self) -> None:
        entry = self._entries[self._dropped]
        number = self.first
        self._held_bytes -= entry.cost_bytes
        if number >= self._fastest:
            self._ahead_bytes -= entry.cost_bytes
            self._fastest = number + 1
        if entry.cursor is not None and self._numbers.get(entry.cursor) == number:
            del self._numbers[entry.cursor]
        self._dropped += 1
        if self._dropped >= _DROPS_BEFORE_COMPACTION:
            del self._entries[: self._dropped]
            self._base += self._dropped
            self._dropped = 0

    def fail(self, reason: str) -> None:
        """No more will be written; readers are told once they have read what is there."""
        self._failure = LogEndedError(reason)
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def read(self, number: int, place: Place | None = None) -> list[Entry] | None:
        """Wait for entries from `number` on; return up to READ_BYTES of them, None when `number` was overwritten.

        The reader is at `place` then, where it has one.

        Raises:
            LogEndedError: the tail ended, and all that it wrote has been read."""
        while number >= self.end:
            if self._failure is not None:
                raise self._failure
            await self._changed.wait()
        if number < self.first:
            return None
        taken, taken_bytes = [], 0
        for index in range(number - self._base, len(self._entries)):
            taken.append(self._entries[index])
            taken_bytes += len(taken[-1].frame)
            if taken_bytes >= READ_BYTES:
                break
        self._note_place(number + len(taken), place)
        return taken

    def _note_place(self, number: int, place: Place | None) -> None:
        if place is not None:
            place.number = number
            if number == self.end:
                place.patience_seconds = PATIENCE_SECONDS
            self._progress.set()
        if number > self._fastest:
            passed = self._entries[self._fastest - self._base : number - self._base]
            self._ahead_bytes -= sum(entry.cost_bytes for entry in passed)
            self._fastest = number
            self._progress.set()

    async def wait_for_cursor(self, cursor: str, timeout_seconds: float) -> int | None:
        """Return the number of that line, waiting a while for the tail to reach it; None when it does not."""
        try:
            async with asyncio.timeout(timeout_seconds):
                while (number := self.number_of(cursor)) is None:
                    await self._changed.wait()
                return number
        except TimeoutError:
            return None
