"""Users, for admins."""

import asyncio
from functools import partial

from aiohttp import web

from fleetwire_server.core.passwords import hash_password
from fleetwire_server.http.audit import audit_entry
from fleetwire_server.http.bodies import StatusAnswer, UserAnswer, UserPatch, UserRequest
from fleetwire_server.http.requests import answer, read_json
from fleetwire_server.keys import NOW, STORE
from fleetwire_server.model import User
from fleetwire_server.storage import users
from fleetwire_server.storage.audit import audited
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
    entry = audit_entry(request, "user.added", user.name, role=user.role)
    await request.app[STORE].write(audited(partial(users.add_user, user=user), entry))
    return answer(_user_answer(user), status=201)


async def change_user(request: web.Request) -> web.Response:
    body = await read_json(request, UserPatch)
    if body.role is None and body.password is None:
        raise InvalidError("nothing to change: give role, password or both")
    password_hash = None if body.password is None else await asyncio.to_thread(hash_password, body.password)
    name = request.match_info["name"]
    change = partial(users.update_user, name=name, role=body.role, password_hash=password_hash)
    entry = audit_entry(request, "user.changed", name, role=body.role, is_password_changed=body.password is not None)
    changed = await request.app[STORE].write(audited(change, entry))
    return answer(_user_answer(changed))


async def remove_user(request: web.Request) -> web.Response:
    name = request.match_info["name"]
    entry = audit_entry(request, "user.removed", name)
    await request.app[STORE].write(audited(partial(users.delete_user, name=name), entry))
    return answer(StatusAnswer(status="deleted"))


def _user_answer(user: User) -> UserAnswer:
    return UserAnswer(username=user.name, role=user.role, created_at=int(user.created_at))
