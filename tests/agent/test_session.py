"""The agent's link against a real WebSocket server on loopback that plays the server's part."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed, ConnectionClosedError, InvalidStatus
from websockets.frames import Close
from websockets.typing import Subprotocol

from fleetwire_agent.commands import Commands
from fleetwire_agent.config import AgentConfig
from fleetwire_agent.ledger import Ledger
from fleetwire_agent.processes import Spawner
from fleetwire_agent.runners import find_launcher
from fleetwire_agent.session import Dialer, Failure, Outbox, Session, delay_before_dialling, describe_failure
from fleetwire_shared.codec import decode, encode
from fleetwire_shared.errors import ProtocolError
from fleetwire_shared.messages import (
    FROM_AGENT,
    SUBPROTOCOL,
    AgentMessage,
    CommandAccepted,
    CommandFinished,
    CommandOffer,
    CommandOutput,
    CommandStored,
    FollowLog,
    Heartbeat,
    Hello,
    HostFacts,
    ListUnits,
    MetricsReport,
    ReadFile,
    ServerMessage,
    Settlement,
    Uninstall,
    Welcome,
    WriteFile,
)

KEY = "agt_" + "a" * 16 + "_" + "B" * 43
FACTS = HostFacts(
    hostname="h", os="o", kernel="k", architecture="a", boot_id="b", cpu_count=1, memory_bytes=1, python="3"
)


def make_welcome(
    *,
    protocol: int = 1,
    heartbeat_seconds: float = 20.0,
    silence_seconds: float = 60.0,
    ledger: tuple[Settlement, ...] = (),
) -> Welcome:
    return Welcome(
        protocol=protocol,
        protocol_oldest=protocol,
        protocol_newest=protocol,
        agent_id="agent_x",
        server_version="0",
        heartbeat_seconds=heartbeat_seconds,
        silence_seconds=silence_seconds,
        metrics_seconds=5.0,
        ledger=ledger,
    )


class Peer:
    """The server's end of one link."""

    def __init__(self, socket: ServerConnection) -> None:
        self.socket = socket
        self.closed = asyncio.Event()

    async def receive(self) -> AgentMessage:
        async with asyncio.timeout(5):
            text = await self.socket.recv()
        assert isinstance(text, str)
        return decode(text, FROM_AGENT)

    async def receive_until(self, kind: type[AgentMessage]) -> AgentMessage:
        while True:
            message = await self.receive()
            if isinstance(message, kind):
                return message

    async def send(self, message: ServerMessage) -> None:
        await self.socket.send(encode(message))

    async def greet(self, welcome: Welcome | None = None) -> Hello:
        hello = await self.receive()
        assert isinstance(hello, Hello)
        await self.send(welcome or make_welcome())
        return hello


@dataclass
class Rig:
    peers: asyncio.Queue[Peer]
    outbox: Outbox
    ledger: Ledger
    session: Session
    delays: list[float] = field(default_factory=list)
    channels: list[ReadFile | WriteFile | FollowLog] = field(default_factory=list)
    requests: list[ListUnits | Uninstall] = field(default_factory=list)

    async def next_peer(self) -> Peer:
        async with asyncio.timeout(5):
            return await self.peers.get()


@asynccontextmanager
async def open_server(handler: Callable[[ServerConnection], Awaitable[None]]) -> AsyncIterator[str]:
    async with serve(handler, "127.0.0.1", 0, subprotocols=[Subprotocol(SUBPROTOCOL)], close_timeout=0.2) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    peers: asyncio.Queue[Peer] = asyncio.Queue()

    async def handle(socket: ServerConnection) -> None:
        assert socket.request
        assert socket.request.path == "/api/agents/connect"
        assert socket.request.headers["X-Agent-Key"] == KEY
        peer = Peer(socket)
        peers.put_nowait(peer)
        await socket.wait_closed()
        peer.closed.set()

    delays: list[float] = []
    channels: list[ReadFile | WriteFile | FollowLog] = []
    requests: list[ListUnits | Uninstall] = []

    async def note_delay(seconds: float) -> None:
        delays.append(seconds)
        await asyncio.sleep(0)

    async with open_server(handle) as url:
        with Spawner({"PATH": os.environ["PATH"]}) as spawner:
            ledger, outbox = Ledger(tmp_path, boot_id="this boot", new_instance_id="i"), Outbox()
            ledger.open()
            ledger.begin()
            environment = {"PATH": os.environ["PATH"]}
            commands = Commands(launcher=find_launcher(spawner), ledger=ledger, environment=environment)
            session = Session(
                dial=Dialer(AgentConfig(server=url, key=KEY)).control,
                read_host=lambda: FACTS,
                outbox=outbox,
                ledger=ledger,
                commands=commands,
                open_channel=channels.append,
                open_request=requests.append,
                jitter=lambda: 0.5,
                sleep=note_delay,
            )
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(commands.serve()), group.create_task(session.run())]
                yield Rig(peers, outbox, ledger, session, delays, channels, requests)
                await commands.stop()
                for task in tasks:
                    task.cancel()
            await asyncio.to_thread(ledger.close)


