"""Runners as the agent sees them: launched, found again, spoken to, and what to do where one is gone."""

import asyncio
import logging
import os
import re
import select
import shutil
import signal
import socket
import stat
import sys
import time
from pathlib import Path
from typing import Final

from fleetwire_agent.process_table import COMMAND_DIRECTORY_VARIABLE, Family, ProcessRow, signal_all
from fleetwire_agent.processes import Spawner, read_output
from fleetwire_agent.runner import files
from fleetwire_agent.runner.control_group import ControlGroup

LAUNCH_SECONDS: Final = 30.0
"""A service manager that takes longer does not work."""

DISMISS_SECONDS: Final = 5.0
"""How long an agent waits for a runner that is not to start its command any more."""

STOP_SECONDS: Final = 10.0
"""How long whoever takes the agent off its host, or gives it to another user, waits for its commands to be ended."""

END_COMMANDS: Final = signal.SIGUSR1
"""Has an agent end all its commands and take no more, as it will be stopped for good; it runs on to tell of them."""

_COMMAND_ID: Final = re.compile(r"cmd_[0-9a-z_]{1,60}", re.ASCII)
"""Wider than what servers give, so that a later one may give others."""

MAX_TASKS: Final = 4096
"""Processes and threads of one command in its unit: what a fork bomb can become."""

# Nothing is garbage while modules are imported, and looking for some costs a tenth of a runner's start.
_PROGRAM: Final = (
    "import gc, sys; gc.disable(); sys.path.insert(0, sys.argv[1]);"
    " from fleetwire_agent.runner.supervisor import run; gc.enable(); run()"
)
_ROOT: Final = str(Path(__file__).parent.parent)
"""Where `fleetwire_agent` lies: a directory, or the bundle where the agent runs without being installed."""

_OOM_POLICY_SYSTEMD: Final = (
    243  # the first with OOMPolicy=; those before stop no unit for what the kernel killed in it
)
_SYSTEMD: Final = Path("/run/systemd/system")
_MAX_WORD_BYTES: Final = 200
_CONNECT_DELAY_SECONDS: Final = 0.1
_KILL_ROUNDS: Final = 20
_KILL_DELAY_SECONDS: Final = 0.05

_log = logging.getLogger(__name__)


def is_command_id(text: object) -> bool:
    """Whether it may name a command, and so a directory and a unit of this host."""
    return isinstance(text, str) and _COMMAND_ID.fullmatch(text) is not None


def is_own_directory(path: Path) -> bool:
    """Whether it is a directory, and no link to one, that belongs to this user and in which nobody else may write."""
    try:
        status = path.lstat()
    except OSError:
        return False
    is_shared = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not is_shared


class Launcher:
    """Starts runners: as transient units where systemd runs and this agent may, else as processes of their own."""

    def __init__(self, spawner: Spawner, *, has_units: bool) -> None:
        self._spawner = spawner
        self.has_units = has_units
        self._systemd_version: int | None = None  # asked when the first unit is made

    async def launch(self, directory: Path, command_id: str) -> None:
        """Start the runner of the order in the directory; return when it listens.

        Raises:
            UnavailableError: it could not be started; the message says why. It may start all the same, later."""
        runner = [sys.executable, "-I", "-S", "-c", _PROGRAM, _ROOT, str(directory)]
        argv = [*await self._build_unit_command(directory.name, command_id), *runner] if self.has_units else runner
        await self._run(argv)

    async def _build_unit_command(self, name: str, command_id: str) -> list[str]:
        if self._systemd_version is None:
            self._systemd_version = parse_systemd_version(await self._run(["systemd-run", "--version"]))
        return build_unit_command(name, command_id, systemd_version=self._systemd_version)

    async def _run(self, argv: list[str]) -> bytes:
        return await read_output(self._spawner, argv, timeout_seconds=LAUNCH_SECONDS, max_bytes=65536)


def find_launcher(spawner: Spawner) -> Launcher:
    has_units = _SYSTEMD.is_dir() and os.geteuid() == 0 and shutil.which("systemd-run") is not None
    return Launcher(spawner, has_units=has_units)


def parse_systemd_version(said: bytes) -> int:
    """Return the version of what a program of systemd says to --version, 0 where that cannot be told. Pure."""
    match = re.match(rb"systemd (\d+)", said)
    return int(match[1]) if match else 0


def build_unit_command(name: str, command_id: str, *, systemd_version: int) -> list[str]:
    """Return the start of a command line that runs the rest of it as a transient unit. Pure."""
    properties = [
        "Delegate=yes",  # the runner makes a group for the command below its own
        "KillMode=process",  # the runner stops the command itself, and what that left in the background lives on
        "TimeoutStopSec=15",
        "NotifyAccess=main",
        f"TasksMax={MAX_TASKS}",
    ]
    if systemd_version >= _OOM_POLICY_SYSTEMD:  # one that does not know a property makes no unit
        properties.append("OOMPolicy=continue")
    return [
        "systemd-run",
        "--quiet",
        "--collect",
        "--no-ask-password",
        f"--unit=fleetwire-{name.replace('_', '-')}.service",
        f"--description=Fleetwire command {command_id}",
        "--service-type=notify",
        *(f"--property={each}" for each in properties),
        "--",
    ]


