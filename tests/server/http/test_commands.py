"""Commands over HTTP, with an agent that says what the test wants: what is shown, keys, ranges of output."""

import asyncio
import base64
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from tests.support.api import Api
from tests.support.callers import USER_PASSWORD
from tests.support.processes import ADMIN_PASSWORD, ServerProcess, find_free_port
from tests.support.raw_agent import RawAgent, make_hello, raw_agent

from fleetwire_server.http.command_output import READ_BYTES
from fleetwire_shared.messages import (
    CommandAccepted,
    CommandCancel,
    CommandFinished,
    CommandOffer,
    CommandOutput,
    CommandRejected,
    CommandStarted,
    CommandStored,
    Hello,
    KilledProcess,
    LedgerEntry,
    OutputStored,
    Welcome,
)

BODY = {"type": "shell", "params": {"command": "true"}}


@dataclass(frozen=True, slots=True)
class Host:
    """An agent that is connected and was welcomed."""

    agent: RawAgent
    agent_id: str
    path: str
    welcome: Welcome


@asynccontextmanager
async def connected(api: Api, agent_id: str, key: str, hello: Hello) -> AsyncIterator[Host]:
    async with raw_agent(api.url, key) as agent:
        await agent.say(hello)
        welcome = await agent.hear()
        assert isinstance(welcome, Welcome)
        yield Host(agent, agent_id, f"/api/agents/{agent_id}/commands", welcome)


@pytest.fixture
async def host(http_api: Api) -> AsyncIterator[Host]:
    agent_id, key = await http_api.enrol("raw")
    async with asyncio.timeout(60), connected(http_api, agent_id, key, make_hello()) as host:
        yield host


async def hear(host: Host, kind: type[Any]) -> Any:
    """Return the next message of a kind, whatever comes before it."""
    while not isinstance(message := await host.agent.hear(), kind):
        pass
    return message


async def say_accepted(host: Host, command_id: str) -> None:
    await host.agent.say(CommandAccepted(command_id=command_id))
    await host.agent.say(CommandStarted(command_id=command_id, seconds_ago=0.1))


async def say_finished(host: Host, command_id: str, **fields: Any) -> None:
    defaults: dict[str, Any] = {
        "status": "succeeded", "exit_code": 0, "stdout_bytes": 0, "stderr_bytes": 0, "seconds_ago": 0.0,
        "duration_seconds": 0.1,
    }  # fmt: skip
    await host.agent.say(CommandFinished(command_id=command_id, **defaults | fields))


# ---------------------------------------------------------------- what is shown


async def test_what_a_stop_killed_and_when_it_was_accepted_is_shown(http_api: Api, host: Host) -> None:
    command_id = await http_api.submit(host.agent_id, "sleep 100")
    path = f"{host.path}/{command_id}"
    queued = await http_api.get(path)
    assert (queued["accepted_at"], queued["orphan"], queued["killed"], queued["killed_count"]) == (None, False, [], 0)
    await say_accepted(host, command_id)
    killed = (KilledProcess(pid=7, command="sleep 100", signal="KILL"),)
    await say_finished(host, command_id, status="timed_out", exit_code=None, killed=killed, killed_count=3)
    ended = await http_api.wait_for_command(host.agent_id, command_id)
    assert ended["created_at"] <= ended["accepted_at"] <= ended["finished_at"]
    assert ended["killed"] == [{"pid": 7, "command": "sleep 100", "signal": "KILL"}]
    assert ended["killed_count"] == 3
    async with asyncio.timeout(10), http_api.sse(f"{path}/stream") as events:
        status = await anext(events)
        assert (status.event, status.json()["killed"], status.json()["killed_count"]) == ("status", ended["killed"], 3)


async def test_a_command_only_the_agent_knows_is_in_the_history_until_its_agent_is_deleted(http_api: Api) -> None:
    agent_id, key = await http_api.enrol("restored")
    orphan = "cmd_" + agent_id.removeprefix("agent_") + "0000"
    entry = LedgerEntry(command_id=orphan, state="running", command="make world", timeout_seconds=3600.0)
    async with asyncio.timeout(30), connected(http_api, agent_id, key, make_hello(ledger=(entry,))) as host:
        assert [answer.action for answer in host.welcome.ledger] == ["keep"]
        (shown,) = await http_api.get(host.path)
        assert (shown["orphan"], shown["status"], shown["created_by"]) == (True, "running", "")
        assert shown["params"] == {"command": "make world", "timeout": 3600.0}
        audit = await http_api.get("/api/audit", limit=5)
        assert ("commands.adopted", agent_id) in {(each["action"], each["subject"]) for each in audit}
        await say_output(host, orphan, b"built", 0)
        await http_api.post(f"{host.path}/{orphan}/cancel", status=202)
        assert (await hear(host, CommandCancel)).command_id == orphan
        await say_finished(host, orphan, status="cancelled", exit_code=None, stdout_bytes=5)
        assert (await hear(host, CommandStored)).command_id == orphan
        ended = await http_api.get(f"{host.path}/{orphan}")
        assert (ended["status"], ended["output"], ended["orphan"]) == ("cancelled", "built", True)
        await http_api.delete(f"/api/agents/{agent_id}")
        assert await host.agent.hear_close() == 4001


