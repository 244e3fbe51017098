"""Fixtures for tests on real hosts: a server that they reach, and an admin's client of it."""

import asyncio
import ssl
import subprocess
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import pytest
from tests.conftest import enter_process
from tests.support.api import Api
from tests.support.host_fixtures import BootHost
from tests.support.processes import ADMIN_PASSWORD, ServerProcess, find_free_port

__all__ = ["BootHost", "E2eServer", "StartE2eServer"]

_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(_HERE):
            item.add_marker("e2e")
    items.sort(key=_longest_first)  # of several at once, none is left to run alone at the end


def _longest_first(item: pytest.Item) -> float:
    limit = item.get_closest_marker("timeout")
    return 0.0 if limit is None else -float(limit.args[0])


class E2eServer(ServerProcess):
    """A server on this machine's address to its hosts.

    Args:
        certificate: its self-signed certificate and that one's key; without, it speaks plain HTTP."""

    admin_password = ADMIN_PASSWORD

    def __init__(
        self,
        directory: Path,
        *,
        address: str,
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        certificate: tuple[Path, Path] | None = None,
    ) -> None:
        self.client_tls: ssl.SSLContext | None = None
        tls_options: list[str] = []
        if certificate is not None:
            self.client_tls = ssl.create_default_context(cafile=str(certificate[0]))
            tls_options = ["--tls-cert", str(certificate[0]), "--tls-key", str(certificate[1])]
        super().__init__(
            directory,
            options=[*tls_options, *options],
            environment=environment,
            listen_host=address,
            port=find_free_port(address),  # known before it starts: the install script names it
        )


class StartE2eServer(Protocol):
    def __call__(
        self,
        name: str = "server",
        *,
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        is_self_signed: bool = False,
    ) -> E2eServer: ...


@pytest.fixture
def start_e2e_server(host_network: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[StartE2eServer]:
    """Start a server of this test's own that hosts reach."""
    with ExitStack() as stack:

        def start(
            name: str = "server",
            *,
            options: Sequence[str] = (),
            environment: Mapping[str, str] | None = None,
            is_self_signed: bool = False,
        ) -> E2eServer:
            certificate = make_certificate(tmp_path, host_network) if is_self_signed else None
            server = E2eServer(
                tmp_path / name,
                address=host_network,
                options=options,
                environment=environment,
                certificate=certificate,
            )
            return enter_process(stack, request, server)

        yield start


@pytest.fixture(scope="session")
def e2e_server(
    host_network: str, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[E2eServer]:
    """A server that hosts reach, shared by all tests."""
    with ExitStack() as stack:
        server = E2eServer(tmp_path_factory.mktemp("e2e") / "server", address=host_network)
        yield enter_process(stack, request, server)


@pytest.fixture(scope="session")
def e2e_token(e2e_server: E2eServer) -> str:
    """An admin's session token, of one login: there are limits on those."""

    async def login() -> str:
        async with Api(e2e_server.url) as client:
            return await client.login("admin", e2e_server.admin_password)

    with ThreadPoolExecutor(1) as pool:  # outside every test's event loop, which it outlives
        return pool.submit(lambda: asyncio.run(login())).result()


@pytest.fixture
async def e2e_api(e2e_server: E2eServer, e2e_token: str) -> AsyncIterator[Api]:
    """An admin's client of the shared server."""
    async with Api(e2e_server.url, token=e2e_token) as client:
        yield client


def make_certificate(directory: Path, address: str) -> tuple[Path, Path]:
    """Make a self-signed certificate for an address; return its file and its key's."""
    certificate, key = directory / "server.pem", directory / "server.key"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
            *("-days", "2", "-subj", "/CN=fleetwire", "-addext", f"subjectAltName=IP:{address}"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    return certificate, key
