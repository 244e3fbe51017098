"""The commands the server offers: accepted, run, watched, stopped. Output and result go to the ledger."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, Literal, TypeAlias

from fleetwire_agent.config import Profile
from fleetwire_agent.ledger import CommandMessage, Entry, Ledger, Stream, build_result
from fleetwire_agent.processes import COMMAND_ID_VARIABLE, Pipe, Process, Spawner, kill_processes
from fleetwire_shared.limits import CHUNK_BYTES, MAX_COMMANDS_AT_ONCE
from fleetwire_shared.messages import (
    CommandCancel,
    CommandFinished,
    CommandOffer,
    CommandRejected,
    Settlement,
)

RejectReason: TypeAlias = Literal["cancelled", "expired", "full", "policy", "unsupported", "invalid"]
StopReason: TypeAlias = Literal["timed_out", "cancelled", "interrupted"]

MAX_HELD_COMMANDS: Final = 256
"""Commands waiting, running or not yet stored by the server; more are rejected as `full`. Bounds the memory."""

SHUTDOWN_GRACE_SECONDS: Final = 0.5
"""Between SIGTERM and SIGKILL when the agent itself has to end."""

MONITOR_RUNS_NOTHING: Final = (
    "this host's agent was installed with the profile monitor, which runs no commands;"
    " install it with --profile manage to allow them"
)

_BACKGROUND_OUTPUT_SECONDS: Final = 0.5  # how long a background child may hold the output after the shell's exit
_LAST_OUTPUT_SECONDS: Final = 0.3  # for the watchers to note the ends, once all is killed
_INTERRUPTED: Final = "the agent was stopped"

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Run:
    """A command whose process runs, or is being watched to its end."""

    entry: Entry
    process: Process
    started: float  # monotonic
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    stop_reason: StopReason | None = None
    error: str | None = None

    def request_stop(self, reason: StopReason) -> None:
        """Ask for the end; the first reason counts."""
        self.stop_reason = self.stop_reason or reason
        self.stop.set()


class Commands:
    """Takes offers and cancels, runs at most `max_at_once` commands at a time, the others in order of arrival."""

    def __init__(
        self,
        *,
        spawner: Spawner,
        ledger: Ledger,
        max_at_once: int = MAX_COMMANDS_AT_ONCE,
        profile: Profile = "manage",
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._spawner = spawner
        self._ledger = ledger
        self._max_at_once = max_at_once
        self._profile = profile
        self._now = now
        self._clock = clock
        self._shell = ("/bin/bash", "-c") if Path("/bin/bash").exists() else ("/bin/sh", "-c")
        self._waiting: deque[Entry] = deque()
        self._runs: dict[str, _Run] = {}
        self._is_idle = asyncio.Event()  # nothing runs
        self._is_idle.set()
        self._is_stopping = False
        self._group: asyncio.TaskGroup | None = None

    async def serve(self) -> None:
        """Own the tasks that watch commands, until cancelled. Offers are started from here on."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            try:
                self._start_waiting()
                await asyncio.get_running_loop().create_future()
            finally:
                self._group = None

    async def deliver(self, send: Callable[[CommandMessage], Awaitable[None]]) -> None:
        """Tell the server of one link all it has not been told yet, until cancelled."""
        while True:
            self._ledger.news.clear()
            while messages := self._ledger.next_messages():
                for message in messages:
                    await send(message)
            await self._ledger.news.wait()

    # ------------------------------------------------------------ what the server asks

    def offer(self, message: CommandOffer) -> CommandRejected | CommandFinished | None:
        """Take a command, or return why not. The same id never runs twice: it is answered by what became of it."""
        if ending := self._ledger.get_ending(message.command_id):
            return ending
        if entry := self._ledger.get(message.command_id):
            entry.is_accepted_sent = entry.is_started_sent = entry.is_result_sent = False
            self._ledger.news.set()
            return None
        if rejection := self._reject(message):
            return rejection
        self._waiting.append(self._ledger.add(message))
        self._start_waiting()
        return None

    def _reject(self, message: CommandOffer) -> CommandRejected | None:
        """Return why the command cannot be taken now; not remembered, as the same offer may be welcome later."""
        reject = partial(_rejection, message.command_id)
        if self._profile == "monitor":
            return reject("policy", MONITOR_RUNS_NOTHING)
        if message.kind != "shell":
            return reject("unsupported", f'kind must be "shell", got {message.kind[:50]!r}')
        if message.remaining_seconds <= 0:
            return reject("expired", "the offer expired before it arrived")
        if message.timeout_seconds <= 0:
            return reject("invalid", f"timeout must be more than 0 seconds, got {message.timeout_seconds}")
        if self._is_stopping or len(self._ledger) >= MAX_HELD_COMMANDS:
            return reject("full", f"the agent takes no more: it is stopping or holds {MAX_HELD_COMMANDS} commands")
        return None

    def cancel(self, message: CommandCancel) -> CommandRejected | CommandFinished | None:
        """Stop a command and all it started. What has not started never will, also when its offer is still to come."""
        command_id = message.command_id
        entry = self._ledger.get(command_id)
        if entry is None:
            ending = self._ledger.get_ending(command_id) or _rejection(command_id, "cancelled", "cancelled")
            self._ledger.remember(ending)
            return ending
        if entry.result:
            return None  # told by itself, after the output that comes before it
        if run := self._runs.get(command_id):
            run.request_stop("cancelled")
            return None
        self._waiting.remove(entry)
        rejection = _rejection(command_id, "cancelled", "cancelled before it started")
        self._ledger.remove(entry, rejection)
        return rejection

    def settle(self, settlements: Sequence[Settlement]) -> list[CommandRejected | CommandFinished]:
        """Bring the ledger in line with what the server of a new link holds; return the answers it waits for.

        A command without a settlement is kept."""
        by_id = {settlement.command_id: settlement for settlement in settlements}
        answers: list[CommandRejected | CommandFinished] = []
        for held in self._ledger.list_entries():
            entry = self._ledger.get(held.command_id)
            settlement = by_id.get(held.command_id)
            if entry is None:
                continue
            if settlement and settlement.action == "forget":
                self._ledger.forget(held.command_id)
                continue
            self._ledger.send_again(entry, position=settlement.output_position if settlement else 0)
            if settlement and settlement.action == "cancel":
                answer = self.cancel(CommandCancel(command_id=held.command_id))
                answers += [answer] if answer else []
        return answers

    async def stop(self) -> None:
        """End everything for the agent's own end: nothing starts any more, what runs is killed and interrupted.

        Returns when all is dead and its result is in the ledger, at most about a second later."""
        self._is_stopping = True
        for entry in self._waiting:
            self._ledger.finish(entry, build_result(entry, "interrupted", error=_INTERRUPTED, now=self._now))
        self._waiting.clear()
        runs = list(self._runs.values())
        for run in runs:
            run.request_stop("interrupted")
        await kill_processes([run.process for run in runs], grace_seconds=SHUTDOWN_GRACE_SECONDS)
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_OUTPUT_SECONDS):
                await self._is_idle.wait()

    # ------------------------------------------------------------ running

    def _start_waiting(self) -> None:
        while self._group and self._waiting and len(self._runs) < self._max_at_once and not self._is_stopping:
            self._start(self._group, self._waiting.popleft())

    def _start(self, group: asyncio.TaskGroup, entry: Entry) -> None:
        started = self._clock()
        try:
            process = self._spawner.spawn(
                [*self._shell, entry.offer.command], env={COMMAND_ID_VARIABLE: entry.command_id}
            )
        except (OSError, ValueError) as err:
            self._ledger.finish(entry, build_result(entry, "failed", error=_describe_spawn_error(err), now=self._now))
            return
        self._ledger.start(entry, started_at=self._now())
        run = self._runs[entry.command_id] = _Run(entry, process, started)
        self._is_idle.clear()
        group.create_task(self._watch(run), name=f"command {entry.command_id}")

    async def _watch(self, run: _Run) -> None:
        pumps = [
            _Pump(run.process.stdout, self._ledger, run.entry, "stdout"),
            _Pump(run.process.stderr, self._ledger, run.entry, "stderr"),
        ]
        try:
            async with asyncio.TaskGroup() as group:
                reading = [group.create_task(pump.run()) for pump in pumps]
                returncode = await self._wait_for_end(run)
                await asyncio.wait(reading, timeout=_BACKGROUND_OUTPUT_SECONDS)
                for task in reading:
                    task.cancel()
            for pump in pumps:
                pump.finish()
        finally:
            run.process.close()
        self._finish(run, returncode)

    async def _wait_for_end(self, run: _Run) -> int | None:
        """Return the shell's exit status, or None when all is dead after a timeout or a stop."""
        async with asyncio.TaskGroup() as group:
            exit_task = group.create_task(run.process.wait())
            stop_task = group.create_task(run.stop.wait())
            done, _ = await asyncio.wait(
                (exit_task, stop_task),
                timeout=run.entry.offer.timeout_seconds,
                return_when=asyncio.FIRST_COMPLETED,
            )
            stop_task.cancel()
            if exit_task in done and stop_task not in done:
                return exit_task.result()
            run.request_stop("timed_out")
            # At the agent's own end `stop` kills all commands together.
            survivors = [] if run.stop_reason == "interrupted" else await kill_processes([run.process])
            if survivors:
                run.error = f"processes {survivors} survived SIGKILL"
                exit_task.cancel()
        return None

    def _finish(self, run: _Run, returncode: int | None) -> None:
        duration_seconds = self._clock() - run.started
        if returncode is None:
            status = run.stop_reason or "interrupted"
            error = run.error or (_INTERRUPTED if status == "interrupted" else None)
            result = build_result(run.entry, status, duration_seconds=duration_seconds, error=error)
        else:
            exit_code = returncode if returncode >= 0 else 128 - returncode
            status_of_exit: Literal["succeeded", "failed"] = "succeeded" if exit_code == 0 else "failed"
            result = build_result(run.entry, status_of_exit, exit_code=exit_code, duration_seconds=duration_seconds)
        del self._runs[run.entry.command_id]
        if not self._runs:
            self._is_idle.set()
        self._ledger.finish(run.entry, result)
        self._start_waiting()


