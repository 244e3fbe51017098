from collections.abc import Callable
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection
from tests.support.stored import make_agent, make_command, make_key, make_piece

from fleetwire_server.model import Command, CommandKey, CommandStatus, KilledProcess, OutputPiece
from fleetwire_server.storage import agents, command_keys, commands
from fleetwire_server.storage.commands import PIECES_IN_TRANSACTION
from fleetwire_shared.errors import NotFoundError

KEEP_ALL = 4095  # of all that these tests store; too little for pieces to be joined
JOIN_NINE = 9 * 4096


@pytest.fixture
def with_command(connection: Connection) -> Connection:
    agents.add_agent(connection, make_agent(), make_key())
    commands.add_command(connection, make_command())
    return connection


def get(connection: Connection, command_id: str = "cmd_1") -> Command:
    command = commands.get_command(connection, "agent_1", command_id)
    assert command is not None
    return command


def count_steps(connection: Connection, look: Callable[[], list[Command]]) -> tuple[list[Command], int]:
    """Return what is found, and how many steps SQLite's virtual machine took for it."""
    steps = 0

    def count() -> int:
        nonlocal steps
        steps += 1
        return 0

    driver = connection.connection.driver_connection
    assert driver is not None
    driver.set_progress_handler(count, 1)
    found = look()
    driver.set_progress_handler(None, 1)
    return found, steps


def text_of(pieces: list[OutputPiece]) -> bytes:
    return b"".join(piece.data for piece in pieces)


def test_a_command_is_returned_as_it_was(connection: Connection) -> None:
    agents.add_agent(connection, make_agent(), make_key())
    command = make_command(
        status=CommandStatus.FAILED, started_at=1.0, finished_at=2.5, exit_code=3, truncated=True, late=True,
        stdout_bytes=1 << 40, error="é", params={"command": "é", "timeout": 1.5}, offered_to="i",
        cancel_requested_at=2.0, accepted_at=0.5, is_orphan=True, killed_count=3,
        killed=(KilledProcess(pid=7, command="sleep é", signal="TERM"),),
    )  # fmt: skip
    commands.add_command(connection, command)
    assert commands.get_command(connection, "agent_1", "cmd_1") == command


def test_a_command_of_another_agent_is_not_returned(with_command: Connection) -> None:
    assert commands.get_command(with_command, "agent_2", "cmd_1") is None


def test_a_command_for_a_deleted_agent_is_refused(connection: Connection) -> None:
    with pytest.raises(NotFoundError, match="no agent agent_1"):
        commands.add_command(connection, make_command())


def test_history_is_newest_first_and_queued_commands_oldest_first(with_command: Connection) -> None:
    for number in range(2, 6):
        commands.add_command(with_command, make_command(f"cmd_{number}"))
    commands.update_command(with_command, "cmd_3", [CommandStatus.QUEUED], status=CommandStatus.EXPIRED)
    commands.update_command(with_command, "cmd_4", [CommandStatus.QUEUED], status=CommandStatus.RUNNING)
    assert [each.id for each in commands.list_commands(with_command, "agent_1", 3)] == ["cmd_5", "cmd_4", "cmd_3"]
    assert [each.id for each in commands.list_queued(with_command, "agent_1", 0.0, 2)] == ["cmd_1", "cmd_2"]
    assert [each.id for each in commands.list_queued(with_command, "agent_1", 0.0, 9)] == ["cmd_1", "cmd_2", "cmd_5"]
    assert [commands.count_open(with_command, agent_id) for agent_id in ("agent_1", "agent_2")] == [4, 0]


def test_only_what_was_ended_without_the_agents_word_is_ended_alone(with_command: Connection) -> None:
    fields: list[dict[str, Any]] = [{}, {"offered_to": "i"}, {"accepted_at": 1.0}, {"agent_id": "agent_2"}]
    agents.add_agent(with_command, make_agent("agent_2"), make_key("key2", "agent_2"))
    made = [
        make_command(f"cmd_{status}_{number}", status=status, **each)
        for status in CommandStatus
        for number, each in enumerate(fields)
    ]
    for command in made:
        commands.add_command(with_command, command)
    listed = commands.list_ended_alone(with_command, "agent_1", 99)
    assert {command.id for command in listed} == {"cmd_cancelled_0", "cmd_expired_0"}
    assert all(command.is_ended_alone for command in listed)
    assert [command for command in made if command.is_ended_alone and command.agent_id == "agent_1"] == sorted(
        listed, key=lambda command: command.id
    )
    assert len(commands.list_ended_alone(with_command, "agent_1", 1)) == 1


