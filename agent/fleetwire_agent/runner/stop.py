"""Ends all that a command started, a step at a time, so that its output is read meanwhile."""

import os
import signal
from typing import Final, Literal

from fleetwire_agent.process_table import Family, ProcessRow, signal_all
from fleetwire_agent.runner.control_group import ControlGroup
from fleetwire_agent.runner.files import Killed

MAX_LISTED: Final = 100
MAX_NAMED: Final = 20
BOMB_PROCESSES: Final = 1000
"""A command of more than these gets no grace: it may be one that only forks, and would fill the host meanwhile."""

GIVE_UP_SECONDS: Final = 5.0
"""After SIGKILL; a process in uninterruptible sleep dies when its device answers."""

_FIRST_DELAY_SECONDS: Final = 0.005
_LONGEST_DELAY_SECONDS: Final = 0.1
_MAX_COMMAND_CHARACTERS: Final = 200


class Stop:
    """SIGTERM, after the grace SIGKILL, until nothing is left of the command."""

    def __init__(self, family: Family, group: ControlGroup | None, *, now: float, grace_seconds: float) -> None:
        self._family = family
        self._group = group
        self._kill_at = now + grace_seconds
        self._delay_seconds = _FIRST_DELAY_SECONDS
        self._told: set[tuple[int, int]] = set()
        self._listed: dict[tuple[int, int], Killed] = {}
        self.next_at = now  # when to call `step`
        self.survivors: list[int] = []  # what even SIGKILL did not end

    @property
    def killed(self) -> list[Killed]:
        return list(self._listed.values())

    @property
    def killed_count(self) -> int:
        """At least so many: what was forked and killed between two looks is not in it."""
        return max(len(self._told), len(self._listed))

    def step(self, now: float) -> bool:
        """Signal what is there; return whether it is over: nothing is left, or nothing more can be done."""
        if self._group is not None and (now >= self._kill_at or self._group.is_larger_than(BOMB_PROCESSES)):
            # Before looking at each: that takes long where they are many, and what forks is faster than who looks.
            self._kill_at = min(self._kill_at, now)
            for row in self._group.read_members(limit=MAX_LISTED):
                self._note(row, "KILL")
            self._group.kill()
        members = self._family.read_members()
        if self._group is not None:
            members |= self._group.read_members()
        if not members:
            return True
        if now > self._kill_at + GIVE_UP_SECONDS:
            self.survivors = sorted(row.pid for row in members)
            return True
        fresh = {row for row in members if row.identity not in self._told}
        for row in sorted(fresh, key=lambda row: (row.start_ticks, row.pid)):
            self._note(row, "KILL" if now >= self._kill_at else "TERM")
        if now >= self._kill_at:
            self._kill(members, has_fresh=bool(fresh))
        else:
            signal_all(fresh, signal.SIGTERM)
            signal_all(fresh, signal.SIGCONT)  # a stopped process would sleep through SIGTERM
            self._delay_seconds = min(self._delay_seconds, max(self._kill_at - now, 0.0))
        self._told |= {row.identity for row in fresh}
        self.next_at = now + self._delay_seconds
        self._delay_seconds = min(self._delay_seconds * 2, _LONGEST_DELAY_SECONDS)
        return False

    def _kill(self, members: set[ProcessRow], *, has_fresh: bool) -> None:
        for row in members:
            if row.identity in self._listed:
                self._note(row, "KILL")
        signal_all(members, signal.SIGKILL)
        if has_fresh:
            self._delay_seconds = _FIRST_DELAY_SECONDS  # outrun what forks

    def _note(self, row: ProcessRow, name: Literal["TERM", "KILL"]) -> None:
        if row.identity in self._listed:
            self._listed[row.identity] = self._listed[row.identity]._replace(signal=name)
        elif len(self._listed) < MAX_LISTED:
            self._listed[row.identity] = Killed(row.pid, read_command_line(row.pid), name)


def describe_survivors(pids: list[int]) -> str:
    """Return the sentence on what SIGKILL did not end; not all are named where they are many."""
    named = ", ".join(str(pid) for pid in pids[:MAX_NAMED])
    rest = f" and {len(pids) - MAX_NAMED} more" if len(pids) > MAX_NAMED else ""
    return f"processes {named}{rest} survived SIGKILL"


def read_command_line(pid: int) -> str:
    """Return what the process was started as, cut to 200 characters; its name in brackets where it has none."""
    for name in ("cmdline", "comm"):
        try:
            descriptor = os.open(f"/proc/{pid}/{name}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return "[gone]"
        try:
            text = os.read(descriptor, 4 * _MAX_COMMAND_CHARACTERS)
        except OSError:
            text = b""
        finally:
            os.close(descriptor)
        words = text.replace(b"\0", b" ").decode("utf-8", "replace").strip()
        if words:
            return words[:_MAX_COMMAND_CHARACTERS] if name == "cmdline" else f"[{words}]"
    return "[gone]"
