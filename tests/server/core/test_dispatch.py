"""What a connect comes to, cell by cell, and what reports do: a real database, a link that notes what it is sent."""

import asyncio
import json
import logging
import random
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
from tests.support.raw_agent import make_hello
from tests.support.stored import make_agent, make_command, make_key

from fleetwire_server.core.dispatch import MAX_HELD_BY_AGENT, Dispatch
from fleetwire_server.core.fanout import Fanout
from fleetwire_server.core.sessions import AgentSession, Sessions
from fleetwire_server.core.settling import MAX_AUDITED_IDS, MAX_ORPHANS, MAX_QUESTIONS, Settled
from fleetwire_server.model import Command, CommandKey, CommandStatus, KilledProcess
from fleetwire_server.storage import agents, audit, commands
from fleetwire_server.storage.store import Store, running_store
from fleetwire_shared.errors import KeyReusedError, ProtocolError, UnavailableError
from fleetwire_shared.limits import MAX_KILLED_LISTED
from fleetwire_shared.messages import (
    NO_KIND,
    CommandAccepted,
    CommandCancel,
    CommandFinished,
    CommandOffer,
    CommandOutput,
    CommandRejected,
    CommandStarted,
    CommandStored,
    Hello,
    LedgerEntry,
    ServerMessage,
    Settlement,
)
from fleetwire_shared.messages import KilledProcess as KilledOnWire

NOW = 1000.0
ID = "cmd_" + "0" * 20
OTHER_ID = "cmd_" + "1" * 20


class Link:
    def __init__(self) -> None:
        self.sent: list[ServerMessage] = []

    def send(self, message: ServerMessage) -> None:
        self.sent.append(message)

    def close(self, code: int, reason: str) -> None:
        raise AssertionError("not closed here")


class World:
    """One server, one agent."""

    def __init__(self, store: Store) -> None:
        self.now = NOW
        self.store = store
        self.sessions = Sessions(now=lambda: self.now)
        self.dispatch = Dispatch(store=store, sessions=self.sessions, fanout=Fanout(), now=lambda: self.now)
        self.link = Link()

    async def hold(self, **fields: Any) -> None:
        """The server has this command stored."""
        command = make_command(ID, **{"created_at": NOW, "expires_at": NOW + 100} | fields)
        await self.store.write(lambda connection: commands.add_command(connection, command))

    async def settle(self, *states: Literal["accepted", "running", "finished"], instance_id: str = "i") -> Settled:
        entries = tuple(LedgerEntry(command_id=ID, state=state) for state in states)
        return await self.dispatch.settle("agent_1", make_hello(instance_id=instance_id, ledger=entries))

    async def connect(self, hello: Hello | None = None) -> AgentSession:
        """What the control socket does, from hello to the first offers."""
        hello = hello or make_hello(instance_id="i")
        self.link = Link()
        session = AgentSession(
            agent_id="agent_1", instance_id=hello.instance_id, link=self.link, host=hello.host, agent_version="1",
            ip="", connected_at=self.now,
        )  # fmt: skip
        settled = await self.dispatch.settle("agent_1", hello)
        session.command_ids.update(settled.reportable_ids)
        session.asked_ids.update(settled.asked_ids)
        for cancel in settled.cancels:
            self.link.send(cancel)
        for question in settled.questions:
            self.link.send(question)
        self.sessions.add(session)
        await self.dispatch.offer_waiting(session)
        await self.dispatch.ask_about_ended(session)
        return session

    async def command(self, command_id: str = ID) -> Command:
        found = await self.store.read(lambda connection: commands.get_command(connection, "agent_1", command_id))
        assert found is not None
        return found


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with running_store(f"sqlite:///{tmp_path}/fleetwire.db") as store:
        await store.write(lambda connection: agents.add_agent(connection, make_agent(), make_key()))
        await store.write(
            lambda connection: agents.add_agent(connection, make_agent("agent_2"), make_key("key2", "agent_2"))
        )
        yield World(store)


# ---------------------------------------------------------------- the table of docs/protocol.md

QUESTION = CommandOffer(command_id=ID, kind=NO_KIND, command="", timeout_seconds=0.0, remaining_seconds=0.0)

