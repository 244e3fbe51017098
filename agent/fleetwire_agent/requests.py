"""Answers the server's questions that take one frame: which units there are, and: remove yourself from your host."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final, Protocol, TypeAlias

from fleetwire_shared.errors import ConflictError, FleetwireError, UnavailableError
from fleetwire_shared.messages import (
    AgentMessage,
    ListUnits,
    RequestFailed,
    Uninstall,
    Uninstalled,
    Unit,
    UnitList,
)

MAX_REQUESTS: Final = 16

_MAX_REFUSALS: Final = 64

_log = logging.getLogger(__name__)

Question: TypeAlias = ListUnits | Uninstall


class Answers(Protocol):
    """The way to the server, as `session.Outbox` is."""

    async def send(self, message: AgentMessage) -> None: ...

    async def flush(self) -> bool: ...


class Requests:
    """Works on at most MAX_REQUESTS at once; more are refused."""

    def __init__(
        self,
        *,
        answers: Answers,
        list_units: Callable[[], Awaitable[tuple[tuple[Unit, ...], bool]]],
        remove_agent: Callable[[bool], Awaitable[tuple[str, ...]]],
        leave: Callable[[], Awaitable[None]],
    ) -> None:
        """Prepare; `serve` does the work.

        Args:
            list_units: returns the units, and whether some were left out.
            remove_agent: removes the agent from its host (with its settings and state, if so told) and ends its
                commands; returns the paths it removed.
            leave: ends the agent."""
        self._answers = answers
        self._list_units = list_units
        self._remove_agent = remove_agent
        self._leave = leave
        self._group: asyncio.TaskGroup | None = None
        self._open_count = 0
        self._is_uninstalling = False

    async def serve(self) -> None:
        """Own the tasks that answer, until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                await asyncio.Event().wait()
        finally:
            self._group = None

    def open(self, message: Question) -> None:
        """Start to answer `message`; call while `serve` runs. Questions that come faster than refusals can be sent are
        dropped: the server's own timeout ends those."""
        if self._group is None or self._open_count >= MAX_REQUESTS + _MAX_REFUSALS:
            _log.warning("request %s dropped: the agent stops, or there are too many at once", message.request_id)
            return
        is_full = self._open_count >= MAX_REQUESTS
        self._open_count += 1
        self._group.create_task(self._carry(message, is_full=is_full))

    async def _carry(self, message: Question, *, is_full: bool) -> None:
        try:
            if is_full:
                raise UnavailableError(f"the agent works on {MAX_REQUESTS} requests already; try again")
            await self._answer(message)
        except FleetwireError as err:
            await self._fail(message, err.code, err.message)
        except Exception:  # noqa: BLE001 - the border of a request: whatever it is, the others go on
            _log.exception("request %s failed", message.request_id)
            await self._fail(message, "internal", "the agent failed; see its log")
        finally:
            self._open_count -= 1

    async def _fail(self, message: Question, code: str, text: str) -> None:
        printable = text.encode(errors="backslashreplace").decode()
        await self._answers.send(RequestFailed(request_id=message.request_id, code=code, message=printable))

    async def _answer(self, message: Question) -> None:
        match message:
            case ListUnits():
                units, is_truncated = await self._list_units()
                await self._answers.send(
                    UnitList(request_id=message.request_id, units=units, is_truncated=is_truncated)
                )
            case Uninstall():
                await self._uninstall(message)

    async def _uninstall(self, message: Uninstall) -> None:
        if self._is_uninstalling:
            raise ConflictError("the agent is removing itself from its host already")
        self._is_uninstalling = True
        try:
            _log.warning("the server asks this agent to remove itself from its host")
            removed = await self._remove_agent(message.purge)
        finally:
            self._is_uninstalling = False
        await self._answers.send(Uninstalled(request_id=message.request_id, removed=removed))
        if not await self._answers.flush():
            _log.warning("the link was lost before the server could be told that this agent is removed")
        await self._leave()
