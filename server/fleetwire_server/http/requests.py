"""Reading what came in, and answering: the few lines every handler shares."""

import asyncio
from typing import TypeVar

import msgspec
from aiohttp import web

from fleetwire_server.core.access import AgentCaller, UserCaller
from fleetwire_server.http.bodies import to_json
from fleetwire_server.http.explain import check, explain
from fleetwire_shared.errors import InvalidError, PeerTimeoutError

BODY_SECONDS = 30.0

S = TypeVar("S", bound=msgspec.Struct)

USER: web.RequestKey[UserCaller] = web.RequestKey("user", UserCaller)
AGENT: web.RequestKey[AgentCaller] = web.RequestKey("agent", AgentCaller)
REQUEST_ID: web.RequestKey[str] = web.RequestKey("request_id", str)
CLIENT_ADDRESS: web.RequestKey[str] = web.RequestKey("client_address", str)


def read_header(request: web.Request, name: str) -> str | None:
    """Return a header that is passed on to an agent, None when it is missing or empty.

    Raises:
        InvalidError: it is not printable ASCII."""
    value = request.headers.get(name)
    if value and not (value.isascii() and value.isprintable()):
        raise InvalidError(f"{name}: must be printable ASCII, as this server gave it")
    return value or None


def parse_query(request: web.Request, kind: type[S]) -> S:
    """Return the query string as a `kind`; parameters it does not have are ignored.

    Raises:
        InvalidError: a parameter is missing, given twice, or not of its type."""
    query = request.query
    for name in set(query):
        if name in kind.__struct_encode_fields__ and len(query.getall(name)) > 1:
            raise InvalidError(f"{name} is given more than once; give it once")
    return check(dict(query), kind, strict=False)


def parse_headers(request: web.Request, kind: type[S]) -> S:
    """Return the headers a `kind` has.

    Raises:
        InvalidError: one of them is given twice, or not of its type."""
    given: dict[str, str] = {}
    for name in kind.__struct_encode_fields__:
        values = request.headers.getall(name, [])
        if len(values) > 1:
            raise InvalidError(f"{name} is given more than once; give it once")
        if values:
            given[name] = values[0]
    return check(given, kind)


async def read_json(request: web.Request, kind: type[S], *, default: S | None = None) -> S:
    """Return the body as a `kind`, or `default` when there is one and the body is empty.

    Raises:
        InvalidError: the body is not JSON, or not of that shape."""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            body = await request.read()
    except TimeoutError as err:
        raise PeerTimeoutError(f"the body did not arrive within {BODY_SECONDS:.0f} s") from err
    if not body and default is not None:
        return default
    try:
        # As text: from bytes msgspec skips unknown fields without looking whether they are UTF-8.
        return msgspec.json.decode(body.decode(), type=kind)
    except msgspec.ValidationError as err:
        raise InvalidError(explain(err, kind)) from err
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
        raise InvalidError(f"the body must be a JSON object; {err}") from err


def answer(document: object, *, status: int = 200) -> web.Response:
    return web.Response(
        status=status,
        body=to_json(document),
        content_type="application/json",
        headers={"Cache-Control": "no-store"},
    )
