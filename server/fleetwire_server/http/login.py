"""Logging in and out, who one is, and tickets for event streams."""

import asyncio
from functools import partial

from aiohttp import web

from fleetwire_server.core.passwords import hash_password, needs_rehash, verify_password
from fleetwire_server.core.tokens import hash_token, new_token
from fleetwire_server.http.bodies import LoginAnswer, LoginRequest, MeAnswer, StatusAnswer, TicketAnswer
from fleetwire_server.http.requests import CLIENT_ADDRESS, USER, answer, read_json
from fleetwire_server.keys import CONFIG, LOGIN_THROTTLE, NOW, STORE, STREAMS
from fleetwire_server.model import StreamTicket, User, UserSession
from fleetwire_server.storage import sessions, users
from fleetwire_shared.errors import UnauthorizedError

TICKET_SECONDS = 60


async def log_in(request: web.Request) -> web.Response:
    body = await read_json(request, LoginRequest)
    with request.app[LOGIN_THROTTLE].attempt(request[CLIENT_ADDRESS], body.username):
        user = await _check_password(request, body)
    await _rehash(request, user, body.password)
    token, now = new_token(), request.app[NOW]()
    session = UserSession(
        token_hash=hash_token(token),
        username=user.name,
        role=user.role,
        created_at=now,
        expires_at=now + request.app[CONFIG].session_hours * 3600,
    )
    await request.app[STORE].write(partial(sessions.add_session, session=session))
    return answer(LoginAnswer(token=token, role=user.role, username=user.name, expires_at=int(session.expires_at)))


async def _check_password(request: web.Request, body: LoginRequest) -> User:
    """Return the user who has that name and password. Raises UnauthorizedError."""
    user = await request.app[STORE].read(partial(users.get_user, name=body.username))
    is_right = await asyncio.to_thread(verify_password, user.password_hash if user else None, body.password)
    if user is None or not is_right:
        raise UnauthorizedError("username or password is wrong")
    return user


async def _rehash(request: web.Request, user: User, password: str) -> None:
    """Store the password anew if its hash was made with weaker parameters than today's."""
    if needs_rehash(user.password_hash):
        new_hash = await asyncio.to_thread(hash_password, password)
        await request.app[STORE].write(
            partial(users.update_password_hash, name=user.name, old_hash=user.password_hash, new_hash=new_hash)
        )


async def log_out(request: web.Request) -> web.Response:
    token_hash = request[USER].session.token_hash
    await request.app[STORE].write(partial(sessions.delete_session, token_hash=token_hash))
    request.app[STREAMS].end_sessions([token_hash], "logged out")
    return answer(StatusAnswer(status="logged out"))


async def show_me(request: web.Request) -> web.Response:
    user = request[USER]
    return answer(MeAnswer(username=user.name, role=user.role, expires_at=int(user.session.expires_at)))


async def make_ticket(request: web.Request) -> web.Response:
    ticket = new_token()
    stored = StreamTicket(
        ticket_hash=hash_token(ticket),
        session_token_hash=request[USER].session.token_hash,
        expires_at=request.app[NOW]() + TICKET_SECONDS,
    )
    await request.app[STORE].write(partial(sessions.add_ticket, ticket=stored))
    return answer(TicketAnswer(ticket=ticket, expires_in=TICKET_SECONDS))
