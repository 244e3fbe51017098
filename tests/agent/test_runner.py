"""Real runners and real commands: what is left of them by an agent that was killed, and what the next one finds."""

import asyncio
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
from tests.agent.command_rig import Rig, make_offer, no_room, open_rig
from tests.support.commands import living_pids
from tests.support.eventually import eventually

from fleetwire_agent.command_states import State
from fleetwire_agent.commands import MAX_HELD_COMMANDS
from fleetwire_agent.ledger import Ledger
from fleetwire_agent.process_table import descendants_of, read_process, read_processes
from fleetwire_agent.processes import Spawner
from fleetwire_agent.runner import files
from fleetwire_agent.runner.control_group import choose_control_group, make_control_group
from fleetwire_agent.runner.spool import MAX_PIECE_BYTES, SEGMENT_BYTES, Piece, SpoolReader, SpoolWriter, list_segments
from fleetwire_agent.runner.stop import describe_survivors, read_command_line
from fleetwire_agent.runner.supervisor import AgentLink, await_go
from fleetwire_agent.runners import (
    Launcher,
    RunnerLink,
    connect,
    dismiss,
    kill_leftovers,
    list_running,
    parse_systemd_version,
    stop_commands,
)
from fleetwire_shared.messages import CommandCancel, Settlement


def find_runner(rig: Rig, command_id: str = "cmd_1") -> int:
    """Return the pid of the command's runner, as it wrote it down."""
    directory = rig.entry(command_id).directory
    assert directory
    traces = files.read_traces(str(directory))
    assert traces
    return traces.runner_pid


async def wait_until_gone(pid: int) -> None:
    async with asyncio.timeout(10):
        while read_process(pid) is not None:
            await asyncio.sleep(0.02)  # of a process that is no child of this one


# ---------------------------------------------------------------- the next agent


async def test_the_next_agent_finds_a_command_that_runs_with_all_its_output(tmp_path: Path) -> None:
    state, gate = tmp_path / "state", tmp_path / "gate"
    os.mkfifo(gate)
    async with open_rig(state, is_killed=True) as rig:
        rig.commands.offer(make_offer(f"echo $$; echo before >&2; cat {gate}; echo $$; exit 5"))
        pid = await rig.first_line()
        await rig.wait_until(lambda: bool(rig.output("stderr")))
        runner = find_runner(rig)
        started = rig.started()
    assert read_process(pid)
    assert read_process(runner)
    async with open_rig(state, instance_id="second") as rig:
        assert rig.ledger.instance_id == "instance"
        assert [(entry.command_id, entry.state) for entry in rig.ledger.list_entries()] == [("cmd_1", "running")]
        assert await rig.first_line() == pid
        assert find_runner(rig) == runner
        assert [told.command_id for told in started] == [told.command_id for told in rig.started()] == ["cmd_1"]
        assert 0 < started[0].seconds_ago < rig.started()[0].seconds_ago
        await asyncio.to_thread(gate.write_text, "through\n")
        result = await rig.result_of()
        assert (result.status, result.exit_code) == ("failed", 5)
        assert rig.output("stdout") == b"%d\nthrough\n%d\n" % (pid, pid)
        assert rig.output("stderr") == b"before\n"
        assert result.stdout_bytes == len(rig.output("stdout"))
    await wait_until_gone(runner)


async def test_the_next_agent_tells_of_a_command_that_ended_meanwhile(tmp_path: Path) -> None:
    state, gate = tmp_path / "state", tmp_path / "gate"
    os.mkfifo(gate)
    async with open_rig(state, is_killed=True) as rig:
        rig.commands.offer(make_offer(f"echo $$; cat {gate}; echo end"))
        pid = await rig.first_line()
        runner = find_runner(rig)
    await asyncio.to_thread(gate.write_text, "")
    await wait_until_gone(runner)
    async with open_rig(state) as rig:
        result = await rig.result_of()
        assert (result.status, result.exit_code) == ("succeeded", 0)
        assert rig.output("stdout") == b"%d\nend\n" % pid


async def test_the_next_agent_can_cancel_a_command(tmp_path: Path) -> None:
    async with open_rig(tmp_path, is_killed=True) as rig:
        rig.commands.offer(make_offer("echo $$; sleep 600"))
        pid = await rig.first_line()
    async with open_rig(tmp_path) as rig:
        rig.commands.cancel(CommandCancel(command_id="cmd_1"))
        assert (await rig.result_of()).status == "cancelled"
        assert read_process(pid) is None


async def test_a_time_limit_holds_without_an_agent(tmp_path: Path) -> None:
    async with open_rig(tmp_path, is_killed=True) as rig:
        rig.commands.offer(make_offer("echo $$; sleep 600", timeout_seconds=1.0))
        pid = await rig.first_line()
        runner = find_runner(rig)
    await wait_until_gone(runner)
    assert read_process(pid) is None
    async with open_rig(tmp_path) as rig:
        assert (await rig.result_of()).status == "timed_out"


async def test_what_waited_when_the_agent_was_killed_runs_once_in_order(tmp_path: Path) -> None:
    state, gate = tmp_path / "state", tmp_path / "gate"
    os.mkfifo(gate)
    async with open_rig(state, max_at_once=1, is_killed=True) as rig:
        rig.commands.offer(make_offer(f"echo $$; cat {gate}", command_id="cmd_1"))
        for number in (2, 3):
            rig.commands.offer(make_offer(f"echo {number} >> {tmp_path}/order", command_id=f"cmd_{number}"))
        await rig.first_line()
        await rig.wait_until(lambda: len(rig.ledger.list_entries()) == 3)
    async with open_rig(state, max_at_once=1) as rig:
        await asyncio.to_thread(gate.write_text, "")
        for number in (1, 2, 3):
            assert (await rig.result_of(f"cmd_{number}")).status == "succeeded"
    assert (tmp_path / "order").read_text() == "2\n3\n"


