"""What a command printed, and what is left of it on the host."""

import asyncio
from pathlib import Path

from tests.support.api import Api
from tests.support.eventually import eventually


async def fetch_output(api: Api, agent_id: str, command_id: str, **params: str) -> bytes:
    """Return the output that is kept, as the bytes it is."""
    async with (
        asyncio.timeout(60),
        api.open("GET", f"/api/agents/{agent_id}/commands/{command_id}/output", params=params) as response,
    ):
        assert response.status == 200
        assert response.content_type == "application/octet-stream"
        return await response.read()


def living_pids(marker: str) -> list[int]:
    """Return the processes of this host that have `marker` in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if marker.encode() in path.read_bytes():  # empty for what is dead and not yet reaped
                found.append(int(path.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


async def until_alive(marker: str) -> None:
    """Return once a process has `marker` in its command line."""

    async def read() -> list[int]:
        return living_pids(marker)

    await eventually(read)


async def until_written(path: Path, text: str = "") -> str:
    """Return the content of a file once it is there and holds `text`."""

    async def read() -> str | None:
        return path.read_text() if path.exists() else None

    found = await eventually(read, lambda content: content is not None and text in content)
    assert found is not None
    return found