def make_offer(command: str, command_id: str = "cmd_1") -> CommandOffer:
    return CommandOffer(
        command_id=command_id, kind="shell", command=command, timeout_seconds=30.0, remaining_seconds=30.0
    )


async def test_hello_comes_first_and_says_who_speaks(rig: Rig) -> None:
    peer = await rig.next_peer()
    hello = await peer.greet()
    assert (hello.host, hello.instance_id, hello.ledger) == (FACTS, "i", ())
    assert peer.socket.subprotocol == SUBPROTOCOL
    async with asyncio.timeout(5):
        await rig.session.is_welcomed.wait()


async def test_a_command_is_run_over_the_link(rig: Rig) -> None:
    peer = await rig.next_peer()
    await peer.greet()
    await peer.send(make_offer("echo hello"))
    assert await peer.receive() == CommandAccepted(command_id="cmd_1")
    output = await peer.receive_until(CommandOutput)
    assert isinstance(output, CommandOutput)
    assert output.base64 == "aGVsbG8K"
    result = await peer.receive_until(CommandFinished)
    assert isinstance(result, CommandFinished)
    assert result.status == "succeeded"


async def test_a_result_that_was_not_stored_is_sent_again_on_the_next_link(rig: Rig) -> None:
    first = await rig.next_peer()
    await first.greet()
    await first.send(make_offer("echo hello"))
    result = await first.receive_until(CommandFinished)
    first.socket.transport.abort()
    second = await rig.next_peer()
    hello = await second.greet(make_welcome(ledger=(Settlement(command_id="cmd_1", action="keep"),)))
    assert [(entry.command_id, entry.state) for entry in hello.ledger] == [("cmd_1", "finished")]
    output = await second.receive_until(CommandOutput)
    assert isinstance(output, CommandOutput)
    assert output.position == 0
    again = await second.receive_until(CommandFinished)
    assert isinstance(again, CommandFinished)
    assert isinstance(result, CommandFinished)
    assert again.seconds_ago > result.seconds_ago
    assert replace(again, seconds_ago=result.seconds_ago) == result
    await second.send(CommandStored(command_id="cmd_1"))
    async with asyncio.timeout(5):
        await rig.ledger.is_reported.wait()
    assert len(rig.ledger) == 0


async def test_a_command_that_runs_through_a_break_is_heard_afterwards(rig: Rig) -> None:
    first = await rig.next_peer()
    await first.greet()
    await first.send(make_offer("echo before; sleep 0.3; echo after"))
    await first.receive_until(CommandOutput)
    first.socket.transport.abort()
    second = await rig.next_peer()
    keep = Settlement(command_id="cmd_1", action="keep", output_position=7)
    await second.greet(make_welcome(ledger=(keep,)))
    output = await second.receive_until(CommandOutput)
    assert isinstance(output, CommandOutput)
    assert (output.position, output.base64) == (7, "YWZ0ZXIK")


async def test_a_silent_server_is_left(rig: Rig) -> None:
    peer = await rig.next_peer()
    await peer.greet(make_welcome(silence_seconds=0.2))
    second = await rig.next_peer()
    await second.greet()
    assert len(rig.delays) == 1


async def test_heartbeats_fill_the_silence_and_those_of_the_server_keep_the_link(rig: Rig) -> None:
    peer = await rig.next_peer()
    await peer.greet(make_welcome(heartbeat_seconds=0.05, silence_seconds=0.5))
    for _ in range(15):  # longer than the silence that would end the link
        assert await peer.receive() == Heartbeat()
        await peer.send(Heartbeat())
    assert rig.delays == []


@pytest.mark.parametrize(("code", "delay_seconds"), [(4001, 54.0), (4003, 54.0), (1012, 0.5)])
async def test_how_long_the_agent_waits_after_a_close(rig: Rig, code: int, delay_seconds: float) -> None:
    peer = await rig.next_peer()
    await peer.greet()
    await peer.socket.close(code, "")
    await rig.next_peer()
    assert rig.delays == [delay_seconds]


