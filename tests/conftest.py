"""Fixtures for tests against a real server and real agents; whatever they start is gone after the test."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from scripts.lib.testhost.programs import find_obstacles
from tests.support.api import Api
from tests.support.host_fixtures import (  # noqa: F401 - fixtures, for all tests
    HOSTS,
    NO_HOSTS,
    OBSTACLES,
    agent_bundle,
    agent_host,
    bookworm,
    boot_host,
    boot_session_host,
    host_network,
    trixie,
)
from tests.support.hosts import BRIDGE_ADDRESS
from tests.support.processes import ADMIN_PASSWORD, AgentProcess, HostAgentProcess, Process, ServerProcess

T = TypeVar("T")

_LOG_CHARACTERS = 20_000  # of one process' log, in the report of a failed test
_PROCESSES = pytest.StashKey[list[Process]]()

_MARKERS = (
    "e2e: needs real hosts, which scripts/testhost boots",
    "on_hosts: runs twice, with its agents on this machine and on a real host",
    "here_only(reason): of a file that is on_hosts, this one says nothing new on a host",
)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_PROCESSES] = []
    config.stash[HOSTS] = []
    config.stash[OBSTACLES] = []
    for marker in _MARKERS:
        config.addinivalue_line("markers", marker)
    # How long an example takes says more of what else the machine does than of the code.
    settings.register_profile("fleetwire", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fleetwire"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        for process in item.config.stash[_PROCESSES]:
            report.sections.append((f"log: {process.log}", process.log_text[-_LOG_CHARACTERS:]))
        for host in item.config.stash[HOSTS]:
            report.sections.append((f"console: {host.name}", host.console_text[-_LOG_CHARACTERS:]))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if obstacles := _obstacles_met(terminalreporter, config):
        terminalreporter.section("NOT TESTED ON REAL HOSTS", sep="!", red=True, bold=True)
        terminalreporter.line(f"This machine can boot none: {' '.join(obstacles)}", red=True)


def _obstacles_met(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> list[str]:
    """Return what kept tests from their hosts; of tests that ran in other processes, only that they were skipped is
    known here."""
    skipped = terminalreporter.stats.get("skipped", ())
    if not config.stash[OBSTACLES] and any(NO_HOSTS in str(report.longrepr) for report in skipped):
        return find_obstacles()
    return config.stash[OBSTACLES]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    markers = {marker.name for marker in metafunc.definition.iter_markers()}
    if "on_hosts" in markers and "here_only" not in markers:
        on_host = pytest.param("host", marks=pytest.mark.e2e)
        metafunc.parametrize("place", ["here", on_host], indirect=True, scope="session")


@dataclass(frozen=True, slots=True)
class Fleet:
    """A server with one agent online, and an admin's session token."""

    server: ServerProcess
    agent: AgentProcess
    token: str

    @property
    def agent_id(self) -> str:
        return self.agent.agent_id

    @property
    def agent_path(self) -> str:
        return f"/api/agents/{self.agent_id}"


@dataclass(frozen=True, slots=True)
class Place:
    """Where agents run, and where a server listens so that they reach it."""

    name: str
    address: str
    make_agent: Callable[..., AgentProcess]  # arguments as AgentProcess takes them


@pytest.fixture(scope="session")
def place(request: pytest.FixtureRequest) -> Place:
    """This machine, or a real host in tests that are `on_hosts`."""
    if getattr(request, "param", "here") == "here":
        return Place("here", "127.0.0.1", AgentProcess)
    host, bundle = request.getfixturevalue("agent_host"), request.getfixturevalue("agent_bundle")
    return Place("host", BRIDGE_ADDRESS, partial(HostAgentProcess, host=host, bundle=bundle))


@pytest.fixture(scope="session")
def fleet(place: Place, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Fleet]:
    """Shared by all cheap tests: leave it as it was found."""
    directory = tmp_path_factory.mktemp("fleet")
    with ExitStack() as stack:
        server = enter_process(stack, request, ServerProcess(directory / "server", listen_host=place.address))
        agent_id, key, token = _run_apart(lambda: _enrol(server, "web-01"))
        agent = place.make_agent(directory / "agent", server_url=server.url, agent_id=agent_id, key=key)
        enter_process(stack, request, agent)
        _run_apart(lambda: _wait_for_agent(server, token, agent_id))
        yield Fleet(server, agent, token)


@pytest.fixture
async def api(fleet: Fleet) -> AsyncIterator[Api]:
    """An admin's client of the shared fleet."""
    async with Api(fleet.server.url, token=fleet.token) as client:
        yield client


class StartServer(Protocol):
    def __call__(
        self, name: str = "server", *, options: Sequence[str] = (), environment: Mapping[str, str] | None = None
    ) -> ServerProcess: ...


@pytest.fixture
def start_server(place: Place, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[StartServer]:
    """Start a server of this test's own."""
    with ExitStack() as stack:

        def start(
            name: str = "server", *, options: Sequence[str] = (), environment: Mapping[str, str] | None = None
        ) -> ServerProcess:
            server = ServerProcess(tmp_path / name, options=options, environment=environment, listen_host=place.address)
            return enter_process(stack, request, server)

        yield start


class StartAgent(Protocol):
    async def __call__(
        self,
        api: Api,
        label: str = "web-01",
        *,
        server_url: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> AgentProcess: ...


@pytest.fixture
def start_agent(place: Place, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[StartAgent]:
    """Enrol an agent at an admin's `api`, start it, and return when it is online.

    `server_url` is where it dials instead, such as a CuttableLink's."""
    with ExitStack() as stack:

        async def start(
            api: Api,
            label: str = "web-01",
            *,
            server_url: str | None = None,
            environment: Mapping[str, str] | None = None,
        ) -> AgentProcess:
            agent_id, key = await api.enrol(label)
            agent = place.make_agent(
                tmp_path / agent_id,
                server_url=server_url or api.url,
                agent_id=agent_id,
                key=key,
                environment=environment,
            )
            enter_process(stack, request, agent)
            await api.wait_for_agent(agent_id)
            return agent

        yield start


class OpenApi(Protocol):
    async def __call__(self, server: ServerProcess, username: str = "admin", password: str = ADMIN_PASSWORD) -> Api: ...


@pytest.fixture
async def open_api() -> AsyncIterator[OpenApi]:
    """`await open_api(server)` is an admin's client; `username` and `password` make it another user's."""
    async with AsyncExitStack() as stack:

        async def open_client(server: ServerProcess, username: str = "admin", password: str = ADMIN_PASSWORD) -> Api:
            client = await stack.enter_async_context(Api(server.url))
            await client.login(username, password)
            return client

        yield open_client


P = TypeVar("P", bound=Process)


def enter_process(stack: ExitStack, request: pytest.FixtureRequest, process: P) -> P:
    """Start `process` until the stack closes; its log is in the report of whatever fails meanwhile."""
    processes = request.config.stash[_PROCESSES]
    stack.enter_context(process)
    processes.append(process)
    stack.callback(processes.remove, process)
    return process


def _run_apart(make: Callable[[], Coroutine[object, object, T]]) -> T:
    """Run a coroutine from a fixture that outlives every test's event loop."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: asyncio.run(make())).result()


async def _enrol(server: ServerProcess, label: str) -> tuple[str, str, str]:
    async with Api(server.url) as client:
        token = await client.login("admin", ADMIN_PASSWORD)
        agent_id, key = await client.enrol(label, "web", "production")
        return agent_id, key, token


async def _wait_for_agent(server: ServerProcess, token: str, agent_id: str) -> None:
    async with Api(server.url, token=token) as client:
        await client.wait_for_agent(agent_id)
