"""Real children: their exit, their output, and that nothing they started is left."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from fleetwire_agent.process_table import (
    REAPED_AT_ONCE,
    Family,
    ProcessRow,
    descendants_of,
    read_process,
)
from fleetwire_agent.processes import Pipe, Spawner, kill_process

ENVIRONMENT = {"PATH": os.environ["PATH"]}


@pytest.fixture
async def spawner() -> AsyncIterator[Spawner]:
    with Spawner(ENVIRONMENT) as spawner:
        yield spawner


async def read_all(pipe: Pipe) -> bytes:
    pieces = []
    while piece := await pipe.read():
        pieces.append(piece)
    return b"".join(pieces)


async def read_pid(pipe: Pipe) -> int:
    """The first line a script prints is the pid of the process a test is about."""
    line = b""
    while not line.endswith(b"\n"):
        line += await pipe.read()
    return int(line)


async def test_output_and_exit_status_of_a_child(spawner: Spawner) -> None:
    process = spawner.spawn(["sh", "-c", "echo out; echo err >&2; exit 7"])
    async with asyncio.timeout(5):
        assert await read_all(process.stdout) == b"out\n"
        assert await read_all(process.stderr) == b"err\n"
        assert await process.wait() == 7
    process.close()


async def test_a_signal_is_a_negative_exit_status(spawner: Spawner) -> None:
    process = spawner.spawn(["sh", "-c", "kill -9 $$"])
    async with asyncio.timeout(5):
        assert await process.wait() == -signal.SIGKILL
    process.close()


async def test_stdin_is_empty_and_the_environment_is_what_was_given(spawner: Spawner) -> None:
    process = spawner.spawn(["sh", "-c", "cat; echo $FOO; pwd"], env={"FOO": "bar"})
    async with asyncio.timeout(5):
        assert await read_all(process.stdout) == b"bar\n/\n"
    process.close()


def test_a_program_that_is_not_there_is_an_error_and_leaks_no_descriptor(
    count_descriptors: Callable[[], int],
) -> None:
    before = count_descriptors()
    with pytest.raises(FileNotFoundError):
        Spawner(ENVIRONMENT).spawn(["/nonexistent/program"])
    assert count_descriptors() == before


@pytest.fixture
def count_descriptors() -> Callable[[], int]:
    return lambda: len(os.listdir("/proc/self/fd"))


async def test_twenty_children_at_once_leave_no_descriptor(
    spawner: Spawner, count_descriptors: Callable[[], int]
) -> None:
    before = count_descriptors()
    processes = [spawner.spawn(["sh", "-c", f"exit {number}"]) for number in range(20)]
    async with asyncio.timeout(10):
        assert [await process.wait() for process in processes] == list(range(20))
    for process in processes:
        process.close()
    assert count_descriptors() == before


async def test_a_full_pipe_makes_the_child_wait_for_its_reader(spawner: Spawner) -> None:
    process = spawner.spawn(["sh", "-c", "head -c 300000 /dev/zero; echo done >&2"])
    async with asyncio.timeout(5):
        told = await asyncio.wait_for(process.stdout.read(1), 5)
        assert told == b"\0"
        assert len(await read_all(process.stdout)) == 299_999
        assert await read_all(process.stderr) == b"done\n"
    process.close()


async def test_closing_a_pipe_ends_a_waiting_read(spawner: Spawner) -> None:
    process = spawner.spawn(["sleep", "600"])
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        reading = group.create_task(process.stdout.read())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        process.close()
    assert reading.result() == b""
    await process.kill()


async def assert_kill_leaves_nothing(spawner: Spawner, script: str, *, grace_seconds: float = 0.2) -> None:
    """The script prints the pid of a process it started; it and the script must be gone after the kill."""
    process = spawner.spawn(["sh", "-c", script])
    async with asyncio.timeout(10):
        pid = await read_pid(process.stdout)
        assert read_process(pid)
        assert await kill_process(process, grace_seconds=grace_seconds) == []
        await process.wait()
    assert read_process(pid) is None
    process.close()


async def test_kill_ends_a_child_that_called_setsid(spawner: Spawner) -> None:
    await assert_kill_leaves_nothing(spawner, "setsid sh -c 'echo $$; sleep 600' & wait")


async def test_kill_ends_a_child_that_ignores_sigterm(spawner: Spawner) -> None:
    await assert_kill_leaves_nothing(spawner, "trap '' TERM; sh -c 'echo $$; while :; do sleep 600; done'")


async def test_kill_ends_a_stopped_child_by_sigterm(spawner: Spawner) -> None:
    await assert_kill_leaves_nothing(spawner, "sh -c 'echo $$; kill -STOP $$; sleep 600'", grace_seconds=5)


async def test_an_orphan_is_adopted_and_killed_while_it_is_in_the_session(spawner: Spawner) -> None:
    process = spawner.spawn(["sh", "-c", "(sh -c 'echo $$; exec sleep 600' &) ; exit 0"])
    async with asyncio.timeout(10):
        pid = await read_pid(process.stdout)
        await process.wait()
        orphan = read_process(pid)
        assert orphan
        assert orphan.parent_pid == os.getpid()  # adopted, as the agent is a subreaper
        await process.kill()
    assert read_process(pid) is None
    process.close()


async def test_kill_ends_a_descendant_that_dropped_session_and_environment(spawner: Spawner) -> None:
    await assert_kill_leaves_nothing(spawner, "env -i setsid /bin/sh -c 'echo $$; trap \"\" TERM; sleep 600' & wait")


async def test_kill_leaves_other_commands_alone(spawner: Spawner) -> None:
    bystander = spawner.spawn(["sleep", "600"])
    await assert_kill_leaves_nothing(spawner, "echo $$; sleep 600")
    assert read_process(bystander.pid)
    async with asyncio.timeout(5):
        await bystander.kill()
    bystander.close()


async def test_kill_lets_a_child_clean_up_on_sigterm(spawner: Spawner, tmp_path: Path) -> None:
    told = tmp_path / "told"
    process = spawner.spawn(
        ["sh", "-c", f"trap 'echo bye > {told}; exit 3' TERM; echo $$; while :; do sleep 0.01; done"]
    )
    async with asyncio.timeout(5):
        await read_pid(process.stdout)
        await process.kill()
        assert await process.wait() == 3
    assert told.read_text() == "bye\n"
    process.close()


async def test_more_children_at_once_than_are_reaped_in_one_go_are_all_reaped(spawner: Spawner) -> None:
    async with asyncio.timeout(30):
        with spawner.sharing_children():  # until its end they stay, and no signal tells of them afterwards
            for _ in range(2 * REAPED_AT_ONCE + 1):
                os.posix_spawn("/bin/true", ["true"], {})
                await asyncio.sleep(0)
            while any(read_process(pid) for pid in children_of(os.getpid())):
                await asyncio.sleep(0.02)
            for _ in range(3):  # what the loop still has to do for their signals
                await asyncio.sleep(0)
        assert len(children_of(os.getpid())) == REAPED_AT_ONCE + 1
        while children_of(os.getpid()):
            await asyncio.sleep(0.02)


def children_of(pid: int) -> list[int]:
    """Return all children, also those that only wait to be reaped."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


def row(pid: int, *, parent_pid: int, session_id: int = 0) -> ProcessRow:
    return ProcessRow(pid, parent_pid=parent_pid, session_id=session_id, start_ticks=pid)


def test_pids_that_were_used_again_while_they_were_read_close_no_circle() -> None:
    rows = [row(1, parent_pid=3), row(2, parent_pid=1), row(3, parent_pid=2), row(4, parent_pid=9)]
    assert [each.pid for each in descendants_of(rows, 1)] == [2, 3, 1]


async def test_a_session_whose_leaders_pid_is_another_process_now_is_nobodys(spawner: Spawner) -> None:
    process = spawner.spawn(["sleep", "600"])
    present = read_process(process.pid)
    assert present
    assert Family([present]).read_members() == {present}
    assert Family([present._replace(start_ticks=present.start_ticks - 1)]).read_members() == set()
    async with asyncio.timeout(5):
        await process.kill()
    process.close()


async def test_killing_what_has_ended_is_no_error(spawner: Spawner) -> None:
    process = spawner.spawn(["true"])
    async with asyncio.timeout(5):
        await process.wait()
        await process.kill()
    process.close()
