"""Who did what, for admins."""

from functools import partial

from aiohttp import web

from fleetwire_server.http.bodies import AuditAnswer, AuditQuery
from fleetwire_server.http.requests import USER, answer, parse_query
from fleetwire_server.keys import NOW, STORE
from fleetwire_server.model import AuditEntry
from fleetwire_server.storage.audit import list_entries


def audit_entry(request: web.Request, action: str, subject: str, **detail: object) -> AuditEntry:
    """Return what is recorded of a request of a user."""
    return AuditEntry(at=request.app[NOW](), actor=request[USER].name, action=action, subject=subject, detail=detail)


async def list_audit(request: web.Request) -> web.Response:
    query = parse_query(request, AuditQuery)
    entries = await request.app[STORE].read(partial(list_entries, limit=query.limit, before=query.before))
    return answer(
        [
            AuditAnswer(
                id=entry.sequence,
                at=entry.at,
                actor=entry.actor,
                action=entry.action,
                subject=entry.subject,
                detail=dict(entry.detail),
            )
            for entry in entries
        ]
    )