async def test_an_agent_that_is_deleted_while_it_connects_is_not_let_in(http_api: Api) -> None:
    agent_id, key = await http_api.enrol("deleted")
    async with asyncio.timeout(30), raw_agent(http_api.url, key) as agent:
        await http_api.delete(f"/api/agents/{agent_id}")
        await agent.say(make_hello())
        assert await agent.hear_close() == 4001


async def test_an_offer_that_was_never_answered_expires_by_the_agents_word(http_api: Api) -> None:
    agent_id, key = await http_api.enrol("slow to answer")
    async with asyncio.timeout(30), connected(http_api, agent_id, key, make_hello()) as first:
        answer = await http_api.post(first.path, BODY | {"expires_in": 1})
        assert (await hear(first, CommandOffer)).command_id == answer["command_id"]
    await asyncio.sleep(1.2)  # the time that the command had
    async with asyncio.timeout(30), connected(http_api, agent_id, key, make_hello()) as second:
        cancel = await second.agent.hear()
        assert cancel == CommandCancel(command_id=answer["command_id"], reason="expired")
        path = f"{second.path}/{answer['command_id']}"
        assert (await http_api.get(path))["status"] == "offered"
        await second.agent.say(CommandRejected(command_id=answer["command_id"], reason="expired", message="too late"))
        assert await second.agent.hear() == CommandStored(command_id=answer["command_id"])
        ended = await http_api.get(path)
        assert (ended["status"], ended["error"]) == ("expired", "too late")


async def test_a_cancel_overtakes_the_offers_before_it(http_api: Api, host: Host) -> None:
    """The agent reads nothing while more is offered than its socket takes."""
    text = "true #" + "x" * 120_000
    ids = [await http_api.submit(host.agent_id, text) for _ in range(120)]
    await http_api.post(f"{host.path}/{ids[-1]}/cancel", status=202)
    heard = [await host.agent.hear() for _ in range(121)]
    at = next(index for index, message in enumerate(heard) if isinstance(message, CommandCancel))
    assert heard[at] == CommandCancel(command_id=ids[-1])
    offered = [message.command_id for message in heard if isinstance(message, CommandOffer)]
    assert offered == ids  # and they keep their order
    assert at < 110, at  # some offers were in the socket's buffers already


# ---------------------------------------------------------------- Idempotency-Key


async def send(api: Api, path: str, key: str | None, body: object = None, *, status: int = 200, **more: Any) -> Any:
    headers = {} if key is None else {"Idempotency-Key": key}
    return await api.call("POST", path, body or BODY, headers=headers, status=status, **more)


async def test_the_same_key_and_body_are_one_command(http_api: Api, http_server: ServerProcess) -> None:
    agent_id, _ = await http_api.enrol("keys")
    path = f"/api/agents/{agent_id}/commands"
    first = await send(http_api, path, "k1")
    same = {
        "on_offline": "wait", "expires_in": 3600, "unknown": 1, "params": {"timeout": 30, "command": "true"},
        "type": "shell",
    }  # fmt: skip
    assert await send(http_api, path, "k1", same) == first
    assert (
        await asyncio.gather(*(send(http_api, path, "k2") for _ in range(20)))
        == [await send(http_api, path, "k2")] * 20
    )
    others = [await send(http_api, path, key) for key in ("K1", "!" * 255, None, None)]
    assert len({answer["command_id"] for answer in (first, *others)}) == 5
    for other in (
        {"type": "shell", "params": {"command": "false"}},
        BODY | {"expires_in": 3599},
        BODY | {"on_offline": "fail"},
        {"type": "shell", "params": {"command": "true", "timeout": 31}},
    ):
        problem = await send(http_api, path, "k1", other, status=422)
        assert (problem["code"], problem["status"]) == ("key_reused", 422)
    other_id, _ = await http_api.enrol("keys, another agent")
    assert await send(http_api, f"/api/agents/{other_id}/commands", "k1") != first
    async with Api(http_server.url) as operator:
        await operator.login("operator", USER_PASSWORD)
        assert await send(operator, path, "k1", {"type": "shell", "params": {"command": "date"}}) != first
    assert len(await http_api.get(path)) == 7


