"""A credential of every kind of caller there is."""

import sqlite3
from contextlib import closing
from dataclasses import dataclass

from tests.support.api import Api
from tests.support.processes import ADMIN_PASSWORD, ServerProcess

from fleetwire_server.core.tokens import hash_token

USER_PASSWORD = "eleven purple bicycles"
CHANGED_USER = "changed"
"""Nobody logs in as this one: a test may give it any password, which ends its sessions."""
"""Of the users `operator` and `viewer` that `make_callers` adds."""


@dataclass(frozen=True, slots=True)
class Callers:
    """Session tokens of users, keys of agents."""

    admin: str
    operator: str
    viewer: str
    expired: str
    logged_out: str
    agent_id: str
    agent_key: str
    other_agent_key: str
    deleted_agent_key: str


async def make_callers(server: ServerProcess) -> Callers:
    async with Api(server.url) as api:
        admin = await api.login("admin", ADMIN_PASSWORD)
        for role in ("operator", "viewer"):
            await api.post("/api/users", {"username": role, "password": USER_PASSWORD, "role": role}, status=201)
        changed = {"username": CHANGED_USER, "password": USER_PASSWORD, "role": "viewer"}
        await api.post("/api/users", changed, status=201)
        expired, logged_out = [await log_in(server, "admin", ADMIN_PASSWORD) for _ in range(2)]
        await api.post("/api/logout", token=logged_out)
        expire_session(server, expired)
        agent_id, agent_key = await api.enrol("policy")
        _, other_agent_key = await api.enrol("policy, another")
        deleted_id, deleted_agent_key = await api.enrol("policy, deleted")
        await api.delete(f"/api/agents/{deleted_id}")
    return Callers(
        admin=admin,
        operator=await log_in(server, "operator", USER_PASSWORD),
        viewer=await log_in(server, "viewer", USER_PASSWORD),
        expired=expired,
        logged_out=logged_out,
        agent_id=agent_id,
        agent_key=agent_key,
        other_agent_key=other_agent_key,
        deleted_agent_key=deleted_agent_key,
    )


async def log_in(server: ServerProcess, username: str, password: str) -> str:
    async with Api(server.url) as api:
        return await api.login(username, password)


def expire_session(server: ServerProcess, token: str) -> None:
    """Let the session have ended long ago: the shortest that can be configured lasts 36 s."""
    with closing(sqlite3.connect(server.data_dir / "fleetwire.db", timeout=10)) as connection, connection:
        changed = connection.execute("UPDATE sessions SET expires_at = 1 WHERE token_hash = ?", (hash_token(token),))
        assert changed.rowcount == 1