@dataclass(slots=True)
class _Pump:
    """Moves one stream of a command into the ledger, in pieces that never end within a UTF-8 character."""

    pipe: Pipe
    ledger: Ledger
    entry: Entry
    stream: Stream
    rest: bytes = b""  # the start of a character whose end has not come yet

    async def run(self) -> None:
        while True:
            await self.entry.has_room.wait()
            content = await self.pipe.read(CHUNK_BYTES - len(self.rest))
            if not content:
                return
            self._add(content)

    def finish(self) -> None:
        """Take what is in the pipe now, whatever the window says: the shell has exited and nobody waits for it."""
        remaining = memoryview(self.pipe.read_rest())
        while remaining:
            size = CHUNK_BYTES - len(self.rest)
            self._add(bytes(remaining[:size]))
            remaining = remaining[size:]
        if self.rest:
            self.ledger.add_output(self.entry, self.stream, self.rest)
            self.rest = b""

    def _add(self, content: bytes) -> None:
        content, self.rest = split_incomplete_character(self.rest + content)
        if content:
            self.ledger.add_output(self.entry, self.stream, content)


def split_incomplete_character(content: bytes) -> tuple[bytes, bytes]:
    """Return `content` without, and the 0 to 3 bytes of, a UTF-8 character that its end cuts through.

    Bytes that cannot become a character whatever follows are not held back."""
    for length in range(1, min(3, len(content)) + 1):
        byte = content[-length]
        if byte & 0b1100_0000 == 0b1000_0000:
            continue  # a continuation byte: its first byte is further left
        needed = 2 if 0xC2 <= byte <= 0xDF else 3 if 0xE0 <= byte <= 0xEF else 4 if 0xF0 <= byte <= 0xF4 else 1
        return (content[:-length], content[-length:]) if needed > length else (content, b"")
    return content, b""


def _rejection(command_id: str, reason: RejectReason, message: str) -> CommandRejected:
    return CommandRejected(command_id=command_id, reason=reason, message=message)


def _describe_spawn_error(error: OSError | ValueError) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"the command could not be started: {error.strerror}"
    return f"the command could not be started: {error}"
