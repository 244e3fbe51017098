"""The units of a host's service manager, for whoever picks one to follow."""

from aiohttp import web

from fleetwire_server.http.agents import require_agent
from fleetwire_server.http.bodies import UnitAnswer, UnitFilter, UnitsAnswer
from fleetwire_server.http.requests import answer, parse_query
from fleetwire_server.keys import REQUESTS, SESSIONS
from fleetwire_shared.messages import ListUnits, Unit, UnitList

LIST_SECONDS = 30.0
"""How long the agent may take: it gives up on systemd itself before that, and says so."""


async def list_units(request: web.Request) -> web.Response:
    query = parse_query(request, UnitFilter)
    agent = await require_agent(request)
    session = request.app[SESSIONS].require(agent.id)
    listed = await request.app[REQUESTS].ask(session, _ask, UnitList, timeout_seconds=LIST_SECONDS)
    units = [_unit_answer(unit) for unit in listed.units if _matches(unit, query)]
    return answer(UnitsAnswer(units=units, truncated=listed.is_truncated))


def _ask(request_id: str) -> ListUnits:
    return ListUnits(request_id=request_id)


def _matches(unit: Unit, query: UnitFilter) -> bool:
    text = "" if query.q is None else query.q.casefold()
    is_of_type = query.type is None or unit.name.endswith(f".{query.type}")
    return is_of_type and any(text in value.casefold() for value in (unit.name, unit.description))


def _unit_answer(unit: Unit) -> UnitAnswer:
    return UnitAnswer(name=unit.name, load=unit.load, active=unit.active, sub=unit.sub, description=unit.description)
