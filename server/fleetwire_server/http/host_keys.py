"""Pinned keys of SSH servers, for admins."""

from aiohttp import web

from fleetwire_server.http.audit import audit_entry
from fleetwire_server.http.bodies import HostKeyAnswer, StatusAnswer
from fleetwire_server.http.requests import answer
from fleetwire_server.keys import STORE
from fleetwire_server.storage import host_keys
from fleetwire_server.storage.audit import add_entry
from fleetwire_server.storage.store import Connection
from fleetwire_shared.errors import NotFoundError


async def list_host_keys(request: web.Request) -> web.Response:
    return answer(
        [
            HostKeyAnswer(
                host=key.host,
                port=key.port,
                public_key=key.public_key,
                fingerprint=key.fingerprint,
                pinned_at=key.pinned_at,
                pinned_by=key.pinned_by,
            )
            for key in await request.app[STORE].read(host_keys.list_host_keys)
        ]
    )


async def remove_host_key(request: web.Request) -> web.Response:
    host, port = request.match_info["host"].lower(), request.match_info["port"]
    entry = audit_entry(request, "host_key.removed", f"{host}:{port}")

    def remove(connection: Connection) -> bool:
        is_removed = port.isascii() and port.isdigit() and len(port) <= 5
        is_removed = is_removed and host_keys.delete_host_key(connection, host, int(port))
        if is_removed:
            add_entry(connection, entry)
        return is_removed

    if not await request.app[STORE].write(remove):
        raise NotFoundError(f"no key of {host} port {port} is pinned; GET /api/host-keys lists those that are")
    return answer(StatusAnswer(status="deleted"))
