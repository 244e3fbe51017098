"""Errors have one shape, whoever found them."""

import io
import json

import pytest
from aiohttp import FormData
from tests.support.api import Api
from tests.support.callers import Callers
from tests.support.processes import ServerProcess

from fleetwire_server.http.problem import STATUS_BY_CODE, internal_problem_response, problem_response
from fleetwire_shared import errors
from fleetwire_shared.errors import FleetwireError, ProtocolError, RangeError, RateLimitedError

FIELDS = {"type", "title", "status", "code", "detail", "request_id"}
KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, FleetwireError)]


def make_error(kind: type[FleetwireError]) -> FleetwireError:
    if kind is ProtocolError:
        return ProtocolError("field", "is wrong")
    if kind is RateLimitedError:
        return RateLimitedError("too many", retry_after_seconds=7)
    return kind("what was wrong")


@pytest.mark.parametrize("kind", KINDS)
def test_every_domain_error_has_a_status_and_the_one_shape(kind: type[FleetwireError]) -> None:
    error = make_error(kind)
    response = problem_response(error, "id")
    assert isinstance(response.body, bytes)
    problem = json.loads(response.body)
    assert response.content_type == "application/problem+json"
    assert set(problem) == FIELDS
    assert (problem["code"], problem["detail"], problem["request_id"]) == (kind.code, error.message, "id")
    assert problem["status"] == response.status
    assert response.status == (500 if kind is FleetwireError else STATUS_BY_CODE[kind.code])


def test_headers_that_belong_to_a_refusal_are_sent() -> None:
    assert problem_response(RateLimitedError("slow", retry_after_seconds=7), "id").headers["Retry-After"] == "7"
    assert problem_response(errors.UnauthorizedError("who?"), "id").headers["WWW-Authenticate"] == "Bearer"
    assert problem_response(RangeError("past", size_bytes=9), "id").headers["Content-Range"] == "bytes */9"


def test_an_internal_error_tells_its_caller_nothing_but_where_to_look() -> None:
    response = internal_problem_response("id")
    assert isinstance(response.body, bytes)
    problem = json.loads(response.body)
    assert (response.status, problem["code"], problem["request_id"]) == (500, "internal", "id")


async def test_an_address_that_is_not_there(http_api: Api) -> None:
    problem = await http_api.get("/api/nothing", status=404)
    assert set(problem) == FIELDS
    assert problem["code"] == "not_found"
    assert "/api/openapi.json" in problem["detail"]


async def test_a_method_that_is_not_answered_names_those_that_are(http_api: Api) -> None:
    async with http_api.open("PUT", "/api/agents") as response:
        assert response.status == 405
        assert {"GET", "POST"} <= set(response.headers["Allow"].split(","))
        assert (await response.json(content_type="application/problem+json"))["code"] == "method_not_allowed"


async def test_a_body_that_is_too_large(http_api: Api) -> None:
    async with http_api.open("POST", "/api/agents", data=io.BytesIO(bytes(1_100_000))) as response:
        assert response.status == 413
        problem = await response.json(content_type="application/problem+json")
    assert problem["code"] == "too_large"
    assert "1 MiB" in problem["detail"]


async def test_an_agent_that_is_away(http_api: Api, callers: Callers) -> None:
    path = f"/api/agents/{callers.agent_id}/files"
    async with http_api.open("GET", path, params={"path": "/etc/hostname"}) as response:
        assert response.status == 503
        assert response.headers["Retry-After"] == "5"
        assert (await response.json(content_type="application/problem+json"))["code"] == "unavailable"
    form = FormData({"dest": "/tmp/x"})
    form.add_field("file", b"x", filename="x")
    async with http_api.open("POST", path, data=form) as response:
        assert response.status == 503


async def test_a_problem_is_found_in_the_log_by_its_request_id(http_api: Api, http_server: ServerProcess) -> None:
    problem = await http_api.get("/api/agents/agent_unknown", status=404)
    assert f"id {problem['request_id']}" in http_server.log_text


async def test_no_answer_is_kept_by_caches_or_guessed_at(http_api: Api) -> None:
    for path in ("/api/agents", "/api/nothing"):
        async with http_api.open("GET", path) as response:
            assert response.headers["Cache-Control"] == "no-store"
            assert response.headers["X-Content-Type-Options"] == "nosniff"
