"""The OpenAPI document tells the truth: it is valid, whole, and the running server keeps to it."""

import asyncio
import re
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import one_of
from schemathesis import GenerationMode
from schemathesis.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from tests.support.api import Api
from tests.support.processes import ServerProcess

from fleetwire_server.http.openapi import build_document
from fleetwire_server.http.route import Media, Policy, Route
from fleetwire_server.http.routes import ROUTES

DOCUMENT = build_document(ROUTES)
TRIED = [
    route
    for route in ROUTES
    # Sockets and endless streams have no answer to compare; a logout would end the login of all that follow.
    if route.answer_media not in (Media.WEBSOCKET, Media.EVENTS) and route.path != "/api/logout"
]


def no_internal_error(context: Any, response: Any, case: Any) -> None:
    """schemathesis' own check takes a 503 of an agent that is away for a failure."""
    assert response.status_code != 500, response.text


CHECKS = [no_internal_error, status_code_conformance, content_type_conformance, response_schema_conformance]


def name_of(route: Route) -> str:
    return f"{route.method} {route.path}"


def test_document_is_valid_openapi_3_1() -> None:
    schema = schemathesis.openapi.from_dict(DOCUMENT)
    schema.validate()
    assert DOCUMENT["openapi"].startswith("3.1")


def test_document_has_every_route_and_nothing_else() -> None:
    documented = {(method.upper(), path) for path, operations in DOCUMENT["paths"].items() for method in operations}
    assert documented == {(route.method, route.path) for route in ROUTES}


def test_every_parameter_of_a_path_is_documented() -> None:
    for path, operations in DOCUMENT["paths"].items():
        for operation in operations.values():
            named = [item["name"] for item in operation["parameters"] if item["in"] == "path"]
            assert named == re.findall(r"{(\w+)}", path)


def test_operation_ids_are_unique() -> None:
    ids = [operation["operationId"] for operations in DOCUMENT["paths"].values() for operation in operations.values()]
    assert len(set(ids)) == len(ids)


async def test_server_shows_the_document_and_its_page(http_api: Api) -> None:
    assert await http_api.get("/api/openapi.json") == DOCUMENT
    page = await http_api.get("/api/docs")
    assert all(f"{route.method} {route.path}" in page for route in ROUTES)


@pytest.mark.parametrize("route", TRIED, ids=name_of)
async def test_server_answers_as_documented(route: Route, http_server: ServerProcess, http_api: Api) -> None:
    agent_id, key = await http_api.enrol(f"tried with {name_of(route)}")
    is_agents = route.policy is Policy.AGENT
    headers = {"X-Agent-Key": key} if is_agents else http_api.headers
    operation = schemathesis.openapi.from_dict(DOCUMENT)[route.path][route.method]
    # Of an agent that exists: for another one all there would be to see is 404.
    path_parameters = {"agent_id": agent_id} if "{agent_id}" in route.path else {}

    @given(case=any_case(operation, path_parameters))
    @settings(max_examples=20, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    def answers_as_documented(case: Any) -> None:
        case.call_and_validate(base_url=http_server.url, headers=headers, checks=CHECKS, timeout=10)

    await asyncio.to_thread(answers_as_documented)


def any_case(operation: Any, path_parameters: dict[str, str]) -> Any:
    """Return a strategy of requests, every other one with something in it that is not allowed."""

    def fix(case: Any) -> Any:
        case.path_parameters = (case.path_parameters or {}) | path_parameters
        return case

    return one_of(
        operation.as_strategy(generation_mode=GenerationMode.POSITIVE),
        operation.as_strategy(generation_mode=GenerationMode.NEGATIVE),
    ).map(fix)
