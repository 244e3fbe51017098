"""Users, for admins."""

import asyncio
from functools import partial

from aiohttp import web

from fleetwire_server.core.passwords import hash_password
from fleetwire_server.http.bodies import StatusAnswer, UserAnswer, UserPatch, UserRequest
from fleetwire_server.http.requests import answer, read_json
from fleetwire_server.keys import NOW, STORE
from fleetwire_server.model import User
from fleetwire_server.storage import users
from fleetwire_shared.errors import InvalidError


async def list_users(request: web.Request) -> web.Response:
    return answer([_user_answer(user) for user in await request.app[STORE].read(users.list_users)])


async def add_user(request: web.Request) -> web.Response:
    body = await read_json(request, UserRequest)
    user = User(
        name=body.username,
        role=body.role,
        password_hash=await asyncio.to_thread(hash_password, body.password),
        created_at=request.app[NOW](),
    )
    await request.app[STORE].write(partial(users.add_user, user=user))
    return answer(_user_answer(user), status=201)


async def change_user(request: web.Request) -> web.Response:
    body = await read_json(request, UserPatch)
    if body.role is None and body.password is None:
        raise InvalidError("nothing to change: give role, password or both")
    password_hash = None if body.password is None else await asyncio.to_thread(hash_password, body.password)
    changed = await request.app[STORE].write(
        partial(users.update_user, name=request.match_info["name"], role=body.role, password_hash=password_hash)
    )
    return answer(_user_answer(changed))


async def remove_user(request: web.Request) -> web.Response:
    await request.app[STORE].write(partial(users.delete_user, name=request.match_info["name"]))
    return answer(StatusAnswer(status="deleted"))


def _user_answer(user: User) -> UserAnswer:
    return UserAnswer(username=user.name, role=user.role, created_at=int(user.created_at))