SAME: dict[str, Any] = {"offered_to": "i"}
OTHER: dict[str, Any] = {"offered_to": "another instance"}
LATE: dict[str, Any] = {"expires_at": NOW - 1}
ASKED: dict[str, Any] = {"cancel_requested_at": NOW - 1}
TAKEN: dict[str, Any] = {"accepted_at": NOW - 5}
PROVED = ("succeeded", "failed", "timed_out", "cancelled", "expired", "rejected")
STATES: tuple[Literal["accepted", "running", "finished"], ...] = ("accepted", "running", "finished")

Cell = tuple[str, dict[str, Any], str, str, str | None, str | None]

NOT_HELD: list[Cell] = [
    # stored as, with, agent says, is then, settlement, cancel or question
    ("queued", {}, "", "queued", None, None),
    ("offered", SAME, "", "queued", None, None),
    ("offered", SAME | LATE, "", "offered", None, "expired"),
    ("offered", SAME | ASKED, "", "offered", None, "cancelled"),
    ("offered", SAME | ASKED | LATE, "", "offered", None, "cancelled"),
    ("offered", OTHER, "", "lost", None, None),
    ("offered", OTHER | LATE, "", "lost", None, None),
    ("offered", OTHER | ASKED, "", "lost", None, None),
    ("lost", SAME, "", "queued", None, None),
    ("lost", SAME | LATE, "", "lost", None, "expired"),
    ("lost", SAME | ASKED, "", "lost", None, "cancelled"),
    ("lost", OTHER, "", "lost", None, None),
    ("lost", SAME | TAKEN, "", "lost", None, None),
    ("interrupted", SAME | TAKEN, "", "interrupted", None, None),
    ("accepted", SAME | TAKEN, "", "accepted", None, "?"),
    ("running", SAME | TAKEN, "", "running", None, "?"),
    ("running", SAME | TAKEN | ASKED, "", "running", None, "?"),
    ("accepted", OTHER | TAKEN, "", "lost", None, None),
    ("running", OTHER | TAKEN | ASKED, "", "lost", None, None),
    *((status, SAME, "", status, None, None) for status in PROVED),
]
HELD: list[Cell] = [
    *((status, {}, state, state, "keep", None) for status in ("queued",) for state in STATES[:2]),
    ("queued", {}, "finished", "queued", "keep", None),
    *(("offered", with_, state, state, "keep", None) for with_ in (SAME, OTHER | LATE) for state in STATES[:2]),
    ("offered", SAME | ASKED, "running", "running", "keep", "cancelled"),
    *(("offered", with_, "finished", "offered", "keep", None) for with_ in (SAME, OTHER | LATE, SAME | ASKED)),
    ("accepted", SAME | TAKEN, "accepted", "accepted", "keep", None),
    ("accepted", SAME | TAKEN | ASKED, "accepted", "accepted", "keep", "cancelled"),
    ("accepted", SAME | TAKEN, "running", "running", "keep", None),
    ("accepted", SAME | TAKEN, "finished", "accepted", "keep", None),
    ("running", SAME | TAKEN, "accepted", "running", "keep", None),
    ("running", SAME | TAKEN, "running", "running", "keep", None),
    ("running", OTHER | TAKEN, "finished", "running", "keep", None),
    *(("lost", with_, state, state, "keep", None) for with_ in (SAME, OTHER | LATE) for state in STATES[:2]),
    *(("lost", with_, "finished", "lost", "keep", None) for with_ in (SAME, OTHER | LATE)),
    *((status, TAKEN, state, state, "keep", None) for status in ("lost", "interrupted") for state in STATES[:2]),
    ("lost", TAKEN | ASKED, "running", "running", "keep", "cancelled"),
    *((status, TAKEN, "finished", status, "keep", None) for status in ("lost", "interrupted")),
    *((status, TAKEN, state, status, "cancel", None) for status in PROVED for state in STATES[:2]),
    *((status, TAKEN, "finished", status, "keep", None) for status in PROVED),
    # Ended here, without the agent's word.
    *((status, {}, state, state, "keep", None) for status in ("cancelled", "expired") for state in STATES[:2]),
    ("cancelled", ASKED, "running", "running", "keep", "cancelled"),
    *((status, {}, "finished", status, "keep", None) for status in ("cancelled", "expired")),
]


