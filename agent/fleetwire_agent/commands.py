"""The commands the server offers: written down, started in order, watched, stopped. What they say and how they end goes
to the ledger; the runners hold the processes, so that a command outlives this agent."""

import asyncio
import logging
import shutil
from bisect import insort
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, Literal, TypeAlias

from fleetwire_agent import runners
from fleetwire_agent.command_states import Action, Event, State, move
from fleetwire_agent.config import Profile
from fleetwire_agent.ledger import CommandMessage, Entry, Ledger
from fleetwire_agent.moments import Moment
from fleetwire_agent.process_table import COMMAND_ID_VARIABLE
from fleetwire_agent.runner import files
from fleetwire_agent.runner.spool import SpoolReader, Stream
from fleetwire_agent.runners import Launcher, RunnerLink
from fleetwire_shared.errors import UnavailableError
from fleetwire_shared.limits import MAX_COMMANDS_AT_ONCE
from fleetwire_shared.messages import (
    CommandCancel,
    CommandFinished,
    CommandOffer,
    CommandRejected,
    KilledProcess,
    Settlement,
)

RejectReason: TypeAlias = Literal["cancelled", "expired", "full", "policy", "unsupported", "invalid"]

MAX_HELD_COMMANDS: Final = 256
"""Commands waiting, running or not yet stored by the server; more are rejected as `full`."""

GRACE_SECONDS: Final = 2.0
"""Between SIGTERM and SIGKILL."""

TURN_SECONDS: Final = 5.0
"""How long a command whose runner is slow to come up keeps those behind it from starting before it."""

HEAD_SEGMENTS: Final = 16
WAITING_SEGMENTS: Final = 8
MAX_ATTEMPTS: Final = 100

MONITOR_RUNS_NOTHING: Final = (
    "this host's agent was installed with the profile monitor, which runs no commands;"
    " install it with --profile manage to allow them"
)

_NOTHING: Final[Mapping[Stream, int]] = {"stdout": 0, "stderr": 0}
_EXPIRY_ROUND_SECONDS: Final = 1.0
_CONNECT_ROUND_SECONDS: Final = 1.0
_HOST_RESTARTED: Final = "the host restarted while the command ran: it may have run in part"
_RUNNER_DIED: Final = (
    "there is no result: the process that watched over the command was killed, or the command's directory on the host"
    " was removed or damaged; what was left of the command was killed"
)
_LEDGER_DAMAGED: Final = "the agent's ledger was damaged: whether the command ran is not known, and it will not run now"
_REMOVED: Final = "the agent was removed from the host, or given to another user there"

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Run:
    """A command that has a runner, or is getting one."""

    entry: Entry
    link: RunnerLink | None = None
    is_prepared: asyncio.Event = field(default_factory=asyncio.Event)  # its runner waits for the word, or has failed
    may_start: asyncio.Event = field(default_factory=asyncio.Event)  # it is its turn
    has_started: asyncio.Event = field(default_factory=asyncio.Event)  # or is over
    stop_word: str | None = None  # to be said as soon as there is a link

    def stop(self, word: str) -> None:
        """Have the runner end the command; the first reason counts."""
        self.stop_word = self.stop_word or word
        if self.link is not None and self.entry.state in (State.STARTING, State.RUNNING):
            self.link.send(self.stop_word)


