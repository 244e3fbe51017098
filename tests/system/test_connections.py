"""Connections that hold the server up, and agents that do not keep to the protocol."""

import asyncio
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from aiohttp import ClientSession, WSServerHandshakeError
from tests.support.api import Api
from tests.support.eventually import eventually
from tests.support.processes import ADMIN_PASSWORD, ServerProcess
from tests.support.raw_agent import RawAgent, make_hello, raw_agent
from tests.support.raw_http import open_socket, send_raw

from fleetwire_shared.limits import MAX_CONTROL_FRAME_BYTES
from fleetwire_shared.messages import (
    SUBPROTOCOL,
    ChannelRefused,
    CommandAccepted,
    CommandFinished,
    CommandOffer,
    CommandOutput,
    CommandStarted,
    Heartbeat,
    ReadFile,
)

HEAD_SECONDS = 1.5
MAX_CONNECTIONS = 40
REPORT = {
    "hostname": "web-01",
    "os": "Ubuntu 24.04",
    "cpu_percent": 12.4,
    "mem_percent": 45.0,
    "disk_percent": 62.0,
    "uptime_s": 86400,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    environment = {
        "FLEETWIRE_HEADER_TIMEOUT_SECONDS": str(HEAD_SECONDS),
        "FLEETWIRE_MAX_CONNECTIONS_PER_ADDRESS": str(MAX_CONNECTIONS),
        "FLEETWIRE_LOGIN_FAILURES_PER_MINUTE": "1000",
        "FLEETWIRE_LOG_LEVEL": "debug",
    }
    with ServerProcess(tmp_path_factory.mktemp("connections"), environment=environment) as process:
        yield process


def wait_for_close(connection: socket.socket) -> float:
    """Return after how many seconds the peer closed; the socket's own timeout is the limit."""
    started = time.monotonic()
    try:
        while connection.recv(4096):
            pass
    except ConnectionError:
        pass
    return time.monotonic() - started


# ---------------------------------------------------------------- before a request


@pytest.mark.parametrize("sent", [b"", b"GET /api/health HTTP/1.1\r\nHost: x\r\n"], ids=["idle", "half a head"])
def test_a_connection_without_a_whole_head_is_closed(server: ServerProcess, sent: bytes) -> None:
    with open_socket(server) as connection:
        connection.sendall(sent)
        assert HEAD_SECONDS * 0.5 < wait_for_close(connection) < 15


def test_a_head_that_drips_does_not_hold_its_connection(server: ServerProcess) -> None:
    with open_socket(server) as connection:
        connection.sendall(b"GET /api/health HTTP/1.1\r\n")
        connection.settimeout(0.1)
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline:
            try:
                connection.sendall(b"X-Slow: 1\r\n")
                if not connection.recv(4096):
                    return
            except TimeoutError:
                continue
            except ConnectionError:
                return
        raise AssertionError("it is still open")


async def test_one_address_holds_so_many_connections_and_no_more(server: ServerProcess) -> None:
    async with Api(server.url) as api, api.session.get("/api/health") as response:
        assert response.status == 200
    with ExitStack() as stack:
        for _ in range(MAX_CONNECTIONS + 5):
            connection = stack.enter_context(open_socket(server))
        started = time.monotonic()
        wait_for_close(connection)
        assert time.monotonic() - started < HEAD_SECONDS
    assert "refused a connection from 127.0.0.1" in server.log_text

    async def is_served() -> bool:
        try:
            return (await asyncio.to_thread(send_raw, server, "GET", "/api/health", {})).status == 200
        except ConnectionError:
            return False

    await eventually(is_served)


def test_a_request_that_is_no_http_is_refused_and_not_logged(server: ServerProcess) -> None:
    for line in (b"GET /api/agents?token=s3cret-in-line HTTP/9.9", b"s3cret-in-line", b"GET  /?s3cret-in-line"):
        with open_socket(server) as connection:
            connection.sendall(line + b"\r\n\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 400") or not connection.recv(65536)
    assert "s3cret-in-line" not in server.log_text


# ---------------------------------------------------------------- whose word is believed


async def reported_ip(server: ServerProcess, forwarded: str) -> str:
    """Return which address the server takes a report for to come from."""
    async with Api(server.url) as api:
        await api.login("admin", ADMIN_PASSWORD)
        agent_id, key = await api.enrol("forwarded")
        headers = {"X-Agent-Key": key, "X-Forwarded-For": forwarded}
        await api.call("POST", f"/api/agents/{agent_id}/report", REPORT, headers=headers, token=None)
        return str((await api.get(f"/api/agents/{agent_id}"))["ip"])


async def test_nobody_is_believed_about_addresses_by_default(server: ServerProcess) -> None:
    assert await reported_ip(server, "203.0.113.9") == "127.0.0.1"


async def test_a_trusted_proxy_is_believed_about_the_last_address(tmp_path_factory: pytest.TempPathFactory) -> None:
    environment = {"FLEETWIRE_TRUSTED_PROXIES": "127.0.0.1, 10.0.0.0/8"}
    with ServerProcess(tmp_path_factory.mktemp("proxied"), environment=environment) as proxied:
        assert await reported_ip(proxied, "203.0.113.9") == "203.0.113.9"
        assert await reported_ip(proxied, "198.51.100.1, 203.0.113.9, 10.1.2.3") == "203.0.113.9"
        assert await reported_ip(proxied, "10.1.2.3") == "127.0.0.1"


async def test_what_a_client_says_of_hosts_comes_back_nowhere(server: ServerProcess) -> None:
    headers = {"Host": "evil.example", "X-Forwarded-Host": "evil.example", "Forwarded": "host=evil.example"}
    for path in ("/api/health", "/api/openapi.json", "/api/docs", "/api/agents", "/api/nothing", "/api/agents/"):
        answer = await asyncio.to_thread(send_raw, server, "GET", path, headers)
        assert b"evil" not in answer.body
        assert "evil" not in str(answer.headers)


# ---------------------------------------------------------------- agents


@pytest.fixture
async def api(server: ServerProcess) -> Api:
    async with Api(server.url) as client:
        token = await client.login("admin", ADMIN_PASSWORD)
    return Api(server.url, token=token)


async def test_an_agent_in_a_browser_is_refused(server: ServerProcess, api: Api) -> None:
    async with api:
        _, key = await api.enrol("origin")
    with pytest.raises(WSServerHandshakeError) as refused:
        async with raw_agent(server.url, key, origin="https://evil.example"):
            pass
    assert refused.value.status == 403


async def test_a_key_that_is_not_valid_is_refused_at_the_handshake(server: ServerProcess) -> None:
    with pytest.raises(WSServerHandshakeError) as refused:
        async with raw_agent(server.url, "agt_0000000000000000_" + "x" * 43):
            pass
    assert refused.value.status == 401


async def test_a_socket_without_our_subprotocol_is_refused(server: ServerProcess, api: Api) -> None:
    async with api, ClientSession() as session:
        _, key = await api.enrol("subprotocol")
        with pytest.raises(WSServerHandshakeError) as refused:
            await session.ws_connect(f"{server.url}/api/agents/connect", headers={"X-Agent-Key": key})
    assert refused.value.status == 400


async def test_frames_are_not_compressed(server: ServerProcess, api: Api) -> None:
    async with api:
        _, key = await api.enrol("compression")
    async with asyncio.timeout(10), raw_agent(server.url, key, compress=15) as agent:
        await agent.greet()
        assert agent.ws.compress == 0
        assert agent.ws.protocol == SUBPROTOCOL


async def say_hello_again(agent: RawAgent) -> None:
    await agent.greet()
    await agent.say(make_hello())


async def say_heartbeat_first(agent: RawAgent) -> None:
    await agent.say(Heartbeat())


async def say_garbage(agent: RawAgent) -> None:
    await agent.greet()
    await agent.ws.send_str('{"type":')


async def say_unknown(agent: RawAgent) -> None:
    await agent.greet()
    await agent.ws.send_str('{"type":"metrics","sampled_at":"yesterday"}')


async def say_binary(agent: RawAgent) -> None:
    await agent.greet()
    await agent.ws.send_bytes(b"\0" * 100)


async def say_too_much(agent: RawAgent) -> None:
    await agent.greet()
    await agent.ws.send_str("x" * (MAX_CONTROL_FRAME_BYTES + 1))


async def speak_a_later_protocol(agent: RawAgent) -> None:
    await agent.say(make_hello(protocol_oldest=900, protocol_newest=901))


async def speak_an_earlier_protocol(agent: RawAgent) -> None:
    await agent.say(make_hello(protocol_oldest=0, protocol_newest=0))


@pytest.mark.parametrize(
    ("misbehave", "code"),
    [
        (say_hello_again, 1008),
        (say_heartbeat_first, 1008),
        (say_garbage, 1008),
        (say_unknown, 1008),
        (say_binary, 1008),
        (say_too_much, 1009),
        (speak_a_later_protocol, 4002),
        (speak_an_earlier_protocol, 4002),
    ],
)
async def test_an_agent_that_leaves_the_protocol_is_told_so(
    misbehave: "object", code: int, server: ServerProcess, api: Api
) -> None:
    async with api:
        _, key = await api.enrol("misbehaving")
    async with asyncio.timeout(15), raw_agent(server.url, key) as agent:
        await misbehave(agent)  # type: ignore[operator]
        assert await agent.hear_close() == code


async def test_an_agent_that_never_says_hello_is_closed(server: ServerProcess, api: Api) -> None:
    async with api:
        agent_id, key = await api.enrol("silent")
        async with asyncio.timeout(40), raw_agent(server.url, key) as agent:
            assert await agent.hear_close() == 1013
        assert (await api.get(f"/api/agents/{agent_id}"))["status"] == "pending"


async def test_a_newer_connection_replaces_the_older(server: ServerProcess, api: Api) -> None:
    async with api, asyncio.timeout(15):
        agent_id, key = await api.enrol("twice")
        async with raw_agent(server.url, key) as older, raw_agent(server.url, key) as newer:
            await older.greet()
            await newer.greet()
            assert await older.hear_close() == 4003
            assert (await api.get(f"/api/agents/{agent_id}"))["status"] == "online"


async def test_an_agent_that_is_deleted_is_closed_at_once(server: ServerProcess, api: Api) -> None:
    async with api, asyncio.timeout(15):
        agent_id, key = await api.enrol("deleted")
        async with raw_agent(server.url, key) as agent:
            await agent.greet()
            await api.delete(f"/api/agents/{agent_id}")
            assert await agent.hear_close() == 4001


async def test_an_agent_cannot_report_on_the_command_of_another(server: ServerProcess, api: Api) -> None:
    async with api, asyncio.timeout(20):
        owner_id, owner_key = await api.enrol("owner")
        _, thief_key = await api.enrol("thief")
        async with raw_agent(server.url, owner_key) as owner, raw_agent(server.url, thief_key) as thief:
            await owner.greet()
            await thief.greet()
            command_id = await api.submit(owner_id, "true")
            offer = await owner.hear()
            assert isinstance(offer, CommandOffer)
            await owner.say(CommandAccepted(command_id=command_id))
            await api.wait_for_command(owner_id, command_id, "accepted")
            await thief.say(CommandStarted(command_id=command_id, seconds_ago=0.1))
            await thief.say(
                CommandOutput(command_id=command_id, stream="stdout", position=0, offset=0, base64="c3RvbGVu")
            )
            await thief.say(finished(command_id))
            assert (await thief.hear()).type == "command_stored"  # it has been read, then: forget it
            command = await api.get(f"/api/agents/{owner_id}/commands/{command_id}")
            assert (command["status"], command["output"]) == ("accepted", "")
            await owner.say(CommandStarted(command_id=command_id, seconds_ago=0.1))
            await owner.say(finished(command_id))
            assert (await api.wait_for_command(owner_id, command_id))["status"] == "succeeded"


def finished(command_id: str) -> CommandFinished:
    return CommandFinished(
        command_id=command_id,
        status="succeeded",
        exit_code=0,
        stdout_bytes=0,
        stderr_bytes=0,
        seconds_ago=0.0,
        duration_seconds=0.1,
    )


async def test_an_agent_cannot_take_the_channel_of_another(server: ServerProcess, api: Api) -> None:
    async with api, asyncio.timeout(20), ClientSession() as session:
        owner_id, owner_key = await api.enrol("owner")
        _, thief_key = await api.enrol("thief")
        async with (
            raw_agent(server.url, owner_key) as owner,
            raw_agent(server.url, thief_key) as thief,
            asyncio.TaskGroup() as group,
        ):
            await owner.greet()
            await thief.greet()
            download = group.create_task(api.get(f"/api/agents/{owner_id}/files?path=/etc/secret", status=404))
            asked = await owner.hear()
            assert isinstance(asked, ReadFile)
            await thief.say(ChannelRefused(channel_id=asked.channel_id, code="forbidden", message="stolen"))
            with pytest.raises(WSServerHandshakeError) as refused:
                await session.ws_connect(
                    f"{server.url}/api/agents/channels/{asked.channel_id}", headers={"X-Agent-Key": thief_key}
                )
            assert refused.value.status == 404
            await owner.say(ChannelRefused(channel_id=asked.channel_id, code="not_found", message="no such file"))
            assert (await download)["detail"] == "no such file"


# ---------------------------------------------------------------- the end


async def test_stopping_does_not_wait_for_open_streams_and_sockets(tmp_path_factory: pytest.TempPathFactory) -> None:
    with ServerProcess(tmp_path_factory.mktemp("stopped")) as stopped:
        async with Api(stopped.url) as api, asyncio.timeout(30):
            await api.login("admin", ADMIN_PASSWORD)
            _, key = await api.enrol("stopped")
            async with raw_agent(stopped.url, key) as agent, api.sse("/api/events") as events:
                await agent.greet()
                started = time.monotonic()
                status, code = await asyncio.gather(asyncio.to_thread(stopped.stop), agent.hear_close())
                seconds = time.monotonic() - started
                assert (status, code) == (0, 1012)
                assert seconds < 4  # aiohttp alone takes twice the 5 s it is given
                last = [event async for event in events][-1]
                assert (last.event, last.json()) == ("end", {"reason": "the server is stopping"})