@pytest.mark.parametrize("key", ["", "x" * 256, "two words", "é", "tab\there"])
async def test_a_key_that_is_none_is_refused(http_api: Api, key: str) -> None:
    agent_id, _ = await http_api.enrol("keys")
    problem = await send(http_api, f"/api/agents/{agent_id}/commands", key, status=400)
    assert problem["detail"].startswith("Idempotency-Key: must be")
    assert "255" in problem["detail"]
    assert "visible ASCII" in problem["detail"]
    assert await http_api.get(f"/api/agents/{agent_id}/commands") == []


async def test_a_key_outlives_the_server_and_the_agents_link(tmp_path: Path) -> None:
    body = BODY | {"on_offline": "fail"}
    with ServerProcess(tmp_path, port=find_free_port()) as server:
        async with Api(server.url) as api:
            await api.login("admin", ADMIN_PASSWORD)
            agent_id, key = await api.enrol("keys")
            async with asyncio.timeout(30), connected(api, agent_id, key, make_hello()) as host:
                first = await send(api, host.path, "k1", body)
            await api.wait_for_agent(agent_id, "offline")
            assert await send(api, host.path, "k1", body) == first
            await send(api, host.path, "k2", body, status=503)
        server.kill()
        server.start()
        async with Api(server.url) as api:
            await api.login("admin", ADMIN_PASSWORD)
            assert await send(api, host.path, "k1", body) == first
            await send(api, host.path, "k1", status=422)
            assert [command["command_id"] for command in await api.get(host.path)] == [first["command_id"]]


# ---------------------------------------------------------------- ranges of the output


async def say_output(
    host: Host, command_id: str, text: bytes, position: int, stream: Literal["stdout", "stderr"] = "stdout",
    offset: int | None = None,
) -> None:  # fmt: skip
    await host.agent.say(
        CommandOutput(
            command_id=command_id,
            stream=stream,
            position=position,
            offset=position if offset is None else offset,
            base64=base64.b64encode(text).decode(),
        )
    )


async def fetch(
    api: Api, path: str, method: str = "GET", headers: Mapping[str, str] | None = None, **params: str
) -> tuple[int, bytes, Mapping[str, str]]:
    async with (
        asyncio.timeout(30),
        api.open(method, f"{path}/output", headers=headers, params=params) as response,
    ):
        return response.status, await response.read(), response.headers


@pytest.fixture
async def written(http_api: Api, host: Host) -> str:
    """A command that is over. Both streams: `abc EFGH def`, then 10 bytes of stdout that are missing, then `tail`."""
    command_id = await http_api.submit(host.agent_id, "true")
    await say_accepted(host, command_id)
    await say_output(host, command_id, b"abc", 0)
    await say_output(host, command_id, b"EFGH", 3, "stderr", 0)
    await say_output(host, command_id, b"def", 7, offset=3)
    await say_output(host, command_id, b"tail", 20, offset=16)
    await say_finished(host, command_id, stdout_bytes=20, stderr_bytes=4)
    await http_api.wait_for_command(host.agent_id, command_id)
    return f"{host.path}/{command_id}"


RANGES = [
    # stream, Range, body, Content-Range
    ("stdout", "bytes=0-2", b"abc", "0-2/20"),
    ("stdout", "bytes=1-4", b"bcde", "1-4/20"),
    ("stdout", "bytes=0-", b"abcdef", "0-5/20"),  # up to the gap
    ("stdout", "bytes=2-19", b"cdef", "2-5/20"),
    ("stdout", "bytes=17-1000", b"ail", "17-19/20"),
    ("stdout", "bytes=-2", b"il", "18-19/20"),
    ("stderr", "bytes=1-", b"FGH", "1-3/4"),
    ("stderr", "bytes=-100", b"EFGH", "0-3/4"),
    ("", "bytes=2-7", b"cEFGHd", "2-7/24"),
    ("", "bytes=-4", b"tail", "20-23/24"),
]


