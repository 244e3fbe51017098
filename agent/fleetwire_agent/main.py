"""The agent's life: joins the parts, runs their loops in one TaskGroup, ends them within two seconds.

Commands do not end with it: their runners go on, and the next agent finds them again."""

import asyncio
import logging
import os
import secrets
import signal
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final

from fleetwire_agent.channels import Channels
from fleetwire_agent.collectors import Sampler
from fleetwire_agent.commands import Commands
from fleetwire_agent.config import AgentConfig
from fleetwire_agent.host import read_host_facts
from fleetwire_agent.ledger import Ledger
from fleetwire_agent.processes import Spawner
from fleetwire_agent.requests import Requests
from fleetwire_agent.runners import END_COMMANDS, find_launcher
from fleetwire_agent.session import Dialer, Outbox, Session
from fleetwire_agent.status import StatusFile
from fleetwire_agent.units import fit_units, read_units
from fleetwire_agent.version import read_version
from fleetwire_shared.limits import METRICS_SECONDS
from fleetwire_shared.messages import Unit

FLUSH_SECONDS: Final = 0.8
"""How long the end waits for the server to store the last results."""

HARD_STOP_SECONDS: Final = 1.8
"""After a signal, when the agent leaves whatever still hangs (a read of a dead disk in a thread)."""

FIRST_SAMPLE_SECONDS: Final = 0.5
"""Shares and rates need two readings: the first report waits this long for its second."""

_log = logging.getLogger(__name__)


async def run_agent(config: AgentConfig) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        ConflictError: another agent uses the state directory. UnavailableError: it cannot be used."""
    stop = _stop_on_signals()
    end_commands = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(END_COMMANDS, end_commands.set)
    version = read_version()
    with (
        StatusFile(config.state_dir, server=config.server, version=version) as status,
        Spawner(config.command_environment) as spawner,
    ):
        boot_id = (await asyncio.to_thread(read_host_facts)).boot_id
        ledger = Ledger(Path(config.state_dir), boot_id=boot_id, new_instance_id=secrets.token_hex(16))
        found = await asyncio.to_thread(ledger.open)
        ledger.begin()
        outbox = Outbox()
        commands = Commands(
            launcher=find_launcher(spawner),
            ledger=ledger,
            environment=config.command_environment,
            max_at_once=config.max_commands_at_once,
            profile=config.profile,
        )
        dialer = Dialer(config)
        channels = Channels(
            dial=dialer.channel,
            send=outbox.send,
            spawn=spawner,
            journal_directory=config.journal_directory,
            profile=config.profile,
        )
        removal = Removal(config, spawner, commands, status, stop)
        requests = Requests(
            answers=outbox,
            list_units=partial(list_units, spawner, config.journal_directory),
            remove_agent=removal.remove,
            leave=removal.leave,
        )
        session = Session(
            dial=dialer.control,
            read_host=read_host_facts,
            outbox=outbox,
            ledger=ledger,
            commands=commands,
            open_channel=channels.open,
            open_request=requests.open,
            on_status=status.note,
            agent_version=version,
        )
        async with asyncio.TaskGroup() as group:
            loops = (
                commands.serve(found),
                channels.serve(),
                requests.serve(),
                session.run(),
                report_metrics(session, outbox),
                end_commands_when_asked(end_commands, commands),
            )
            tasks = [group.create_task(loop) for loop in loops]
            await stop.wait()
            _log.info("stopping")
            await _flush(ledger, outbox)
            for task in tasks:
                task.cancel()
        await asyncio.to_thread(ledger.close)


async def list_units(spawner: Spawner, journal_directory: str | None) -> tuple[tuple[Unit, ...], bool]:
    """Return the host's units as they fit into one frame, and whether some were left out."""
    return fit_units(await read_units(spawner, journal_directory))


class Removal:
    """Takes this agent off its host while it runs."""

    def __init__(
        self, config: AgentConfig, spawner: Spawner, commands: Commands, status: StatusFile, stop: asyncio.Event
    ) -> None:
        self._profile = config.profile
        self._spawner = spawner
        self._commands = commands
        self._status = status
        self._stop = stop

    async def remove(self, purge: bool) -> tuple[str, ...]:
        """End the commands and remove all but this process; return the paths. What may not be removed loses nothing."""
        from fleetwire_agent.install import uninstall  # here: needed once in an agent's life, if ever

        uninstall.check_may_remove(self._profile)
        await self._commands.stop()
        self._status.close()  # it would come back where the state's directory is a mount point, which stays
        with self._spawner.sharing_children():
            return await asyncio.to_thread(uninstall.remove_running_agent, profile=self._profile, purge=purge)

    async def leave(self) -> None:
        """Have the service manager stop this agent, and stop."""
        from fleetwire_agent.install import uninstall

        try:
            with self._spawner.sharing_children():
                await asyncio.to_thread(uninstall.leave)
        finally:
            self._stop.set()


async def end_commands_when_asked(asked: asyncio.Event, commands: Commands) -> None:
    """Wait until somebody on the host is about to stop this agent for good, and end its commands while it can still
    tell of them."""
    await asked.wait()
    _log.info("ending all commands, as the agent is to be removed or given to another user")
    await commands.stop()


async def report_metrics(session: Session, outbox: Outbox) -> None:
    """Sample at the server's interval and offer the newest report to the link, until cancelled.

    Samples also while the server is away: rates need a recent reading, and a report is there for the next welcome."""
    sampler = await asyncio.to_thread(Sampler)
    await asyncio.sleep(FIRST_SAMPLE_SECONDS)
    next_at = time.monotonic()
    while True:
        outbox.put_report(await asyncio.to_thread(sampler.sample))
        next_at = max(next_at + (session.metrics_seconds or METRICS_SECONDS), time.monotonic())
        await asyncio.sleep(next_at - time.monotonic())


def _stop_on_signals() -> asyncio.Event:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def note_signal() -> None:
        if not stop.is_set():
            loop.call_later(HARD_STOP_SECONDS, os._exit, 1)  # runs also while the loop waits for its threads
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, note_signal)
    return stop


async def _flush(ledger: Ledger, outbox: Outbox) -> None:
    """Give the server a moment to store the ends that it has not stored yet, if it is there at all."""
    if outbox.is_open:
        with suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_SECONDS):
                await ledger.is_reported.wait()
