"""Whether what the server says of each command is true. Pure: it compares, and has no way to find out itself."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Final

from scripts.lib.chaos.workload import Order, sequence_bytes

OVER: Final[Set[str]] = frozenset(
    {"succeeded", "failed", "timed_out", "cancelled", "expired", "rejected", "interrupted", "lost"}
)
UNPROVED: Final[Set[str]] = frozenset({"interrupted", "lost"})
"""Ends that say "nobody knows": never the truth while the host lives."""

NEVER_RAN: Final[Set[str]] = frozenset({"expired", "rejected"})


@dataclass(slots=True, kw_only=True)
class Evidence:
    """What is known of one command at the end.

    Args:
        answer: the server's GET of it; None where the server has no such command.
        stdout, stderr: the output that is kept; None where nobody looked.
        said_missing: bytes that the command's event stream said are not kept; what is missing is wrong all the same.
        ends_seen: the statuses it was over with, in the order in which they were seen.
        other_ids: commands that later submits with the same key were answered with.
        living: its processes that are still there, described.
        excused: ends that are honest though they prove nothing, as its host died, or what watched it there."""

    order: Order
    command_id: str | None = None
    answer: Mapping[str, Any] | None = None
    stdout: bytes | None = None
    stderr: bytes | None = None
    said_missing: int = 0
    ends_seen: list[str] = field(default_factory=list)
    other_ids: set[str] = field(default_factory=set)
    living: Sequence[str] = ()
    excused: Set[str] = frozenset()

    @property
    def status(self) -> str:
        return "unknown" if self.answer is None else str(self.answer["status"])


@dataclass(frozen=True, slots=True)
class Violation:
    """A promise that was not kept; `token` is the command's, None where it is about none of them."""

    rule: str
    detail: str
    token: str | None = None


def check(
    evidences: Collection[Evidence], executions: Iterable[str], *, strangers: Iterable[str] = ()
) -> list[Violation]:
    """Return all that is wrong.

    Args:
        executions: the lines of the file that each command writes its token to when it runs.
        strangers: commands the server told of that no submit was answered with."""
    runs = Counter(executions)
    found = [
        Violation(rule, detail, evidence.order.token)
        for evidence in evidences
        for rule, detail in _check_one(evidence, runs[evidence.order.token])
    ]
    known = {evidence.order.token for evidence in evidences}
    found += [Violation("nobody's token", f"{line!r} was written by no command") for line in runs if line not in known]
    found += [Violation("a command nobody submitted", f"the server tells of {name}") for name in strangers]
    return found


def _check_one(evidence: Evidence, runs: int) -> Iterator[tuple[str, str]]:
    if runs > 1:
        yield "executed twice", f"its token was written {runs} times"
    if evidence.other_ids:
        names = ", ".join(sorted(evidence.other_ids))
        yield "one key, two commands", f"{evidence.command_id} and {names} were the answers to one Idempotency-Key"
    if evidence.command_id is None:
        return  # never acknowledged: only running twice would be wrong
    if evidence.answer is None:
        yield "missing", f"{evidence.command_id} was acknowledged, and the server does not know it"
        return
    if evidence.living:
        yield "processes left", "; ".join(evidence.living)
    yield from _check_end(evidence, runs)


def _check_end(evidence: Evidence, runs: int) -> Iterator[tuple[str, str]]:
    status, order = evidence.status, evidence.order
    assert evidence.answer is not None
    proved = [end for end in evidence.ends_seen if end not in UNPROVED]
    if any(end != status for end in proved):
        yield "end changed", f"it was {', then '.join(evidence.ends_seen)}, and now is {status}"
    for end in dict.fromkeys([*evidence.ends_seen, status]):
        if end in UNPROVED - evidence.excused:
            yield "unproved end", f"it was told to be {end}, though its host lived, and now is {status}"
    if evidence.answer["late"] and not evidence.excused:
        yield "late end", f"it is {status} and late: another end was told before, though its host lived"
    if status not in OVER:
        yield "not over", f"its status is {status}"
    elif status in UNPROVED:
        return
    elif status not in order.ends:
        yield "wrong end", f"it is {status}, and can only be {' or '.join(sorted(order.ends))}"
    else:
        yield from _check_proof(evidence, runs)


def _check_proof(evidence: Evidence, runs: int) -> Iterator[tuple[str, str]]:
    """Check an end that may be the right one."""
    assert evidence.answer is not None
    status, order, answer = evidence.status, evidence.order, evidence.answer
    has_started = answer["started_at"] is not None
    if runs and (status in NEVER_RAN or not has_started):
        yield "ran though it says it did not", f"it is {status}, started_at is {answer['started_at']}, and it ran"
    if status in ("succeeded", "failed"):
        if not runs:
            yield "did not run", f"it is {status}, and its token was not written"
        if answer["exit_code"] != order.exit_code:
            yield "wrong exit code", f"exit_code is {answer['exit_code']}, not {order.exit_code}"
        yield from _check_output(evidence)
    if status in ("succeeded", "failed", "timed_out") and not has_started:
        yield "over without a start", f"it is {status}, and started_at is null"


def _check_output(evidence: Evidence) -> Iterator[tuple[str, str]]:
    """All must be there: no order prints as much as a quota, and a result is written after its output is synced."""
    assert evidence.answer is not None
    missing = 0
    for name, numbers, kept in (
        ("stdout", evidence.order.stdout, evidence.stdout),
        ("stderr", evidence.order.stderr, evidence.stderr),
    ):
        written = sequence_bytes(numbers)
        total = evidence.answer[f"{name}_bytes"]
        if total != len(written):
            yield "wrong total", f"{name}_bytes is {total}, not {len(written)}"
        if kept is None:
            continue
        missing += max(0, len(written) - len(kept))
        if len(kept) == len(written) and kept != written:
            yield "wrong output", f"{name} differs from byte {_first_difference(kept, written)} on"
        if len(kept) > len(written):
            yield "wrong output", f"{name} holds {len(kept)} bytes, {len(written)} were written"
    if missing:
        said = f"truncated is {evidence.answer['truncated']}, and the stream says {evidence.said_missing}"
        yield "output missing", f"{missing} bytes are missing; {said}"


def _first_difference(one: bytes, other: bytes) -> int:
    return next(index for index, (left, right) in enumerate(zip(one, other, strict=True)) if left != right)
