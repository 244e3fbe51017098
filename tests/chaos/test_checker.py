"""The checker finds each lie it is there for: of a true story with one thing changed it tells what is wrong."""

import random
from collections.abc import Callable
from typing import Any

import pytest
from scripts.lib.chaos.checker import Evidence, check
from scripts.lib.chaos.run import make_plan
from scripts.lib.chaos.workload import (
    KINDS,
    Order,
    make_cancelled,
    make_expiring,
    make_failing,
    make_output,
    make_quick,
    make_timed_out,
    sequence_bytes,
)

TOKEN = "canary-00001-00000000cafe"
Make = Callable[[str, random.Random], Order]


def make_evidence(make: Make = make_quick, **changes: Any) -> Evidence:
    """Return what is known of a command that ended as it should; `changes` are of the server's answer."""
    order = make(TOKEN, random.Random(1))
    stdout, stderr = sequence_bytes(order.stdout), sequence_bytes(order.stderr)
    answer = {
        "status": min(order.ends),
        "exit_code": order.exit_code,
        "started_at": 1.0,
        "stdout_bytes": len(stdout),
        "stderr_bytes": len(stderr),
        "truncated": False,
        "late": False,
    }
    return Evidence(order=order, command_id="cmd_1", answer=answer | changes, stdout=stdout, stderr=stderr)


def rules(evidence: Evidence, *executions: str, strangers: tuple[str, ...] = ()) -> list[str]:
    return [violation.rule for violation in check([evidence], executions, strangers=strangers)]


@pytest.mark.parametrize("make", [make_quick, make_output, make_failing, make_cancelled, make_timed_out])
def test_a_true_story_is_believed(make: Make) -> None:
    assert rules(make_evidence(make), TOKEN) == []


def test_a_command_that_expired_or_was_cancelled_before_it_began_did_not_run() -> None:
    for evidence in (make_evidence(make_expiring, status="expired"), make_evidence(make_cancelled)):
        evidence.answer = {**(evidence.answer or {}), "started_at": None}
        assert rules(evidence) == []
        assert rules(evidence, TOKEN) == ["ran though it says it did not"]


def test_a_second_execution_is_found() -> None:
    assert rules(make_evidence(), TOKEN, TOKEN) == ["executed twice"]


def test_a_command_that_is_gone_is_found() -> None:
    missing = make_evidence()
    missing.answer = None
    assert rules(missing, TOKEN) == ["missing"]


def test_a_success_that_never_ran_is_found() -> None:
    assert rules(make_evidence()) == ["did not run"]


@pytest.mark.parametrize("status", ["queued", "offered", "accepted", "running"])
def test_a_command_that_does_not_end_is_found(status: str) -> None:
    assert rules(make_evidence(status=status), TOKEN) == ["not over"]


@pytest.mark.parametrize("status", ["lost", "interrupted"])
def test_an_end_that_nobody_knows_is_wrong_while_the_host_lives(status: str) -> None:
    evidence = make_evidence(status=status)
    assert rules(evidence, TOKEN) == ["unproved end"]
    evidence.excused = {status}
    assert rules(evidence, TOKEN) == []
    assert rules(evidence, TOKEN, TOKEN) == ["executed twice"]


@pytest.mark.parametrize(
    ("make", "changes", "rule"),
    [
        (make_quick, {"status": "failed"}, "wrong end"),
        (make_cancelled, {"status": "succeeded"}, "wrong end"),
        (make_failing, {"exit_code": 126}, "wrong exit code"),
        (make_timed_out, {"started_at": None}, "ran though it says it did not"),
        (make_output, {"stdout_bytes": 1}, "wrong total"),
    ],
)
def test_a_wrong_answer_is_found(make: Make, changes: dict[str, object], rule: str) -> None:
    assert rule in rules(make_evidence(make, **changes), TOKEN)


def test_wrong_output_is_found() -> None:
    evidence = make_evidence(make_output)
    assert evidence.stdout
    evidence.stdout = b"0" + evidence.stdout[1:]
    assert rules(evidence, TOKEN) == ["wrong output"]
    evidence.stdout += b"0"
    assert rules(evidence, TOKEN) == ["wrong output"]
    assert "holds" in check([evidence], [TOKEN])[0].detail


@pytest.mark.parametrize("make", [make_output, make_failing])
@pytest.mark.parametrize("is_said", [False, True])
def test_missing_output_is_found_whether_said_or_not(make: Make, *, is_said: bool) -> None:
    evidence = make_evidence(make, truncated=is_said)
    assert evidence.stdout
    evidence.stdout = evidence.stdout[5:]
    evidence.said_missing = 5 if is_said else 0
    assert rules(evidence, TOKEN) == ["output missing"]


def test_an_end_that_changes_is_found() -> None:
    evidence = make_evidence()
    evidence.ends_seen = ["cancelled", "succeeded"]
    assert rules(evidence, TOKEN) == ["end changed"]


@pytest.mark.parametrize("end", ["lost", "interrupted"])
def test_an_end_that_nobody_knew_is_wrong_also_when_the_truth_came_later(end: str) -> None:
    seen, unseen = make_evidence(), make_evidence(late=True)
    seen.ends_seen = [end, "succeeded"]
    assert (rules(seen, TOKEN), rules(unseen, TOKEN)) == (["unproved end"], ["late end"])
    seen.excused = unseen.excused = {end}
    assert rules(seen, TOKEN) == rules(unseen, TOKEN) == []


def test_processes_that_are_left_are_found() -> None:
    evidence = make_evidence(make_cancelled)
    evidence.living = ["4711: sleep"]
    assert rules(evidence, TOKEN) == ["processes left"]


def test_what_nobody_submitted_is_found() -> None:
    assert rules(make_evidence(), TOKEN, "canary-00002-0") == ["nobody's token"]
    assert rules(make_evidence(), TOKEN, strangers=("cmd_2",)) == ["a command nobody submitted"]
    evidence = make_evidence()
    evidence.other_ids = {"cmd_2"}
    assert rules(evidence, TOKEN) == ["one key, two commands"]


def test_a_submit_that_was_never_acknowledged_may_run_once() -> None:
    evidence = make_evidence()
    evidence.command_id = evidence.answer = None
    assert rules(evidence) == rules(evidence, TOKEN) == []
    assert rules(evidence, TOKEN, TOKEN) == ["executed twice"]


def test_a_seed_gives_one_schedule_with_all_in_it() -> None:
    plan = make_plan(2000, seed=7, agents=2)
    assert plan == make_plan(2000, seed=7, agents=2)
    assert plan != make_plan(2000, seed=8, agents=2)
    assert len({order.kind for order in plan.orders}) == len(KINDS)
    faults = [fault.kind for strike in make_plan(2000, seed=7).strikes for fault in strike.faults]
    assert min(faults.count("server kill"), faults.count("agent kill")) >= 15