@pytest.mark.parametrize(("stream", "wanted", "body", "told"), RANGES)
async def test_a_range_counts_the_bytes_as_they_were_written(
    http_api: Api, written: str, stream: str, wanted: str, body: bytes, told: str
) -> None:
    params = {"stream": stream} if stream else {}
    status, content, headers = await fetch(http_api, written, headers={"Range": wanted}, **params)
    assert (status, content, headers["Content-Range"]) == (206, body, f"bytes {told}")
    assert (headers["Content-Length"], headers["Accept-Ranges"]) == (str(len(body)), "bytes")
    again = {"Range": wanted, "If-Range": headers["ETag"]}
    assert (await fetch(http_api, written, headers=again, **params))[:2] == (206, body)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ("bytes=6-", ("byte 6 was not kept", "ends before byte 6", "again at byte 16")),
        ("bytes=-5", ("byte 15 was not kept",)),
        ("bytes=20-", ("begins at byte 20", "there are 20")),
    ],
)
async def test_a_range_that_begins_where_nothing_is_says_what_is_kept(
    http_api: Api, written: str, wanted: str, words: tuple[str, ...]
) -> None:
    async with http_api.open(
        "GET", f"{written}/output", headers={"Range": wanted}, params={"stream": "stdout"}
    ) as response:
        assert (response.status, response.headers["Content-Range"]) == (416, "bytes */20")
        problem = await response.json()
        assert problem["code"] == "range_not_satisfiable"
        assert all(word in problem["detail"] for word in words), problem


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Range": "bytes=0-1,3-4"},
        {"Range": "lines=0-1"},
        {"Range": "bytes=0-1", "If-Range": '"another"'},
        {"Range": "bytes=0-1", "If-Range": "Mon, 01 Jan 2024 00:00:00 GMT"},
    ],
)
async def test_all_that_is_kept_comes_without_a_range_that_counts(
    http_api: Api, written: str, headers: dict[str, str]
) -> None:
    status, content, told = await fetch(http_api, written, headers=headers, stream="stdout")
    assert (status, content, told["Content-Length"]) == (200, b"abcdeftail", "10")
    assert (told["Output-Gaps"], told["Output-Gap-Bytes"]) == ("6-15", "10")
    assert "Content-Range" not in told
    status, content, told = await fetch(http_api, written, "HEAD", headers, stream="stdout")
    assert (status, content, told["Content-Length"], told["Output-Gaps"]) == (200, b"", "10", "6-15")
    _, content, told = await fetch(http_api, written, headers=headers, stream="stderr")
    assert (content, "Output-Gaps" in told) == (b"EFGH", False)


async def test_while_it_runs_a_range_is_of_what_there_is(http_api: Api, host: Host) -> None:
    command_id = await http_api.submit(host.agent_id, "true")
    path = f"{host.path}/{command_id}"
    assert (await fetch(http_api, path))[:2] == (200, b"")
    status, _, told = await fetch(http_api, path, headers={"Range": "bytes=0-"})
    assert (status, told["Content-Range"]) == (416, "bytes */0")
    await say_accepted(host, command_id)
    await say_output(host, command_id, b"hello", 0)
    await hear(host, OutputStored)
    status, content, told = await fetch(http_api, path, headers={"Range": "bytes=1-100"})
    assert (status, content, told["Content-Range"], "ETag" in told) == (206, b"ello", "bytes 1-4/*", False)
    status, content, told = await fetch(http_api, path, headers={"Range": "bytes=1-100", "If-Range": '"x"'})
    assert (status, content, "Content-Length" in told) == (200, b"hello", False)
    await say_finished(host, command_id, stdout_bytes=9)  # the last four bytes never came
    await http_api.wait_for_command(host.agent_id, command_id)
    _, content, told = await fetch(http_api, path)
    assert (content, told["Output-Gaps"], told["Output-Gap-Bytes"]) == (b"hello", "5-8", "4")
    status, content, told = await fetch(http_api, path, headers={"Range": "bytes=3-"})
    assert (status, content, told["Content-Range"]) == (206, b"lo", "bytes 3-4/9")
    for last_id, count in ((None, 4), ("4", 4), ("7", 2), ("9", 0), ("99", 0)):
        async with asyncio.timeout(10), http_api.sse(f"{path}/stream", last_event_id=last_id) as events:
            heard = [event async for event in events]
        gaps = [event.json()["count"] for event in heard if event.event == "gap"]
        assert gaps == ([count] if count else []), last_id
        assert heard[-1].json() == {"reason": "succeeded"}


async def test_a_fetch_while_it_runs_ends_with_what_was_there(http_api: Api, host: Host) -> None:
    """A client that stops reading, and a command that goes on writing meanwhile."""
    command_id = await http_api.submit(host.agent_id, "true")
    await say_accepted(host, command_id)
    size, chunk = 12 * 1024 * 1024, 64 * 1024
    for position in range(0, size, chunk):
        await say_output(host, command_id, bytes(chunk), position)
    while (await hear(host, OutputStored)).position < size:
        pass
    async with asyncio.timeout(60), http_api.open("GET", f"{host.path}/{command_id}/output") as response:
        assert len(await response.content.readexactly(chunk)) == chunk
        for position in range(size, size + 3 * 1024 * 1024, chunk):
            await say_output(host, command_id, bytes(chunk), position)
        while (await hear(host, OutputStored)).position < size + 3 * 1024 * 1024:
            pass
        rest = await response.read()
    assert size <= chunk + len(rest) <= size + READ_BYTES
