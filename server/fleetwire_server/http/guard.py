"""Who may call a route, checked in one place before its handler runs."""

from collections.abc import Awaitable, Callable

from aiohttp import web

from fleetwire_server.core.access import UserCaller
from fleetwire_server.http.requests import AGENT, USER
from fleetwire_server.http.route import Policy, Route
from fleetwire_server.keys import ACCESS
from fleetwire_server.model import Role
from fleetwire_shared.errors import ForbiddenError, UnauthorizedError

ROUTE: web.RequestKey[Route] = web.RequestKey("route", Route)

_ROLES = {Policy.VIEWER: Role.VIEWER, Policy.OPERATOR: Role.OPERATOR, Policy.ADMIN: Role.ADMIN}


def guarded(route: Route) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """Return the route's handler behind its policy."""

    async def handle(request: web.Request) -> web.StreamResponse:
        request[ROUTE] = route
        if route.policy is Policy.AGENT:
            request[AGENT] = await request.app[ACCESS].agent_by_key(read_agent_key(request, route))
        elif route.policy is not Policy.PUBLIC:
            request[USER] = await _user(request, route)
        return await route.handler(request)

    return handle


def read_agent_key(request: web.Request, route: Route) -> str:
    """Return the key a request carries, unchecked. Raises UnauthorizedError where there is none."""
    key = request.headers.get("X-Agent-Key")
    if key is None and route.is_key_in_query:
        key = request.query.get("key")
        if key is None:
            raise UnauthorizedError("give the agent's key: ?key=KEY")
    if key is None:
        raise UnauthorizedError("send the agent's key in the header X-Agent-Key")
    return key


async def _user(request: web.Request, route: Route) -> UserCaller:
    user = await _authenticate(request, is_stream=route.is_stream)
    needed = _ROLES[route.policy]
    if not user.role.includes(needed):
        raise ForbiddenError(f"this needs the role {needed} or higher; {user.name} has the role {user.role}")
    return user


async def _authenticate(request: web.Request, *, is_stream: bool) -> UserCaller:
    access = request.app[ACCESS]
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token:
        return await access.user_by_token(token.strip())
    in_url = {"token", "ticket"} & set(request.query)
    if in_url and not is_stream:
        raise UnauthorizedError("a token in the URL works for event streams only; send Authorization: Bearer TOKEN")
    if "ticket" in request.query:
        return await access.user_by_ticket(request.query["ticket"])
    if "token" in request.query:
        return await access.user_by_token(request.query["token"])
    raise UnauthorizedError("log in with POST /api/login and send Authorization: Bearer TOKEN")
