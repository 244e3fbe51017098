"""Commands with a real ledger and real runners, and a server that is a list of what it was told."""

import asyncio
import base64
import os
import resource
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from fleetwire_agent.commands import Commands
from fleetwire_agent.config import Profile
from fleetwire_agent.ledger import CommandMessage, Entry, Ledger
from fleetwire_agent.processes import Spawner
from fleetwire_agent.runners import find_launcher
from fleetwire_shared.messages import CommandFinished, CommandOffer, CommandOutput, CommandRejected, CommandStarted


def make_offer(
    command: str, *, command_id: str = "cmd_1", timeout_seconds: float = 30.0, remaining_seconds: float = 60.0
) -> CommandOffer:
    return CommandOffer(
        command_id=command_id,
        kind="shell",
        command=command,
        timeout_seconds=timeout_seconds,
        remaining_seconds=remaining_seconds,
    )


@contextmanager
def no_room(*, after_bytes: int = 1) -> Iterator[None]:
    """While this holds, no file takes a byte of this process beyond its first so many."""
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (after_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)


class Rig:
    """One agent's life. The server stores all output at once, unless `stores_output` is False."""

    def __init__(self, commands: Commands, ledger: Ledger) -> None:
        self.commands = commands
        self.ledger = ledger
        self.told: list[CommandMessage] = []
        self.stores_output = True
        self._changed = asyncio.Event()

    async def receive(self, message: CommandMessage) -> None:
        self.told.append(message)
        if isinstance(message, CommandOutput) and self.stores_output:
            self.store_output(message)
        self._changed.set()

    def store_output(self, message: CommandOutput) -> None:
        end = message.position + len(base64.b64decode(message.base64))
        self.commands.note_output_stored(message.command_id, end)

    async def wait_until(self, condition: Callable[[], bool], *, timeout_seconds: float = 10.0) -> None:
        async with asyncio.timeout(timeout_seconds):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    def started(self, command_id: str = "cmd_1") -> list[CommandStarted]:
        return [item for item in self.told if isinstance(item, CommandStarted) and item.command_id == command_id]

    def finished(self, command_id: str = "cmd_1") -> list[CommandFinished]:
        return [item for item in self.told if isinstance(item, CommandFinished) and item.command_id == command_id]

    def rejected(self, command_id: str = "cmd_1") -> list[CommandRejected]:
        return [item for item in self.told if isinstance(item, CommandRejected) and item.command_id == command_id]

    def pieces(self, command_id: str = "cmd_1") -> list[CommandOutput]:
        return [item for item in self.told if isinstance(item, CommandOutput) and item.command_id == command_id]

    def output(self, stream: str, command_id: str = "cmd_1") -> bytes:
        pieces = self.pieces(command_id)
        return b"".join(base64.b64decode(piece.base64) for piece in pieces if piece.stream == stream)

    async def result_of(self, command_id: str = "cmd_1", *, timeout_seconds: float = 10.0) -> CommandFinished:
        await self.wait_until(lambda: bool(self.finished(command_id)), timeout_seconds=timeout_seconds)
        return self.finished(command_id)[0]

    async def rejection_of(self, command_id: str = "cmd_1", count: int = 1) -> CommandRejected:
        """Return the last of so many rejections."""
        await self.wait_until(lambda: len(self.rejected(command_id)) >= count)
        return self.rejected(command_id)[-1]

    async def first_line(self, command_id: str = "cmd_1") -> int:
        """The first line a command prints is the pid that a test is about."""
        await self.wait_until(lambda: b"\n" in self.output("stdout", command_id))
        return int(self.output("stdout", command_id).split(b"\n")[0])

    def entry(self, command_id: str = "cmd_1") -> Entry:
        entry = self.ledger.get(command_id)
        assert entry is not None
        return entry

    async def run(self, command: str, *, command_id: str = "cmd_1", timeout_seconds: float = 30.0) -> CommandFinished:
        self.commands.offer(make_offer(command, command_id=command_id, timeout_seconds=timeout_seconds))
        return await self.result_of(command_id)


@asynccontextmanager
async def open_rig(
    directory: Path,
    *,
    max_at_once: int = 32,
    profile: Profile = "manage",
    boot_id: str = "boot",
    instance_id: str = "instance",
    is_killed: bool = False,
    is_connected: bool = True,
) -> AsyncIterator[Rig]:
    """Run an agent's commands in a directory. With `is_killed` it ends as one that was killed: its commands go on."""
    environment = {"PATH": os.environ["PATH"]}
    with Spawner(environment) as spawner:
        ledger = Ledger(directory, boot_id=boot_id, new_instance_id=instance_id)
        found = ledger.open()
        ledger.begin()
        commands = Commands(
            launcher=find_launcher(spawner),
            ledger=ledger,
            environment=environment,
            max_at_once=max_at_once,
            profile=profile,
            grace_seconds=0.5,
        )
        rig = Rig(commands, ledger)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(commands.serve(found)), group.create_task(commands.deliver(rig.receive))]
            await asyncio.sleep(0)  # what was found is known to the commands before anything is asked of them
            if is_connected:
                commands.connect()
            try:
                yield rig
            finally:
                if not is_killed:
                    await commands.stop()
                for task in tasks:
                    task.cancel()
        ledger.close()
