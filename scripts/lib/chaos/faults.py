"""What is done to a fleet: planned before, from a seed, and struck while commands run."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final

from scripts.lib.chaos.link import CuttableLink
from scripts.lib.chaos.parts import Agent, Part, Server
from scripts.lib.chaos.record import Record


@dataclass(frozen=True, slots=True)
class Target:
    """What faults are done to: a server, and each agent with the link it dials through."""

    server: Server
    agents: tuple[Agent, ...]
    links: tuple[CuttableLink, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    kind: str
    agent: int  # which one, or whose link
    seconds: float  # how long it lasts

    @property
    def side(self) -> str:
        """What of the fleet it is done to: one thing at a time."""
        part = self.kind.partition(" ")[0]
        return part if part == "server" else f"{part} {self.agent}"


@dataclass(frozen=True, slots=True)
class Strike:
    """Faults that are done at once, some time after the strike before is over."""

    after: float
    faults: tuple[Fault, ...]


async def kill_part(part: Part, seconds: float) -> bool:
    was_running = part.is_running
    await part.kill()
    has_struck = was_running and part.was_killed
    await asyncio.sleep(seconds)
    await part.start()
    return has_struck


async def restart_part(part: Part, seconds: float) -> bool:
    was_running = part.is_running
    await part.stop()
    has_struck = was_running and part.exit_status == 0
    await asyncio.sleep(seconds)
    await part.start()
    return has_struck


async def pause_part(part: Part, seconds: float) -> bool:
    part.pause()
    await asyncio.sleep(seconds)
    has_struck = part.is_paused and part.is_running
    part.resume()
    return has_struck


async def delay_link(link: CuttableLink, seconds: float) -> bool:
    """Packets are late, and none is lost."""
    has_struck = link.is_used
    link.cut()
    await asyncio.sleep(seconds)
    link.heal(resume=True)
    return has_struck


async def lose_link(link: CuttableLink, seconds: float) -> bool:
    """What was connected hears nothing ever again; as long again, and what still tries is told so by a reset."""
    has_struck = link.is_used
    link.cut()
    await asyncio.sleep(seconds)
    link.heal()
    await asyncio.sleep(seconds)
    link.reset()
    return has_struck


async def reset_link(link: CuttableLink, _: float) -> bool:
    has_struck = link.is_used
    link.reset()
    return has_struck


_Deed = Callable[[Target, Fault], Awaitable[bool]]
"""Returns whether it struck: what it was done to was there, and ended as the fault ends it."""

_DEEDS: Final[Mapping[str, _Deed]] = {
    "server kill": lambda target, fault: kill_part(target.server, fault.seconds),
    "server restart": lambda target, fault: restart_part(target.server, fault.seconds),
    "server pause": lambda target, fault: pause_part(target.server, fault.seconds),
    "agent kill": lambda target, fault: kill_part(target.agents[fault.agent], fault.seconds),
    "agent restart": lambda target, fault: restart_part(target.agents[fault.agent], fault.seconds),
    "agent pause": lambda target, fault: pause_part(target.agents[fault.agent], fault.seconds),
    "link delay": lambda target, fault: delay_link(target.links[fault.agent], fault.seconds),
    "link loss": lambda target, fault: lose_link(target.links[fault.agent], fault.seconds),
    "link reset": lambda target, fault: reset_link(target.links[fault.agent], fault.seconds),
}
FAULTS: Final = tuple(_DEEDS)

_FIRST: Final[Mapping[str, int]] = {
    "server kill": 8,
    "server restart": 1,
    "server pause": 1,
    "link delay": 1,
    "link loss": 1,
    "link reset": 1,
}
_SECOND: Final[Mapping[str, int]] = {"agent kill": 8, "agent restart": 2, "agent pause": 2}
_BESIDES: Final[Mapping[str, int]] = dict.fromkeys(_DEEDS, 1)


def plan_strikes(count: int, agents: int, choose: random.Random) -> list[Strike]:
    """Return that many strikes of one to three faults.

    What parts an agent from its server takes turns with what befalls the agent itself: an agent that is started anew
    begins its backoff anew, and some time for work follows. Of each turn, a kind comes as often as its weight says."""
    first, second, besides = (_Bag(weights, choose) for weights in (_FIRST, _SECOND, _BESIDES))
    strikes = []
    for number in range(count):
        kinds = [(second if number % 2 else first).draw()]
        kinds += [besides.draw() for _ in range(choose.choice([0, 0, 0, 1, 1, 2]))]
        faults: dict[str, Fault] = {}
        for kind in kinds:
            longest = 0.6 if kind.endswith(("kill", "restart")) else 3.0
            fault = Fault(kind=kind, agent=choose.randrange(agents), seconds=choose.uniform(0.1, longest))
            faults.setdefault(fault.side, fault)
        after = choose.uniform(0.0, 1.0) if number % 2 else choose.uniform(0.5, 3.5)
        strikes.append(Strike(after, tuple(faults.values())))
    return strikes


class _Bag:
    """Gives each kind as often as its weight says, in any order."""

    def __init__(self, weights: Mapping[str, int], choose: random.Random) -> None:
        self._all = [kind for kind, weight in weights.items() for _ in range(weight)]
        self._choose = choose
        self._left: list[str] = []

    def draw(self) -> str:
        if not self._left:
            self._left = self._choose.sample(self._all, len(self._all))
        return self._left.pop()


async def strike(target: Target, planned: Strike, record: Record) -> list[str]:
    """Do the faults of one strike; return, when all are over and what was ended runs again, the kinds that struck."""
    async with asyncio.TaskGroup() as group:
        tasks = [(fault.kind, group.create_task(_do(target, fault, record))) for fault in planned.faults]
    return [kind for kind, task in tasks if task.result()]


async def _do(target: Target, fault: Fault, record: Record) -> bool:
    where = "" if fault.side == "server" or len(target.agents) == 1 else f" of agent {fault.agent}"
    record.add(f"FAULT {fault.kind}{where}, {fault.seconds:.1f} s")
    has_struck = await _DEEDS[fault.kind](target, fault)
    record.add(f"over: {fault.kind}{where}{'' if has_struck else ', which struck nothing'}")
    return has_struck