class Commands:
    """Takes offers and cancels, runs at most `max_at_once` commands at a time, the others in order of arrival."""

    def __init__(
        self,
        *,
        launcher: Launcher,
        ledger: Ledger,
        environment: Mapping[str, str],
        max_at_once: int = MAX_COMMANDS_AT_ONCE,
        profile: Profile = "manage",
        grace_seconds: float = GRACE_SECONDS,
    ) -> None:
        self._launcher = launcher
        self._ledger = ledger
        self._environment = dict(environment)
        self._max_at_once = max_at_once
        self._profile = profile
        self._grace_seconds = grace_seconds
        self._shell = ("/bin/bash", "-c") if Path("/bin/bash").exists() else ("/bin/sh", "-c")
        self._waiting: deque[Entry] = deque()
        self._turns: deque[_Run] = deque()  # prepared or being prepared, in the order in which they are to start
        self._runs: dict[str, _Run] = {}
        self._has_news = asyncio.Event()  # for the loop that prepares commands
        self._has_turns = asyncio.Event()
        self._is_idle = asyncio.Event()  # nothing runs
        self._is_idle.set()
        self._is_connected = False
        self._is_stopping = False

    async def serve(self, found: Sequence[Entry] = ()) -> None:
        """Find the commands again that were not over when the agent ended, then run all there are, until cancelled."""
        async with asyncio.TaskGroup() as group:
            for entry in found:
                if entry.state is State.ACCEPTED:
                    self._waiting.append(entry)
                else:
                    self._add_run(entry, group, self._find_again)
            group.create_task(self._start_in_turn())
            while True:
                self._prepare_waiting(group)
                try:
                    async with asyncio.timeout(_EXPIRY_ROUND_SECONDS if self._waiting else None):
                        await self._has_news.wait()
                except TimeoutError:
                    self._expire_waiting()
                self._has_news.clear()

    async def deliver(self, send: Callable[[CommandMessage], Awaitable[None]]) -> None:
        """Tell the server of one link all it has not been told yet, until cancelled."""
        while True:
            self._ledger.news.clear()
            while messages := self._ledger.next_messages():
                for message in messages:
                    await send(message)
            await self._ledger.news.wait()

    def connect(self) -> None:
        """A link is up: from now on output that the server is slow to take makes its command wait."""
        self._tell_all(is_connected=True)

    def disconnect(self) -> None:
        """The link is gone: output beyond the quota is dropped, no command waits for the server."""
        self._tell_all(is_connected=False)

    def _tell_all(self, *, is_connected: bool) -> None:
        self._is_connected = is_connected
        for run in self._runs.values():
            self._tell_flow(run)

    def _tell_flow(self, run: _Run) -> None:
        if run.link is not None and run.entry.state in (State.STARTING, State.RUNNING):
            run.link.send("wait" if self._is_connected and not run.entry.is_muted else "drop")

    # ------------------------------------------------------------ what the server asks

    def offer(self, message: CommandOffer) -> None:
        """Take a command, or answer why not. The same id never runs twice: it is answered by what became of it."""
        command_id = message.command_id
        match move(self._ledger.state_of(command_id), Event.OFFERED).action:
            case Action.ACCEPT:
                if rejection := self._reject(message):
                    self._ledger.answer(rejection)
                else:
                    self._accept(message)
            case Action.REPORT:
                if entry := self._ledger.get(command_id):
                    self._ledger.report_again(entry)
            case Action.ANSWER:
                self._ledger.answer_again(command_id)
            case _:
                pass

    def _accept(self, message: CommandOffer) -> None:
        entry, saved = self._ledger.add(message)

        def begin(saved: "asyncio.Future[None]") -> None:
            if saved.exception() is None:
                if entry.state is State.ACCEPTED and self._is_stopping:
                    self._withdraw(entry, "cancelled", _REMOVED, Event.CANCELLED)
                elif entry.state is State.ACCEPTED:
                    self._waiting.append(entry)
                    self._has_news.set()
                return
            self._ledger.drop(entry)
            if entry.ending is not None:  # cancelled meanwhile: it must not run should it be offered again
                self._ledger.remember(entry.ending)
                return
            problem = f"the agent cannot write its ledger: {saved.exception()}"
            self._ledger.answer(_rejection(message.command_id, "full", problem))

        saved.add_done_callback(begin)

    def _reject(self, message: CommandOffer) -> CommandRejected | None:
        """Return why the command cannot be taken now; not remembered, as the same offer may be welcome later."""
        reject = partial(_rejection, message.command_id)
        if not runners.is_command_id(message.command_id):
            return reject("invalid", f"command_id must be cmd_ and 0-9, a-z or _, got {message.command_id[:50]!r}")
        if self._profile == "monitor":
            return reject("policy", MONITOR_RUNS_NOTHING)
        if message.kind != "shell":
            return reject("unsupported", f'kind must be "shell", got {message.kind[:50]!r}')
        if message.remaining_seconds <= 0:
            return reject("expired", "the offer expired before it arrived")
        if message.timeout_seconds <= 0:
            return reject("invalid", f"timeout must be more than 0 seconds, got {message.timeout_seconds}")
        if self._is_stopping:
            return reject("full", "the agent takes no more commands: it is being removed from the host")
        if (held := len(self._ledger)) >= MAX_HELD_COMMANDS:
            return reject("full", f"the agent holds {held} commands, and takes at most {MAX_HELD_COMMANDS}")
        return None

    def cancel(self, message: CommandCancel) -> None:
        """Stop a command and all it started. What has not started never will, also when its offer is still to come."""
        command_id = message.command_id
        match move(self._ledger.state_of(command_id), Event.CANCELLED).action:
            case Action.REMEMBER:
                text = "out of time before the agent received it" if message.reason == "expired" else "cancelled"
                self._ledger.remember(_rejection(command_id, message.reason, text))
            case Action.WITHDRAW:
                if entry := self._ledger.get(command_id):
                    self._withdraw(entry, message.reason, f"{message.reason} before it started", Event.CANCELLED)
            case Action.STOP:
                if run := self._runs.get(command_id):
                    run.stop("stop cancelled")
            case Action.ANSWER:
                self._ledger.answer_again(command_id)
            case _:  # over, and told by itself after the output that comes before it
                pass

    def _withdraw(self, entry: Entry, reason: RejectReason, text: str, event: Event) -> None:
        if entry in self._waiting:
            self._waiting.remove(entry)
        self._ledger.finish(entry, _rejection(entry.command_id, reason, text), event)
        if run := self._runs.get(entry.command_id):
            run.may_start.set()  # it sees that there is nothing to start

    def settle(self, settlements: Sequence[Settlement]) -> None:
        """Bring the ledger in line with what the server of a new link holds. A command without a settlement is kept."""
        by_id = {settlement.command_id: settlement for settlement in settlements}
        for held in self._ledger.list_entries():
            entry = self._ledger.get(held.command_id)
            settlement = by_id.get(held.command_id)
            if entry is None:
                continue
            if settlement and settlement.action == "forget":
                self._forget(entry)
                continue
            self._ledger.send_again(entry, position=settlement.output_position if settlement else 0)
            if settlement and settlement.action == "cancel":
                self.cancel(CommandCancel(command_id=held.command_id))

    def _forget(self, entry: Entry) -> None:
        match move(entry.state, Event.FORGOTTEN).action:
            case Action.RECORD:
                self._ledger.note_stored(entry.command_id)
            case Action.WITHDRAW:
                self._ledger.mute(entry)
                self._withdraw(entry, "cancelled", "the server knows nothing of it", Event.FORGOTTEN)
            case Action.MUTE:
                self._ledger.mute(entry)
                if run := self._runs.get(entry.command_id):
                    self._tell_flow(run)
            case _:
                pass

    def note_output_stored(self, command_id: str, position: int) -> None:
        """The server has stored output: what it has is removed here, and its command may write on."""
        if self._ledger.note_output_stored(command_id, position):
            run = self._runs.get(command_id)
            if run is not None and run.link is not None:
                run.link.send("freed")

    async def stop(self) -> None:
        """End everything, as the agent is being removed: nothing starts any more, what runs is killed and interrupted.

        Returns when all is over, at most ten seconds later."""
        self._is_stopping = True
        for entry in list(self._waiting):
            self._withdraw(entry, "cancelled", _REMOVED, Event.CANCELLED)
        for run in list(self._runs.values()):
            if run.entry.state is State.ACCEPTED:
                self._withdraw(run.entry, "cancelled", _REMOVED, Event.CANCELLED)
            else:
                run.stop("stop interrupted")
        try:
            async with asyncio.timeout(runners.STOP_SECONDS):
                await self._is_idle.wait()
        except TimeoutError:
            _log.error("commands still run: %s", ", ".join(self._runs))

    # ------------------------------------------------------------ turns

    def _prepare_waiting(self, group: asyncio.TaskGroup) -> None:
        while self._waiting and len(self._runs) < self._max_at_once and not self._is_stopping:
            entry = self._waiting.popleft()
            if self._profile == "monitor":  # of an agent in the same directory that had another profile
                self._withdraw(entry, "policy", MONITOR_RUNS_NOTHING, Event.CANCELLED)
            elif self._ledger.is_expired(entry):
                self._expire(entry)
            else:
                self._turns.append(self._add_run(entry, group, self._run))
                self._has_turns.set()

    def _add_run(self, entry: Entry, group: asyncio.TaskGroup, life: Callable[[_Run], Awaitable[None]]) -> _Run:
        run = self._runs[entry.command_id] = _Run(entry)
        self._is_idle.clear()
        group.create_task(self._live(run, life), name=f"command {entry.command_id}")
        return run

    async def _live(self, run: _Run, life: Callable[[_Run], Awaitable[None]]) -> None:
        try:
            await life(run)
        finally:
            run.is_prepared.set()
            run.has_started.set()
            if run.link is not None:
                run.link.close()
            del self._runs[run.entry.command_id]
            if not self._runs:
                self._is_idle.set()
            self._has_news.set()

    async def _start_in_turn(self) -> None:
        """Let prepared commands start, each after the one that was offered before it."""
        while True:
            while self._turns:
                run = self._turns.popleft()
                try:
                    async with asyncio.timeout(TURN_SECONDS):
                        await run.is_prepared.wait()
                        run.may_start.set()
                        await run.has_started.wait()
                except TimeoutError:
                    _log.warning("command %s is slow to start; others go first", run.entry.command_id)
                    run.may_start.set()
            self._has_turns.clear()
            await self._has_turns.wait()

    def _expire_waiting(self) -> None:
        for entry in [entry for entry in self._waiting if self._ledger.is_expired(entry)]:
            self._expire(entry)

    def _expire(self, entry: Entry) -> None:
        text = "it waited on its host for its turn until it was out of time"
        self._withdraw(entry, "expired", text, Event.EXPIRED)

    # ------------------------------------------------------------ one command

    async def _run(self, run: _Run) -> None:
        """Prepare a runner, wait for the turn, start the command, and watch it to its end."""
        entry = run.entry
        directory = self._ledger.directory_of(entry)
        try:
            if await asyncio.to_thread(directory.is_dir):  # of an agent that was killed before it gave the word
                await runners.dismiss(directory)
                if entry.state is not State.ACCEPTED:  # withdrawn meanwhile
                    return
                self._ledger.record_never_ran(entry)
                directory = self._ledger.directory_of(entry)
            await self._prepare(entry, directory)
            run.link = runners.connect(directory)
        except (OSError, UnavailableError) as err:
            self._fail(entry, f"the command could not be started: {_describe(err)}")
            return
        run.is_prepared.set()
        await run.may_start.wait()
        if entry.state is not State.ACCEPTED:  # withdrawn meanwhile; the runner sees the link close, and ends
            return
        try:
            await self._ledger.record_starting(entry)
        except OSError as err:
            await self._conclude(run, directory, problem=f"the ledger cannot be written: {err}")
            return
        if run.link is not None:
            run.link.send("go")
        entry.open_output(directory)
        await self._watch(run, directory)

    async def _prepare(self, entry: Entry, directory: Path) -> None:
        order = files.Order(
            command_id=entry.command_id,
            argv=[*self._shell, entry.offer.command],
            environment={**self._environment, COMMAND_ID_VARIABLE: entry.command_id},
            timeout_seconds=entry.offer.timeout_seconds,
            grace_seconds=self._grace_seconds,
            head_segments=HEAD_SEGMENTS,
            waiting_segments=WAITING_SEGMENTS,
        )
        await asyncio.to_thread(_write_order, directory, order)
        await self._launcher.launch(directory, entry.command_id)

    def _fail(self, entry: Entry, problem: str) -> None:
        if entry.state is State.ACCEPTED:
            self._ledger.finish(entry, self._build_ending(entry, "failed", error=problem, written=_NOTHING))

    async def _find_again(self, run: _Run) -> None:
        """Go on with a command that an earlier agent started, or was about to."""
        directory = self._ledger.directory_of(run.entry)
        run.is_prepared.set()
        if run.entry.started_boot_id in (self._ledger.boot_id, None):
            run.link = await self._connect_again(run.entry, directory)
        await self._watch(run, directory)

    async def _connect_again(self, entry: Entry, directory: Path) -> RunnerLink | None:
        """Return a link to the runner, None when it has ended: what cannot be told now is asked until it can, as a
        runner that is taken for dead has its command killed."""
        is_told = False
        while True:
            try:
                return runners.connect(directory)
            except OSError as err:
                if not is_told:
                    _log.error("whether %s still runs cannot be seen, and is tried again: %s", entry.command_id, err)
                is_told = True
            await asyncio.sleep(_CONNECT_ROUND_SECONDS)

    def _may_be_of_this_boot(self, entry: Entry) -> bool:
        """Whether what it started may still run. Where the ledger has lost the start, the acceptance counts."""
        return (entry.started_boot_id or entry.boot_id) == self._ledger.boot_id

    async def _watch(self, run: _Run, directory: Path) -> None:
        """Listen to the runner until it ends; then see how the command ended."""
        entry = run.entry
        self._tell_flow(run)
        if run.stop_word:  # said before there was a link
            run.stop(run.stop_word)
        while run.link is not None and (word := await run.link.receive()) is not None:
            verb, _, argument = word.partition(" ")
            if verb == "started" and entry.state is State.STARTING:
                self._ledger.record_running(entry, float(argument))
                run.has_started.set()
                self._tell_flow(run)
                if run.stop_word:
                    run.link.send(run.stop_word)
            elif verb == "output":
                self._ledger.note_output(entry)
            elif verb == "done":
                break
        await self._conclude(run, directory)

    async def _conclude(self, run: _Run, directory: Path, *, problem: str | None = None) -> None:
        """The runner has ended: take its result; where it left none, find out what that means."""
        entry = run.entry
        result = None
        error = _RUNNER_DIED if self._may_be_of_this_boot(entry) else _HOST_RESTARTED
        if entry.started_boot_id is None:
            error = _LEDGER_DAMAGED
        try:
            result = await asyncio.to_thread(files.read_result, str(directory))
            # What was seen to run has run, also where its claim was removed.
            may_be_unstarted = move(entry.state, Event.NEVER_RAN).action is Action.REQUEUE
            is_provable = may_be_unstarted and entry.started_boot_id == self._ledger.boot_id
            if result is None and is_provable and await asyncio.to_thread(self._claim, directory):
                self._start_again(run, problem)
                return
            if result is None and self._may_be_of_this_boot(entry):
                await runners.kill_leftovers(directory)
                result = await asyncio.to_thread(files.read_result, str(directory))
        except files.UnknownResultError as err:
            error = f"it ended, and how is not known to this version of the agent: {err}"
        except OSError as err:
            error = (
                f"how it ended cannot be read from the host's disk: {_describe(err)}; what was left of it was killed"
            )
            if self._may_be_of_this_boot(entry):
                await runners.kill_leftovers(directory)
        if result is None:
            _log.warning("%s is interrupted: %s", entry.command_id, error)
            written = await asyncio.to_thread(_count_output, entry)
            self._ledger.finish(entry, self._build_ending(entry, "interrupted", error=error, written=written))
            return
        ended = Moment(entry.started_boot_id or "", result.ended_boottime, result.ended_at)
        self._ledger.finish(entry, _ending_from(entry, result), ended=ended)

    def _claim(self, directory: Path) -> bool:
        """Whether it is sure that the runner has not started the shell, and never will."""
        try:
            return files.claim(str(directory), "agent")
        except (FileNotFoundError, NotADirectoryError):  # it was there before the start: somebody has removed it
            return False

    def _start_again(self, run: _Run, problem: str | None) -> None:
        """It never ran: let it wait for its turn again, or end it where it was not to run any more."""
        entry = run.entry
        self._ledger.record_never_ran(entry)
        if run.stop_word:
            self._withdraw(entry, "cancelled", "cancelled before it started", Event.CANCELLED)
        elif problem or entry.attempt > MAX_ATTEMPTS:
            self._fail(entry, f"the command could not be started: {problem or 'its runner does not come up'}")
        elif not self._is_stopping:
            insort(self._waiting, entry, key=lambda each: each.number)

    def _build_ending(
        self, entry: Entry, status: Literal["failed", "interrupted"], *, error: str, written: Mapping[Stream, int]
    ) -> CommandFinished:
        """Return the end of a command that left no result."""
        return CommandFinished(
            command_id=entry.command_id,
            status=status,
            exit_code=None,
            stdout_bytes=written["stdout"],
            stderr_bytes=written["stderr"],
            seconds_ago=0.0,
            duration_seconds=0.0,
            error=error,
        )


