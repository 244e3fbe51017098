"""A server and an agent, started for the measurements, and what /proc says of them."""

import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from scripts.lib.bench.client import CallError, Client

START_SECONDS = 60.0
STOP_SECONDS = 15.0
POLL_SECONDS = 0.005  # what the start times may be off by
LOG_CHARACTERS = 4000


class BenchError(Exception):
    """The measurements cannot go on; the message says why."""


@dataclass(frozen=True, slots=True)
class Memory:
    rss_bytes: int
    private_bytes: int  # what the process alone costs: without files it shares with others


@dataclass(frozen=True, slots=True)
class Part:
    """One of the two processes."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    spawned: float  # monotonic

    def memory(self) -> Memory:
        text = self._read("smaps_rollup")
        sizes = {name: int(size) * 1024 for name, size in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}
        return Memory(sizes["Rss"], sizes["Private_Clean"] + sizes["Private_Dirty"])

    def cpu_seconds(self) -> float:
        return self._cpu_seconds(11)

    def children_cpu_seconds(self) -> float:
        """Return what the children cost that have ended, with theirs."""
        return self._cpu_seconds(13)

    def _cpu_seconds(self, first: int) -> float:
        fields = self._read("stat").rpartition(")")[2].split()
        return (int(fields[first]) + int(fields[first + 1])) / os.sysconf("SC_CLK_TCK")

    @contextmanager
    def watching_peak(self) -> Iterator[Callable[[], int]]:
        """Yield a function that returns the most resident memory since here, less what there was here; bytes."""
        (Path("/proc") / str(self.process.pid) / "clear_refs").write_text("5")
        before = self._status_bytes("VmRSS")
        yield lambda: self._status_bytes("VmHWM") - before

    def check(self) -> None:
        """Raise BenchError with its last words if it has ended."""
        if self.process.poll() is not None:
            words = self.log.read_text(errors="replace")[-LOG_CHARACTERS:]
            raise BenchError(f"the {self.name} ended with status {self.process.returncode}:\n{words}")

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def _status_bytes(self, name: str) -> int:
        match = re.search(rf"^{name}:\s+(\d+) kB$", self._read("status"), re.MULTILINE)
        if match is None:
            raise BenchError(f"/proc says nothing of {name} of the {self.name}")
        return int(match[1]) * 1024

    def _read(self, name: str) -> str:
        self.check()
        return (Path("/proc") / str(self.process.pid) / name).read_text()


@dataclass(frozen=True, slots=True)
class Fleet:
    server: Part
    agent: Part
    client: Client
    agent_id: str
    directory: Path  # for files to move and follow
    first_start_seconds: float  # of the server, with an empty directory
    start_seconds: float  # of the server, with a database
    online_seconds: float

    @property
    def agent_path(self) -> str:
        return f"/api/agents/{self.agent_id}"


@contextmanager
def running_fleet(directory: Path) -> Iterator[Fleet]:
    """Start a server twice and an agent once, and time that; both are stopped at the end."""
    password = secrets.token_urlsafe(15)
    with ExitStack() as stack:
        first = _start_server(directory, 0, password)
        stack.callback(first.stop)
        client = Client(_wait_for_port(first))
        first_start_seconds = _wait(first, client.is_healthy)
        first.stop()

        server = _start_server(directory, client.port, password)
        stack.callback(server.stop)
        start_seconds = _wait(server, client.is_healthy)
        client.log_in("admin", password)
        enrolled = client.call("POST", "/api/agents", {"label": "bench"})
        agent_id = enrolled["agent_id"]
        agent = _start_agent(directory, client.port, enrolled["key"])
        stack.callback(agent.stop)
        online_seconds = _wait(agent, lambda: client.call("GET", f"/api/agents/{agent_id}")["status"] == "online")
        yield Fleet(server, agent, client, agent_id, directory, first_start_seconds, start_seconds, online_seconds)


def _start_server(directory: Path, port: int, password: str) -> Part:
    arguments = ["serve", "--listen", f"127.0.0.1:{port}", "--data-dir", str(directory / "server")]
    return _spawn("server", directory, arguments, {"FLEETWIRE_ADMIN_PASSWORD": password})


def _start_agent(directory: Path, port: int, key: str) -> Part:
    key_file = directory / "agent.key"
    key_file.touch(mode=0o600)
    key_file.write_text(key)
    arguments = ["run", "--server", f"http://127.0.0.1:{port}", "--key-file", str(key_file)]
    return _spawn("agent", directory, [*arguments, "--state-dir", str(directory / "agent")], {})


def _spawn(name: str, directory: Path, arguments: list[str], environment: dict[str, str]) -> Part:
    plain = {key: value for key, value in os.environ.items() if not key.startswith("FLEETWIRE_")}
    die_with_us = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []
    log = directory / f"{name}.log"
    with log.open("wb") as output:
        spawned = time.monotonic()
        process = subprocess.Popen(
            [*die_with_us, str(Path(sys.executable).parent / f"fleetwire-{name}"), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=plain | environment,
            cwd=directory,
            start_new_session=True,  # Ctrl-C reaches us alone, and we stop it in order
        )
    return Part(name, process, log, spawned)


def _wait_for_port(server: Part) -> int:
    found: list[int] = []

    def find() -> bool:
        match = re.search(r"Fleetwire listens on http://\S+:(\d+)", server.log.read_text(errors="replace"))
        if match is not None:
            found.append(int(match[1]))
        return match is not None

    _wait(server, find)
    return found[0]


def _wait(part: Part, is_true: Callable[[], bool]) -> float:
    """Return how long after the part was spawned it became true."""
    while time.monotonic() < part.spawned + START_SECONDS:
        part.check()
        try:
            if is_true():
                return time.monotonic() - part.spawned
        except CallError:
            pass  # not yet
        time.sleep(POLL_SECONDS)
    raise BenchError(f"the {part.name} was not there after {START_SECONDS:.0f} s; its log: {part.log.read_text()}")
