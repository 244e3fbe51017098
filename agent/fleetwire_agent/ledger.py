"""What the agent holds of each command until the server has stored its end: on disk, so that neither a killed agent
nor a power cut makes it forget.

Knows no process and no socket. `next_messages` says what the server has not been told on this link and what is safe to
tell, as it is on disk; a new link starts from what the server says it has (`send_again`)."""

import asyncio
import binascii
import errno
import json
import logging
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, cast

from fleetwire_agent.command_states import WRITING, Event, State, move
from fleetwire_agent.ledger_file import LedgerFile
from fleetwire_agent.moments import Moment
from fleetwire_agent.runner.files import COMMANDS, keep_reserve
from fleetwire_agent.runner.spool import SpoolReader, list_segments, measure, remove_segments
from fleetwire_agent.runners import is_command_id, is_own_directory
from fleetwire_shared.codec import decode, encode
from fleetwire_shared.errors import ConflictError, ProtocolError, UnavailableError
from fleetwire_shared.limits import COMMAND_PREVIEW_CHARACTERS, OUTPUT_WINDOW_BYTES
from fleetwire_shared.messages import (
    FROM_AGENT,
    FROM_SERVER,
    CommandAccepted,
    CommandFinished,
    CommandOffer,
    CommandOutput,
    CommandRejected,
    CommandStarted,
    LedgerEntry,
)

Ending: TypeAlias = CommandFinished | CommandRejected
CommandMessage: TypeAlias = CommandAccepted | CommandStarted | CommandOutput | CommandFinished | CommandRejected

SPOOL_BYTES: Final = 512 * 1024 * 1024
"""Output of all commands together that waits on disk for the server."""

REMEMBERED_ENDINGS: Final = 2000
"""Commands whose end the server has stored and whose ids are kept, so that a repeated offer never runs them again."""

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Entry:
    """One command, from its acceptance until the server has stored its end."""

    offer: CommandOffer
    boot_id: str  # of the boot in which it was accepted
    expires_at: float  # Unix seconds by this host's clock; counts after a reboot
    expires_boottime: float  # seconds of CLOCK_BOOTTIME; counts within one boot, whatever is done to the clock
    number: int  # in the order in which this ledger's commands were accepted
    state: State = State.ACCEPTED
    attempt: int = 1  # its directory's; a new one after it is proved that the last one did not start the shell
    started_boot_id: str | None = None  # of the boot in which it was last about to start; None: never, or not known
    started: Moment | None = None
    ending: Ending | None = None
    ended: Moment | None = None
    directory: Path | None = None  # of its output, once it has one
    output: SpoolReader | None = None
    spool_bytes: int = 0  # as measured last
    stored_position: int = 0  # what the server has
    is_on_disk: bool = False  # the acceptance is
    is_ending_on_disk: bool = False
    is_muted: bool = False  # the server wants to hear no more of it
    is_accepted_sent: bool = False
    is_started_sent: bool = False
    is_ending_sent: bool = False

    @property
    def command_id(self) -> str:
        return self.offer.command_id

    def describe(self) -> LedgerEntry:
        states: dict[State, Literal["accepted", "running", "finished"]] = {
            State.RUNNING: "running",
            State.FINISHED: "finished",
        }
        return LedgerEntry(
            command_id=self.command_id,
            state=states.get(self.state, "accepted"),
            command=self.offer.command[:COMMAND_PREVIEW_CHARACTERS],
            timeout_seconds=self.offer.timeout_seconds,
        )

    def open_output(self, directory: Path) -> None:
        self.directory = directory
        self.output = SpoolReader(str(directory))
        self.output.seek(self.stored_position)

    def next_message(self, now: Moment) -> CommandMessage | None:
        """Return what the server is to be told next, and count it as told; None when it knows all that may be told."""
        if not self.is_on_disk:
            return None
        if not self.is_accepted_sent:
            self.is_accepted_sent = True
            return CommandAccepted(command_id=self.command_id)
        if not self.is_started_sent and self.started is not None:
            self.is_started_sent = True
            return CommandStarted(command_id=self.command_id, seconds_ago=self.started.seconds_before(now))
        if message := self._next_output():
            return message
        if self.ending and self.is_ending_on_disk and not self.is_ending_sent and self._is_output_told():
            self.is_ending_sent = True
            return _tell(self.ending, self.ended or now, now)
        return None

    def _next_output(self) -> CommandOutput | None:
        if self.output is None or self.output.position - self.stored_position >= OUTPUT_WINDOW_BYTES:
            return None
        try:
            piece = self.output.read()
        except OSError as err:
            _log.error("output of %s cannot be read: %s", self.command_id, err)
            return None
        if piece is None:
            return None
        return CommandOutput(
            command_id=self.command_id,
            stream=piece.stream,
            position=piece.position,
            offset=piece.offset,
            base64=binascii.b2a_base64(piece.content, newline=False).decode("ascii"),
        )

    def _is_output_told(self) -> bool:
        """Whether nothing of the output waits for room in the window."""
        return self.output is None or self.output.position - self.stored_position < OUTPUT_WINDOW_BYTES

    def send_again_from(self, position: int) -> None:
        """Start over on a new link: `accepted` is known from the hello, output before `position` is stored."""
        self.stored_position = position
        if self.output is not None:
            self.output.seek(position)
        self.is_accepted_sent = True
        self.is_started_sent = False
        self.is_ending_sent = False


