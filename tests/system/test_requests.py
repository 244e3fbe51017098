"""Questions to an agent through the API: units, and to remove itself; answered well, badly, late or never."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from tests.conftest import Fleet
from tests.support.api import Api
from tests.support.raw_agent import RawAgent, raw_agent

from fleetwire_shared.messages import (
    Heartbeat,
    ListUnits,
    Message,
    RequestFailed,
    ServerMessage,
    Uninstall,
    Uninstalled,
    Unit,
    UnitList,
)

UNITS = (
    Unit(name="backup.timer", load="loaded", active="active", sub="waiting", description="Nightly Backup"),
    Unit(name="nginx.service", load="loaded", active="active", sub="running", description="A web server"),
    Unit(name="old.service", load="not-loaded", active="inactive", sub="dead", description=""),
)


async def hear_question(agent: RawAgent) -> ListUnits | Uninstall:
    while True:
        message: ServerMessage = await agent.hear()
        if isinstance(message, ListUnits | Uninstall):
            return message
        assert isinstance(message, Heartbeat)


@asynccontextmanager
async def connected(api: Api) -> AsyncIterator[tuple[RawAgent, str]]:
    agent_id, key = await api.enrol("raw")
    async with asyncio.timeout(30), raw_agent(api.url, key) as agent:
        await agent.greet()
        yield agent, f"/api/agents/{agent_id}"
        await agent.ws.close()


async def get_units(api: Api, path: str, agent: RawAgent, answer: Any, *, status: int = 200, **params: str) -> Any:
    """Ask for the units, have the agent answer with what `answer` makes of the request's id, return what comes."""
    async with asyncio.TaskGroup() as group:
        task = group.create_task(api.get(f"{path}/units", status=status, **params))
        question = await hear_question(agent)
        assert isinstance(question, ListUnits)
        message: Message = answer(question.request_id)
        await agent.say(message)
    return task.result()


async def test_units_are_listed_and_filtered(api: Api) -> None:
    def answer(request_id: str) -> UnitList:
        return UnitList(request_id=request_id, units=UNITS, is_truncated=True)

    async with connected(api) as (agent, path):
        listed = await get_units(api, path, agent, answer)
        assert listed["truncated"] is True
        assert listed["units"][1] == {
            "name": "nginx.service",
            "load": "loaded",
            "active": "active",
            "sub": "running",
            "description": "A web server",
        }
        filters: list[tuple[dict[str, Any], list[str]]] = [
            ({}, ["backup.timer", "nginx.service", "old.service"]),
            ({"type": "service"}, ["nginx.service", "old.service"]),
            ({"q": "BACK"}, ["backup.timer"]),
            ({"q": "web", "type": "timer"}, []),
        ]
        for params, names in filters:
            listed = await get_units(api, path, agent, answer, **params)
            assert [unit["name"] for unit in listed["units"]] == names
        await api.get(f"{path}/units", type="service;", status=400)
    await api.get(f"{path}/units", status=503)
    await api.get("/api/agents/agent_unknown/units", status=404)


@pytest.mark.parametrize(("code", "status"), [("unavailable", 503), ("peer_failed", 502), ("internal", 502)])
async def test_what_the_agent_says_is_wrong_is_passed_on(api: Api, code: str, status: int) -> None:
    async with connected(api) as (agent, path):
        problem = await get_units(
            api,
            path,
            agent,
            lambda request_id: RequestFailed(request_id=request_id, code=code, message="this host has no systemd"),
            status=status,
        )
        assert problem["detail"] == "this host has no systemd"


async def test_an_agent_that_answers_nonsense_or_leaves_is_an_error(api: Api) -> None:
    async with connected(api) as (agent, path):
        await agent.say(UnitList(request_id="req_nobody", units=()))  # ignored: the link goes on
        problem = await get_units(
            api, path, agent, lambda request_id: Uninstalled(request_id=request_id, removed=()), status=502
        )
        assert "unit_list was due" in problem["detail"]
        async with asyncio.TaskGroup() as group:
            task = group.create_task(api.get(f"{path}/units", status=503))
            await hear_question(agent)
            await agent.ws.close()
        assert "before it answered" in task.result()["detail"]


async def test_an_agent_is_deleted_when_it_says_that_it_is_removed(api: Api) -> None:
    async with connected(api) as (agent, path), asyncio.TaskGroup() as group:
        task = group.create_task(api.delete(f"{path}?uninstall=true"))
        question = await hear_question(agent)
        assert question == Uninstall(request_id=question.request_id, purge=True)
        await api.get(path)  # not before
        await agent.say(Uninstalled(request_id=question.request_id, removed=("/opt/fleetwire-agent",)))
        assert await agent.hear_close() == 4001
    assert task.result() == {"status": "deleted", "uninstalled": True}
    await api.get(path, status=404)


async def test_an_agent_that_is_not_removed_stays_in_the_database(api: Api) -> None:
    async with connected(api) as (agent, path):
        async with asyncio.TaskGroup() as group:
            task = group.create_task(api.delete(f"{path}?uninstall=true", status=409))
            question = await hear_question(agent)
            await agent.say(RequestFailed(request_id=question.request_id, code="conflict", message="profile monitor"))
        assert task.result()["detail"] == "profile monitor"
        assert (await api.get(path))["status"] == "online"
        await api.delete(f"{path}?uninstall=maybe", status=400)
    await api.delete(f"{path}?uninstall=true", status=503)  # not connected
    assert (await api.get(path))["status"] == "offline"
    assert await api.delete(f"{path}?uninstall=false") == {"status": "deleted"}
    await api.delete(f"{path}?uninstall=true", status=404)


async def test_an_agent_that_was_not_installed_says_so(api: Api, fleet: Fleet) -> None:
    problem = await api.delete(f"{fleet.agent_path}?uninstall=true", status=409)
    assert "was not installed by its installer" in problem["detail"]
    assert (await api.run(fleet.agent_id, "echo still here"))["output"] == "still here\n"
