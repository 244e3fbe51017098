"""What a person reads at the end: a table, and the history of each command that went wrong."""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from scripts.lib.chaos.checker import Evidence
from scripts.lib.chaos.run import Outcome

_LINES: Final = 60  # of a log, or of a file, in a history
_FILE_CHARACTERS: Final = 3000


def format_table(outcome: Outcome) -> str:
    """Return the numbers of a run."""
    plan, evidences = outcome.plan, outcome.evidences
    statuses = sorted({evidence.status for evidence in evidences})
    by_kind = Counter((evidence.order.kind, evidence.status) for evidence in evidences)
    rows = [["kind", *statuses, "all"]]
    for kind in [*dict.fromkeys(sorted(evidence.order.kind for evidence in evidences)), "all"]:
        counts = [sum(n for (k, s), n in by_kind.items() if kind in (k, "all") and s == status) for status in statuses]
        rows.append([kind, *(str(count or "") for count in counts), str(sum(counts))])
    runs = Counter(outcome.executions)
    cut = sum(evidence.said_missing > 0 for evidence in evidences)
    facts = {
        "seed": plan.seed,
        "duration": f"{outcome.seconds:.0f} s",
        "faults": ", ".join(f"{count} x {kind}" for kind, count in sorted(outcome.faults.items())) or "none",
        "strikes": f"{outcome.strikes}, {outcome.strikes_at_work} of them while commands were not over",
        "executions": len(outcome.executions),
        "duplicates": sum(count - 1 for count in runs.values()),
        "outputs with a gap": cut,
        "violations": len(outcome.violations),
    }
    facts |= {f"  {rule}": count for rule, count in Counter(v.rule for v in outcome.violations).items()}
    return "\n".join([*_align(rows), "", *_align([[name, str(value)] for name, value in facts.items()])])


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def format_history(outcome: Outcome, token: str, directory: Path) -> str:
    """Return all that is known of one command.

    Args:
        directory: where the run kept its logs and state."""
    evidence = next(evidence for evidence in outcome.evidences if evidence.order.token == token)
    broken = [f"{violation.rule}: {violation.detail}" for violation in outcome.violations if violation.token == token]
    lines = [
        f"==== {token} ({evidence.order.kind}), {evidence.command_id}",
        *broken,
        f"order: {evidence.order}",
        f"executions: {Counter(outcome.executions)[token]}; ends seen: {evidence.ends_seen}",
        f"answer: {json.dumps(_shorten(evidence))}",
        "---- seen, in seconds since the start (indented: faults)",
        *outcome.record.tell(token),
    ]
    if evidence.command_id:
        lines += find_traces(directory, evidence.command_id)
    return "\n".join(lines)


def _shorten(evidence: Evidence) -> dict[str, object] | None:
    answer = dict(evidence.answer) if evidence.answer else None
    if answer is not None:
        answer["output"] = str(answer["output"])[-200:]
    return answer


def find_traces(directory: Path, command_id: str) -> Iterator[str]:
    """Yield the lines of all logs and state files that name a command, and the files that are named after it."""
    for path in sorted(directory.rglob("*")):
        if path.is_symlink() or not path.is_file() or path.suffix == ".img":
            continue
        relative = path.relative_to(directory)
        content = path.read_bytes()
        if command_id in str(relative):
            yield f"---- {relative}, {len(content)} bytes"
            yield _readable(content[:_FILE_CHARACTERS])
        elif command_id.encode() in content and not relative.name.startswith("fleetwire.db"):
            lines = [line for line in content.split(b"\n") if command_id.encode() in line]
            if found := [
                line for line in lines if b"[info] GET" not in line
            ]:  # whether it is over is asked all the time
                yield f"---- {relative}"
            yield from (_readable(line[:500]) for line in found[-_LINES:])


def _readable(content: bytes) -> str:
    """Return the text in a file that may be none."""
    text = content.decode(errors="replace").replace("\ufffd", "\0")
    return "".join(character if character.isprintable() or character == "\n" else " " for character in text).strip()


def say(text: str) -> None:
    print(f"scripts/chaos: {text}", file=sys.stderr, flush=True)
