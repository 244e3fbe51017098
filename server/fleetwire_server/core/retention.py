"""What is older than it is kept for leaves the database, in transactions small enough to delay nobody."""

from collections.abc import Callable
from functools import partial

from fleetwire_server.core.clock import Clock
from fleetwire_server.core.loops import run_every
from fleetwire_server.storage import agents, audit, command_keys, commands, deployments, metrics, sessions
from fleetwire_server.storage.store import Connection, Store

ROUND_SECONDS = 600.0
ROWS_IN_TRANSACTION = 500
DAY_SECONDS = 86_400

COMMAND_KEY_SECONDS = 86_400.0
"""How long a request for a command can be repeated under its key."""

KEPT_DEPLOYMENTS = 1_000
KEPT_AUDIT_ENTRIES = 100_000


async def run_retention(store: Store, *, command_days: float, metrics_days: float, now: Clock) -> None:
    """Delete what is too old, every ROUND_SECONDS. Runs until cancelled."""

    async def delete_old() -> None:
        await _delete_in_steps(store, partial(commands.delete_old_commands, before=now() - command_days * DAY_SECONDS))
        await _delete_in_steps(store, partial(command_keys.delete_old, before=now() - COMMAND_KEY_SECONDS))
        await _delete_in_steps(store, partial(metrics.delete_old, before=now() - metrics_days * DAY_SECONDS))
        await _delete_in_steps(store, partial(deployments.delete_old, keep=KEPT_DEPLOYMENTS))
        await _delete_in_steps(store, partial(audit.delete_old, keep=KEPT_AUDIT_ENTRIES))
        await store.write(partial(sessions.delete_expired, now=now()))
        await store.write(partial(agents.delete_expired_keys, now=now()))

    await run_every(ROUND_SECONDS, delete_old, "deleting what is too old")


async def _delete_in_steps(store: Store, delete: Callable[..., int]) -> None:
    def step(connection: Connection) -> int:
        return delete(connection, limit=ROWS_IN_TRANSACTION)

    while await store.write(step) >= ROWS_IN_TRANSACTION:
        continue