class Ledger:
    """The commands of this agent. `news` is set when `next_messages` may have something new."""

    def __init__(
        self,
        directory: Path,
        *,
        boot_id: str,
        new_instance_id: str,
        spool_bytes: int = SPOOL_BYTES,
        now: Callable[[], float] = time.time,
        boottime: Callable[[], float] = lambda: time.clock_gettime(time.CLOCK_BOOTTIME),
    ) -> None:
        """`new_instance_id` is taken where the directory holds no ledger, or a damaged one."""
        self.instance_id = new_instance_id
        self._new_instance_id = new_instance_id
        self.boot_id = boot_id
        self.news = asyncio.Event()
        self.is_reported = asyncio.Event()  # the server has stored the end of every command that ended
        self.is_reported.set()
        self._directory = directory
        self._commands_directory = directory / COMMANDS
        self._file = LedgerFile(directory, self._list_live)
        self._spool_bytes = spool_bytes
        self._now = now
        self._boottime = boottime
        self._entries: dict[str, Entry] = {}
        self._endings: OrderedDict[str, tuple[Ending, Moment]] = OrderedDict()
        self._answers: list[tuple[Ending, Moment]] = []  # to be told once
        self._accepted_count = 0

    # ------------------------------------------------------------ opening

    def open(self) -> list[Entry]:
        """Read the ledger; return the commands that were not over. Blocking.

        Raises:
            ConflictError: another agent uses the directory. UnavailableError: it cannot be used."""
        try:
            records, is_damaged = self._file.open()
            self._commands_directory.mkdir(mode=0o700, exist_ok=True)
            if not is_own_directory(self._commands_directory):
                raise PermissionError(errno.EPERM, f"{COMMANDS} is a link, or others may write to it")
            keep_reserve(str(self._directory))
        except BlockingIOError as err:
            raise ConflictError(f"another agent keeps its state in {self._directory}; give --state-dir") from err
        except OSError as err:
            problem = f"the ledger in {self._directory} cannot be used: {err.strerror}"
            hint = "make all in it this user's own, and writable for it alone, or give another with --state-dir"
            raise UnavailableError(f"{problem}; {hint}") from err
        understood = [self._try_to_replay(record) for record in records]
        if is_damaged or not all(understood):
            _log.error("the ledger is damaged: commands may have been forgotten")
            self._doubt()
        for entry in self._entries.values():
            entry.is_on_disk = entry.is_accepted_sent = True
            entry.is_ending_on_disk = entry.ending is not None
            self._find_output(entry)
        self._keep_quota()  # what ran on without an agent kept only its own
        self._remove_strays()
        self._update_reported()
        return [entry for entry in self._entries.values() if entry.state is not State.FINISHED]

    def begin(self) -> None:
        """Write down which instance this is, in the loop. Call it once, after `open`."""
        self._append({"record": "instance", "instance_id": self.instance_id})

    def close(self) -> None:
        """Blocking."""
        for entry in self._entries.values():
            if entry.output is not None:
                entry.output.close()
        self._file.close()

    def _try_to_replay(self, record: bytes) -> bool:
        """Return whether the record is understood: one that is whole may be of a newer agent."""
        try:
            self._replay(json.loads(record))
        except (ProtocolError, ValueError, KeyError, TypeError, AttributeError) as err:
            _log.error("a record of the ledger cannot be read: %s %s in %.200r", type(err).__name__, err, record)
            return False
        return True

    def _doubt(self) -> None:
        """Be another instance, as records are missing; what seems not to have been started may be one that ran."""
        self.instance_id = self._new_instance_id
        for entry in self._entries.values():
            if entry.state in (State.ACCEPTED, State.STARTING):
                entry.state, entry.started_boot_id = State.STARTING, None
                places = self._commands_directory.glob(f"{entry.command_id}.*")
                attempts = [int(place.suffix[1:]) for place in places if place.suffix[1:].isdecimal()]
                entry.attempt = max([entry.attempt, *attempts])
        self._file.compact()  # or the next agent would doubt what this one has settled

    def _replay(self, record: dict[str, Any]) -> None:
        entry = self._entries.get(record.get("command_id", ""))
        match record["record"]:
            case "instance":
                self.instance_id = record["instance_id"]
            case "accepted":
                offer = cast(CommandOffer, decode(record["offer"], FROM_SERVER))
                if not is_command_id(offer.command_id):
                    raise ValueError(f"{offer.command_id[:50]!r} is no command's id")
                self._hold(offer, record["boot_id"], record["expires_at"], record["expires_boottime"])
            case "starting" if entry:
                entry.state, entry.attempt, entry.started_boot_id = (
                    State.STARTING,
                    int(record["attempt"]),
                    record["boot_id"],
                )
            case "never_ran" if entry:
                entry.state, entry.attempt = State.ACCEPTED, int(record["attempt"])
            case "running" if entry:
                entry.state, entry.started = State.RUNNING, Moment(*record["started"])
            case "finished" if entry:
                ending, ended = _decode_ending(record["ending"]), Moment(*record["ended"])
                entry.state, entry.ending, entry.ended = State.FINISHED, ending, ended
            case "stored" if entry:
                del self._entries[entry.command_id]
                if entry.ending and entry.ended:
                    self._remember(entry.ending, entry.ended)
            case "ended":
                self._remember(_decode_ending(record["ending"]), Moment(*record["ended"]))
            case "starting" | "never_ran" | "running" | "finished" | "stored":  # of a command that is over
                pass
            case kind:  # of a newer agent: it may say that a command was started
                raise ValueError(f"kind {kind!r} is not known")

    def _list_live(self) -> Iterator[bytes]:
        """Return the records that make up the present state."""
        yield _pack({"record": "instance", "instance_id": self.instance_id})
        for ending, ended in self._endings.values():
            yield _pack({"record": "ended", "ending": encode(ending), "ended": ended})
        for entry in self._entries.values():
            yield _pack(_accepted(entry))
            known: dict[str, Any] = {"command_id": entry.command_id}
            if entry.state in (State.STARTING, State.RUNNING):
                yield _pack({"record": "starting", **known, "attempt": entry.attempt, "boot_id": entry.started_boot_id})
            elif entry.attempt > 1:
                yield _pack({"record": "never_ran", **known, "attempt": entry.attempt})
            if entry.started:
                yield _pack({"record": "running", **known, "started": entry.started})
            if entry.ending:
                yield _pack({"record": "finished", **known, "ending": encode(entry.ending), "ended": entry.ended})

    # ------------------------------------------------------------ looking

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, command_id: str) -> Entry | None:
        return self._entries.get(command_id)

    def state_of(self, command_id: str) -> State:
        if entry := self._entries.get(command_id):
            return entry.state
        return State.ENDED if command_id in self._endings else State.UNKNOWN

    def list_entries(self) -> tuple[LedgerEntry, ...]:
        """Return what the hello says of the commands held."""
        return tuple(entry.describe() for entry in self._entries.values() if entry.is_on_disk and not entry.is_muted)

    def next_messages(self) -> list[CommandMessage]:
        """Return the next message of every command that has one: a talkative command does not delay the others."""
        now = self.moment()
        answers = [_tell(ending, ended, now) for ending, ended in self._answers]
        self._answers.clear()
        entries = [entry for entry in self._entries.values() if not entry.is_muted]
        return [*answers, *(message for entry in entries if (message := entry.next_message(now)))]

    def moment(self) -> Moment:
        """Return what now is."""
        return Moment(self.boot_id, self._boottime(), self._now())

    def is_expired(self, entry: Entry) -> bool:
        """Whether its time to wait for its turn is over."""
        if entry.boot_id == self.boot_id:
            return self._boottime() >= entry.expires_boottime
        return self._now() >= entry.expires_at

    def directory_of(self, entry: Entry) -> Path:
        return self._commands_directory / f"{entry.command_id}.{entry.attempt}"

    # ------------------------------------------------------------ what happens to commands

    def add(self, offer: CommandOffer) -> tuple[Entry, "asyncio.Future[None]"]:
        """Hold a command; the future is done when that is on disk, and raises OSError when it cannot be."""
        seconds = offer.remaining_seconds
        entry = self._hold(offer, self.boot_id, self._now() + seconds, self._boottime() + seconds)
        saved = self._append(_accepted(entry))

        def note(saved: "asyncio.Future[None]") -> None:
            if saved.exception() is None:
                entry.is_on_disk = True
                self.news.set()

        saved.add_done_callback(note)
        return entry, saved

    def _hold(self, offer: CommandOffer, boot_id: str, expires_at: float, expires_boottime: float) -> Entry:
        self._accepted_count += 1
        entry = Entry(offer, boot_id, expires_at, expires_boottime, number=self._accepted_count)
        self._entries[offer.command_id] = entry
        return entry

    def drop(self, entry: Entry) -> None:
        """Forget a command whose acceptance could not be written: nobody was told of it."""
        self._entries.pop(entry.command_id, None)
        self._update_reported()

    async def record_starting(self, entry: Entry) -> None:
        """Write down that the command may run from here on; returns when that is on disk."""
        self._move(entry, Event.STARTED)
        entry.started_boot_id = self.boot_id
        saved = self._append(
            {
                "record": "starting",
                "command_id": entry.command_id,
                "attempt": entry.attempt,
                "boot_id": entry.started_boot_id,
            }
        )
        await asyncio.shield(saved)  # the record is written whether or not somebody still waits for it

    def record_running(self, entry: Entry, started_boottime: float) -> None:
        """What it says is also in the runner's keeping, so nobody waits for the disk.

        Args:
            started_boottime: when, in seconds of this boot's CLOCK_BOOTTIME."""
        self._move(entry, Event.RAN)
        now = self.moment()
        entry.started = now._replace(boottime=started_boottime, at=now.at - (now.boottime - started_boottime))
        self._append({"record": "running", "command_id": entry.command_id, "started": entry.started}, is_durable=False)
        self.news.set()

    def record_never_ran(self, entry: Entry) -> None:
        self._move(entry, Event.NEVER_RAN)
        self._close_output(entry)
        proof = self.directory_of(entry)
        entry.attempt += 1
        saved = self._append({"record": "never_ran", "command_id": entry.command_id, "attempt": entry.attempt})

        def note(saved: "asyncio.Future[None]") -> None:
            if saved.exception() is None:
                _remove_soon(proof)

        saved.add_done_callback(note)

    def finish(
        self, entry: Entry, ending: Ending, event: Event = Event.FINISHED, *, ended: Moment | None = None
    ) -> None:
        """Write down how a command ended, and when if not now; the server is told when that is on disk."""
        self._move(entry, event)
        entry.ending, entry.ended = ending, ended or self.moment()
        saved = self._append(
            {
                "record": "finished",
                "command_id": entry.command_id,
                "ending": encode(ending),
                "ended": entry.ended,
            }
        )

        def note(saved: "asyncio.Future[None]") -> None:
            if saved.exception() is not None:
                # The server is told all the same: it stores what this disk cannot.
                _log.error("the end of %s could not be written down: %s", entry.command_id, saved.exception())
            entry.is_ending_on_disk = True
            self.news.set()

        saved.add_done_callback(note)
        self._update_reported()
        if entry.is_muted:
            self.note_stored(entry.command_id)

    def remember(self, ending: Ending) -> None:
        """Write down that an id must not run that is not on disk; the server is told when that is, or cannot be.

        It need not be: a server that has stored the answer never offers the id again, and one that has not yet asks
        again when this agent comes back."""
        ended = self.moment()
        self._remember(ending, ended)
        saved = self._append({"record": "ended", "ending": encode(ending), "ended": ended})
        saved.add_done_callback(lambda _: self.answer(ending))

    def answer(self, ending: Ending) -> None:
        """Tell the server once."""
        self._answers.append((ending, self.moment()))
        self.news.set()

    def answer_again(self, command_id: str) -> None:
        self._answers.append(self._endings[command_id])
        self.news.set()

    def report_again(self, entry: Entry) -> None:
        entry.is_accepted_sent = entry.is_started_sent = entry.is_ending_sent = False
        self.news.set()

    # ------------------------------------------------------------ what the server says

    def note_output_stored(self, command_id: str, position: int) -> bool:
        """Return whether that made room on the disk."""
        entry = self._entries.get(command_id)
        if entry is None or position <= entry.stored_position:
            return False
        entry.stored_position = position
        self.news.set()
        if entry.output is None or entry.directory is None or not entry.output.drop_before(position):
            return False
        entry.spool_bytes = _measure(entry.directory)
        return True

    def note_stored(self, command_id: str) -> None:
        entry = self._entries.get(command_id)
        if entry is None or entry.ending is None or entry.ended is None:
            return
        self._move(entry, Event.STORED)
        del self._entries[command_id]
        self._remember(entry.ending, entry.ended)
        self._append({"record": "stored", "command_id": command_id}, is_durable=False)
        self._forget_directory(entry)
        self._update_reported()

    def mute(self, entry: Entry) -> None:
        """Say no more of a command."""
        entry.is_muted = True
        self._update_reported()

    def send_again(self, entry: Entry, *, position: int = 0) -> None:
        entry.send_again_from(position)
        self.news.set()

    # ------------------------------------------------------------ output on disk

    def note_output(self, entry: Entry) -> None:
        """There is more of it: tell the server, and keep all of it together within the quota."""
        self.news.set()
        if entry.directory is None:
            return
        entry.spool_bytes = _measure(entry.directory)
        self._keep_quota()

    def _keep_quota(self) -> None:
        """Remove output the server has not, of what ended longest ago first, then of what has most; the gap tells."""
        waiting_bytes = sum(entry.spool_bytes for entry in self._entries.values())
        now = self.moment()
        ended = [entry for entry in self._entries.values() if entry.state is State.FINISHED]
        ended.sort(key=lambda entry: (entry.ended or now).seconds_before(now), reverse=True)
        running = [entry for entry in self._entries.values() if entry.state is not State.FINISHED]
        for entry in [*ended, *sorted(running, key=lambda entry: -entry.spool_bytes)]:
            if waiting_bytes <= self._spool_bytes:
                return
            if entry.directory is None or not entry.spool_bytes:
                continue
            starts = list_segments(str(entry.directory))
            gone = starts if entry.state is State.FINISHED else starts[:-1]
            remove_segments(str(entry.directory), gone)
            _log.warning(
                "the server has been away for long: output of %s is dropped, as %d bytes of all commands wait on disk",
                entry.command_id,
                waiting_bytes,
            )
            left_bytes = _measure(entry.directory)
            waiting_bytes -= entry.spool_bytes - left_bytes
            entry.spool_bytes = left_bytes

    def _forget_directory(self, entry: Entry) -> None:
        self._close_output(entry)
        _remove_soon(self.directory_of(entry))

    def _close_output(self, entry: Entry) -> None:
        if entry.output is not None:
            entry.output.close()
        entry.output, entry.directory, entry.spool_bytes = None, None, 0

    def _find_output(self, entry: Entry) -> None:
        directory = self.directory_of(entry)
        if directory.is_dir():
            entry.open_output(directory)
            entry.spool_bytes = _measure(directory)

    def _remove_strays(self) -> None:
        known = {self.directory_of(entry) for entry in self._entries.values()}
        for path in self._commands_directory.iterdir():
            if path not in known:
                shutil.rmtree(path, ignore_errors=True)

    # ------------------------------------------------------------ the file

    def _append(self, record: dict[str, Any], *, is_durable: bool = True) -> "asyncio.Future[None]":
        saved = self._file.append(_pack(record), is_durable=is_durable)
        saved.add_done_callback(_complain)
        return saved

    def _move(self, entry: Entry, event: Event) -> None:
        """Bring the entry into its next state, before anything of it is changed or written.

        Raises:
            RuntimeError: nothing is to be written of that event in that state; what runs or is over would be undone."""
        to, action = move(entry.state, event)
        if action not in WRITING:
            states = " or ".join(state for state in State if move(state, event).action in WRITING)
            raise RuntimeError(f"{entry.command_id} is {entry.state}: {event} is written only of what is {states}")
        entry.state = to

    def _remember(self, ending: Ending, ended: Moment) -> None:
        short = replace(ending, killed=()) if isinstance(ending, CommandFinished) else ending
        self._endings[ending.command_id] = (short, ended)
        if len(self._endings) > REMEMBERED_ENDINGS:
            self._endings.popitem(last=False)

    def _update_reported(self) -> None:
        if any(entry.ending for entry in self._entries.values()):
            self.is_reported.clear()
        else:
            self.is_reported.set()