def test_what_was_ended_alone_is_found_without_reading_the_history(with_command: Connection) -> None:
    for number in range(2, 3000):
        status = CommandStatus.CANCELLED if number % 2 else CommandStatus.EXPIRED
        offered_to = None if number in (7, 8) else "instance"
        commands.add_command(with_command, make_command(f"cmd_{number}", status=status, offered_to=offered_to))
    found, steps = count_steps(with_command, lambda: commands.list_ended_alone(with_command, "agent_1", 99))
    assert {command.id for command in found} == {"cmd_7", "cmd_8"}
    assert steps < 1000


def test_only_queued_commands_past_their_time_are_expirable(with_command: Connection) -> None:
    commands.add_command(with_command, make_command("cmd_2", status=CommandStatus.OFFERED))
    commands.add_command(with_command, make_command("cmd_3", expires_at=5000.0))
    assert commands.list_expirable(with_command, 3699.0) == []
    assert [each.id for each in commands.list_expirable(with_command, 3700.0)] == ["cmd_1"]


def test_the_next_in_the_queue_are_found_without_reading_the_queue(with_command: Connection) -> None:
    for number in range(2, 3000):
        commands.add_command(with_command, make_command(f"cmd_{number}", expires_at=150.0 + number))
    commands.update_command(with_command, "cmd_1", [CommandStatus.QUEUED], status=CommandStatus.OFFERED)

    def look() -> list[Command]:
        assert commands.has_queued(with_command, "agent_1")
        return commands.list_queued(with_command, "agent_1", now=155.0, limit=3)

    found, steps = count_steps(with_command, look)
    assert [command.id for command in found] == ["cmd_6", "cmd_7", "cmd_8"]  # in the order of the queue, with time left
    assert steps < 1000
    assert not commands.has_queued(with_command, "agent_2")


def test_an_update_needs_an_expected_status(with_command: Connection) -> None:
    changed = commands.update_command(
        with_command, "cmd_1", [CommandStatus.QUEUED, CommandStatus.OFFERED], status=CommandStatus.OFFERED,
        offered_to="instance", started_at=101.0,
    )  # fmt: skip
    assert changed == make_command(status=CommandStatus.OFFERED, offered_to="instance", started_at=101.0)
    assert changed == get(with_command)
    assert type(changed.timeout_seconds) is type(changed.started_at) is float
    assert commands.update_command(with_command, "cmd_1", [CommandStatus.QUEUED], error="x") is None
    assert commands.update_command(with_command, "cmd_9", list(CommandStatus), error="x") is None
    assert get(with_command).error is None


def test_output_sent_again_is_stored_once(with_command: Connection) -> None:
    pieces = [make_piece(b"abc"), make_piece(b"def", 3)]
    assert commands.add_output(with_command, "cmd_1", pieces, KEEP_ALL) == 6
    assert commands.add_output(with_command, "cmd_1", pieces, KEEP_ALL) == 6
    assert commands.list_output(with_command, "cmd_1", 0, 1000) == pieces
    assert not get(with_command).truncated


def test_output_that_overlaps_is_cut(with_command: Connection) -> None:
    commands.add_output(with_command, "cmd_1", [make_piece(b"abc")], KEEP_ALL)
    assert commands.add_output(with_command, "cmd_1", [make_piece(b"bcdef", 1)], KEEP_ALL) == 6
    assert commands.list_output(with_command, "cmd_1", 0, 1000) == [make_piece(b"abc"), make_piece(b"def", 3)]


def test_a_gap_in_the_output_is_told(with_command: Connection) -> None:
    commands.add_output(with_command, "cmd_1", [make_piece(b"abc")], KEEP_ALL)
    assert commands.add_output(with_command, "cmd_1", [make_piece(b"xyz", 10)], KEEP_ALL) == 13
    assert get(with_command).truncated
    assert commands.list_output(with_command, "cmd_1", 3, 1) == [make_piece(b"xyz", 10)]


