"""The parts of a running server, as handlers find them: `request.app[STORE]`. Joined in app.py, used everywhere."""

from aiohttp import web

from fleetwire_server.config import ServerConfig
from fleetwire_server.core.access import Access
from fleetwire_server.core.channels import Channels
from fleetwire_server.core.clock import Clock
from fleetwire_server.core.deployments import Deployments
from fleetwire_server.core.dispatch import Dispatch
from fleetwire_server.core.fanout import Fanout
from fleetwire_server.core.ingest import Ingest
from fleetwire_server.core.logs import Logs
from fleetwire_server.core.metrics import Metrics
from fleetwire_server.core.requests import Requests
from fleetwire_server.core.sessions import Sessions
from fleetwire_server.core.streams import OpenStreams
from fleetwire_server.core.telemetry import Telemetry
from fleetwire_server.core.throttle import LoginThrottle
from fleetwire_server.deploy.bundle import Bundle
from fleetwire_server.storage.store import Store

CONFIG = web.AppKey("config", ServerConfig)
NOW: web.AppKey[Clock] = web.AppKey("now")
STORE = web.AppKey("store", Store)
BUNDLE: web.AppKey[Bundle | None] = web.AppKey("bundle")
TLS_PIN: web.AppKey[str | None] = web.AppKey("tls_pin")
ACCESS = web.AppKey("access", Access)
CHANNELS = web.AppKey("channels", Channels)
DEPLOYMENTS = web.AppKey("deployments", Deployments)
DISPATCH = web.AppKey("dispatch", Dispatch)
FANOUT = web.AppKey("fanout", Fanout)
INGEST = web.AppKey("ingest", Ingest)
LOGS = web.AppKey("logs", Logs)
METRICS = web.AppKey("metrics", Metrics)
REQUESTS = web.AppKey("requests", Requests)
SESSIONS = web.AppKey("sessions", Sessions)
STREAMS = web.AppKey("streams", OpenStreams)
TELEMETRY = web.AppKey("telemetry", Telemetry)
LOGIN_THROTTLE = web.AppKey("login_throttle", LoginThrottle)