@pytest.mark.parametrize(("before", "fields", "state", "after", "answer", "cancel"), NOT_HELD + HELD)
async def test_every_cell_of_a_connect(
    world: World,
    before: str,
    fields: dict[str, Any],
    state: Literal["accepted", "running", "finished", ""],
    after: str,
    answer: Literal["keep", "forget", "cancel"] | None,
    cancel: Literal["cancelled", "expired", "?"] | None,
) -> None:
    await world.hold(status=CommandStatus(before), **fields)
    settled = await (world.settle(state) if state else world.settle())
    assert (await world.command()).status == after
    assert settled.answers == ([] if answer is None else [Settlement(command_id=ID, action=answer)])
    asked = [QUESTION] if cancel == "?" else []
    assert settled.questions == asked
    assert [(each.command_id, each.reason) for each in settled.cancels] == (
        [(ID, cancel)] if cancel and not asked else []
    )
    assert settled.reportable_ids == ({ID} if answer == "keep" or cancel else set())
    stored = await world.command()
    if before != after:
        assert [command.id for command in settled.changed] == [ID]
        assert stored.late == (before in ("lost", "interrupted", "cancelled", "expired"))
        assert (stored.finished_at is None) == (after != "lost")
        assert (stored.accepted_at is not None) == (state != "" or "accepted_at" in fields)
    else:
        assert settled.changed == []
        assert not stored.late


@pytest.mark.parametrize(("before", "fields"), [cell[:2] for cell in HELD if cell[2] == "finished"])
async def test_an_end_that_a_connect_announced_is_stored_or_compared_and_acknowledged(
    world: World, before: str, fields: dict[str, Any]
) -> None:
    """The rest of each cell of `finished`: what the agent then sends."""
    await world.hold(status=CommandStatus(before), **fields)
    held = await world.command()
    session = await world.connect(make_hello(instance_id="i", ledger=(LedgerEntry(command_id=ID, state="finished"),)))
    end = make_finished(status="failed", exit_code=7, stdout_bytes=3, seconds_ago=0.0)
    await world.dispatch.receive(session, [CommandStarted(command_id=ID, seconds_ago=2.0), end])
    offers = ["command_offer"] if before == "queued" else []  # which the agent answers by what it holds
    assert [message.type for message in world.link.sent] == [*offers, "command_stored"]
    assert session.command_ids == set()
    stored = await world.command()
    if before in PROVED and fields == TAKEN:
        assert stored == held
    else:
        assert (stored.status, stored.exit_code, stored.stdout_bytes) == ("failed", 7, 3)
        assert (stored.finished_at, stored.accepted_at is not None) == (NOW, True)
        assert stored.late == (before in ("lost", "interrupted", "cancelled", "expired"))
    await world.connect()  # settled for good: the agent holds it no more
    assert world.link.sent == []
    assert await world.command() == stored


