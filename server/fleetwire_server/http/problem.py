"""Errors as RFC 9457 problem documents: `{type, title, status, code, detail, request_id}`."""

from http import HTTPStatus

import msgspec
from aiohttp import web
from msgspec import UNSET, UnsetType

from fleetwire_server.deploy.errors import DeployError
from fleetwire_shared.errors import (
    ConflictError,
    FleetwireError,
    ForbiddenError,
    InvalidError,
    KeyReusedError,
    NotFoundError,
    PeerFailedError,
    PeerTimeoutError,
    ProtocolError,
    RangeError,
    RateLimitedError,
    TooLargeError,
    UnauthorizedError,
    UnavailableError,
)

STATUS_BY_CODE: dict[str, HTTPStatus] = {
    InvalidError.code: HTTPStatus.BAD_REQUEST,
    ProtocolError.code: HTTPStatus.BAD_REQUEST,
    UnauthorizedError.code: HTTPStatus.UNAUTHORIZED,
    ForbiddenError.code: HTTPStatus.FORBIDDEN,
    NotFoundError.code: HTTPStatus.NOT_FOUND,
    ConflictError.code: HTTPStatus.CONFLICT,
    KeyReusedError.code: HTTPStatus.UNPROCESSABLE_ENTITY,
    TooLargeError.code: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    RangeError.code: HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
    RateLimitedError.code: HTTPStatus.TOO_MANY_REQUESTS,
    PeerFailedError.code: HTTPStatus.BAD_GATEWAY,
    UnavailableError.code: HTTPStatus.SERVICE_UNAVAILABLE,
    PeerTimeoutError.code: HTTPStatus.GATEWAY_TIMEOUT,
}

_CODE_BY_STATUS = {status.value: code for code, status in STATUS_BY_CODE.items() if code != ProtocolError.code} | {
    HTTPStatus.METHOD_NOT_ALLOWED.value: "method_not_allowed",
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE.value: "unsupported_media_type",
}


class Problem(msgspec.Struct, kw_only=True):
    """Why a request failed."""

    type: str = "about:blank"
    title: str
    status: int
    code: str  # stable; for programs
    detail: str  # what was wrong and what would be right; for people
    request_id: str  # to find it in the server's log


class DeployProblem(Problem, kw_only=True):
    """Why a host was not deployed to."""

    step: str  # at which it failed
    reason: str  # stable; for programs
    agent_id: str | UnsetType = UNSET  # already_managed: of the agent that is there, where that could be read
    expected_fingerprint: str | UnsetType = UNSET  # host_key_changed
    shown_fingerprint: str | UnsetType = UNSET  # host_key_changed, host_key_unknown


def problem_response(error: FleetwireError, request_id: str) -> web.Response:
    status = STATUS_BY_CODE.get(error.code, HTTPStatus.INTERNAL_SERVER_ERROR)
    headers = {}
    if isinstance(error, RateLimitedError):
        headers["Retry-After"] = str(error.retry_after_seconds)
    if isinstance(error, UnavailableError):
        headers["Retry-After"] = "5"
    if status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, RangeError) and error.size_bytes is not None:
        headers["Content-Range"] = f"bytes */{error.size_bytes}"
    problem = _problem(status, error.code, error.message, request_id)
    if isinstance(error, DeployError):
        members = msgspec.structs.asdict(problem) | {"step": error.step, "reason": error.reason} | dict(error.more)
        problem = msgspec.convert(members, DeployProblem)
    return _response(problem, headers)


def http_problem_response(error: web.HTTPException, request_id: str) -> web.Response:
    """Return aiohttp's own refusals (no such route, method, too large) in the same shape."""
    headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
    code = _CODE_BY_STATUS.get(error.status, HTTPStatus(error.status).phrase.lower().replace(" ", "_"))
    detail = _DETAIL.get(error.status, error.reason)
    return _response(_problem(HTTPStatus(error.status), code, detail, request_id), headers)


_DETAIL = {
    404: "there is nothing at this address; GET /api/openapi.json lists what there is",
    405: "this address does not answer that method; the Allow header lists those it answers",
    413: "the body is too large; at most 1 MiB is read here",
}


def internal_problem_response(request_id: str) -> web.Response:
    detail = "internal error; the server's log has more under this request id"
    return _response(_problem(HTTPStatus.INTERNAL_SERVER_ERROR, "internal", detail, request_id), {})


def _problem(status: HTTPStatus, code: str, detail: str, request_id: str) -> Problem:
    return Problem(title=status.phrase, status=status.value, code=code, detail=detail, request_id=request_id)


def _response(problem: Problem, headers: dict[str, str]) -> web.Response:
    return web.Response(
        status=problem.status,
        body=msgspec.json.encode(problem),
        content_type="application/problem+json",
        headers=headers | {"Cache-Control": "no-store"},
    )
