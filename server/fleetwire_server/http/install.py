"""What a host fetches to become an agent: the install script and the agent itself."""

import base64

from aiohttp import web

from fleetwire_server.deploy.bundle import require_bundle
from fleetwire_server.deploy.install_script import build_install_script, reachable_url
from fleetwire_server.http.bodies import InstallQuery
from fleetwire_server.http.guard import ROUTE, read_agent_key
from fleetwire_server.http.requests import parse_query
from fleetwire_server.http.route import Media
from fleetwire_server.keys import BUNDLE, CONFIG, TLS_PIN


async def send_install_script(request: web.Request) -> web.Response:
    """The guard has checked the key. The server's address comes from the settings, never from the request."""
    parse_query(request, InstallQuery)  # refuses one that is ambiguous
    script = build_install_script(
        reachable_url(request.app[CONFIG].public_url),
        read_agent_key(request, request[ROUTE]),
        require_bundle(request.app[BUNDLE]),
        request.app[TLS_PIN],
    )
    return web.Response(text=script, content_type=Media.SCRIPT.value, headers={"Cache-Control": "no-store"})


async def send_bundle(request: web.Request) -> web.Response:
    bundle = require_bundle(request.app[BUNDLE])
    digest = base64.b64encode(bytes.fromhex(bundle.sha256)).decode()
    headers = {
        "ETag": f'"{bundle.sha256}"',
        "Repr-Digest": f"sha-256=:{digest}:",
        "Content-Disposition": "attachment; filename=fleetwire-agent.pyz",
        "Cache-Control": "no-cache",
    }
    if f'"{bundle.sha256}"' in request.headers.get("If-None-Match", ""):
        return web.Response(status=304, headers=headers)
    return web.Response(body=bundle.content, content_type=Media.BYTES.value, headers=headers)
