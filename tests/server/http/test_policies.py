"""Every route, tried by every kind of caller: who is let in is what the route table says, and nothing else."""

import re
from dataclasses import replace

import pytest
from tests.support.api import Api
from tests.support.callers import USER_PASSWORD, Callers, log_in
from tests.support.processes import ADMIN_PASSWORD, ServerProcess

from fleetwire_server.http.route import Policy, Route
from fleetwire_server.http.routes import ROUTES

USERS = ("viewer", "operator", "admin")
AGENTS = ("agent", "other agent")
NOT_VALID = ("nobody", "garbage", "garbage key", "deleted agent", "expired session", "logged out session")
CALLERS = (*USERS, *AGENTS, *NOT_VALID)
GUARDED = [route for route in ROUTES if route.policy is not Policy.PUBLIC]

ALLOWED: dict[Policy, frozenset[str]] = {
    Policy.PUBLIC: frozenset(CALLERS),
    Policy.VIEWER: frozenset({"viewer", "operator", "admin"}),
    Policy.OPERATOR: frozenset({"operator", "admin"}),
    Policy.ADMIN: frozenset({"admin"}),
    Policy.AGENT: frozenset(AGENTS),
}

LIKE_AN_AGENT = re.compile(r"/api/agents/[a-z-]+")
"""Addresses that may be the id of an agent, too: there the methods of an agent's are answered."""

IDS = {
    "agent_id": "agent_unknown",  # the guard comes first: who may not call learns nothing of what exists
    "command_id": "cmd_unknown",
    "channel_id": "ch_unknown",
    "name": "unknown",
    "deployment_id": "dep_unknown",
    "host": "unknown",
    "port": "22",
}


def name_of(route: Route) -> str:
    return f"{route.method} {route.path}"


def expected_refusal(route: Route, caller: str) -> int | None:
    """Return 401, 403, or None where the caller is let in."""
    if route.path.endswith("/report") and caller == "other agent":
        return 403
    if caller in ALLOWED[route.policy]:
        return None
    return 403 if caller in USERS and route.policy is not Policy.AGENT else 401


def headers_of(caller: str, callers: Callers) -> dict[str, str]:
    tokens = {
        "viewer": callers.viewer,
        "operator": callers.operator,
        "admin": callers.admin,
        "garbage": "garbage",
        "expired session": callers.expired,
        "logged out session": callers.logged_out,
    }
    keys = {
        "agent": callers.agent_key,
        "other agent": callers.other_agent_key,
        "garbage key": "garbage",
        "deleted agent": callers.deleted_agent_key,
    }
    if caller in tokens:
        return {"Authorization": f"Bearer {tokens[caller]}"}
    return {"X-Agent-Key": keys[caller]} if caller in keys else {}


async def fresh(callers: Callers, caller: str, server: ServerProcess) -> Callers:
    """Return the callers with a login that may be ended."""
    password = ADMIN_PASSWORD if caller == "admin" else USER_PASSWORD
    return replace(callers, **{caller: await log_in(server, caller, password)})


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("route", ROUTES, ids=name_of)
async def test_route_lets_in_whom_its_policy_names(
    route: Route, caller: str, http_server: ServerProcess, callers: Callers
) -> None:
    if route.path == "/api/logout" and caller in USERS:
        callers = await fresh(callers, caller, http_server)
    ids = IDS | ({"agent_id": callers.agent_id} if route.policy is Policy.AGENT else {})
    refusal = expected_refusal(route, caller)
    # Without a body: whoever is let in gets no further than the reading of it.
    async with (
        Api(http_server.url) as api,
        api.open(route.method, route.path.format(**ids), headers=headers_of(caller, callers)) as response,
    ):
        if refusal is not None:
            assert response.status == refusal, await response.text()
            problem = await response.json(content_type="application/problem+json")
            assert problem["code"] == ("unauthorized" if refusal == 401 else "forbidden")
            assert ("WWW-Authenticate" in response.headers) == (refusal == 401)
        else:
            assert response.status not in (401, 403), await response.text()
            assert response.status < 500, await response.text()


@pytest.mark.parametrize("route", GUARDED, ids=name_of)
async def test_a_token_in_the_url_opens_event_streams_only(
    route: Route, http_server: ServerProcess, callers: Callers
) -> None:
    path = route.path.format(**IDS)
    async with Api(http_server.url) as api, api.open(route.method, path, params={"token": callers.admin}) as response:
        assert (response.status != 401) == route.is_stream, await response.text()


@pytest.mark.parametrize("route", GUARDED, ids=name_of)
async def test_a_credential_opens_nothing_in_the_place_of_another_kind(
    route: Route, http_server: ServerProcess, callers: Callers
) -> None:
    path = route.path.format(**IDS)
    headers = {"Authorization": f"Bearer {callers.agent_key}", "X-Agent-Key": callers.admin, "Cookie": callers.admin}
    async with Api(http_server.url) as api, api.open(route.method, path, headers=headers) as response:
        assert response.status == 401


async def test_no_address_answers_a_method_that_has_no_policy(http_api: Api) -> None:
    for path in {route.path for route in ROUTES if not LIKE_AN_AGENT.fullmatch(route.path)}:
        declared = {route.method for route in ROUTES if route.path == path}
        allowed = declared | ({"HEAD"} if "GET" in declared else set())
        for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"} - allowed:
            async with http_api.open(method, path.format(**IDS)) as response:
                assert response.status == 405, f"{method} {path}"
                assert set(response.headers["Allow"].split(",")) <= allowed


def test_every_route_has_a_policy_and_an_address_of_its_own() -> None:
    assert all(isinstance(route.policy, Policy) for route in ROUTES)
    addresses = [(route.method, route.path) for route in ROUTES]
    assert len(set(addresses)) == len(addresses)


async def test_head_is_guarded_as_get(http_server: ServerProcess) -> None:
    async with Api(http_server.url) as api, api.open("HEAD", "/api/agents") as response:
        assert response.status == 401
