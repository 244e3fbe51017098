"""Topics: what is published once and goes to every subscriber. One process; nothing here survives a restart."""

import asyncio
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum, auto


class Keep(Enum):
    """What happens when a subscriber does not read as fast as events are published."""

    NEWEST = auto()  # it gets the newest only: a snapshot replaces the one before
    ALL = auto()  # up to `max_pending` events wait; one more, and the subscription is over


class SubscriberTooSlowError(Exception):
    """The subscription's queue overflowed; what it would have missed is not known to it, so it must end."""


class Subscription:
    """One subscriber's queue of framed events."""

    def __init__(self, keep: Keep, max_pending: int) -> None:
        self._pending: deque[bytes] = deque(maxlen=1 if keep is Keep.NEWEST else None)
        self._keep = keep
        self._max_pending = max_pending
        self._ready = asyncio.Event()
        self._is_overflown = False

    def put(self, frame: bytes) -> None:
        if self._keep is Keep.ALL and len(self._pending) >= self._max_pending:
            self._is_overflown = True
            self._pending.clear()
        else:
            self._pending.append(frame)
        self._ready.set()

    async def get(self) -> bytes:
        """Wait for events; return all that are pending, joined.

        Raises:
            SubscriberTooSlowError: the queue overflowed since the last call."""
        await self._ready.wait()
        self._ready.clear()
        if self._is_overflown:
            raise SubscriberTooSlowError
        frames = b"".join(self._pending)
        self._pending.clear()
        return frames


class Fanout:
    def __init__(self, *, max_pending: int = 1000) -> None:
        self._max_pending = max_pending
        self._topics: dict[str, set[Subscription]] = {}

    @contextmanager
    def subscribe(self, topic: str, keep: Keep) -> Iterator[Subscription]:
        subscription = Subscription(keep, self._max_pending)
        subscribers = self._topics.setdefault(topic, set())
        subscribers.add(subscription)
        try:
            yield subscription
        finally:
            subscribers.discard(subscription)
            if not subscribers and self._topics.get(topic) is subscribers:
                del self._topics[topic]

    def publish(self, topic: str, frame: bytes) -> None:
        for subscription in self._topics.get(topic, ()):
            subscription.put(frame)

    def has_subscribers(self, topic: str) -> bool:
        return topic in self._topics


FLEET_TOPIC = "fleet"


def metrics_topic(agent_id: str) -> str:
    return f"metrics/{agent_id}"


def command_topic(command_id: str) -> str:
    """A wake-up for viewers of one command: they read what is new from the store, from their own position."""
    return f"command/{command_id}"


def deployment_topic(deployment_id: str) -> str:
    """A wake-up for viewers of one deployment: they take what is new from its events, from their own position."""
    return f"deployment/{deployment_id}"
