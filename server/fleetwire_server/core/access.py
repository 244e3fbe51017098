"""Who a request comes from: a user by session token or ticket, an agent by key. Only hashes are compared and stored."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from fleetwire_server.core.loops import run_every
from fleetwire_server.core.streams import OpenStreams
from fleetwire_server.core.tokens import hash_token
from fleetwire_server.model import Agent, Role, UserSession
from fleetwire_server.storage import agents, sessions
from fleetwire_server.storage.store import Store
from fleetwire_shared.errors import UnauthorizedError
from fleetwire_shared.limits import AGENT_KEY_PATTERN

SWEEP_SECONDS = 2.0
"""How often open streams are checked against the database, where another process may have removed a user."""

_AGENT_KEY = re.compile(AGENT_KEY_PATTERN, re.ASCII)


@dataclass(frozen=True, slots=True)
class UserCaller:
    name: str
    role: Role
    session: UserSession


@dataclass(frozen=True, slots=True)
class AgentCaller:
    agent_id: str
    key_hash: str


class Access:
    def __init__(self, *, store: Store, streams: OpenStreams, now: Callable[[], float]) -> None:
        self._store = store
        self._streams = streams
        self._now = now

    async def user_by_token(self, token: str) -> UserCaller:
        """Return who the session token belongs to.

        Raises:
            UnauthorizedError: no such session, or it is over."""
        session = await self._store.read(partial(sessions.get_session, token_hash=hash_token(token), now=self._now()))
        return _caller(session, "the session token is not valid (any more); log in again")

    async def user_by_ticket(self, ticket: str) -> UserCaller:
        """Return whose stream ticket it is; it cannot be used again."""
        session = await self._store.write(
            partial(sessions.take_ticket, ticket_hash=hash_token(ticket), now=self._now())
        )
        return _caller(session, "the stream ticket is not valid (any more); a ticket works once, within 60 seconds")

    async def agent_by_key(self, key: str) -> AgentCaller:
        """Return which agent the key belongs to.

        Raises:
            UnauthorizedError: not a key, or a revoked one."""
        found: Agent | None = None
        if _AGENT_KEY.fullmatch(key):
            found = await self._store.read(partial(agents.get_agent_by_key, key_hash=hash_token(key), now=self._now()))
        if found is None:
            raise UnauthorizedError("the agent key is not valid (any more); enrol the agent again or rotate its key")
        return AgentCaller(found.id, hash_token(key))

    async def run_sweep(self) -> None:
        """End the streams of logins that are over. Runs until cancelled."""
        await run_every(SWEEP_SECONDS, self._sweep, "checking logins")

    async def _sweep(self) -> None:
        open_hashes = self._streams.session_token_hashes()
        if open_hashes:
            valid = await self._store.read(partial(sessions.list_valid, token_hashes=open_hashes, now=self._now()))
            self._streams.end_sessions(open_hashes - valid, "the login is over")


def _caller(session: UserSession | None, message: str) -> UserCaller:
    if session is None:
        raise UnauthorizedError(message)
    return UserCaller(session.username, session.role, session)
