"""Real server and agent processes, started as an operator starts them."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from tests.support.hosts import Host

from fleetwire_agent.runner.files import COMMANDS
from fleetwire_agent.runners import stop_commands

_BIN = Path(sys.executable).parent  # where pip put our commands; not resolved: it is the environment that counts
ROOT = Path(__file__).resolve().parents[2]

_START_SECONDS = 30.0
_STOP_SECONDS = 15.0

ADMIN_PASSWORD = "correct horse battery staple"


class Process:
    """One process that writes to a log file and can be stopped, killed, frozen and started again.

    As a context manager it starts on entry, and nothing of it is left on exit, whatever happened."""

    def __init__(self, arguments: Sequence[str | Path], *, log: Path, environment: Mapping[str, str]) -> None:
        self.arguments = [str(argument) for argument in arguments]
        self.log = log
        self.environment = dict(environment)
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
    def log_text(self) -> str:
        """All it wrote to stdout and stderr, over all its lives."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    @property
    def last_log_text(self) -> str:
        """What it wrote since its last start."""
        with self.log.open("rb") as file:
            file.seek(self._log_start)
            return file.read().decode(errors="replace")

    def start(self) -> None:
        assert not self.is_running, "already started"
        with self.log.open("ab") as output:
            self._log_start = output.tell()
            self._process = self._spawn(output)
        self.wait_until_started()

    def wait_until_started(self) -> None:
        """Return when it does what it was started for; a plain process does so at once."""

    def stop(self) -> int:
        """Ask it to end as systemd does. Return its exit status."""
        self.resume()
        return self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it as a power cut would: it can do nothing more."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """Freeze it: its sockets stay open, and nothing answers."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        if self.is_running:
            os.kill(self.pid, signal.SIGCONT)

    def wait(self, timeout_seconds: float = _STOP_SECONDS) -> int:
        """Return the exit status it ends with by itself."""
        assert self._process is not None, "not started"
        return self._process.wait(timeout_seconds)

    def rss_bytes(self) -> int:
        """Return its resident memory now."""
        match = re.search(r"^VmRSS:\s+(\d+) kB$", Path(f"/proc/{self.pid}/status").read_text(), re.MULTILINE)
        assert match is not None, "it has ended"
        return int(match[1]) * 1024

    def peak_rss_bytes(self) -> int:
        """Return the most resident memory it ever had, or had since `reset_peak_rss`."""
        match = re.search(r"^VmHWM:\s+(\d+) kB$", Path(f"/proc/{self.pid}/status").read_text(), re.MULTILINE)
        assert match is not None, "it has ended"
        return int(match[1]) * 1024

    def reset_peak_rss(self) -> None:
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End it if it still runs, by force if it must be."""
        if not self.is_running:
            return
        try:
            self.stop()
        except subprocess.TimeoutExpired:
            self.kill()

    def _spawn(self, output: IO[bytes]) -> subprocess.Popen[bytes]:
        # In a session of its own: Ctrl-C in the terminal ends the tests, which then end it in order. setpriv: tests
        # that are killed leave nothing running either.
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *self.arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=self.environment,
            start_new_session=True,
        )

    def _end(self, number: signal.Signals) -> int:
        assert self._process is not None, "not started"
        if self.is_running:
            self._process.send_signal(number)
        return self._process.wait(_STOP_SECONDS)


class ServerProcess(Process):
    """`fleetwire-server serve` on a free port of an address. It keeps its port over restarts, as a real one does.

    Args:
        directory: gets the log and, in `data`, all the server stores.
        options: further arguments of `serve`.
        environment: variables beyond a plain environment, such as FLEETWIRE_* settings.
        listen_host: an address of this machine.
        port: 0 is any free one."""

    def __init__(
        self,
        directory: Path,
        *,
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        listen_host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.data_dir = directory / "data"
        self._options = list(options)
        self.listen_host = listen_host
        self._port = port
        self._scheme = "http"
        super().__init__(
            [],
            log=directory / "server.log",
            environment=plain_environment() | {"FLEETWIRE_ADMIN_PASSWORD": ADMIN_PASSWORD} | dict(environment or {}),
        )

    @property
    def port(self) -> int:
        assert self._port, "not started"
        return self._port

    @property
    def url(self) -> str:
        return f"{self._scheme}://{self.listen_host}:{self.port}"

    def start(self) -> None:
        listen = f"{self.listen_host}:{self._port}"
        command = [_BIN / "fleetwire-server", "serve", "--listen", listen, "--data-dir", self.data_dir]
        self.arguments = [str(argument) for argument in [*command, *self._options]]
        super().start()

    def wait_until_started(self) -> None:
        """Return when it says that it listens. Raises AssertionError with its log when it does not."""
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and self.is_running:
            if match := re.search(r"Fleetwire listens on (https?)://\S+:(\d+)", self.last_log_text):
                self._scheme, self._port = match[1], int(match[2])
                return
            time.sleep(0.02)  # a log file has no event that tells of a line
        raise AssertionError(f"the server did not start:\n{self.log_text}")


class AgentProcess(Process):
    """`fleetwire-agent run`, with its key in a file.

    It is started when it runs; that it is online is for the API to tell."""

    def __init__(
        self,
        directory: Path,
        *,
        server_url: str,
        agent_id: str,
        key: str,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.agent_id = agent_id
        self.key_file = directory / "agent.key"
        self.key_file.touch(mode=0o600)
        self.key_file.write_text(key + "\n")
        self.state_dir = directory / "state"
        command = [_BIN / "fleetwire-agent", "run", "--server", server_url, "--key-file", self.key_file]
        super().__init__(
            [*map(str, command), "--state-dir", self.state_dir],
            log=directory / "agent.log",
            environment=plain_environment() | dict(environment or {}),
        )

    def close(self) -> None:
        """End it, and the commands that outlive it."""
        super().close()
        stop_commands(self.state_dir / COMMANDS)


class HostAgentProcess(AgentProcess):
    """`fleetwire-agent run` on a test host, by that host's own python3, from the bundle.

    Args:
        directory: is at the same path on the host.
        bundle: the agent as one file, there too."""

    def __init__(
        self,
        directory: Path,
        *,
        host: Host,
        bundle: Path,
        server_url: str,
        agent_id: str,
        key: str,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(directory, server_url=server_url, agent_id=agent_id, key=key)
        self.arguments[:1] = ["/usr/bin/python3", str(bundle)]
        self.environment = dict(environment or {})
        self._host = host

    @property
    def pid(self) -> int:
        """The agent itself, as this machine numbers it; what was started here only waits for it."""
        return self._inner_pid

    def wait_until_started(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        waiting = super().pid
        while time.monotonic() < deadline and self.is_running:
            for child in Path(f"/proc/{waiting}/task/{waiting}/children").read_text().split():
                if Path(f"/proc/{child}/cmdline").read_bytes().startswith(b"/usr/bin/python3\0"):
                    self._inner_pid = int(child)
                    return
            time.sleep(0.01)  # /proc has no event that tells of it
        raise AssertionError(f"the agent did not start on {self._host.name}:\n{self.log_text}")

    def resume(self) -> None:
        super().resume()
        if self.is_running:
            os.kill(super().pid, signal.SIGCONT)  # nsenter stops with what it waits for

    def _spawn(self, output: IO[bytes]) -> subprocess.Popen[bytes]:
        command = self._host.build_exec(self.arguments, self.environment)
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )

    def _end(self, number: signal.Signals) -> int:
        if self.is_running:
            os.kill(self.pid, number)
        return self.wait()


def build_agent_bundle(tree: Path, output: Path) -> Path:
    """Build the agent of a tree as one file."""
    command: list[str | Path] = [tree / "scripts/build-agent", "--output", output]
    done = subprocess.run(command, env=plain_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    return output


def find_free_port(address: str = "127.0.0.1") -> int:
    """Return a port that nobody uses now: for a server that must know its own URL before it listens."""
    with socket.socket() as own:
        own.bind((address, 0))
        return int(own.getsockname()[1])


def plain_environment() -> dict[str, str]:
    """Return this process' environment without any setting of Fleetwire, so that a developer's do not leak in."""
    return {name: value for name, value in os.environ.items() if not name.startswith("FLEETWIRE_")}
