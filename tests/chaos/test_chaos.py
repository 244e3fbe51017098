"""Commands while everything fails: the whole of scripts/chaos."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from scripts.lib.chaos.faults import FAULTS
from scripts.lib.chaos.report import format_history, format_table
from scripts.lib.chaos.run import Outcome, make_plan, run_plan
from tests.support.processes import ROOT

HISTORIES = 5  # told at length


def describe(outcome: Outcome, directory: Path) -> str:
    """Return all that a person needs to find out what went wrong."""
    tokens = dict.fromkeys(violation.token for violation in outcome.violations if violation.token)
    histories = [format_history(outcome, token, directory) for token in list(tokens)[:HISTORIES]]
    others = [f"{violation.rule}: {violation.detail}" for violation in outcome.violations if not violation.token]
    return "\n\n".join(["", *histories, *others, format_table(outcome)])


@pytest.mark.timeout(480)
def test_2000_commands_survive_everything(tmp_path: Path) -> None:
    plan = make_plan(2000, seed=20, agents=1)
    outcome = asyncio.run(run_plan(plan, tmp_path))
    assert not outcome.violations, describe(outcome, tmp_path)
    assert min(outcome.faults["agent kill"], outcome.faults["server kill"]) >= 15, outcome.faults
    assert all(outcome.faults[kind] >= 2 for kind in FAULTS), outcome.faults
    assert outcome.strikes_at_work >= 0.9 * len(plan.strikes), format_table(outcome)
    print(format_table(outcome))


def test_the_script_prints_a_table_and_leaves_nothing(tmp_path: Path) -> None:
    arguments = ["--commands", "30", "--seed", "3", "--agents", "2", "--strikes", "0", "--keep", str(tmp_path / "kept")]
    done = subprocess.run(
        [sys.executable, "-m", "scripts.lib.chaos", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "seed 3: 30 commands for 2 agents, 0 faults" in done.stderr
    facts = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if line and "  " in line)
    assert (facts["duplicates"], facts["violations"]) == ("0", "0")
    assert (tmp_path / "kept/canary").exists()
