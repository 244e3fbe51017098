"""Around every request: its id, its client's address, errors as problem documents, one log line."""

import logging
import os
import time
from collections.abc import Awaitable, Callable

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web import RequestPayloadError

from fleetwire_server.http.connections import CONNECTIONS
from fleetwire_server.http.guard import ROUTE
from fleetwire_server.http.problem import http_problem_response, internal_problem_response, problem_response
from fleetwire_server.http.requests import CLIENT_ADDRESS, REQUEST_ID
from fleetwire_server.keys import CONFIG, TELEMETRY
from fleetwire_shared.errors import FleetwireError, InvalidError

logger = logging.getLogger(__name__)

CLIENT_CLOSED_REQUEST = 499
"""nginx' number for it; no RFC has one, as there is nobody left to read it."""

IS_ANSWERED: web.RequestKey[bool] = web.RequestKey("is_answered", bool)

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@web.middleware
async def identify(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """Give the request an id and find out which address it came from; log it when it is answered.

    The log has the path without its query string, where tokens and keys may be."""
    request[REQUEST_ID] = os.urandom(8).hex()
    request[CLIENT_ADDRESS] = client_address(request)
    started_at = time.monotonic()
    request.app[CONNECTIONS].request_began(request)
    status = 0
    try:
        response = await handler(request)
        status = response.status
        return response
    finally:
        request.app[CONNECTIONS].request_ended(request)
        seconds = time.monotonic() - started_at
        route = request.get(ROUTE)
        name = route.path if route is not None else "none"
        is_timed = route is not None and route.is_timed
        request.app[TELEMETRY].note_request(request.method, name, status, seconds if is_timed else None)
        logger.info(
            "%s %s %d %.1f ms from %s id %s",
            request.method,
            request.rel_url.raw_path,
            status,
            seconds * 1000,
            request[CLIENT_ADDRESS],
            request[REQUEST_ID],
        )


@web.middleware
async def errors_to_problems(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """Turn what a handler raises into its answer. Once a stream has begun there is no answer left to give."""
    try:
        return await _handle(request, handler)
    except FleetwireError as err:
        return problem_response(err, request[REQUEST_ID])
    except web.HTTPException as err:
        return http_problem_response(err, request[REQUEST_ID])
    except (ConnectionError, TimeoutError) as err:
        logger.info("request %s: the client went away: %s", request[REQUEST_ID], err)
        return web.Response(status=CLIENT_CLOSED_REQUEST)  # seen by nobody but the log and the metrics
    except Exception:
        logger.exception("request %s failed", request[REQUEST_ID])
        return internal_problem_response(request[REQUEST_ID])


async def _handle(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """Call the handler. A body that cannot be decoded is the client's fault; and where an answer had begun, only a
    broken connection can still say that it went wrong: a second answer would be read as part of the first."""
    try:
        return await handler(request)
    except (RequestPayloadError, HttpProcessingError) as err:
        raise InvalidError(f"the body cannot be read: {getattr(err, 'message', None) or err}") from err
    except Exception as err:
        if not request.get(IS_ANSWERED, False):
            raise
        if request.transport is not None:
            request.transport.abort()
        if isinstance(err, FleetwireError):
            raise ConnectionAbortedError(err.message) from err
        raise


async def note_answer(request: web.Request, _: web.StreamResponse) -> None:
    """Signal `on_response_prepare`: from here on the status line is gone."""
    request[IS_ANSWERED] = True


@web.middleware
async def secure_headers(request: web.Request, handler: _Handler) -> web.StreamResponse:
    response = await handler(request)
    if not response.prepared:
        response.headers.setdefault("X-Content-Type-Options", "nosniff")
        response.headers.setdefault("Referrer-Policy", "no-referrer")
    return response


def client_address(request: web.Request) -> str:
    """Return the peer's address, or what a trusted proxy says it is: the last address it did not vouch for itself."""
    peer = request.remote or ""
    is_trusted = request.app[CONFIG].is_trusted_proxy
    if not is_trusted(peer):
        return peer
    for address in reversed(request.headers.get("X-Forwarded-For", "").split(",")):
        if (stripped := address.strip()) and not is_trusted(stripped):
            return stripped
    return peer