def test_short_pieces_that_follow_each_other_are_one_row(with_command: Connection) -> None:
    for position in range(20):
        commands.add_output(with_command, "cmd_1", [make_piece(b"x", position)], JOIN_NINE)
    lengths = [len(piece.data) for piece in commands.list_output(with_command, "cmd_1", 0, 1000)]
    assert lengths == [9, 9, 2]
    ends = [make_piece(b"e", 20, stream="stderr", offset=0), make_piece(b"e", 21, stream="stderr", offset=1)]
    commands.add_output(with_command, "cmd_1", [*ends, make_piece(b"long" * 3, 22, offset=20)], JOIN_NINE)
    commands.add_output(with_command, "cmd_1", [make_piece(b"gap", 40, offset=38)], JOIN_NINE)
    stored = commands.list_output(with_command, "cmd_1", 18, 1000)
    assert [(piece.stream, piece.position, piece.offset, piece.data) for piece in stored] == [
        ("stdout", 18, 18, b"xx"),
        ("stderr", 20, 0, b"ee"),
        ("stdout", 22, 20, b"long" * 3),
        ("stdout", 40, 38, b"gap"),
    ]


def test_output_of_an_unknown_command_goes_nowhere(with_command: Connection) -> None:
    assert commands.add_output(with_command, "cmd_9", [make_piece(b"abc")], KEEP_ALL) is None


def test_no_output_changes_nothing(with_command: Connection) -> None:
    assert commands.add_output(with_command, "cmd_1", [], KEEP_ALL) == 0
    assert commands.list_output(with_command, "cmd_1", 0, 1000) == []
    assert commands.tail_output(with_command, "cmd_1", 1000) == []


def test_the_head_and_the_tail_of_each_stream_are_kept(with_command: Connection) -> None:
    commands.add_output(with_command, "cmd_1", [make_piece(b"E" * 10, stream="stderr")], 100)
    for number in range(30):
        piece = make_piece(b"%010d" % number, 10 + 10 * number, offset=10 * number)
        assert commands.add_output(with_command, "cmd_1", [piece], 100) == 20 + 10 * number
    kept = commands.list_output(with_command, "cmd_1", 0, 10_000, "stdout")
    assert [int(piece.data) for piece in kept] == [0, 1, 2, 3, 4, 25, 26, 27, 28, 29]
    assert text_of(commands.list_output(with_command, "cmd_1", 0, 10_000, "stderr")) == b"E" * 10
    assert get(with_command).truncated
    assert get(with_command).output_end == 310


def test_output_up_to_the_quota_is_all_kept(with_command: Connection) -> None:
    pieces = [make_piece(b"x" * 10, 10 * number) for number in range(10)]
    commands.add_output(with_command, "cmd_1", pieces, 100)
    assert commands.list_output(with_command, "cmd_1", 0, 10_000) == pieces
    assert not get(with_command).truncated


def test_what_was_dropped_is_passed_over_by_a_reader(with_command: Connection) -> None:
    pieces = [make_piece(b"x" * 10, 10 * number) for number in range(100)]
    commands.add_output(with_command, "cmd_1", pieces, 100)
    assert commands.list_output(with_command, "cmd_1", 50, 1) == [make_piece(b"x" * 10, 950)]
    assert commands.list_output(with_command, "cmd_1", 1000, 1) == []


def test_the_gaps_are_named_in_the_addresses_of_the_stream_or_of_both(with_command: Connection) -> None:
    def gaps(stream: Literal["stdout", "stderr"] | None, gaps_from: int = 0) -> tuple[tuple[int, int], ...]:
        described = commands.describe_output(with_command, "cmd_1", stream, gaps_from=gaps_from, max_gaps=3)
        kept = commands.list_output(with_command, "cmd_1", 0, 10_000, stream)
        assert described.size_bytes == len(text_of(kept))
        return described.gaps

    assert commands.describe_output(with_command, "cmd_1") == commands.KeptOutput(0, 0, ())
    for number in range(30):  # by turns: ten bytes of stdout, one of stderr
        pieces = [
            make_piece(b"%010d" % number, 11 * number, offset=10 * number),
            make_piece(b"!", 11 * number + 10, stream="stderr", offset=number),
        ]
        commands.add_output(with_command, "cmd_1", pieces, 100)
    assert gaps("stdout") == ((50, 250),)
    assert gaps("stdout", 249) == ((50, 250),)
    assert gaps("stdout", 250) == gaps("stderr") == ()
    assert gaps(None) == ((55, 65), (66, 76), (77, 87))
    assert gaps(None, 65) == ((66, 76), (77, 87), (88, 98))
    assert commands.find_position(with_command, "cmd_1", "stdout", 253) == 11 * 25 + 3
    assert commands.find_position(with_command, "cmd_1", "stderr", 7) == 11 * 7 + 10