def _remove_soon(directory: Path) -> None:
    """Remove a directory in a thread: 32 MiB take a disk a while. What a kill leaves of it the next agent removes."""
    asyncio.get_running_loop().run_in_executor(None, partial(shutil.rmtree, directory, ignore_errors=True))


def _measure(directory: Path) -> int:
    """Return the bytes that output takes there; what cannot be read takes none."""
    try:
        return measure(str(directory))
    except OSError as err:
        _log.error("output in %s cannot be read: %s", directory, err)
        return 0


def _accepted(entry: Entry) -> dict[str, Any]:
    return {
        "record": "accepted",
        "offer": encode(entry.offer),
        "boot_id": entry.boot_id,
        "expires_at": entry.expires_at,
        "expires_boottime": entry.expires_boottime,
    }


def _tell(ending: Ending, ended: Moment, now: Moment) -> Ending:
    """Return what the server is told of an end now."""
    return replace(ending, seconds_ago=ended.seconds_before(now)) if isinstance(ending, CommandFinished) else ending


def _pack(record: dict[str, Any]) -> bytes:
    return json.dumps(record, separators=(",", ":")).encode()


def _decode_ending(text: str) -> Ending:
    return cast(Ending, decode(text, FROM_AGENT))


def _complain(saved: "asyncio.Future[None]") -> None:
    if (error := saved.exception()) is not None:
        _log.error("the ledger cannot be written: %s", error)
