"""What seldom happens at the worst moment, made to happen there."""

import asyncio
import os
import subprocess
from pathlib import Path

from tests.agent.command_rig import make_offer, open_rig
from tests.support.eventually import eventually
from tests.support.syncs import needs_strace

from fleetwire_agent.runner import files

pytestmark = needs_strace


async def test_a_shell_that_dies_between_two_looks_of_its_runner_is_missed_by_neither(tmp_path: Path) -> None:
    """It closes its output, which wakes the runner, and dies while that asks whether an agent has come."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    async with open_rig(tmp_path / "state") as rig:
        rig.commands.offer(make_offer(f"echo $$; cat {gate}; exec >&- 2>&-; sleep 0.4; exit 3"))
        await rig.first_line()
        traces = files.read_traces(str(rig.entry().directory))
        assert traces
        slow = ["-e", "trace=accept4", "-e", "inject=accept4:delay_enter=1500000"]
        strace = subprocess.Popen(["strace", "-qq", "-o", "/dev/null", *slow, "-p", str(traces.runner_pid)])
        try:
            await eventually(lambda: is_traced(traces.runner_pid))
            await asyncio.to_thread(gate.write_text, "")
            result = await rig.result_of()
        finally:
            strace.kill()
            strace.wait()
        assert (result.status, result.exit_code) == ("failed", 3)


async def is_traced(pid: int) -> bool:
    return "TracerPid:\t0\n" not in Path(f"/proc/{pid}/status").read_text()