def test_a_stream_whose_beginning_is_missing_has_a_gap_there(with_command: Connection) -> None:
    commands.add_output(with_command, "cmd_1", [make_piece(b"abc", 10)], KEEP_ALL)
    assert commands.describe_output(with_command, "cmd_1", "stdout") == commands.KeptOutput(3, 13, ((0, 10),))


def test_what_is_unsettled_was_offered_and_not_answered(with_command: Connection) -> None:
    for status in CommandStatus:
        commands.add_command(with_command, make_command(f"cmd_{status}", status=status, offered_to="i", accepted_at=1))
    commands.add_command(with_command, make_command("cmd_other", status=CommandStatus.LOST, offered_to="j"))
    commands.add_command(with_command, make_command("cmd_unheard", status=CommandStatus.LOST, offered_to="i"))
    unsettled = [command.id for command in commands.list_unsettled(with_command, "agent_1", "i")]
    assert unsettled == ["cmd_offered", "cmd_accepted", "cmd_running", "cmd_unheard"]


def test_keys_are_removed_when_they_are_old_and_go_with_their_command(with_command: Connection) -> None:
    def make(key: str, created_at: float = 100.0, body_hash: str = "a") -> CommandKey:
        return CommandKey(agent_id="agent_1", username="ada", key=key, body_hash=body_hash, created_at=created_at)

    for number in range(5):
        command_keys.add_key(with_command, make(f"k{number}", 100.0 + number), "cmd_1")
    command_keys.add_key(with_command, make("k4", 200.0, "b"), "cmd_1")  # in the place of the one before
    assert command_keys.get_key(with_command, make("k4"), 199.0) == ("b", "cmd_1")
    assert command_keys.get_key(with_command, make("k4"), 200.0) is None
    assert [command_keys.delete_old(with_command, 102.0, 2) for _ in range(3)] == [2, 1, 0]
    assert command_keys.get_key(with_command, make("k3"), 0.0) == ("a", "cmd_1")
    agents.delete_agent(with_command, "agent_1")
    assert command_keys.get_key(with_command, make("k3"), 0.0) is None


def test_a_reader_starts_at_any_byte(with_command: Connection) -> None:
    commands.add_output(with_command, "cmd_1", [make_piece(b"abc"), make_piece(b"def", 3)], KEEP_ALL)
    assert commands.list_output(with_command, "cmd_1", 1, 1000) == [make_piece(b"bc", 1), make_piece(b"def", 3)]
    assert commands.list_output(with_command, "cmd_1", 4, 1) == [make_piece(b"ef", 4)]
    assert commands.list_output(with_command, "cmd_1", 6, 1) == []


def test_a_reader_of_one_stream_passes_over_the_other(with_command: Connection) -> None:
    error = make_piece(b"abc", stream="stderr")
    output = make_piece(b"def", 3, offset=0)
    commands.add_output(with_command, "cmd_1", [error, output], KEEP_ALL)
    assert commands.list_output(with_command, "cmd_1", 0, 1, "stdout") == [output]
    assert commands.list_output(with_command, "cmd_1", 3, 1, "stderr") == []


def test_the_tail_is_the_last_bytes(with_command: Connection) -> None:
    commands.add_output(with_command, "cmd_1", [make_piece(b"abc"), make_piece(b"def", 3)], KEEP_ALL)
    commands.add_command(with_command, make_command("cmd_2"))
    commands.add_command(with_command, make_command("cmd_3"))
    commands.add_output(with_command, "cmd_2", [make_piece(b"ghi")], KEEP_ALL)
    assert text_of(commands.tail_output(with_command, "cmd_1", 1)) == b"f"
    assert text_of(commands.tail_output(with_command, "cmd_1", 4)) == b"cdef"
    assert text_of(commands.tail_output(with_command, "cmd_1", 1000)) == b"abcdef"
    tails = commands.tail_outputs(with_command, ["cmd_1", "cmd_2", "cmd_3"], 3)
    assert {each: text_of(pieces) for each, pieces in tails.items()} == {"cmd_1": b"def", "cmd_2": b"ghi"}


