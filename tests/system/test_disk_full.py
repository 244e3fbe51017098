"""The server's disk is full: what cannot be stored is refused and said, and with space all goes on by itself."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from tests.conftest import OpenApi, StartAgent, StartServer
from tests.support.eventually import eventually


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 8 MB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small filesystem")
    mountpoint = tmp_path / "disk"
    mountpoint.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(mountpoint)], check=True)
    yield mountpoint
    subprocess.run(["umount", "-l", str(mountpoint)], check=True)


def fill(file: Path) -> None:
    """Write to the file until nothing fits any more."""
    with file.open("wb") as ballast, suppress(OSError):
        while True:
            os.write(ballast.fileno(), bytes(4096))


async def test_a_full_disk_refuses_what_it_cannot_keep_and_recovers_with_space(
    small_disk: Path, start_server: StartServer, start_agent: StartAgent, open_api: OpenApi
) -> None:
    server = start_server(options=["--data-dir", str(small_disk / "data")])
    api = await open_api(server)
    agent = await start_agent(api)
    before = await api.run(agent.agent_id, "echo before")
    ballast = small_disk / "ballast"
    fill(ballast)

    refused = await api.post(
        f"/api/agents/{agent.agent_id}/commands",
        {"type": "shell", "params": {"command": f"echo {'x' * 100_000}"}},
        status=503,
    )
    assert refused["code"] == "unavailable"
    assert "database cannot be written" in refused["detail"]
    assert (await api.get("/api/health", status=503))["code"] == "unavailable"
    shown = await api.get(f"/api/agents/{agent.agent_id}/commands/{before['command_id']}")
    assert shown["output"] == "before\n", "reading goes on"

    ballast.unlink()
    after = await eventually(lambda: api.run(agent.agent_id, "echo after"), lambda command: bool(command))
    assert after["output"] == "after\n"
    assert (await api.get("/api/health"))["status"] == "ok"
    assert server.is_running