async def test_what_nobody_expects_is_warned_of(world: World, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        await world.hold()
        await world.settle("running")
        assert "restored from a backup" in caplog.text
        await world.store.write(
            lambda connection: commands.update_command(
                connection, ID, list(CommandStatus), status=CommandStatus.EXPIRED
            )
        )
        await world.settle("running")
        assert "expired here and running at the agent" in caplog.text
        caplog.clear()
        await world.store.write(
            lambda connection: commands.update_command(
                connection, ID, list(CommandStatus), offered_to=None, accepted_at=None
            )
        )
        await world.settle("running")
        assert "expired here before it was offered, and running at the agent" in caplog.text


# ---------------------------------------------------------------- after the welcome


async def test_an_unanswered_offer_expires_when_the_agent_says_that_it_will_never_run(world: World) -> None:
    await world.hold(status=CommandStatus.OFFERED, **SAME | LATE)
    session = await world.connect()
    assert world.link.sent == [CommandCancel(command_id=ID, reason="expired")]
    await world.dispatch._expire_due()
    assert (await world.command()).status == "offered"  # not by the server alone
    rejection = CommandRejected(command_id=ID, reason="expired", message="never seen, and too late now")
    await world.dispatch.receive(session, [rejection])
    command = await world.command()
    assert (command.status, command.error, command.finished_at) == ("expired", rejection.message, NOW)
    assert command.accepted_at is None
    assert world.link.sent[1:] == [CommandStored(command_id=ID)]


async def test_an_offer_that_never_arrived_comes_again_with_its_id_and_the_time_that_is_left(world: World) -> None:
    await world.hold(status=CommandStatus.OFFERED, **SAME)
    world.now += 40
    await world.connect()
    (offer,) = world.link.sent
    assert isinstance(offer, CommandOffer)
    assert (offer.command_id, offer.remaining_seconds) == (ID, 60)
    assert (await world.command()).offered_to == "i"


async def test_a_lost_command_is_refined_once_and_is_late(world: World) -> None:
    await world.hold(status=CommandStatus.LOST, **SAME | TAKEN)
    session = await world.connect(make_hello(ledger=(LedgerEntry(command_id=ID, state="finished"),)))
    for status in ("succeeded", "failed"):
        session.command_ids.add(ID)
        await world.dispatch.receive(session, [make_finished(status=status)])
    command = await world.command()
    assert (command.status, command.late, command.accepted_at) == ("succeeded", True, NOW - 5)


async def test_another_end_than_the_stored_one_is_warned_of_and_acknowledged(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    await world.hold(status=CommandStatus.SUCCEEDED, exit_code=0)
    session = await world.connect(make_hello(ledger=(LedgerEntry(command_id=ID, state="finished"),)))
    await world.dispatch.receive(session, [make_finished(status="succeeded")])
    assert caplog.text == ""
    session.command_ids.add(ID)
    await world.dispatch.receive(session, [make_finished(status="failed", exit_code=1)])
    assert "succeeded here, and failed at the agent" in caplog.text
    assert (await world.command()).exit_code == 0
    assert world.link.sent == [CommandStored(command_id=ID)] * 2


async def test_full_means_later_unless_it_was_accepted_or_cancelled(world: World) -> None:
    full = CommandRejected(command_id=ID, reason="full", message="full")
    await world.hold()
    session = await world.connect()
    await world.dispatch.receive(session, [full])
    assert ((await world.command()).status, session.has_queued) == ("queued", True)
    session = await world.connect()
    await world.dispatch.receive(session, [CommandAccepted(command_id=ID), full])
    assert (await world.command()).status == "rejected"
    second = replace(make_command(OTHER_ID), expires_at=NOW + 1)
    await world.dispatch.submit(second)
    await world.dispatch.cancel("agent_1", OTHER_ID)
    await world.dispatch.receive(session, [replace(full, command_id=OTHER_ID)])
    assert (await world.command(OTHER_ID)).status == "cancelled"


async def test_commands_are_offered_in_the_order_of_the_queue_and_never_more_than_the_agent_may_hold(
    world: World,
) -> None:
    """Many send at once, and the queue runs empty again and again: the moments at which a command may be offered at
    once, because none waits before it, or else waits itself."""
    session = await world.connect()
    count, senders = 2000, 200
    chance = random.Random(0)
    most_held = 0

    async def send(first: int) -> None:
        for number in range(first, count, senders):
            await asyncio.sleep(chance.choice((0, 0.01, 0.05)))
            command = make_command(f"cmd_{number}", created_at=NOW, expires_at=NOW + 100)
            await world.dispatch.submit(command)

    async def end_all() -> None:
        nonlocal most_held
        ended = 0
        while ended < count:
            offers = [message.command_id for message in world.link.sent if isinstance(message, CommandOffer)]
            most_held = max(most_held, len(offers) - ended)
            ends = [make_finished(each) for each in offers[ended : ended + chance.randint(1, 64)]]
            if ends:
                await world.dispatch.receive(session, ends)
            ended += len(ends)
            await asyncio.sleep(0)

    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        for first in range(senders):
            group.create_task(send(first))
        group.create_task(end_all())
    offered = [message.command_id for message in world.link.sent if isinstance(message, CommandOffer)]
    listed = await world.store.read(lambda connection: commands.list_commands(connection, "agent_1", count))
    assert offered == [command.id for command in reversed(listed)]
    assert most_held <= MAX_HELD_BY_AGENT


async def test_what_was_stored_as_offered_to_a_session_that_is_gone_goes_to_the_next(world: World) -> None:
    gone = await world.connect()
    before = world.link
    present = await world.connect()
    await world.hold()
    await world.dispatch.offer_waiting(gone)
    assert before.sent == []
    assert [message.type for message in world.link.sent] == ["command_offer"]
    assert present.command_ids == {ID}


async def test_what_was_cancelled_before_it_could_be_sent_is_over(world: World) -> None:
    gone = await world.connect()
    world.sessions.remove(gone, said_goodbye=False)
    await world.hold(status=CommandStatus.OFFERED, **SAME)
    offered = await world.command()
    await world.dispatch.cancel("agent_1", ID)
    await world.dispatch._deliver(gone, [offered])
    command = await world.command()
    assert (command.status, command.cancel_requested_at, command.accepted_at) == ("cancelled", NOW, None)


# ---------------------------------------------------------------- what the agent remembers

UNKNOWN = CommandRejected(command_id=ID, reason="unsupported", message="of no kind")
MONITOR = replace(UNKNOWN, reason="policy")
WITHDRAWN = replace(UNKNOWN, reason="expired", message="it waited on its host for its turn")


@pytest.mark.parametrize(
    ("before", "fields", "answer", "after", "error"),
    [
        ("accepted", SAME | TAKEN, "succeeded", "succeeded", None),
        ("running", SAME | TAKEN, "interrupted", "interrupted", None),
        ("running", SAME | TAKEN | ASKED, "cancelled", "cancelled", None),
        ("accepted", SAME | TAKEN, WITHDRAWN, "expired", WITHDRAWN.message),
        ("running", SAME | TAKEN, WITHDRAWN, "lost", "its state is gone"),  # makes no sense, and must not stand still
        *(
            (status, SAME | TAKEN, answer, "lost", "its state is gone")
            for status in ("accepted", "running")
            for answer in (UNKNOWN, MONITOR)
        ),
        *((status, {}, "succeeded", "succeeded", None) for status in ("cancelled", "expired")),
        *((status, {}, "interrupted", "interrupted", None) for status in ("cancelled", "expired")),
        *((status, {}, answer, status, None) for status in ("cancelled", "expired") for answer in (UNKNOWN, WITHDRAWN)),
    ],
)
async def test_what_cannot_be_known_here_is_asked_and_the_answer_stands(
    world: World, before: str, fields: dict[str, Any], answer: str | CommandRejected, after: str, error: str | None
) -> None:
    await world.hold(status=CommandStatus(before), **fields)
    session = await world.connect()
    assert world.link.sent == [QUESTION]
    if before in ("accepted", "running"):  # a cancel meanwhile would be remembered as the end of what is not known
        await world.dispatch.cancel("agent_1", ID)
        assert world.link.sent == [QUESTION]
    report = answer if isinstance(answer, CommandRejected) else make_finished(status=answer, stdout_bytes=7)
    await world.dispatch.receive(session, [report, report])
    command = await world.command()
    assert command.status == after
    assert (error or "") in (command.error or "")
    assert command.late == (before != after and before in ("cancelled", "expired"))
    assert (command.stdout_bytes, command.truncated) == ((7, True) if isinstance(answer, str) else (0, False))
    assert (session.asked_ids, session.command_ids) == (set(), set())
    assert world.link.sent == [QUESTION, CommandStored(command_id=ID), CommandStored(command_id=ID)]
    again = await world.connect()
    assert (world.link.sent, again.asked_ids) == ([], set())  # answered for good
    assert await world.command() == command


async def test_all_that_ended_without_the_agent_is_asked_about_a_part_at_a_time(world: World) -> None:
    def fill(connection: Any) -> None:
        for number in range(2 * MAX_QUESTIONS + 1):
            commands.add_command(connection, make_command(f"cmd_{number}", status=CommandStatus.EXPIRED))

    await world.store.write(fill)
    session = await world.connect()
    asked: list[str] = []
    for count in (MAX_QUESTIONS, MAX_QUESTIONS, 1, 0):
        questions = [message for message in world.link.sent if isinstance(message, CommandOffer)]
        assert len(questions) == count
        assert {question.kind for question in questions} <= {NO_KIND}
        asked += [question.command_id for question in questions]
        world.link.sent.clear()
        for question in questions:
            await world.dispatch.receive(session, [replace(UNKNOWN, command_id=question.command_id)])
    assert len(set(asked)) == len(asked) == 2 * MAX_QUESTIONS + 1


async def test_what_ends_unoffered_while_the_agent_is_here_is_asked_about_at_once(world: World) -> None:
    session = await world.connect()
    session.command_ids.update(f"held_{number}" for number in range(MAX_HELD_BY_AGENT))
    await world.dispatch.submit(make_command(ID, created_at=NOW, expires_at=NOW + 10))
    await world.dispatch.submit(make_command(OTHER_ID, created_at=NOW, expires_at=NOW + 10))
    assert (await world.dispatch.cancel("agent_1", ID)).status == "cancelled"
    assert world.link.sent == [QUESTION]
    await world.dispatch.receive(session, [UNKNOWN])
    world.now += 10
    await world.dispatch._expire_due()
    assert (await world.command(OTHER_ID)).status == "expired"
    assert world.link.sent[1:] == [CommandStored(command_id=ID), replace(QUESTION, command_id=OTHER_ID)]


# ---------------------------------------------------------------- orphans


def make_finished(command_id: str = ID, **fields: Any) -> CommandFinished:
    defaults: dict[str, Any] = {
        "status": "succeeded", "exit_code": 0, "stdout_bytes": 0, "stderr_bytes": 0, "seconds_ago": 0.0,
        "duration_seconds": 2.0,
    }  # fmt: skip
    return CommandFinished(command_id=command_id, **defaults | fields)


def make_entry(state: Literal["accepted", "running", "finished"], command_id: str = ID) -> LedgerEntry:
    return LedgerEntry(command_id=command_id, state=state, command="sleep 100" * 100, timeout_seconds=120.0)


@pytest.mark.parametrize(
    ("is_orphan", "started_ago", "ended_ago", "times"),
    [
        (False, 50.0, 20.0, (950.0, 980.0)),
        (False, 5.0, 20.0, (978.0, 980.0)),  # its start was long under way
        (False, 900.0, 800.0, (900.0, 900.0)),  # not before it was created
        (False, -50.0, -20.0, (998.0, 1000.0)),  # nor later than now
        (True, 900.0, 800.0, (100.0, 200.0)),  # it was there before it was known here
    ],
)
async def test_the_history_shows_when_it_happened_and_not_when_it_was_heard(
    world: World, is_orphan: bool, started_ago: float, ended_ago: float, times: tuple[float, float]
) -> None:
    await world.hold(status=CommandStatus.ACCEPTED, is_orphan=is_orphan, **SAME | TAKEN | {"created_at": 900.0})
    session = await world.connect(make_hello(instance_id="i", ledger=(make_entry("running"),)))
    assert (await world.command()).status == "running"  # the connect shows it before the agent tells since when
    await world.dispatch.receive(session, [CommandStarted(command_id=ID, seconds_ago=started_ago)])
    shown = (await world.command()).started_at
    world.now += 5.0
    await world.dispatch.receive(session, [CommandStarted(command_id=ID, seconds_ago=started_ago)])
    assert (await world.command()).started_at == shown  # told again, it has not started again
    world.now -= 5.0
    await world.dispatch.receive(session, [make_finished(seconds_ago=ended_ago, duration_seconds=2.0)])
    ended = await world.command()
    assert (ended.started_at, ended.finished_at) == times


async def test_an_end_that_counts_less_output_than_came_does_not_unsay_it(world: World) -> None:
    """The command's directory was removed: the agent finds nothing there to count."""
    await world.hold(status=CommandStatus.RUNNING, **SAME | TAKEN)
    session = await world.connect(make_hello(ledger=(make_entry("running"),)))
    piece = CommandOutput(command_id=ID, stream="stdout", position=0, offset=0, base64="YWJjZA==")
    await world.dispatch.receive(session, [piece, make_finished(status="interrupted", exit_code=None)])
    command = await world.command()
    assert (command.status, command.stdout_bytes, command.truncated) == ("interrupted", 4, False)


@pytest.mark.parametrize("state", STATES)
async def test_a_command_only_the_agent_knows_is_kept_and_shown(
    world: World, state: Literal["accepted", "running", "finished"]
) -> None:
    session = await world.connect(make_hello(ledger=(make_entry(state),)))
    orphan = await world.command()
    assert (orphan.is_orphan, orphan.status.is_end, orphan.created_by) == (True, False, "")
    assert orphan.params == {"command": ("sleep 100" * 100)[:200], "timeout": 120.0}
    assert (orphan.accepted_at, orphan.late) == (NOW, False)
    (entry,) = await world.store.read(lambda connection: audit.list_entries(connection, 10))
    assert (entry.action, entry.actor, entry.subject) == ("commands.adopted", "server", "agent_1")
    assert entry.detail["command_ids"] == [ID]
    if state != "finished":
        assert (await world.dispatch.cancel("agent_1", ID)).cancel_requested_at == NOW
        assert world.link.sent == [CommandCancel(command_id=ID)]
    await world.dispatch.receive(session, [make_finished(status="failed", exit_code=7)])
    assert world.link.sent[-1] == CommandStored(command_id=ID)
    ended = await world.command()
    assert (ended.status, ended.exit_code, ended.is_orphan) == ("failed", 7, True)
    await world.connect(make_hello(ledger=(make_entry("finished"),)))  # known now, so it is no orphan again
    assert len(await world.store.read(lambda connection: audit.list_entries(connection, 10))) == 1


async def test_what_cannot_be_adopted_is_not_killed_and_not_stored_but_audited(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    of_another = make_command(ID, agent_id="agent_2", status=CommandStatus.RUNNING)
    await world.store.write(lambda connection: commands.add_command(connection, of_another))
    entries = (make_entry("running"), make_entry("finished", "../etc/passwd"), make_entry("accepted", OTHER_ID))

    def fill(connection: Any) -> None:
        for number in range(MAX_ORPHANS):
            commands.add_command(connection, make_command(f"cmd_{number}", is_orphan=True))

    await world.store.write(fill)
    caplog.set_level(logging.WARNING)
    settled = await world.dispatch.settle("agent_1", make_hello(instance_id="i", ledger=entries))
    assert [answer.action for answer in settled.answers] == ["forget"] * 3
    assert (settled.changed, settled.cancels, settled.reportable_ids) == ([], [], set())
    assert [record.getMessage().partition(",")[0] for record in caplog.records] == [
        f"command {each.command_id}: not known here" for each in entries
    ]
    assert await world.store.read(lambda connection: commands.get_command(connection, "agent_1", ID)) is None
    assert await world.store.read(lambda connection: commands.get_command(connection, "agent_2", ID)) == of_another

    many = tuple(make_entry("running", f"cmd_{number:020}") for number in range(10, 10 + 2 * MAX_AUDITED_IDS))
    await world.dispatch.settle("agent_1", make_hello(instance_id="i" * 1000, ledger=many))
    beyond, first = await world.store.read(lambda connection: audit.list_entries(connection, 10))
    assert (first.action, first.actor, first.subject) == ("commands.not_adopted", "server", "agent_1")
    named = [each.command_id for each in entries]
    assert first.detail == {"command_ids": named, "count": 3, "agent_instance": "i"}
    assert beyond.detail == {
        "command_ids": [each.command_id for each in many[:MAX_AUDITED_IDS]],
        "count": 2 * MAX_AUDITED_IDS,
        "agent_instance": "i" * 100,
    }


@pytest.mark.parametrize(
    ("pieces", "stored"),
    [
        ([("stdout", 0, 0), ("stdout", 4, 4), ("stderr", 8, 0), ("stdout", 12, 8)], 16),
        ([("stdout", 0, 0), ("stdout", 0, 0), ("stdout", 2, 2)], 6),  # sent again, and further
        ([("stdout", 0, 0), ("stdout", 100, 50)], 104),  # some of both was dropped
        ([("stdout", 0, 0), ("stdout", 4, 0)], None),
        ([("stdout", 0, 0), ("stderr", 4, 0), ("stderr", 8, 3)], None),
        ([("stdout", 0, 0), ("stdout", 2, 1)], None),
        ([("stdout", 0, 1)], None),
        ([("stdout", -1, -1)], None),
        ([("stdout", (1 << 63) - 1, 0)], None),
    ],
)
async def test_output_that_would_escape_its_quota_is_no_output(
    world: World, pieces: list[tuple[Literal["stdout", "stderr"], int, int]], stored: int | None
) -> None:
    await world.hold(status=CommandStatus.RUNNING, **SAME | TAKEN)
    session = await world.connect(make_hello(ledger=(make_entry("running"),)))
    reports = [
        CommandOutput(command_id=ID, stream=stream, position=position, offset=offset, base64="YWJjZA==")
        for stream, position, offset in pieces
    ]
    await world.dispatch.receive(session, reports[:-1])
    if stored is None:
        with pytest.raises(ProtocolError, match=r"command_output\."):
            await world.dispatch.receive(session, reports[-1:])
        assert (await world.command()).output_end == 4 * len(reports[:-1])
    else:
        await world.dispatch.receive(session, reports[-1:])
        assert (await world.command()).output_end == stored


async def test_what_was_killed_is_stored_up_to_a_bound(world: World) -> None:
    await world.hold(status=CommandStatus.RUNNING, **SAME | TAKEN)
    session = await world.connect(make_hello(ledger=(make_entry("running"),)))
    killed = tuple(KilledOnWire(pid=pid, command="x" * 5000, signal="KILL") for pid in range(MAX_KILLED_LISTED + 5))
    await world.dispatch.receive(session, [make_finished(status="timed_out", exit_code=None, killed=killed)])
    command = await world.command()
    assert command.killed == tuple(
        KilledProcess(pid=pid, command="x" * 200, signal="KILL") for pid in range(MAX_KILLED_LISTED)
    )
    assert command.killed_count == MAX_KILLED_LISTED + 5


# ---------------------------------------------------------------- keys


def make_key_of(body: object, **fields: Any) -> CommandKey:
    defaults: dict[str, Any] = {"agent_id": "agent_1", "username": "ada", "key": "k", "created_at": NOW}
    return CommandKey(body_hash=json.dumps(body), **defaults | fields)


async def test_a_key_stands_for_one_command_of_a_user_and_an_agent_for_a_day(world: World) -> None:
    async def submit(command_id: str, key: CommandKey, **fields: Any) -> str:
        return (await world.dispatch.submit(make_command(command_id, **fields), key=key)).id

    session = await world.connect()
    assert await submit("cmd_1", make_key_of("a")) == "cmd_1"
    assert await submit("cmd_2", make_key_of("a", created_at=NOW + 86_399)) == "cmd_1"
    assert await submit("cmd_3", make_key_of("a", username="bob")) == "cmd_3"
    assert await submit("cmd_4", make_key_of("a", key="K")) == "cmd_4"
    assert await submit("cmd_5", make_key_of("a", agent_id="agent_2"), agent_id="agent_2") == "cmd_5"
    with pytest.raises(KeyReusedError):
        await submit("cmd_6", make_key_of("b"))
    assert await submit("cmd_7", make_key_of("b", created_at=NOW + 86_400)) == "cmd_7"
    assert session.command_ids == {"cmd_1", "cmd_3", "cmd_4", "cmd_7"}


async def test_a_repeated_request_is_answered_though_the_agent_is_away_now(world: World) -> None:
    session = await world.connect()
    first = await world.dispatch.submit(make_command(), key=make_key_of("a"), is_connected_only=True)
    world.sessions.remove(session, said_goodbye=False)
    second = await world.dispatch.submit(make_command("cmd_2"), key=make_key_of("a"), is_connected_only=True)
    assert second.id == first.id
    with pytest.raises(UnavailableError):
        await world.dispatch.submit(make_command("cmd_3"), key=make_key_of("a", key="new"), is_connected_only=True)
