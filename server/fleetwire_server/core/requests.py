"""Questions to an agent that one frame answers, asked and answered on its control connection."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from fleetwire_server.core.sessions import AgentSession
from fleetwire_shared.errors import PeerFailedError, PeerTimeoutError, UnavailableError, error_from_code
from fleetwire_shared.messages import RequestFailed, ServerMessage, Uninstalled, UnitList

logger = logging.getLogger(__name__)

MAX_PENDING_PER_AGENT = 16
"""Questions to one agent that wait for an answer; more are refused as unavailable. An agent takes no more at once."""

Answer: TypeAlias = UnitList | Uninstalled
A = TypeVar("A", bound=Answer)


@dataclass(frozen=True, slots=True)
class _Pending:
    session: AgentSession
    answer: asyncio.Future[Answer]


class Requests:
    """What was asked of agents and is not answered yet. An answer counts only from the agent that was asked."""

    def __init__(self, *, new_request_id: Callable[[], str], max_per_agent: int = MAX_PENDING_PER_AGENT) -> None:
        self._new_request_id = new_request_id
        self._max_per_agent = max_per_agent
        self._pending: dict[str, _Pending] = {}

    def __len__(self) -> int:
        return len(self._pending)

    async def ask(
        self,
        session: AgentSession,
        question: Callable[[str], ServerMessage],
        kind: type[A],
        *,
        timeout_seconds: float,
    ) -> A:
        """Ask over this session and return the answer, which must be a `kind`.

        Args:
            question: builds the message that asks, from the request's id.
        Raises:
            FleetwireError: the agent's own refusal, with its reason.
            PeerTimeoutError: no answer came in time; one that comes later is ignored.
            UnavailableError: the link ended before the answer came, or too many questions wait for this agent.
            PeerFailedError: it answered something else."""
        if (
            sum(pending.session.agent_id == session.agent_id for pending in self._pending.values())
            >= self._max_per_agent
        ):
            raise UnavailableError(f"{self._max_per_agent} requests wait for this agent, the most allowed; try again")
        request_id = self._new_request_id()
        pending = _Pending(session, asyncio.get_running_loop().create_future())
        self._pending[request_id] = pending
        try:
            session.link.send(question(request_id))
            async with asyncio.timeout(timeout_seconds):
                answer = await pending.answer
        except TimeoutError as err:
            raise PeerTimeoutError(f"the agent did not answer within {timeout_seconds:g} s") from err
        finally:
            del self._pending[request_id]
        if not isinstance(answer, kind):
            raise PeerFailedError(f"the agent answered with {answer.type} where {kind.type} was due")
        return answer

    def receive(self, agent_id: str, message: Answer | RequestFailed) -> None:
        """Give an agent's answer to the one who waits for it."""
        pending = self._pending.get(message.request_id)
        if pending is None or pending.session.agent_id != agent_id or pending.answer.done():
            logger.warning("agent %s answered a request that nobody waits for: %s", agent_id, message.type)
        elif isinstance(message, RequestFailed):
            pending.answer.set_exception(error_from_code(message.code, message.message))
        else:
            pending.answer.set_result(message)

    def end_session(self, session: AgentSession) -> None:
        """The link is gone, and with it every answer that was to come over it."""
        for pending in self._pending.values():
            if pending.session is session and not pending.answer.done():
                pending.answer.set_exception(UnavailableError("the agent went away before it answered"))
