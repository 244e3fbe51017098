"""What arrives from agents besides reports on commands (signs of life, metrics), and its way to viewers and disk."""

from functools import partial

from fleetwire_server.core.clock import Clock
from fleetwire_server.core.events import frame_json
from fleetwire_server.core.fanout import FLEET_TOPIC, Fanout, metrics_topic
from fleetwire_server.core.loops import run_every
from fleetwire_server.core.metrics import Metrics, Newest, report_document
from fleetwire_server.core.sessions import Sessions
from fleetwire_server.storage import agents
from fleetwire_server.storage import metrics as stored_metrics
from fleetwire_server.storage.store import Store
from fleetwire_shared.messages import MetricsReport

FLUSH_SECONDS = 20.0


class Ingest:
    def __init__(self, *, store: Store, sessions: Sessions, metrics: Metrics, fanout: Fanout, now: Clock) -> None:
        self._store = store
        self._sessions = sessions
        self._metrics = metrics
        self._fanout = fanout
        self._now = now

    def receive_metrics(self, agent_id: str, report: MetricsReport) -> None:
        """Keep a report and show it to those who watch."""
        now = self._now()
        self._metrics.add(agent_id, report, now)
        topic = metrics_topic(agent_id)
        if self._fanout.has_subscribers(topic):
            self._fanout.publish(topic, frame_json(report_document(agent_id, Newest(now, report))))

    def announce_agent(self, agent_id: str, status: str) -> None:
        """Tell viewers of the fleet that an agent came, went, or was deleted."""
        self._fanout.publish(FLEET_TOPIC, frame_json({"agent_id": agent_id, "status": status}, event="agent"))

    async def run_flush(self) -> None:
        """Store finished minutes and when agents were seen, every FLUSH_SECONDS. Runs until cancelled."""
        await run_every(FLUSH_SECONDS, lambda: self.flush(before=self._now() // 60 * 60), "storing metrics")

    async def flush(self, *, before: float) -> None:
        """Store the rollups of minutes that began before `before`, and when agents were seen."""
        rollups = self._metrics.finished_rollups(before=before)
        if rollups:
            await self._store.write(partial(stored_metrics.add_rollups, rollups=rollups))
            self._metrics.drop_rollups(rollups)
        seen = self._sessions.unsaved()
        if seen:
            await self._store.write(partial(agents.record_last_seen, seen=seen))
            self._sessions.note_saved(seen)
