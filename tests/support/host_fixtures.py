"""Fixtures of real hosts.

Where this machine can boot none, what needs one is skipped and the end of the output says so loudly; in CI it fails."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import pytest
from scripts.lib.testhost import operations
from scripts.lib.testhost.programs import find_obstacles
from tests.support.hosts import Host
from tests.support.processes import ROOT, build_agent_bundle

HOSTS = pytest.StashKey[list[Host]]()
"""Those that run; their consoles are in the report of what fails meanwhile."""
NO_HOSTS = "no test hosts here"
OBSTACLES = pytest.StashKey[list[str]]()
"""Why hosts were asked for and not to be had."""


class BootHost(Protocol):
    def __call__(
        self,
        release: str = "bookworm",
        *,
        init: str = "systemd",
        binds: tuple[Path, ...] = (),
        disk_mib: int | None = None,
        python: bool = True,
    ) -> Host: ...


@pytest.fixture(scope="session")
def host_network(request: pytest.FixtureRequest) -> Iterator[str]:
    """This machine's address to its hosts; a server that hosts are to reach listens there."""
    if obstacles := find_obstacles():
        request.config.stash[OBSTACLES][:] = obstacles
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must be able to boot test hosts: {' '.join(obstacles)}")
        pytest.skip(f"{NO_HOSTS}: {' '.join(obstacles)}")
    address = operations.hold_network(os.getpid())
    yield address
    operations.release_network(os.getpid())


@pytest.fixture
def boot_host(host_network: str, request: pytest.FixtureRequest) -> Iterator[BootHost]:
    """Boot hosts of this test's own: `boot_host("trixie", disk_mib=64)`; they are gone after it.

    See scripts.lib.testhost.operations.boot_host for what can be chosen."""
    with ExitStack() as stack:
        yield _make_boot(stack, request)


@pytest.fixture(scope="session")
def boot_session_host(host_network: str, request: pytest.FixtureRequest) -> Iterator[BootHost]:
    """As `boot_host`, for hosts that stay to the end of the tests."""
    with ExitStack() as stack:
        yield _make_boot(stack, request)


@pytest.fixture(scope="session")
def bookworm(boot_session_host: BootHost) -> Host:
    """Shared by all tests: leave it as it was found."""
    return boot_session_host("bookworm")


@pytest.fixture(scope="session")
def trixie(boot_session_host: BootHost) -> Host:
    """Shared by all tests: leave it as it was found."""
    return boot_session_host("trixie")


@pytest.fixture(scope="session")
def agent_host(boot_session_host: BootHost, tmp_path_factory: pytest.TempPathFactory) -> Host:
    """A host that has every `tmp_path` at the same path, for agents that run there instead of here."""
    return boot_session_host("bookworm", binds=(tmp_path_factory.getbasetemp(),))


@pytest.fixture(scope="session")
def agent_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The agent as one file, built from this tree."""
    return build_agent_bundle(ROOT, tmp_path_factory.mktemp("bundle") / "fleetwire-agent.pyz")


def _make_boot(stack: ExitStack, request: pytest.FixtureRequest) -> BootHost:
    hosts = request.config.stash[HOSTS]

    def boot(
        release: str = "bookworm",
        *,
        init: str = "systemd",
        binds: tuple[Path, ...] = (),
        disk_mib: int | None = None,
        python: bool = True,
    ) -> Host:
        record = operations.boot_host(
            release, init=init, binds=binds, disk_mib=disk_mib, python=python, owner_pid=os.getpid()
        )
        host = Host(record)
        stack.callback(host.stop)
        hosts.append(host)
        stack.callback(hosts.remove, host)
        return host

    return boot