def test_old_commands_are_removed_a_few_at_a_time(with_command: Connection) -> None:
    for number in range(2, 6):
        commands.add_command(
            with_command, make_command(f"cmd_{number}", status=CommandStatus.SUCCEEDED, created_at=100.0 + number)
        )
        commands.add_output(with_command, f"cmd_{number}", [make_piece(b"abc")], KEEP_ALL)
    assert commands.delete_old_commands(with_command, 105.0, 2) == 2
    assert commands.delete_old_commands(with_command, 105.0, 2) == 1
    assert commands.delete_old_commands(with_command, 105.0, 2) == 0
    assert [each.id for each in commands.list_commands(with_command, "agent_1")] == ["cmd_5", "cmd_1"]
    assert commands.list_output(with_command, "cmd_2", 0, 1000) == []


def test_much_output_is_removed_before_its_command_a_part_at_a_time(with_command: Connection) -> None:
    def fill(command_id: str, count: int) -> None:
        commands.add_command(with_command, make_command(command_id, status=CommandStatus.SUCCEEDED))
        pieces = [make_piece(b"x", position) for position in range(count)]
        commands.add_output(with_command, command_id, pieces, KEEP_ALL)

    def left() -> int:
        return int(with_command.exec_driver_sql("SELECT count(*) FROM command_output").scalar_one())

    fill("cmd_2", 2 * PIECES_IN_TRANSACTION + 1)
    fill("cmd_3", 1)
    steps: list[tuple[int, int]] = []
    while not steps or steps[-1][0] == 9:
        steps.append((commands.delete_old_commands(with_command, 105.0, 9), left()))
    assert steps == [(9, PIECES_IN_TRANSACTION + 2), (9, 2), (2, 0)]

    fill("cmd_4", PIECES_IN_TRANSACTION + 1)
    agents.add_agent(with_command, make_agent("agent_2"), make_key("key2", "agent_2"))
    commands.add_command(with_command, make_command("cmd_5", agent_id="agent_2"))
    commands.add_output(with_command, "cmd_5", [make_piece(b"x")], KEEP_ALL)
    assert [commands.delete_output_of_agent(with_command, "agent_1") for _ in range(2)] == [True, False]
    assert left() == 1
    assert get(with_command, "cmd_4").output_end == PIECES_IN_TRANSACTION + 1
    plan = [
        row[-1]
        for row in with_command.exec_driver_sql(
            "EXPLAIN QUERY PLAN DELETE FROM command_output WHERE (command_id, position) IN (SELECT command_id, position"
            " FROM commands JOIN command_output ON commands.id = command_id WHERE agent_id = 'a' LIMIT 9)"
        )
    ]
    assert [step for step in plan if step.startswith("SCAN")] == []


Streams = list[tuple[Literal["stdout", "stderr"], int]]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    written=st.lists(st.tuples(st.sampled_from(["stdout", "stderr"]), st.integers(1, 9)), max_size=40),
    batch=st.integers(1, 7),
    start=st.integers(0, 60),
    keep_bytes=st.sampled_from([KEEP_ALL, JOIN_NINE]),
)
def test_whatever_is_written_is_read_back_from_anywhere(
    with_command: Connection, written: Streams, batch: int, start: int, keep_bytes: int
) -> None:
    offsets = {"stdout": 0, "stderr": 0}
    pieces: list[OutputPiece] = []
    position = 0
    for stream, length in written:
        data = bytes((position + index) % 251 for index in range(length))
        pieces.append(OutputPiece(position=position, stream=stream, offset=offsets[stream], data=data))
        position += length
        offsets[stream] += length
    with with_command.begin_nested() as savepoint:
        for index in range(0, len(pieces), batch):
            # Each batch comes with what came before, as after a broken connection.
            commands.add_output(with_command, "cmd_1", pieces[max(index - 2, 0) : index + batch], keep_bytes)
        everything = text_of(pieces)
        assert get(with_command).output_end == len(everything)
        assert not get(with_command).truncated
        read, at = b"", start
        while some := commands.list_output(with_command, "cmd_1", at, 5):
            assert some[0].position == at
            read, at = read + text_of(some), some[-1].end
        assert read == everything[start:]
        last = commands.tail_output(with_command, "cmd_1", start)
        assert text_of(last) == everything[max(len(everything) - start, 0) :]
        savepoint.rollback()