async def test_the_server_may_name_the_delay(rig: Rig) -> None:
    peer = await rig.next_peer()
    await peer.greet()
    await peer.socket.close(1013, "retry_after=7")
    await rig.next_peer()
    assert rig.delays == [7.0]


async def test_a_protocol_outside_the_window_is_refused(rig: Rig) -> None:
    peer = await rig.next_peer()
    await peer.greet(make_welcome(protocol=99))
    async with asyncio.timeout(5):
        await peer.closed.wait()
    assert peer.socket.close_code == 4002


async def test_a_frame_that_cannot_be_read_is_passed_over(rig: Rig) -> None:
    peer = await rig.next_peer()
    await peer.greet()
    await peer.socket.send('{"type":"from_the_future"}')
    await peer.send(FollowLog(channel_id="ch_1", source="file", path="/x"))
    await peer.send(ListUnits(request_id="req_1"))
    await peer.send(make_offer("true"))
    assert await peer.receive() == CommandAccepted(command_id="cmd_1")
    assert rig.channels == [FollowLog(channel_id="ch_1", source="file", path="/x")]
    assert rig.requests == [ListUnits(request_id="req_1")]


async def test_only_the_newest_report_is_kept_while_the_server_is_away(rig: Rig) -> None:
    peer = await rig.next_peer()
    for number in range(1000):
        rig.outbox.put_report(MetricsReport(sampled_at=float(number)))
        await rig.outbox.send(Heartbeat())  # nobody is there: dropped, and never waits
    await peer.greet()
    assert await peer.receive() == MetricsReport(sampled_at=999.0)


async def test_a_full_outbox_makes_senders_wait_until_it_closes() -> None:
    outbox = Outbox()
    outbox.open()
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        tasks = [group.create_task(outbox.send(Heartbeat())) for _ in range(50)]
        await asyncio.sleep(0)
        assert sum(task.done() for task in tasks) == 16
        outbox.close()


async def test_a_redirect_is_not_followed_with_the_key() -> None:
    async def never(_: ServerConnection) -> None:
        raise AssertionError("the redirect was followed")

    async with open_server(never) as elsewhere:

        def redirect(socket: ServerConnection, _: object) -> object:
            response = socket.respond(307, "")
            response.headers["Location"] = elsewhere.replace("http", "ws")
            return response

        async with serve(never, "127.0.0.1", 0, process_request=redirect) as server:  # type: ignore[arg-type]
            port = next(iter(server.sockets)).getsockname()[1]
            dialer = Dialer(AgentConfig(server=f"http://127.0.0.1:{port}", key=KEY))
            with pytest.raises(InvalidStatus):
                async with dialer.control():
                    pass


# ---------------------------------------------------------------- pure functions


def close_with(code: int, reason: str = "") -> ConnectionClosed:
    return ConnectionClosedError(Close(code, reason), None)


@pytest.mark.parametrize(
    ("error", "wait_seconds", "is_hopeless"),
    [
        (ConnectionRefusedError(), None, False),
        (TimeoutError(), None, False),
        (ProtocolError("x", "y"), None, False),
        (ConnectionClosedError(None, None), None, False),
        (close_with(1012, "retry_after=2.5"), 2.5, False),
        (close_with(1012, "retry_after=soon"), None, False),
        (close_with(4001), None, True),
        (close_with(4002), None, True),
        (ExceptionGroup("", [close_with(4003)]), None, True),
    ],
)
def test_failures_of_the_link_are_retried(error: Exception, wait_seconds: float | None, is_hopeless: bool) -> None:
    failure = describe_failure(error)
    assert failure
    assert (failure.wait_seconds, failure.is_hopeless) == (wait_seconds, is_hopeless)


@pytest.mark.parametrize("error", [TypeError(), ExceptionGroup("", [close_with(1012), KeyError("x")])])
def test_faults_of_the_agent_are_not_retried(error: Exception) -> None:
    assert describe_failure(error) is None


def test_the_backoff_doubles_to_a_minute_with_full_jitter() -> None:
    longest = [delay_before_dialling(Failure("x"), attempt, lambda: 1.0) for attempt in (1, 2, 3, 4, 5, 6, 7, 100_000)]
    assert longest == [1, 2, 4, 8, 16, 32, 60, 60]
    assert delay_before_dialling(Failure("x"), 7, lambda: 0.0) == 0.0


def test_a_named_delay_is_kept_give_or_take_a_fifth() -> None:
    failure = Failure("x", wait_seconds=10.0)
    assert delay_before_dialling(failure, 1, lambda: 0.0) == pytest.approx(8.0)
    assert delay_before_dialling(failure, 1, lambda: 1.0) == pytest.approx(12.0)
