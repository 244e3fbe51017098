"""What the agent holds of each command until the server has stored it: state, output and result. In memory.

Knows no process and no socket. `next_message` says what the server has not been told on this link; a new link starts
from what the server says it has (`settle`), so nothing is lost by a break except what the window could not hold."""

import asyncio
import binascii
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

from fleetwire_shared.limits import CHUNK_BYTES, OUTPUT_WINDOW_BYTES
from fleetwire_shared.messages import (
    CommandAccepted,
    CommandFinished,
    CommandOffer,
    CommandOutput,
    CommandRejected,
    CommandStarted,
    LedgerEntry,
)

Stream: TypeAlias = Literal["stdout", "stderr"]
Ending: TypeAlias = CommandFinished | CommandRejected
CommandMessage: TypeAlias = CommandAccepted | CommandStarted | CommandOutput | CommandFinished

AWAY_OUTPUT_BYTES: Final = 16 * 1024 * 1024
"""Output of all commands together that is held while the server is away; the oldest of the largest goes first."""

REMEMBERED_ENDINGS: Final = 2000
"""Commands whose end the server has stored and whose ids are kept, so that a repeated offer never runs them again."""

_PIECE_COST_BYTES: Final = 256  # what a piece costs beside its bytes: else one-byte writes would defeat the window
_JOINED_PIECE_BYTES: Final = 4096  # small writes are joined up to this while they wait


@dataclass(slots=True)
class Piece:
    """Output that was read in one go."""

    stream: Stream
    position: int
    offset: int
    content: bytes

    @property
    def end(self) -> int:
        return self.position + len(self.content)

    @property
    def cost_bytes(self) -> int:
        return len(self.content) + _PIECE_COST_BYTES


@dataclass(slots=True)
class Entry:
    """One command, from its acceptance until the server has stored its end."""

    offer: CommandOffer
    started_at: float | None = None
    result: CommandFinished | None = None
    is_forgotten: bool = False  # the server wants to hear no more of it
    written_bytes: dict[Stream, int] = field(default_factory=lambda: {"stdout": 0, "stderr": 0})
    held_bytes: int = 0  # cost of the pieces in `sent` and `unsent`
    sent: deque[Piece] = field(default_factory=deque)
    unsent: deque[Piece] = field(default_factory=deque)
    is_accepted_sent: bool = False
    is_started_sent: bool = False
    is_result_sent: bool = False
    has_room: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def command_id(self) -> str:
        return self.offer.command_id

    @property
    def state(self) -> Literal["accepted", "running", "finished"]:
        if self.result:
            return "finished"
        return "accepted" if self.started_at is None else "running"

    def next_message(self) -> CommandMessage | None:
        """Return what the server is to be told next, and count it as told; None when it knows all."""
        if not self.is_accepted_sent:
            self.is_accepted_sent = True
            return CommandAccepted(command_id=self.command_id)
        if not self.is_started_sent and self.started_at is not None:
            self.is_started_sent = True
            return CommandStarted(command_id=self.command_id, started_at=self.started_at)
        if self.unsent:
            piece = self.unsent.popleft()
            self.sent.append(piece)
            return CommandOutput(
                command_id=self.command_id,
                stream=piece.stream,
                position=piece.position,
                offset=piece.offset,
                base64=binascii.b2a_base64(piece.content, newline=False).decode("ascii"),
            )
        if self.result and not self.is_result_sent:
            self.is_result_sent = True
            return self.result
        return None

    def add_output(self, stream: Stream, content: bytes) -> None:
        position = sum(self.written_bytes.values())
        offset = self.written_bytes[stream]
        self.written_bytes[stream] += len(content)
        if self.is_forgotten:
            return
        last = self.unsent[-1] if self.unsent else None
        if last and last.stream == stream and len(last.content) + len(content) <= _JOINED_PIECE_BYTES:
            last.content += content
            self.held_bytes += len(content)
            return
        piece = Piece(stream, position, offset, content)
        self.unsent.append(piece)
        self.held_bytes += piece.cost_bytes

    def drop_output_before(self, position: int) -> None:
        """Forget what the server has stored."""
        for pieces in (self.sent, self.unsent):
            while pieces and pieces[0].end <= position:
                self.held_bytes -= pieces.popleft().cost_bytes

    def drop_oldest_output(self) -> int:
        """Return how many bytes of the window it freed."""
        pieces = self.sent or self.unsent
        if not pieces:
            return 0
        cost_bytes = pieces.popleft().cost_bytes
        self.held_bytes -= cost_bytes
        return cost_bytes

    def send_again_from(self, position: int) -> None:
        """Start over on a new link: `accepted` is known from the hello, output before `position` is stored."""
        self.unsent.extendleft(reversed(self.sent))
        self.sent.clear()
        self.drop_output_before(position)
        if self.unsent and self.unsent[0].position < position:
            first = self.unsent[0]
            known_bytes = position - first.position
            self.unsent[0] = Piece(first.stream, position, first.offset + known_bytes, first.content[known_bytes:])
            self.held_bytes -= known_bytes
        self.is_accepted_sent = True
        self.is_started_sent = False
        self.is_result_sent = False