def _write_order(directory: Path, order: files.Order) -> None:
    state_directory = str(directory.parent.parent)
    files.keep_reserve(state_directory)
    try:
        files.write_order(str(directory), order)
    except OSError:
        if not files.use_reserve(state_directory):
            raise
        shutil.rmtree(directory, ignore_errors=True)
        files.write_order(str(directory), order)


def _count_output(entry: Entry) -> dict[Stream, int]:
    """Return what the disk shows of a command that left no result. Blocking."""
    written = dict(_NOTHING)
    if entry.directory is not None and entry.directory.is_dir():
        reader = SpoolReader(str(entry.directory))
        try:
            while piece := reader.read():
                written[piece.stream] = piece.offset + len(piece.content)
        except OSError as err:
            _log.error("output of %s cannot be read: %s", entry.command_id, err)
        reader.close()
    return written


def _ending_from(entry: Entry, result: files.Result) -> CommandFinished:
    """Return the message that says how a command ended; how long ago that is the ledger adds when it is sent."""
    return CommandFinished(
        command_id=entry.command_id,
        status=result.status,
        exit_code=result.exit_code,
        stdout_bytes=result.stdout_bytes,
        stderr_bytes=result.stderr_bytes,
        seconds_ago=0.0,
        duration_seconds=result.duration_seconds,
        error=result.error,
        killed=tuple(KilledProcess(pid=each.pid, command=each.command, signal=each.signal) for each in result.killed),
        killed_count=result.killed_count,
    )


def _rejection(command_id: str, reason: RejectReason, message: str) -> CommandRejected:
    return CommandRejected(command_id=command_id, reason=reason, message=message)


def _describe(error: OSError | UnavailableError) -> str:
    return error.message if isinstance(error, UnavailableError) else error.strerror or str(error)
