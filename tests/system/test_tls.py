"""The server's own TLS: commands, files and streams over it, and agents that trust nobody else."""

import asyncio
import ssl
import subprocess
from pathlib import Path

import pytest
from tests.conftest import StartServer
from tests.support.api import Api
from tests.support.processes import ADMIN_PASSWORD, AgentProcess, ServerProcess


def make_certificate(directory: Path, name: str) -> tuple[Path, Path]:
    """Make a self-signed certificate for 127.0.0.1; return its file and its key's."""
    certificate, key = directory / f"{name}.pem", directory / f"{name}.key"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
            *("-days", "2", "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    return certificate, key


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_certificate(tmp_path_factory.mktemp("tls"), "fleetwire")


@pytest.fixture
def tls_server(start_server: StartServer, certificate: tuple[Path, Path]) -> ServerProcess:
    return start_server(options=["--tls-cert", str(certificate[0]), "--tls-key", str(certificate[1])])


def make_agent(
    directory: Path, server: ServerProcess, enrolled: tuple[str, str], *, trusted: Path | None
) -> AgentProcess:
    agent_id, key = enrolled
    environment = {} if trusted is None else {"FLEETWIRE_AGENT_TLS_CA_FILE": str(trusted)}
    return AgentProcess(directory, server_url=server.url, agent_id=agent_id, key=key, environment=environment)


async def test_everything_works_over_tls(
    tls_server: ServerProcess, certificate: tuple[Path, Path], tmp_path: Path
) -> None:
    assert tls_server.url.startswith("https://")
    async with Api(tls_server.url, tls=ssl.create_default_context(cafile=str(certificate[0]))) as api:
        await api.login("admin", ADMIN_PASSWORD)
        with make_agent(tmp_path / "agent", tls_server, await api.enrol("tls"), trusted=certificate[0]) as agent:
            await api.wait_for_agent(agent.agent_id)
            assert (await api.run(agent.agent_id, "echo over tls"))["output"] == "over tls\n"
            (tmp_path / "file").write_bytes(b"bytes " * 100_000)
            path = f"/api/agents/{agent.agent_id}/files"
            async with api.session.get(path, params={"path": str(tmp_path / "file")}, headers=api.headers) as response:
                assert await response.read() == b"bytes " * 100_000


async def test_an_agent_refuses_a_certificate_it_was_not_given(
    tls_server: ServerProcess, certificate: tuple[Path, Path], tmp_path: Path
) -> None:
    stranger, _ = make_certificate(tmp_path, "stranger")
    async with Api(tls_server.url, tls=ssl.create_default_context(cafile=str(certificate[0]))) as api:
        await api.login("admin", ADMIN_PASSWORD)
        enrolled = await api.enrol("tls")
        for trusted in (None, stranger):
            with make_agent(tmp_path / f"agent-{trusted is None}", tls_server, enrolled, trusted=trusted) as agent:
                async with asyncio.timeout(30):
                    while "CERTIFICATE_VERIFY_FAILED" not in agent.log_text:
                        await asyncio.sleep(0.05)
        assert (await api.get(f"/api/agents/{enrolled[0]}"))["status"] == "pending"


def test_a_certificate_that_cannot_be_read_is_told_in_one_line(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path, options=["--tls-cert", "/nowhere.pem", "--tls-key", "/nowhere.key"])
    with pytest.raises(AssertionError, match=r"/nowhere\.pem"):
        server.__enter__()
    assert "Traceback" not in server.log_text
    server.close()