class Ledger:
    """The commands of this agent. `news` is set when `next_messages` may have something new."""

    def __init__(self, *, window_bytes: int = OUTPUT_WINDOW_BYTES, away_bytes: int = AWAY_OUTPUT_BYTES) -> None:
        self._window_bytes = window_bytes
        self._away_bytes = away_bytes
        self._entries: dict[str, Entry] = {}
        self._endings: OrderedDict[str, Ending] = OrderedDict()
        self._is_connected = False
        self._held_bytes = 0  # of all entries
        self.news = asyncio.Event()
        self.is_reported = asyncio.Event()  # the server has stored the end of every command that ended
        self.is_reported.set()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, command_id: str) -> Entry | None:
        return self._entries.get(command_id)

    def get_ending(self, command_id: str) -> Ending | None:
        """Return how a command that is no longer held ended, as far back as the agent remembers."""
        return self._endings.get(command_id)

    def list_entries(self) -> tuple[LedgerEntry, ...]:
        """Return what the hello says of the commands held."""
        return tuple(
            LedgerEntry(command_id=entry.command_id, state=entry.state)
            for entry in self._entries.values()
            if not entry.is_forgotten
        )

    def next_messages(self) -> list[CommandMessage]:
        """Return the next message of every command that has one: a talkative command does not delay the others."""
        entries = [entry for entry in self._entries.values() if not entry.is_forgotten]
        return [message for entry in entries if (message := entry.next_message())]

    # ------------------------------------------------------------ what happens to commands

    def add(self, offer: CommandOffer) -> Entry:
        entry = Entry(offer)
        self._entries[offer.command_id] = entry
        self._update_room(entry)
        self.news.set()
        return entry

    def remove(self, entry: Entry, ending: Ending) -> None:
        """Stop holding a command; remember only that and how it ended."""
        if self._entries.pop(entry.command_id, None) is entry:
            self._held_bytes -= entry.held_bytes
        self.remember(ending)
        self._update_reported()

    def remember(self, ending: Ending) -> None:
        self._endings[ending.command_id] = ending
        if len(self._endings) > REMEMBERED_ENDINGS:
            self._endings.popitem(last=False)

    def start(self, entry: Entry, *, started_at: float) -> None:
        entry.started_at = started_at
        self.news.set()

    def add_output(self, entry: Entry, stream: Stream, content: bytes) -> None:
        """Hold a piece of output. With the server away the oldest output makes room for it."""
        before = entry.held_bytes
        entry.add_output(stream, content)
        self._held_bytes += entry.held_bytes - before
        if not self._is_connected:
            self._drop_oldest(entry)
        self._update_room(entry)
        self.news.set()

    def finish(self, entry: Entry, result: CommandFinished) -> None:
        if entry.is_forgotten:
            self.remove(entry, result)
            return
        entry.result = result
        self._update_reported()
        self.news.set()

    # ------------------------------------------------------------ what the server says

    def note_output_stored(self, command_id: str, position: int) -> None:
        if entry := self._entries.get(command_id):
            before = entry.held_bytes
            entry.drop_output_before(position)
            self._held_bytes += entry.held_bytes - before
            self._update_room(entry)

    def note_stored(self, command_id: str) -> None:
        entry = self._entries.get(command_id)
        if entry and entry.result:
            self.remove(entry, entry.result)

    def forget(self, command_id: str) -> None:
        """The server wants to hear no more of it; a command that still runs goes on unheard."""
        entry = self._entries.get(command_id)
        if entry is None:
            return
        entry.is_forgotten = True
        if entry.result:
            self.remove(entry, entry.result)
        else:
            self._drop_all(entry)

    def send_again(self, entry: Entry, *, position: int = 0) -> None:
        before = entry.held_bytes
        entry.send_again_from(position)
        self._held_bytes += entry.held_bytes - before
        self._update_room(entry)
        self.news.set()

    def connect(self) -> None:
        """A link is up and every entry has been settled: full windows stop their readers from now on."""
        self._is_connected = True
        self._update_all_rooms()
        self.news.set()

    def disconnect(self) -> None:
        """The link is gone: from now on old output is dropped instead of making commands wait."""
        self._is_connected = False
        self._update_all_rooms()

    # ------------------------------------------------------------ the window

    def _update_all_rooms(self) -> None:
        for entry in self._entries.values():
            self._update_room(entry)

    def _update_room(self, entry: Entry) -> None:
        # Two streams read at the same time, each at most one chunk.
        has_room = entry.held_bytes <= self._window_bytes - 2 * (CHUNK_BYTES + _PIECE_COST_BYTES)
        if has_room or entry.is_forgotten or not self._is_connected:
            entry.has_room.set()
        else:
            entry.has_room.clear()

    def _drop_oldest(self, entry: Entry) -> None:
        while entry.held_bytes > self._window_bytes:
            self._held_bytes -= entry.drop_oldest_output()
        while self._held_bytes > self._away_bytes:
            largest = max(self._entries.values(), key=lambda other: other.held_bytes)
            self._held_bytes -= largest.drop_oldest_output()

    def _drop_all(self, entry: Entry) -> None:
        while freed_bytes := entry.drop_oldest_output():
            self._held_bytes -= freed_bytes
        self._update_room(entry)

    def _update_reported(self) -> None:
        if any(entry.result for entry in self._entries.values()):
            self.is_reported.clear()
        else:
            self.is_reported.set()


def build_result(
    entry: Entry,
    status: Literal["succeeded", "failed", "timed_out", "cancelled", "interrupted"],
    *,
    exit_code: int | None = None,
    duration_seconds: float = 0.0,
    error: str | None = None,
    now: Callable[[], float] = time.time,
) -> CommandFinished:
    """Return the message that says how a command ended; of one that never started, its start is now."""
    return CommandFinished(
        command_id=entry.command_id,
        status=status,
        exit_code=exit_code,
        stdout_bytes=entry.written_bytes["stdout"],
        stderr_bytes=entry.written_bytes["stderr"],
        started_at=now() if entry.started_at is None else entry.started_at,
        duration_seconds=duration_seconds,
        error=error,
    )
