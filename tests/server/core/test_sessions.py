"""What the status of an agent says, for all that may be known of it."""

import pytest

from fleetwire_server.core.sessions import Presence, agent_status

NOW = 10_000.0


@pytest.mark.parametrize(
    ("status", "presence", "last_seen", "is_connected"),
    [
        ("pending", None, None, False),
        ("online", Presence(heard_at=NOW - 1), None, True),
        ("online", Presence(heard_at=NOW - 59), NOW - 500, True),
        ("stale", Presence(heard_at=NOW - 61), NOW - 500, True),
        ("stale", Presence(heard_at=NOW - 61), NOW - 61, False),
        ("offline", Presence(heard_at=NOW - 181), NOW - 181, False),
        ("offline", Presence(heard_at=NOW - 1, is_gone=True), NOW - 1, False),
        ("online", Presence(heard_at=NOW - 30, reported_at=NOW - 30), NOW - 30, False),
        ("stale", Presence(heard_at=NOW - 90, reported_at=NOW - 90), NOW - 90, False),
        ("stale", None, NOW - 10, False),
        ("offline", None, NOW - 1000, False),
    ],
    ids=[
        "never seen",
        "connected",
        "connected, two heartbeats missed",
        "connected, three heartbeats missed",
        "cut off a minute ago",
        "cut off long ago",
        "said goodbye",
        "reported over HTTP",
        "reported over HTTP, then fell silent",
        "seen before this server started, just now",
        "seen before this server started, long ago",
    ],
)
def test_status(status: str, presence: Presence | None, last_seen: float | None, is_connected: bool) -> None:
    assert agent_status(presence, last_seen, is_connected=is_connected, now=NOW) == status
