"""Agents that are connected now, and what is known of the presence of the others."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias

from fleetwire_shared.errors import UnavailableError
from fleetwire_shared.limits import SILENCE_SECONDS
from fleetwire_shared.messages import HostFacts, ServerMessage

OFFLINE_AFTER_SECONDS = 3 * SILENCE_SECONDS
"""How long an agent whose link was lost without a goodbye counts as stale: it may be back with the next attempt."""


AgentStatus: TypeAlias = Literal["pending", "online", "stale", "offline"]


class AgentLink(Protocol):
    """The control socket of one agent, as core sees it."""

    def send(self, message: ServerMessage) -> None:
        """Queue a message. A link whose queue is full is closed: its peer no longer reads."""

    def close(self, code: int, reason: str) -> None:
        """Close the socket; returns at once."""


@dataclass(eq=False, slots=True)
class AgentSession:
    """One connection of one agent, from welcome to close."""

    agent_id: str
    instance_id: str
    link: AgentLink
    host: HostFacts
    agent_version: str
    ip: str
    connected_at: float
    command_ids: set[str] = field(default_factory=set)  # commands this agent may report on in this session
    asked_ids: set[str] = field(default_factory=set)  # of these: it was asked what it remembers, and has not answered
    has_queued: bool = False  # some of its commands wait here, as it holds as many as it may
    offering: asyncio.Lock = field(default_factory=asyncio.Lock)  # held while they are offered


@dataclass(slots=True)
class Presence:
    """What is remembered of an agent after it was heard. `is_gone`: it closed its link, it was not cut off."""

    heard_at: float
    is_gone: bool = False
    reported_at: float | None = None  # over plain HTTP


def agent_status(presence: Presence | None, last_seen: float | None, *, is_connected: bool, now: float) -> AgentStatus:
    """Return `pending`, `online`, `stale` or `offline`.

    Args:
        presence: what this server process heard of the agent, None when nothing since it started.
        last_seen: Unix seconds as stored; covers the time before this process."""
    if last_seen is None and presence is None:
        return "pending"
    heard_at = presence.heard_at if presence is not None else last_seen or 0.0
    silent_seconds = now - heard_at
    if is_connected:
        return "online" if silent_seconds < SILENCE_SECONDS else "stale"
    if presence is not None and presence.reported_at is not None and now - presence.reported_at < SILENCE_SECONDS:
        return "online"
    if presence is not None and presence.is_gone:
        return "offline"
    return "stale" if silent_seconds < OFFLINE_AFTER_SECONDS else "offline"


class Sessions:
    """The registry of connected agents. One session for each agent: a new connection replaces the one before."""

    def __init__(self, *, now: Callable[[], float]) -> None:
        self._now = now
        self._sessions: dict[str, AgentSession] = {}
        self._presence: dict[str, Presence] = {}
        self._arrivals: dict[str, asyncio.Event] = {}
        self._unsaved: set[str] = set()

    def add(self, session: AgentSession) -> AgentSession | None:
        """Make `session` the agent's present one; return the one it replaces."""
        before = self._sessions.get(session.agent_id)
        self._sessions[session.agent_id] = session
        self.heard(session.agent_id)
        arrival = self._arrivals.pop(session.agent_id, None)
        if arrival is not None:
            arrival.set()
        return before

    def remove(self, session: AgentSession, *, said_goodbye: bool) -> bool:
        """Forget the session; return whether it was still the agent's present one."""
        if self._sessions.get(session.agent_id) is not session:
            return False
        del self._sessions[session.agent_id]
        presence = self._presence.get(session.agent_id)
        if presence is not None:
            presence.is_gone = said_goodbye
        return True

    def get(self, agent_id: str) -> AgentSession | None:
        return self._sessions.get(agent_id)

    def require(self, agent_id: str) -> AgentSession:
        """Return the agent's session.

        Raises:
            UnavailableError: the agent is not connected."""
        session = self._sessions.get(agent_id)
        if session is None:
            raise UnavailableError("the agent is not connected; try again when its status is online")
        return session

    async def wait_for(self, agent_id: str) -> AgentSession:
        """Wait until the agent is connected."""
        while (session := self._sessions.get(agent_id)) is None:
            await self._arrivals.setdefault(agent_id, asyncio.Event()).wait()
        return session

    def heard(self, agent_id: str, *, is_report: bool = False) -> None:
        """Note a sign of life, over the agent's link or (`is_report`) over plain HTTP."""
        now = self._now()
        presence = self._presence.get(agent_id)
        if presence is None:
            presence = self._presence[agent_id] = Presence(heard_at=now)
        presence.heard_at = now
        presence.is_gone = False
        if is_report:
            presence.reported_at = now
        self._unsaved.add(agent_id)

    def forget(self, agent_id: str) -> AgentSession | None:
        """Drop all that is known of a deleted agent; return its session, to be closed."""
        self._presence.pop(agent_id, None)
        self._unsaved.discard(agent_id)
        self._arrivals.pop(agent_id, None)  # it will not come
        return self._sessions.pop(agent_id, None)

    def status(self, agent_id: str, last_seen: float | None) -> AgentStatus:
        return agent_status(
            self._presence.get(agent_id), last_seen, is_connected=agent_id in self._sessions, now=self._now()
        )

    def last_seen(self, agent_id: str, stored: float | None) -> float | None:
        presence = self._presence.get(agent_id)
        return stored if presence is None else presence.heard_at

    def unsaved(self) -> dict[str, float]:
        """Return, by agent, when it was last heard, where that is not stored yet."""
        return {agent_id: self._presence[agent_id].heard_at for agent_id in self._unsaved}

    def note_saved(self, saved: Mapping[str, float]) -> None:
        """These times are stored now."""
        for agent_id, heard_at in saved.items():
            presence = self._presence.get(agent_id)
            if presence is None or presence.heard_at == heard_at:
                self._unsaved.discard(agent_id)

    def all(self) -> list[AgentSession]:
        return list(self._sessions.values())
