"""The server and the agents as processes: started, killed, frozen, and started again as systemd would."""

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from scripts.lib.chaos.workload import CANARY_VARIABLE

START_SECONDS: Final = 60.0
STOP_SECONDS: Final = 30.0
POLL_SECONDS: Final = 0.02  # neither a log file nor a process has an event for asyncio to wait for
LOG_CHARACTERS: Final = 4000

RUN_VARIABLE: Final = "CHAOS_RUN"
"""Marks, with the run's directory as value, the environment of all that is started, directly or by what was started."""

COMMAND_VARIABLE: Final = "FLEETWIRE_COMMAND_ID"


class ChaosError(Exception):
    """The run cannot go on; the message says why."""


class Part:
    """One process, in all its lives. `is_wanted` is whether it should be there: else its end is no news."""

    def __init__(
        self,
        name: str,
        arguments: Sequence[str | Path],
        *,
        log: Path,
        environment: Mapping[str, str],
        prefix: Sequence[str | Path] = (),
    ) -> None:
        self.name = name
        self.arguments = [str(argument) for argument in arguments]
        self.prefix = [str(argument) for argument in prefix]  # a program that starts it, such as strace
        self.log = log
        self.is_wanted = False
        self.is_paused = False
        self._environment = plain_environment() | dict(environment)
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def exit_status(self) -> int | None:
        return None if self._process is None else self._process.poll()

    @property
    def was_killed(self) -> bool:
        """Whether SIGKILL has ended its last life."""
        return self.exit_status == -signal.SIGKILL

    def spawn(self) -> None:
        """Start it; that it is ready is for `wait_until_ready` to tell."""
        assert not self.is_running, f"{self.name} runs already"
        die_with_us = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        with self.log.open("ab") as output:
            self._log_start = output.tell()
            self._process = subprocess.Popen(
                [*die_with_us, *self.prefix, *self.arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self._environment,
                start_new_session=True,  # Ctrl-C reaches us alone, and we stop it in order
            )
        self.is_wanted, self.is_paused = True, False

    async def start(self) -> None:
        self.spawn()
        await self.wait_until_ready()

    async def wait_until_ready(self) -> None:
        """Return when it does what it was started for."""

    async def kill(self) -> None:
        """End it as the kernel does when memory is short: it can do nothing more."""
        await self._end(signal.SIGKILL)

    async def stop(self) -> None:
        """Ask it to end as systemd does. Raises ChaosError when it does not."""
        self.resume()
        await self._end(signal.SIGTERM)

    def pause(self) -> None:
        if self.is_running:
            os.kill(self.pid, signal.SIGSTOP)
            self.is_paused = True

    def resume(self) -> None:
        if self.is_running and self.is_paused:
            os.kill(self.pid, signal.SIGCONT)
        self.is_paused = False

    async def wait_ended(self, seconds: float = STOP_SECONDS) -> None:
        """Return once it has ended. Raises ChaosError when it does not."""
        try:
            async with asyncio.timeout(seconds):
                while self.is_running:  # noqa: ASYNC110 - waiting for a pid blocks
                    await asyncio.sleep(POLL_SECONDS)
        except TimeoutError as err:
            raise ChaosError(f"the {self.name} did not end within {seconds:.0f} s:\n{self.last_words()}") from err

    def close(self) -> None:
        """End it at once if it is still there."""
        self.is_wanted = False
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def last_words(self) -> str:
        return self.read_log()[-LOG_CHARACTERS:]

    def read_log(self) -> str:
        """Return what it wrote since its last start."""
        with self.log.open("rb") as file:
            file.seek(self._log_start)
            return file.read().decode(errors="replace")

    async def _end(self, number: signal.Signals) -> None:
        self.is_wanted = False
        if self.is_running:
            os.kill(self.pid, number)
        await self.wait_ended()


class Server(Part):
    """`fleetwire-server serve` on a port that it keeps over its lives; `port` 0 is any free one."""

    def __init__(
        self,
        directory: Path,
        *,
        password: str,
        port: int = 0,
        data_dir: Path | None = None,
        environment: Mapping[str, str] | None = None,
        prefix: Sequence[str | Path] = (),
        log: Path | None = None,
    ) -> None:
        self.data_dir = data_dir or directory / "server"
        self._port = port
        super().__init__(
            "server",
            [],
            log=log or directory / "server.log",
            environment={"FLEETWIRE_ADMIN_PASSWORD": password} | dict(environment or {}),
            prefix=prefix,
        )

    @property
    def url(self) -> str:
        assert self._port, "not started"
        return f"http://127.0.0.1:{self._port}"

    def spawn(self) -> None:
        listen = f"127.0.0.1:{self._port}"
        self.arguments = [find_program("server"), "serve", "--listen", listen, "--data-dir", str(self.data_dir)]
        super().spawn()

    async def wait_until_ready(self) -> None:
        """Return when it says that it listens. Raises ChaosError."""
        with suppress(TimeoutError):
            async with asyncio.timeout(START_SECONDS):
                while self.is_running:
                    if match := re.search(r"Fleetwire listens on http://\S+:(\d+)", self.read_log()):
                        self._port = int(match[1])
                        return
                    await asyncio.sleep(POLL_SECONDS)
        raise ChaosError(f"the server did not start:\n{self.last_words()}")


class Agent(Part):
    """`fleetwire-agent run`; it is started when it runs, and online when the server says so."""

    def __init__(
        self,
        directory: Path,
        *,
        name: str = "agent",
        server_url: str,
        agent_id: str,
        key: str,
        canary: Path,
        state_dir: Path | None = None,
        environment: Mapping[str, str] | None = None,
        prefix: Sequence[str | Path] = (),
    ) -> None:
        self.agent_id = agent_id
        self.state_dir = state_dir or directory / f"{name}-state"
        key_file = directory / f"{name}.key"
        key_file.touch(mode=0o600)
        key_file.write_text(key)
        settings = ["--server", server_url, "--key-file", str(key_file), "--state-dir", str(self.state_dir)]
        super().__init__(
            name,
            [find_program("agent"), "run", *settings],
            log=directory / f"{name}.log",
            environment={CANARY_VARIABLE: str(canary)} | dict(environment or {}),
            prefix=prefix,
        )

    @property
    def path(self) -> str:
        return f"/api/agents/{self.agent_id}"

    async def wait_until_connected(self) -> None:
        """Return once it was greeted by the server in this life. Raises ChaosError."""
        try:
            async with asyncio.timeout(START_SECONDS):
                while "connected as" not in self.read_log():  # noqa: ASYNC110 - a log has no event
                    await asyncio.sleep(POLL_SECONDS)
        except TimeoutError as err:
            raise ChaosError(f"the {self.name} did not connect:\n{self.last_words()}") from err


def find_program(name: str) -> str:
    return str(Path(sys.executable).parent / f"fleetwire-{name}")


def plain_environment() -> dict[str, str]:
    """Return this process' environment without any setting of Fleetwire."""
    return {name: value for name, value in os.environ.items() if not name.startswith("FLEETWIRE_")}


@contextmanager
def closing(parts: Iterable[Part], run: str) -> Iterator[None]:
    """At the end, end all parts that still are there, and all that carries `run` in its environment."""
    try:
        yield
    finally:
        for part in parts:
            part.close()
        end_all(run)


# ---------------------------------------------------------------- what was started, directly or not


@dataclass(frozen=True, slots=True)
class Living:
    """A process of a run. Source: /proc."""

    pid: int
    command_id: str | None
    command_line: str

    def __str__(self) -> str:
        return f"{self.pid} ({self.command_id or 'of no command'}): {self.command_line[:200]}"


def find_living(run: str) -> list[Living]:
    """Return the processes whose environment names this run; what is dead and not yet reaped has none."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            environment = (directory / "environ").read_bytes().split(b"\0")
            if f"{RUN_VARIABLE}={run}".encode() in environment:
                line = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                found.append(Living(int(directory.name), _find_command_id(environment), line))
    return [living for living in found if living.pid != os.getpid()]


def _find_command_id(environment: Sequence[bytes]) -> str | None:
    prefix = f"{COMMAND_VARIABLE}=".encode()
    return next((entry[len(prefix) :].decode() for entry in environment if entry.startswith(prefix)), None)


def end_all(run: str) -> None:
    """Kill what is left of a run until nothing is."""
    while living := find_living(run):
        for process in living:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)


def stop_all(run: str) -> list[int]:
    """Freeze all of a run, also what it starts meanwhile; return the pids. Blocking."""
    stopped: list[int] = []
    while fresh := [process.pid for process in find_living(run) if process.pid not in stopped]:
        for pid in fresh:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        while any(_runs_on(pid) for pid in fresh):
            time.sleep(0.001)
        stopped += fresh
    return stopped


def _runs_on(pid: int) -> bool:
    """Whether a thread of a process that was told to stop still computes. One that waits in the kernel (D) will stop
    before it gets back to its program."""
    for path in Path(f"/proc/{pid}/task").glob("*/stat"):
        with suppress(OSError):
            if path.read_text().rpartition(")")[2].split()[0] in "RS":
                return True
    return False


def resume_all(pids: Iterable[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
