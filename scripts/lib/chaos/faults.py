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


async def kill_part(part: Part, seconds: float) -> None:
    await part.kill()
    await asyncio.sleep(seconds)
    await part.start()


async def restart_part(part: Part, seconds: float) -> None:
    await part.stop()
    await asyncio.sleep(seconds)
    await part.start()


async def pause_part(part: Part, seconds: float) -> None:
    part.pause()
    await asyncio.sleep(seconds)
    part.resume()


async def delay_link(link: CuttableLink, seconds: float) -> None:
    """Packets are late, and none is lost."""
    link.cut()
    await asyncio.sleep(seconds)
    link.heal(resume=True)


async def lose_link(link: CuttableLink, seconds: float) -> None:
    """What was connected hears nothing ever again; as long again, and what still tries is told so by a reset."""
    link.cut()
    await asyncio.sleep(seconds)
    link.heal()
    await asyncio.sleep(seconds)
    link.reset()


async def reset_link(link: CuttableLink, _: float) -> None:
    link.reset()


_Deed = Callable[[Target, Fault], Awaitable[None]]

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
_WEIGHTS: Final[Mapping[str, int]] = dict.fromkeys(_DEEDS, 2) | {
    "server kill": 8,
    "agent kill": 8,
    "agent restart": 4,  # ends its backoff, which a server that is away half of the time drives to a minute
}
_LONGEST_DOWN_SECONDS: Final = 1.0


def plan_strikes(count: int, agents: int, choose: random.Random) -> list[Strike]:
    """Return that many strikes of one to three faults. Each kind comes about as often as its weight says."""
    strikes, bag = [], list[str]()
    for _ in range(count):
        faults: dict[str, Fault] = {}
        for _ in range(choose.choice([1, 1, 1, 2, 2, 3])):
            if not bag:
                bag = [kind for kind, weight in _WEIGHTS.items() for _ in range(weight)]
                choose.shuffle(bag)
            kind = bag.pop()
            longest = _LONGEST_DOWN_SECONDS if kind.endswith(("kill", "restart")) else 3.0
            fault = Fault(kind=kind, agent=choose.randrange(agents), seconds=choose.uniform(0.1, longest))
            if fault.side in faults:
                bag.insert(0, kind)  # later: it is struck already
            else:
                faults[fault.side] = fault
        strikes.append(Strike(choose.uniform(0.1, 1.2), tuple(faults.values())))
    return strikes


async def strike(target: Target, planned: Strike, record: Record) -> None:
    """Do the faults of one strike; return when all are over and what was ended runs again."""
    async with asyncio.TaskGroup() as group:
        for fault in planned.faults:
            group.create_task(_do(target, fault, record))


async def _do(target: Target, fault: Fault, record: Record) -> None:
    where = "" if fault.side == "server" or len(target.agents) == 1 else f" of agent {fault.agent}"
    record.add(f"FAULT {fault.kind}{where}, {fault.seconds:.1f} s")
    await _DEEDS[fault.kind](target, fault)
    record.add(f"over: {fault.kind}{where}")
