"""A server of its own for all tests of the HTTP surface."""

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest
from tests.support.api import Api
from tests.support.callers import Callers, make_callers
from tests.support.processes import ServerProcess, find_free_port


@pytest.fixture(scope="session")
def http_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Without the limits that many tests from one address would meet."""
    environment = {"FLEETWIRE_LOGIN_FAILURES_PER_MINUTE": "10000", "FLEETWIRE_MAX_CONNECTIONS_PER_ADDRESS": "10000"}
    with ServerProcess(tmp_path_factory.mktemp("http"), environment=environment, port=find_free_port()) as server:
        yield server


@pytest.fixture(scope="session")
def callers(http_server: ServerProcess) -> Callers:
    return asyncio.run(make_callers(http_server))


@pytest.fixture
async def http_api(http_server: ServerProcess, callers: Callers) -> AsyncIterator[Api]:
    """An admin's client of that server."""
    async with Api(http_server.url, token=callers.admin) as api:
        yield api