async def test_a_command_whose_runner_cannot_be_reached_is_left_alone_until_it_can(tmp_path: Path) -> None:
    state, gate = tmp_path / "state", tmp_path / "gate"
    os.mkfifo(gate)
    async with open_rig(state, is_killed=True) as rig:
        rig.commands.offer(make_offer(f"echo $$; cat {gate}; exit 5"))
        pid = await rig.first_line()
        runner = find_runner(rig)
        directory = rig.entry().directory
        assert directory
    os.kill(runner, signal.SIGSTOP)
    links = fill_backlog(directory)
    async with open_rig(state) as rig:
        await asyncio.sleep(0.5)  # for whoever takes it for dead
        assert read_process(pid)
        assert rig.entry().state is State.RUNNING
        os.kill(runner, signal.SIGCONT)
        await asyncio.to_thread(gate.write_text, "")
        assert (await rig.result_of()).exit_code == 5
    for link in links:
        link.close()


def fill_backlog(directory: Path) -> list[RunnerLink]:
    """Connect to a runner that is stopped, as often as it lets wait."""
    links = []
    with suppress(BlockingIOError):
        while link := connect(directory):
            links.append(link)
    return links


async def test_what_was_about_to_start_waits_again_in_the_order_of_acceptance(tmp_path: Path) -> None:
    state, names = tmp_path / "state", [f"cmd_{number}" for number in range(6)]
    ledger = Ledger(state, boot_id="boot", new_instance_id="instance")
    ledger.open()
    ledger.begin()
    for name in names:
        entry, saved = ledger.add(make_offer(f"echo {name} >> {tmp_path}/order", command_id=name))
        await saved
        files.write_order(str(ledger.directory_of(entry)), make_order("true"))
        if name != names[-1]:
            await ledger.record_starting(entry)
    ledger.close()
    async with open_rig(state, max_at_once=1) as rig:
        for name in names:
            assert (await rig.result_of(name)).status == "succeeded"
    assert (tmp_path / "order").read_text().split() == names


# ---------------------------------------------------------------- what is lost


