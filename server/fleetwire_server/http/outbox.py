"""What waits to be sent to one agent."""

import asyncio
from collections import deque

from fleetwire_shared.messages import CommandCancel, Heartbeat, ServerMessage, Welcome

URGENT = (Welcome, CommandCancel, Heartbeat)
"""Sent ahead of all others, in order among themselves. A cancel may overtake its own offer: the agent remembers the id
and refuses the offer. The welcome is put in before anything else is, and so is the first frame of all."""


class Outbox:
    """Two lanes for one writer. Full, `put` raises: a link with so much waiting no longer moves, and is closed."""

    def __init__(self, max_messages: int) -> None:
        self._max_messages = max_messages
        self._urgent: deque[ServerMessage] = deque()
        self._others: deque[ServerMessage] = deque()
        self._wakeup = asyncio.Event()

    def __len__(self) -> int:
        return len(self._urgent) + len(self._others)

    def put(self, message: ServerMessage) -> None:
        """Queue a message.

        Raises:
            asyncio.QueueFull: as many as may be are waiting."""
        if len(self) >= self._max_messages:
            raise asyncio.QueueFull
        lane = self._urgent if isinstance(message, URGENT) else self._others
        lane.append(message)
        self._wakeup.set()

    async def take(self) -> ServerMessage:
        """Wait for a message and return the next one."""
        while not self:
            self._wakeup.clear()
            await self._wakeup.wait()
        return (self._urgent or self._others).popleft()
