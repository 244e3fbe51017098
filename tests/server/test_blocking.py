"""Nothing of the server's own blocks its event loop."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from aiohttp import web
from blockbuster import blockbuster_ctx
from tests.support.api import Api
from tests.support.processes import ADMIN_PASSWORD

from fleetwire_server.app import create_app
from fleetwire_server.config import load_config
from fleetwire_server.core.passwords import hash_password
from fleetwire_server.keys import STORE
from fleetwire_server.model import Role, User
from fleetwire_server.storage import users


@asynccontextmanager
async def running_app(data_dir: Path) -> AsyncIterator[str]:
    """Yield the URL of an application in this process."""
    app = create_app(load_config({"data_dir": str(data_dir)}, {}))
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    async with asyncio.TaskGroup() as group:
        writer = group.create_task(app[STORE].run_writer())
        try:
            password_hash = await asyncio.to_thread(hash_password, ADMIN_PASSWORD)
            admin = User(name="admin", role=Role.ADMIN, password_hash=password_hash, created_at=1.0)
            await app[STORE].write(lambda connection: users.add_user(connection, admin))
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            yield site.name if not runner.addresses else f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()
            writer.cancel()


async def test_no_request_blocks_the_loop(tmp_path: Path) -> None:
    async with running_app(tmp_path) as url:
        with blockbuster_ctx("fleetwire_server"):
            async with Api(url) as api:
                await api.get("/api/health")
                await api.login("admin", ADMIN_PASSWORD)
                await api.post("/api/login", {"username": "admin", "password": "wrong"}, status=401, token=None)
                await api.post(
                    "/api/users", {"username": "eve", "password": "long enough", "role": "viewer"}, status=201
                )
                await api.patch("/api/users/eve", {"password": "longer than before"})
                await api.delete("/api/users/eve")
                agent_id, _ = await api.enrol("web-01")
                command_id = await api.submit(agent_id, "true")
                for path in ("", "/commands", f"/commands/{command_id}/output", "/metrics"):
                    await api.get(f"/api/agents/{agent_id}{path}")
                await api.post(f"/api/agents/{agent_id}/commands/{command_id}/cancel")
                async with (
                    asyncio.timeout(10),
                    api.sse(f"/api/agents/{agent_id}/commands/{command_id}/stream") as events,
                ):
                    assert [event.event async for event in events] == ["status", "end"]
                await api.delete(f"/api/agents/{agent_id}")
                await api.get("/metrics")
                await api.post("/api/logout")