async def test_a_killed_runner_is_an_interrupted_command_and_leaves_nothing_running(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        rig.commands.offer(make_offer("echo $$; setsid sh -c 'echo $$; exec sleep 600' & trap '' TERM; wait"))
        await rig.wait_until(lambda: rig.output("stdout").count(b"\n") == 2)
        pids = [int(line) for line in rig.output("stdout").split()]
        os.kill(find_runner(rig), signal.SIGKILL)
        result = await rig.result_of()
        assert (result.status, result.exit_code) == ("interrupted", None)
        assert result.error
        assert "watched over the command was killed" in result.error
        assert result.stdout_bytes == len(rig.output("stdout"))
        assert [pid for pid in pids if read_process(pid)] == []


async def test_a_killed_runner_leaves_no_orphan_without_an_environment_and_no_control_group(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        rig.commands.offer(make_offer("(env -i setsid /bin/sh -c 'echo $$; exec /bin/sleep 600' &); sleep 600"))
        pid = await rig.first_line()
        traces = files.read_traces(str(rig.entry().directory))
        assert traces
        if traces.control_group is None or not await asyncio.to_thread(os.path.isdir, traces.control_group):
            pytest.skip("this host has no control groups of version 2 that may be written to")
        os.kill(traces.runner_pid, signal.SIGKILL)
        assert (await rig.result_of()).status == "interrupted"
        assert read_process(pid) is None
        assert not await asyncio.to_thread(os.path.exists, traces.control_group)


async def test_what_a_command_leaves_in_the_background_goes_on_and_its_control_group_goes(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        rig.commands.offer(make_offer("sleep 600 >/dev/null 2>&1 & echo $!; sleep 0.2"))
        pid = await rig.first_line()
        traces = files.read_traces(str(rig.entry().directory))
        assert (await rig.result_of()).status == "succeeded"
        assert traces
        await wait_until_gone(traces.runner_pid)
        assert read_process(pid)
        os.kill(pid, signal.SIGKILL)
        if traces.control_group is not None:
            assert not await asyncio.to_thread(os.path.exists, traces.control_group)


async def test_a_shell_whose_runner_is_killed_before_it_ran_never_runs(tmp_path: Path) -> None:
    """The runner is killed after the fork, where neither its traces nor an environment tell of the child."""
    program = (
        "import os; from fleetwire_agent.runner.shell import Shell\n"
        "def note(pid): print(pid, flush=True); os.kill(os.getpid(), 9)\n"
        f"Shell(['/bin/touch', '{tmp_path}/ran'], {{}}, None, note_pid=note)"
    )
    runner = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE)
    said, _ = await runner.communicate()
    assert runner.returncode == -signal.SIGKILL
    await wait_until_gone(int(said))
    assert not (tmp_path / "ran").exists()


async def test_what_another_agent_of_this_host_runs_under_the_same_id_is_left_alone(tmp_path: Path) -> None:
    async with open_rig(tmp_path / "one") as rig:
        rig.commands.offer(make_offer("echo $$; sleep 600"))
        pid = await rig.first_line()
        own = rig.entry().directory
        assert own
        await kill_leftovers(tmp_path / "other" / "commands" / own.name)
        assert read_process(pid)
        await kill_leftovers(own)
        assert read_process(pid) is None


def test_a_control_group_of_somebody_else_is_neither_taken_nor_removed() -> None:
    path = choose_control_group("cmd_1")
    if path is None or not os.access(os.path.dirname(path), os.W_OK):
        pytest.skip("this host has no control groups of version 2 that may be written to")
    assert path != choose_control_group("cmd_1")
    Path(path).mkdir()
    try:
        assert make_control_group(path) is None
        assert Path(path).is_dir()
    finally:
        Path(path).rmdir()


async def test_a_runner_killed_while_no_agent_ran_is_an_interrupted_command(tmp_path: Path) -> None:
    async with open_rig(tmp_path, is_killed=True) as rig:
        rig.commands.offer(make_offer("echo $$; setsid sh -c 'echo $$; exec sleep 600' & wait"))
        await rig.wait_until(lambda: rig.output("stdout").count(b"\n") == 2)
        pids = [int(line) for line in rig.output("stdout").split()]
        runner = find_runner(rig)
    os.kill(runner, signal.SIGKILL)
    await wait_until_gone(runner)
    async with open_rig(tmp_path) as rig:
        assert (await rig.result_of()).status == "interrupted"
        assert [pid for pid in pids if read_process(pid)] == []


async def test_a_runner_that_is_terminated_stops_its_command_and_says_so(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        rig.commands.offer(make_offer("echo $$; sleep 600"))
        pid = await rig.first_line()
        os.kill(find_runner(rig), signal.SIGTERM)
        result = await rig.result_of()
        assert result.status == "interrupted"
        assert result.error == "stopped by the service manager, as when the host shuts down"
        assert read_process(pid) is None


@pytest.mark.parametrize("reason", ["SIGTERM", "removal"])
async def test_a_shell_that_has_ended_counts_and_its_background_lives_whatever_ends_the_runner(
    tmp_path: Path, reason: str
) -> None:
    async with open_rig(tmp_path) as rig:
        rig.commands.offer(make_offer("sleep 600 & echo $!; exit 3"))  # holds the output for half a second
        pid = await rig.first_line()
        traces = files.read_traces(str(rig.entry().directory))
        assert traces
        assert traces.shell
        await wait_until_gone(traces.shell[0])
        if reason == "SIGTERM":
            os.kill(traces.runner_pid, signal.SIGTERM)
        else:
            await rig.commands.stop()
        result = await rig.result_of()
        assert (result.status, result.exit_code, result.killed) == ("failed", 3, ())
        assert read_process(pid)
        os.kill(pid, signal.SIGKILL)


async def test_a_command_begins_with_no_signal_ignored_or_blocked(tmp_path: Path) -> None:
    ignored = signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # of which a child's child is told nothing but that
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    try:
        async with open_rig(tmp_path) as rig:
            await rig.run("grep -E 'Sig(Ign|Blk)' /proc/self/status; trap 'echo trapped' INT HUP; kill -INT $$")
            output = rig.output("stdout").decode().split()
    finally:
        signal.signal(signal.SIGUSR1, ignored)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    assert output == ["SigBlk:", "0" * 16, "SigIgn:", "0" * 16, "trapped"]


async def test_a_command_of_another_boot_is_interrupted_and_not_run_again(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with open_rig(state, is_killed=True) as rig:
        rig.commands.offer(make_offer(f"echo ran >> {tmp_path}/runs; echo $$; sleep 600"))
        await rig.first_line()
        runner = find_runner(rig)
        os.kill(-os.getsid(int(rig.output("stdout"))), signal.SIGKILL)  # a reboot ends everything
        os.kill(runner, signal.SIGKILL)
    await wait_until_gone(runner)
    async with open_rig(state, boot_id="another boot") as rig:
        result = await rig.result_of()
        assert result.status == "interrupted"
        assert result.error == "the host restarted while the command ran: it may have run in part"
    assert (tmp_path / "runs").read_text() == "ran\n"


async def test_a_result_that_was_left_before_a_reboot_is_told(tmp_path: Path) -> None:
    state, gate = tmp_path / "state", tmp_path / "gate"
    os.mkfifo(gate)
    async with open_rig(state, is_killed=True) as rig:
        rig.commands.offer(make_offer(f"echo $$; cat {gate}; exit 3"))
        await rig.first_line()
        runner = find_runner(rig)
    await asyncio.to_thread(gate.write_text, "")
    await wait_until_gone(runner)
    async with open_rig(state, boot_id="another boot") as rig:
        result = await rig.result_of()
        assert (result.status, result.exit_code) == ("failed", 3)


# ---------------------------------------------------------------- what cannot be read


async def test_after_damage_to_the_ledger_what_seems_to_wait_is_not_run(tmp_path: Path) -> None:
    """The record that it was started, and all that followed, may be what is missing."""
    state = tmp_path / "state"
    ledger = Ledger(state, boot_id="boot", new_instance_id="first")
    ledger.open()
    ledger.begin()
    for name in ("cmd_1", "cmd_2"):
        _, saved = ledger.add(make_offer(f"echo {name} >> {tmp_path}/runs", command_id=name))
        await saved
    ledger.close()
    content = (state / "ledger.0").read_bytes()
    (state / "ledger.0").write_bytes(content.replace(b"first", b"worst"))  # the record before both
    for _ in range(2):
        async with open_rig(state, instance_id="second") as rig:
            for name in ("cmd_1", "cmd_2"):
                result = await rig.result_of(name)
                assert (result.status, result.error) == (
                    "interrupted",
                    "the agent's ledger was damaged: whether the command ran is not known, and it will not run now",
                )
            assert rig.ledger.instance_id == "second"
    assert not (tmp_path / "runs").exists()


def put_a_directory_for_the_result(directory: Path) -> None:
    (directory / files.RESULT).mkdir()


def put_a_file_for_the_directory(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.touch()


def remove_the_directory(directory: Path) -> None:
    shutil.rmtree(directory)


def leave_a_result_of_another_version(directory: Path) -> None:
    content = json.dumps({**make_result()._asdict(), "status": "paused"}).encode()
    header = struct.pack(">4sII", b"FWR1", len(content), zlib.crc32(content))
    (directory / files.RESULT).write_bytes(header + content)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (put_a_directory_for_the_result, "cannot be read from the host's disk"),
        (put_a_file_for_the_directory, "was killed"),
        (remove_the_directory, "was killed"),
        (leave_a_result_of_another_version, "not known to this version of the agent"),
    ],
)
async def test_an_agent_starts_whatever_was_done_to_a_commands_directory(
    tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    state = tmp_path / "state"
    await leave_starting(state, f"echo ran >> {tmp_path}/runs")
    directory = state / "commands" / "cmd_1.1"
    assert files.claim(str(directory), "runner")
    damage(directory)
    async with open_rig(state) as rig:
        result = await rig.result_of()
        assert result.status == "interrupted"
        assert said in (result.error or "")
        assert (await rig.run("echo well", command_id="cmd_2")).status == "succeeded"
    assert not (tmp_path / "runs").exists()


async def test_a_command_whose_directory_is_removed_while_it_runs_is_interrupted_and_not_run_again(
    tmp_path: Path,
) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    async with open_rig(tmp_path / "state") as rig:
        rig.commands.offer(make_offer(f"echo ran >> {tmp_path}/runs; echo $$; cat {gate}; echo more"))
        await rig.first_line()
        directory = rig.entry().directory
        assert directory
        await asyncio.to_thread(shutil.rmtree, directory)
        await asyncio.to_thread(gate.write_text, "")
        result = await rig.result_of()
        assert result.status == "interrupted"
        assert result.error
        assert "directory on the host was removed" in result.error
    assert (tmp_path / "runs").read_text() == "ran\n"


async def test_a_command_that_was_seen_to_run_is_not_run_again_where_its_claim_is_gone(tmp_path: Path) -> None:
    async with open_rig(tmp_path / "state") as rig:
        rig.commands.offer(make_offer(f"echo ran >> {tmp_path}/runs; echo $$; sleep 600"))
        pid = await rig.first_line()
        directory = rig.entry().directory
        assert directory
        (directory / files.CLAIM).unlink()
        os.kill(find_runner(rig), signal.SIGKILL)
        assert (await rig.result_of()).status == "interrupted"
        assert read_process(pid) is None
    async with open_rig(tmp_path / "state") as rig:
        assert (await rig.result_of()).status == "interrupted"
    assert (tmp_path / "runs").read_text() == "ran\n"


async def test_what_is_forgotten_while_it_runs_goes_on_unheard_and_is_removed_when_it_is_over(tmp_path: Path) -> None:
    """With more output than would wait for a server that takes none, and another command that waits behind it."""
    gate, ended = tmp_path / "gate", tmp_path / "ended"
    async with open_rig(tmp_path / "state", max_at_once=1) as rig:
        rig.stores_output = False
        flood = f"head -c {40 * SEGMENT_BYTES} /dev/zero"
        rig.commands.offer(
            make_offer(f"echo $$; until [ -e {gate} ]; do sleep 0.05; done; {flood}; echo over > {ended}")
        )
        rig.commands.offer(make_offer(f"echo ran > {tmp_path}/ran", command_id="cmd_2"))
        pid = await rig.first_line()
        await rig.wait_until(lambda: rig.ledger.state_of("cmd_2") is State.ACCEPTED)
        directory = rig.entry().directory
        assert directory
        rig.told.clear()
        rig.commands.settle([Settlement(command_id=f"cmd_{number}", action="forget") for number in (1, 2)])
        assert rig.ledger.list_entries() == ()  # a link that comes later is not told either
        assert read_process(pid)
        gate.touch()
        await eventually(lambda: asyncio.to_thread(directory.exists), lambda exists: not exists, timeout_seconds=9)
        assert ended.read_text() == "over\n"  # it did not wait the 10 seconds that it would for a server
        assert rig.told == []
        assert len(rig.ledger) == 0
        assert rig.ledger.state_of("cmd_1") is rig.ledger.state_of("cmd_2") is State.ENDED
        assert rig.ledger.is_reported.is_set()
        assert (await rig.run("echo well", command_id="cmd_3")).status == "succeeded"  # in the place that is free again
    assert not (tmp_path / "ran").exists()


LISTENS_SLOWLY = """
import os, sys, time
from fleetwire_agent.runner import files, supervisor

class SlowLink(supervisor.AgentLink):
    def accept(self):
        time.sleep(0.5)
        return super().accept()

os.chdir(sys.argv[1])
result, wakeup = files.allocate_result("."), supervisor._route_signals()
traces = files.Traces(os.getpid(), None, shell=None)
supervisor.Supervisor(files.read_order("."), SlowLink(), None, traces, result, wakeup).run()
"""
"""A runner whose shell may end while it listens to its agent, after it has looked for the dead."""


def test_a_shell_that_ends_between_two_looks_is_seen_at_once(tmp_path: Path) -> None:
    directory = tmp_path / "commands" / "cmd_1.1"
    directory.parent.mkdir()
    files.write_order(str(directory), make_order("exec >&- 2>&-; sleep 0.2"))  # nothing but its end wakes the runner
    subprocess.run([sys.executable, "-c", LISTENS_SLOWLY, directory], check=True, timeout=30)
    result = files.read_result(str(directory))
    assert result
    assert (result.status, result.exit_code) == ("succeeded", 0)
    assert result.duration_seconds < 5  # and not when the command's time is over, after 10


async def test_an_agent_that_takes_no_more_commands_says_why(tmp_path: Path) -> None:
    async with open_rig(tmp_path, max_at_once=1) as rig:
        for number in range(MAX_HELD_COMMANDS + 1):
            rig.commands.offer(make_offer("sleep 600", command_id=f"cmd_{number}"))
        refused = await rig.rejection_of(f"cmd_{MAX_HELD_COMMANDS}")
        assert (refused.reason, refused.message) == ("full", "the agent holds 256 commands, and takes at most 256")
        await rig.commands.stop()
        rig.commands.offer(make_offer("true", command_id="cmd_late"))
        refused = await rig.rejection_of("cmd_late")
        assert (refused.reason, "being removed" in refused.message) == ("full", True)


def test_of_a_newer_runners_result_what_is_known_is_read(tmp_path: Path) -> None:
    fields = {**make_result()._asdict(), "killed": [[7, "sh", "KILL", "new"]], "peak_bytes": 5}
    content = json.dumps(fields).encode()
    header = struct.pack(">4sII", b"FWR1", len(content), zlib.crc32(content))
    (tmp_path / files.RESULT).write_bytes(header + content)
    assert files.read_result(str(tmp_path)) == make_result()._replace(killed=[files.Killed(7, "sh", "KILL")])


# ---------------------------------------------------------------- about to start


async def leave_starting(directory: Path, command: str) -> None:
    """Leave a ledger as an agent does that is killed after it wrote `starting` and before it said go."""
    ledger = Ledger(directory, boot_id="boot", new_instance_id="instance")
    ledger.open()
    ledger.begin()
    entry, saved = ledger.add(make_offer(command))
    await saved
    files.write_order(str(ledger.directory_of(entry)), make_order(command))
    await ledger.record_starting(entry)
    ledger.close()


async def test_what_was_about_to_start_and_never_did_is_started_exactly_once(tmp_path: Path) -> None:
    state = tmp_path / "state"
    await leave_starting(state, f"echo ran >> {tmp_path}/runs")
    for _ in range(2):
        async with open_rig(state) as rig:
            assert (await rig.result_of()).status == "succeeded"
            assert rig.entry().attempt == 2
    assert (tmp_path / "runs").read_text() == "ran\n"


async def test_a_runner_whose_agent_was_killed_before_it_connected_gives_way_to_another(tmp_path: Path) -> None:
    state, ran = tmp_path / "state", tmp_path / "ran"
    ledger = Ledger(state, boot_id="boot", new_instance_id="instance")
    ledger.open()
    ledger.begin()
    entry, saved = ledger.add(make_offer(f"echo ran >> {ran}"))
    await saved
    directory = ledger.directory_of(entry)
    files.write_order(str(directory), make_order(f"echo ran >> {ran}"))
    with Spawner({"PATH": os.environ["PATH"]}) as spawner:
        await make_launcher(spawner).launch(directory, entry.command_id)
    (runner,) = living_pids(str(directory))
    ledger.close()
    for _ in range(2):
        async with open_rig(state) as rig:
            assert (await rig.result_of()).status == "succeeded"
            assert rig.entry().attempt == 2, "systemd refuses a unit whose name is taken"
    await wait_until_gone(runner)
    assert ran.read_text() == "ran\n"


async def test_what_an_agent_has_claimed_is_never_started_by_its_runner(tmp_path: Path) -> None:
    order = make_order(f"touch {tmp_path}/ran")
    directory = tmp_path / "command"
    await asyncio.to_thread(files.write_order, str(directory), order)
    with Spawner({"PATH": os.environ["PATH"]}) as spawner:
        await make_launcher(spawner).launch(directory, order.command_id)
        link = connect(directory)
        assert link
        assert files.claim(str(directory), "agent")
        link.send("go")
        async with asyncio.timeout(5):
            assert await link.receive() is None
        link.close()
    assert not (tmp_path / "ran").exists()
    assert files.read_result(str(directory)) is None


async def test_a_runner_whose_agent_leaves_without_a_word_never_starts(tmp_path: Path) -> None:
    order = make_order(f"touch {tmp_path}/ran")
    directory = tmp_path / "command"
    await asyncio.to_thread(files.write_order, str(directory), order)
    with Spawner({"PATH": os.environ["PATH"]}) as spawner:
        await make_launcher(spawner).launch(directory, order.command_id)
        link = connect(directory)
        assert link
        link.close()
        async with asyncio.timeout(5):
            while (later := connect(directory)) is not None:
                later.close()
                await asyncio.sleep(0.02)
    assert files.claim(str(directory), "agent")
    assert not (tmp_path / "ran").exists()


async def test_a_runner_waits_for_its_turn_as_long_as_its_agent_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    listener = AgentLink()
    link = connect(tmp_path)
    assert link
    waiting = asyncio.create_task(  # noqa: TID251 - a runner of one's own
        asyncio.to_thread(await_go, listener, is_terminated=lambda: False, alone_seconds=0.1)
    )
    await asyncio.sleep(1.5)
    link.send("go")
    assert await waiting
    link.close()
    listener.close()
    listener = AgentLink()
    assert not await asyncio.to_thread(await_go, listener, is_terminated=lambda: False, alone_seconds=0.1)
    listener.close()


@pytest.mark.parametrize("words", [["stop cancelled"], ["go", "stop interrupted"]])
async def test_a_runner_that_is_told_to_stop_before_it_began_ends_at_once(tmp_path: Path, words: list[str]) -> None:
    directory = tmp_path / "command"
    await asyncio.to_thread(files.write_order, str(directory), make_order(f"touch {tmp_path}/ran"))
    with Spawner({"PATH": os.environ["PATH"]}) as spawner:
        await make_launcher(spawner).launch(directory, "cmd_1")
        traces = files.read_traces(str(directory))
        assert traces
        os.kill(traces.runner_pid, signal.SIGSTOP)  # it hears all words at once
        link = connect(directory)
        assert link
        for word in words:
            link.send(word)
        os.kill(traces.runner_pid, signal.SIGCONT)
        async with asyncio.timeout(5):
            assert await link.receive() is None
        link.close()
    assert files.claim(str(directory), "agent")
    assert not (tmp_path / "ran").exists()


async def test_the_runner_of_an_agent_that_was_killed_before_the_word_is_dismissed(tmp_path: Path) -> None:
    state = tmp_path / "state"
    ledger = Ledger(state, boot_id="boot", new_instance_id="instance")
    ledger.open()
    ledger.begin()
    entry, saved = ledger.add(make_offer(f"echo ran >> {tmp_path}/runs"))
    await saved
    ledger.close()
    directory = ledger.directory_of(entry)
    await asyncio.to_thread(files.write_order, str(directory), make_order(f"echo wrong >> {tmp_path}/runs"))
    with Spawner({"PATH": os.environ["PATH"]}) as spawner:
        await make_launcher(spawner).launch(directory, "cmd_1")
    traces = files.read_traces(str(directory))
    assert traces
    async with open_rig(state) as rig:
        assert (await rig.result_of()).status == "succeeded"
        assert rig.entry().attempt == 2
        assert read_process(traces.runner_pid) is None
    assert (tmp_path / "runs").read_text() == "ran\n"


async def test_a_claim_without_a_runner_is_an_interrupted_command(tmp_path: Path) -> None:
    """The runner had said that it would start, and was gone before it said more."""
    state = tmp_path / "state"
    await leave_starting(state, f"touch {tmp_path}/ran")
    directory = state / "commands" / "cmd_1.1"
    assert files.claim(str(directory), "runner")
    async with open_rig(state) as rig:
        assert (await rig.result_of()).status == "interrupted"
        assert rig.ledger.state_of("cmd_1") is State.FINISHED
    assert not (tmp_path / "ran").exists()


def make_order(command: str) -> files.Order:
    return files.Order(
        command_id="cmd_1",
        argv=["/bin/sh", "-c", command],
        environment={"PATH": os.environ["PATH"]},
        timeout_seconds=10.0,
        grace_seconds=0.5,
        head_segments=16,
        waiting_segments=8,
    )


def make_launcher(spawner: Spawner) -> Launcher:
    return Launcher(spawner, has_units=False)


_SYSTEMD_RUN = """\
#!/bin/sh
if [ "$1" = --version ]; then
    echo "systemd {version} ({version}-1)"
    exit
fi
while [ "$1" != -- ]; do
    case "$1" in
    *OOMPolicy=*) if [ {version} -lt 243 ]; then echo "Unknown assignment: $1" >&2; exit 1; fi; touch {mark} ;;
    esac
    shift
done
shift
exec "$@"
"""


@pytest.mark.parametrize("version", [239, 252])
async def test_a_systemd_is_asked_for_no_property_that_it_does_not_know(tmp_path: Path, version: int) -> None:
    mark, directory = tmp_path / "mark", tmp_path / "state/cmd_1.1"
    program = tmp_path / "bin/systemd-run"
    program.parent.mkdir()
    program.write_text(_SYSTEMD_RUN.format(version=version, mark=mark))
    program.chmod(0o755)
    directory.parent.mkdir()
    await asyncio.to_thread(files.write_order, str(directory), make_order("true"))
    with Spawner({"PATH": f"{program.parent}:{os.environ['PATH']}"}) as spawner:
        await Launcher(spawner, has_units=True).launch(directory, "cmd_1")
        await dismiss(directory)
    assert mark.exists() == (version >= 243)


def test_a_version_of_systemd_that_cannot_be_told_is_taken_for_an_old_one() -> None:
    assert parse_systemd_version(b"systemd 257~rc1 (257~rc1-2)\n+PAM +AUDIT\n") == 257
    assert parse_systemd_version(b"sh: systemd 300\n") == 0


async def test_who_stops_commands_without_an_agent_is_told_which_go_on(tmp_path: Path) -> None:
    commands = tmp_path / "state/commands"
    async with open_rig(tmp_path / "state", is_killed=True) as rig:
        for number in (1, 2):
            rig.commands.offer(make_offer("echo $$; sleep 600", command_id=f"cmd_{number}"))
        pids = [await rig.first_line(f"cmd_{number}") for number in (1, 2)]
        stuck = find_runner(rig, "cmd_2")
    assert sorted(list_running(commands)) == ["cmd_1.1", "cmd_2.1"]
    os.kill(stuck, signal.SIGSTOP)
    assert await asyncio.to_thread(stop_commands, commands, seconds=3.0) == ["cmd_2.1"]
    assert read_process(pids[0]) is None
    assert list_running(commands) == ["cmd_2.1"]
    os.kill(stuck, signal.SIGCONT)
    await wait_until_gone(stuck)
    assert list_running(commands) == stop_commands(commands) == []
    async with open_rig(tmp_path / "state") as rig:
        for number in (1, 2):
            assert (await rig.result_of(f"cmd_{number}")).status == "interrupted"


# ---------------------------------------------------------------- what is killed


async def test_what_left_the_session_is_killed_and_listed(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        rig.commands.offer(
            make_offer(
                "env -i setsid /bin/sh -c 'echo $$; trap \"\" TERM; while :; do sleep 600; done' &"
                " (setsid sh -c 'echo $$; exec sleep 601' &); wait"
            )
        )
        await rig.wait_until(lambda: rig.output("stdout").count(b"\n") == 2)
        runner = find_runner(rig)
        pids = {int(line) for line in rig.output("stdout").split()}
        await eventually(lambda: asyncio.sleep(0, "sleep 601" in map(read_command_line, pids)))  # after its echo
        family = pids | {row.pid for row in descendants_of(read_processes(), runner)}
        rig.commands.cancel(CommandCancel(command_id="cmd_1"))
        result = await rig.result_of()
        assert result.status == "cancelled"
        assert [pid for pid in family if read_process(pid)] == []
        killed = {each.pid: each for each in result.killed}
        assert family <= set(killed)
        assert result.killed_count == len(killed)
        assert [each.signal for each in result.killed if each.command == "sleep 601"] == ["TERM"]
        assert [each.signal for each in result.killed if "trap" in each.command and each.pid in pids] == ["KILL"]


async def test_a_command_that_ends_by_itself_lists_no_killed(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        result = await rig.run("true")
        assert (result.killed, result.killed_count) == ((), 0)


# ---------------------------------------------------------------- the result's file


def make_result(*, killed: int = 0) -> files.Result:
    listed = [files.Killed(pid, "x" * 200, "KILL") for pid in range(killed)]
    return files.Result("cancelled", None, None, 1.0, 1.5, 2.0, 3, 4, listed, killed)


def test_a_result_is_read_back(tmp_path: Path) -> None:
    directory = tmp_path / "command"
    directory.mkdir()
    assert files.read_result(str(directory)) is None
    descriptor = files.allocate_result(str(directory))
    assert files.read_result(str(directory)) is None
    files.write_result(descriptor, str(directory), make_result(killed=3))
    os.close(descriptor)
    assert files.read_result(str(directory)) == make_result(killed=3)


def test_a_result_torn_at_any_byte_is_none(tmp_path: Path) -> None:
    directory = tmp_path / "command"
    directory.mkdir()
    descriptor = files.allocate_result(str(directory))
    files.write_result(descriptor, str(directory), make_result())
    os.close(descriptor)
    path = directory / files.RESULT
    whole = path.read_bytes()
    for cut in range(len(whole.rstrip(b"\0"))):
        path.write_bytes(whole[:cut] + bytes(len(whole) - cut))
        assert files.read_result(str(directory)) is None, cut


def test_a_result_of_which_the_disk_takes_a_part_is_an_error(tmp_path: Path) -> None:
    descriptor = files.allocate_result(str(tmp_path))
    with no_room(after_bytes=100), pytest.raises(OSError, match="File too large"):
        files.write_result(descriptor, str(tmp_path), make_result(killed=3))
    assert files.read_result(str(tmp_path)) is None
    files.write_result(descriptor, str(tmp_path), make_result(killed=3))
    os.close(descriptor)
    assert files.read_result(str(tmp_path)) == make_result(killed=3)


def test_a_result_that_is_too_large_lists_fewer_of_the_killed(tmp_path: Path) -> None:
    descriptor = files.allocate_result(str(tmp_path))
    files.write_result(descriptor, str(tmp_path), make_result(killed=1000))
    os.close(descriptor)
    result = files.read_result(str(tmp_path))
    assert result
    assert (len(result.killed), result.killed_count) == (250, 1000)


def test_a_result_of_a_long_error_is_cut_to_what_fits(tmp_path: Path) -> None:
    descriptor = files.allocate_result(str(tmp_path))
    files.write_result(descriptor, str(tmp_path), make_result(killed=100)._replace(error="\x00" * 100_000))
    os.close(descriptor)
    result = files.read_result(str(tmp_path))
    assert result
    assert (result.error, len(result.killed)) == ("\x00" * files.MAX_ERROR_CHARACTERS, 100)


def test_nothing_is_written_or_read_through_a_link(tmp_path: Path) -> None:
    victim, directory = tmp_path / "victim", tmp_path / "cmd_1.1"
    victim.write_text('{"kept": true}')
    directory.mkdir()
    for name in (files.ORDER, files.TRACES, files.RESULT, f"output.{0:020d}"):
        (directory / name).symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        files.write_traces(str(directory), files.Traces(1, None, None))
    with pytest.raises(FileExistsError):
        files.allocate_result(str(directory))
    writer = make_writer(directory)
    writer.add("stdout", b"x")
    assert writer.has_failed
    readers: list[Callable[[str], object]] = [
        files.read_order,
        files.read_result,
        lambda each: SpoolReader(each).read(),
    ]
    for read in readers:
        with pytest.raises(OSError, match="symbolic links"):
            read(str(directory))
    assert files.read_traces(str(directory)) is None
    assert victim.read_text() == '{"kept": true}'


def test_not_all_survivors_of_a_fork_bomb_are_named() -> None:
    assert describe_survivors([7, 9]) == "processes 7, 9 survived SIGKILL"
    sentence = describe_survivors(list(range(20_000)))
    assert sentence.endswith("18, 19 and 19980 more survived SIGKILL")


def test_only_the_first_claims(tmp_path: Path) -> None:
    assert files.claim(str(tmp_path), "agent")
    assert not files.claim(str(tmp_path), "runner")
    assert files.claim(str(tmp_path), "agent")  # also the next agent knows that it never ran


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root")
def test_a_full_disk_keeps_nobody_from_claiming(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], check=True)
    try:
        with suppress(OSError):
            (tmp_path / "filling").write_bytes(bytes(128 * 1024))
        assert [files.claim(str(tmp_path), who) for who in ("agent", "runner")] == [True, False]
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_an_order_is_read_back(tmp_path: Path) -> None:
    order = make_order("echo 'é\0'")
    files.write_order(str(tmp_path / "command"), order)
    assert files.read_order(str(tmp_path / "command")) == order
    assert (tmp_path / "command").stat().st_mode & 0o777 == 0o700
    assert json.loads((tmp_path / "command" / files.ORDER).read_text())["command_id"] == "cmd_1"


# ---------------------------------------------------------------- the spool


def make_writer(directory: Path, *, head_segments: int = 16) -> SpoolWriter:
    return SpoolWriter(str(directory), head_segments=head_segments, make_room=lambda: False)


def read_all(reader: SpoolReader) -> Iterator[Piece]:
    while piece := reader.read():
        yield piece


def fill(writer: SpoolWriter, *, segments: int) -> None:
    """Each segment takes fifteen such pieces."""
    for number in range(15 * segments):
        writer.add("stdout", bytes([number % 256]) * MAX_PIECE_BYTES)


def test_pieces_are_read_in_order_while_they_are_written(tmp_path: Path) -> None:
    writer, reader = make_writer(tmp_path), SpoolReader(str(tmp_path))
    assert reader.read() is None
    writer.add("stdout", b"abc")
    assert reader.read() == ("stdout", 0, 0, b"abc")
    assert reader.read() is None
    writer.add("stderr", b"de")
    writer.add("stdout", b"f")
    assert list(read_all(reader)) == [("stderr", 3, 0, b"de"), ("stdout", 5, 3, b"f")]
    writer.close()
    assert reader.read() is None
    reader.close()


def test_a_reader_follows_from_segment_to_segment(tmp_path: Path) -> None:
    writer, reader = make_writer(tmp_path), SpoolReader(str(tmp_path))
    read: list[int] = []
    for number in range(40):
        writer.add("stdout", bytes([number]) * MAX_PIECE_BYTES)
        if number % 7 == 0:
            read += [content[0] for _, _, _, content in read_all(reader)]
    read += [content[0] for _, _, _, content in read_all(reader)]
    writer.close()
    reader.close()
    assert read == list(range(40))
    assert len(list_segments(str(tmp_path))) == 3


def test_a_reader_may_begin_within_a_piece(tmp_path: Path) -> None:
    writer, reader = make_writer(tmp_path), SpoolReader(str(tmp_path))
    writer.add("stdout", b"abc")
    writer.add("stderr", b"defg")
    writer.close()
    reader.seek(4)
    assert list(read_all(reader)) == [("stderr", 4, 1, b"efg")]
    reader.seek(0)
    assert [position for _, position, _, _ in read_all(reader)] == [0, 3]
    reader.close()


def test_what_is_not_kept_is_a_gap_and_the_offsets_are_exact(tmp_path: Path) -> None:
    writer, reader = make_writer(tmp_path, head_segments=2), SpoolReader(str(tmp_path))
    fill(writer, segments=10)
    writer.add("stderr", b"end")
    writer.close()
    starts = list_segments(str(tmp_path))
    assert len(starts) == 4
    pieces = list(read_all(reader))
    reader.close()
    gaps = [
        (before[1] + len(before[3]), after[1])
        for before, after in pairwise(pieces)
        if before[1] + len(before[3]) != after[1]
    ]
    assert gaps == [(30 * MAX_PIECE_BYTES, starts[2])]
    assert all(offset == position for stream, position, offset, _ in pieces if stream == "stdout")
    assert pieces[-1] == ("stderr", 150 * MAX_PIECE_BYTES, 0, b"end")
    assert writer.written_bytes == {"stdout": 150 * MAX_PIECE_BYTES, "stderr": 3}


def test_counting_what_is_left_drops_nothing(tmp_path: Path) -> None:
    writer = make_writer(tmp_path, head_segments=2)
    fill(writer, segments=4)
    starts = list_segments(str(tmp_path))
    assert len(starts) == 4
    assert writer.segments == 3
    writer.recount()
    assert list_segments(str(tmp_path)) == starts
    assert SpoolReader(str(tmp_path)).drop_before(starts[1])
    writer.recount()
    assert writer.segments == 2
    fill(writer, segments=1)
    assert len(list_segments(str(tmp_path))) == 4  # room had been made by the reader, so none was dropped
    writer.close()


def test_what_is_stored_is_removed_in_whole_segments_and_never_the_last(tmp_path: Path) -> None:
    writer, reader = make_writer(tmp_path), SpoolReader(str(tmp_path))
    fill(writer, segments=3)
    _, second, third = list_segments(str(tmp_path))
    assert not reader.drop_before(second - 1)
    assert reader.drop_before(second)
    assert list_segments(str(tmp_path)) == [second, third]
    assert reader.drop_before(writer.position)
    assert list_segments(str(tmp_path)) == [third]
    assert next(read_all(reader))[1] == third
    writer.close()
    reader.close()


@pytest.mark.parametrize("kept_bytes", [1, 10, 24, 25, 26, 27])
def test_a_torn_last_piece_is_not_read(tmp_path: Path, kept_bytes: int) -> None:
    writer, reader = make_writer(tmp_path), SpoolReader(str(tmp_path))
    writer.add("stdout", b"abc")
    [start] = list_segments(str(tmp_path))
    path = next(tmp_path.glob("output.*"))
    size_bytes = path.stat().st_size
    writer.add("stdout", b"def")
    writer.close()
    os.truncate(path, size_bytes + kept_bytes)
    assert start == 0
    assert [content for _, _, _, content in read_all(reader)] == [b"abc"]
    reader.close()


class LateReader(SpoolReader):
    """Is interrupted by the writer after it has seen the end of a segment."""

    def __init__(self, directory: str, writer: SpoolWriter) -> None:
        super().__init__(directory)
        self._writer = writer
        self._has_waited = False

    def _find_next_segment(self) -> int | None:
        if not self._has_waited:
            self._has_waited = True
            fill(self._writer, segments=1)
        return super()._find_next_segment()


def test_what_is_added_just_before_the_next_segment_is_not_passed_over(tmp_path: Path) -> None:
    writer = make_writer(tmp_path)
    reader = LateReader(str(tmp_path), writer)
    for _ in range(5):
        writer.add("stdout", b"x" * MAX_PIECE_BYTES)
    positions = [position for _, position, _, _ in read_all(reader)]
    writer.close()
    reader.close()
    assert positions == [number * MAX_PIECE_BYTES for number in range(20)]


def test_a_segment_is_no_larger_than_it_may_be(tmp_path: Path) -> None:
    writer = make_writer(tmp_path)
    fill(writer, segments=2)
    writer.close()
    sizes = [path.stat().st_size for path in tmp_path.glob("output.*")]
    assert all(size <= SEGMENT_BYTES for size in sizes)