class RunnerLink:
    """A connection to one runner. What it says only hurries the agent: the directory holds the truth."""

    def __init__(self, peer: socket.socket) -> None:
        self._peer = peer

    async def receive(self) -> str | None:
        """Return the next word, None when the runner has ended."""
        try:
            word = await asyncio.get_running_loop().sock_recv(self._peer, _MAX_WORD_BYTES)
        except OSError:
            return None
        return word.decode("ascii", "replace") or None

    def send(self, word: str) -> None:
        """A runner that has ended hears nothing any more."""
        try:
            self._peer.send(word.encode("ascii"), socket.MSG_NOSIGNAL)
        except OSError as err:
            _log.debug("a runner does not listen: %s", err)

    def leave(self) -> None:
        """Say that no word will follow; what the runner says can still be heard."""
        try:
            self._peer.shutdown(socket.SHUT_WR)
        except OSError as err:
            _log.debug("a runner does not listen: %s", err)

    def wait_for_end(self, deadline: float) -> bool:
        """Wait until the runner has ended, or the monotonic clock shows that time; return which. Blocking."""
        while True:
            readable, _, _ = select.select([self._peer], [], [], max(0.0, deadline - time.monotonic()))
            if not readable:
                return False
            try:
                if not self._peer.recv(_MAX_WORD_BYTES):
                    return True
            except OSError:
                return True

    def close(self) -> None:
        self._peer.close()


def connect(directory: Path) -> RunnerLink | None:
    """Return a link to the runner of the directory, None when none listens there.

    Raises:
        OSError: nobody can tell, as where too many have connected to a runner that is stopped, or memory is short."""
    try:
        place = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            peer.setblocking(False)
            # The path of a socket holds 107 bytes: too few for some state directories.
            peer.connect(f"/proc/self/fd/{place}/{files.SOCKET}")
        except (FileNotFoundError, ConnectionRefusedError):
            peer.close()
            return None
        except OSError:
            peer.close()
            raise
    finally:
        os.close(place)
    return RunnerLink(peer)


def list_running(directory: Path) -> list[str]:
    """Return the names of the directories below this one whose runner lives. None hears of it, and so no agent loses
    its link. Blocking."""
    if not is_own_directory(directory):
        return []
    return [path.name for path in directory.iterdir() if _has_runner(path)]


def _has_runner(directory: Path) -> bool:
    traces = files.read_traces(str(directory))
    try:  # its last argument is the directory; by now the pid may be another's
        command = b"" if traces is None else Path(f"/proc/{traces.runner_pid}/cmdline").read_bytes()
    except OSError:
        return False
    return command.endswith(b"/%s\0" % os.fsencode(directory.name))


def stop_commands(directory: Path, *, seconds: float = STOP_SECONDS) -> list[str]:
    """Have all runners below the directory end their commands, as no agent does; return the names of the directories of
    those that have not within these seconds. Blocking.

    Each leaves its result: an agent that is installed later with the same state tells of it. To be called when the
    agent is stopped: a runner listens to who came last."""
    if not is_own_directory(directory):
        return []
    deadline = time.monotonic() + seconds
    links = {path.name: link for path in directory.iterdir() if (link := _connect_until(deadline, path)) is not None}
    for link in links.values():
        link.send("stop interrupted")
    left = [name for name, link in links.items() if not link.wait_for_end(deadline)]
    for link in links.values():
        link.close()
    return left


def _connect_until(deadline: float, directory: Path) -> RunnerLink | None:
    """As `connect`, but for as long as nobody can tell it tries again, until the deadline. Blocking."""
    while True:
        try:
            return connect(directory)
        except OSError as err:
            if time.monotonic() >= deadline:
                _log.error("whether the command in %s still runs cannot be seen: %s", directory, err)
                return None
        time.sleep(_CONNECT_DELAY_SECONDS)


async def dismiss(directory: Path) -> None:
    """Have a runner that waits there for the word to start end without having run. One whose command runs goes on."""
    link = await asyncio.to_thread(connect, directory)
    if link is None:
        return
    link.leave()
    try:
        async with asyncio.timeout(DISMISS_SECONDS):
            while await link.receive() is not None:
                pass
    except TimeoutError:
        _log.warning("the runner in %s does not end; it will not start its command", directory)
    finally:
        link.close()


async def kill_leftovers(directory: Path) -> None:
    """Kill what is left of the command whose runner was killed, and remove its control group. Of this boot only."""
    traces = await asyncio.to_thread(files.read_traces, str(directory))
    group = ControlGroup(traces.control_group) if traces and traces.control_group else None
    roots = []
    if traces and traces.shell:
        pid, start_ticks = traces.shell
        roots.append(ProcessRow(pid, parent_pid=0, session_id=pid, start_ticks=start_ticks))
    place = await asyncio.to_thread(directory.resolve)  # as the runner sees it
    family = Family(roots, variables=[f"{COMMAND_DIRECTORY_VARIABLE}={place}"])
    for _ in range(_KILL_ROUNDS):
        if not await asyncio.to_thread(_kill, family, group):
            break
        await asyncio.sleep(_KILL_DELAY_SECONDS)
    else:
        _log.error("processes of the command in %s survive SIGKILL", directory)
    if group is not None:
        await asyncio.to_thread(group.remove)


def _kill(family: Family, group: ControlGroup | None) -> bool:
    """Return whether there was anything to kill. Blocking."""
    members: set[ProcessRow] = set()
    if group is not None:
        members = group.read_members()
        group.kill()
    members |= family.read_members()
    signal_all(members, signal.SIGKILL)
    return bool(members)
