"""What an installation says as it goes on: lines for people, or JSON objects for the server that runs it over SSH."""

import json
import os
import select
import sys
from dataclasses import asdict, dataclass
from typing import Literal, TypeAlias

from fleetwire_agent.install.failures import Reason

Result: TypeAlias = Literal["installed", "upgraded", "unchanged", "failed", "dry_run", "uninstalled", "nothing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The last thing that is said."""

    result: Result
    version: str | None
    agent_id: str | None
    reason: Reason | None
    detail: str


class Report:
    """Writes to standard output. Output that nobody reads any more is no reason to fail: see `is_abandoned`."""

    def __init__(self, *, is_json: bool) -> None:
        self._is_json = is_json
        self._is_broken = False

    def step(self, name: str, detail: str) -> None:
        self._write(json.dumps({"step": name, "detail": detail}) if self._is_json else f"  {name:<9} {detail}")

    def finish(self, outcome: Outcome) -> None:
        if self._is_json:
            self._write(json.dumps(asdict(outcome)))
        elif outcome.result == "failed":
            sys.stdout.flush()
            sys.stderr.write(f"fleetwire-agent: {outcome.detail}\n")
        else:
            self._write(outcome.detail)

    def is_abandoned(self) -> bool:
        """Whether the program that asked for JSON is gone: then nobody waits for this agent any more."""
        if not self._is_json:
            return False
        if self._is_broken:
            return True
        try:
            poll = select.poll()
            poll.register(sys.stdout.fileno(), 0)
            return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
        except (OSError, ValueError):
            return True

    def _write(self, text: str) -> None:
        if self._is_broken:
            return
        try:
            sys.stdout.write(text + "\n")
            sys.stdout.flush()
        except (OSError, ValueError):
            self._is_broken = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is buffered must go somewhere at exit
