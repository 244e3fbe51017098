"""status.json says what the link does, and never stands in the agent's way."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from tests.support.eventually import eventually

from fleetwire_agent.status import Status, StatusFile, format_status, is_alive, read_status

SERVER = "https://fleet.example"


def read(directory: Path) -> Any:
    path = directory / "status.json"
    return json.loads(path.read_text()) if path.exists() else None


async def wait_for(directory: Path, **expected: object) -> Any:
    async def look() -> Any:
        return read(directory)

    return await eventually(look, lambda found: found is not None and found.items() >= expected.items())


async def test_each_change_is_written(tmp_path: Path) -> None:
    directory = tmp_path / "state"
    times = iter([100.0, 200.0, 300.0])
    with StatusFile(str(directory), server=SERVER, version="1-a", now=lambda: next(times)) as status:
        status.note("connecting")
        first = await wait_for(directory, state="connecting")
        expected = {"state": "connecting", "since": 100.0, "server": SERVER, "agent_id": None}
        assert first == expected | {"version": "1-a", "pid": os.getpid(), "detail": None}
        status.note("connecting", detail="refused")
        assert (await wait_for(directory, detail="refused"))["since"] == 100.0
        status.note("connecting")
        status.note("connected", agent_id="agent_x")
        assert (await wait_for(directory, state="connected"))["detail"] is None
        status.note("connecting", detail="broke")
        assert await wait_for(directory, detail="broke", agent_id="agent_x", since=300.0)
    assert [path.name for path in directory.iterdir()] == ["status.json"]
    assert directory.stat().st_mode & 0o777 == 0o700
    assert (directory / "status.json").stat().st_mode & 0o777 == 0o600


async def test_a_place_that_cannot_be_written_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        with StatusFile(str(tmp_path / "file/state"), server=SERVER, version="1") as status:
            for _ in range(3):
                status.note("connecting")
                status.note("connected", agent_id="agent_x")

        async def count() -> int:
            return len(caplog.records)

        await eventually(count, lambda found: found > 0)
    assert len(caplog.records) == 1
    assert read_status(tmp_path / "file/state") is None


def make_status(**changes: Any) -> Status:
    values: dict[str, Any] = {
        "state": "connected",
        "since": 0.0,
        "server": SERVER,
        "agent_id": "agent_x",
        "version": "1-a",
        "pid": os.getpid(),
        "detail": None,
    }
    return Status(**values | changes)


def test_what_a_person_is_told() -> None:
    assert "has not run here" in format_status(None, 0.0)
    assert "is not running" in format_status(make_status(pid=2**22 + 1), 0.0)
    status = make_status(state="connecting", detail="refused")
    if is_alive(status):  # where this process' command line names the project, as the agent's does
        assert format_status(status, 90.0) == f"not connected to {SERVER} for 1 min: refused; version 1-a"


def test_what_cannot_be_understood_is_no_status(tmp_path: Path) -> None:
    assert read_status(tmp_path) is None
    for content in ("", "[]", "{}", '{"state": 1}', "\xff"):
        (tmp_path / "status.json").write_text(content)
        assert read_status(tmp_path) is None
