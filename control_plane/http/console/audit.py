"""/console/audit: who has done what; an organisation's people see what was done there, and what they did."""

import re

from starlette.responses import Response

from control_plane.errors import Invalid
from control_plane.http.api.audit import object_of, time_of
from control_plane.http.console import changes, lists
from control_plane.http.console.shell import MANAGE, Page, Visit, url
from control_plane.services import audit

# Suggested, of those that there are
_VERBS = {
    "key": ("create", "update", "rotate", "end"),
    "token": ("create", "update", "rotate", "end"),
    "user": ("create", "update", "end"),
    "organisation": ("create", "update", "end"),
    "member": ("create", "update", "end"),
    "model": ("create", "update", "delete"),
    "login_link": ("create", "use"),
    "override": ("create", "end"),
    "limit": ("create", "update", "delete"),
    "budget": ("create", "update", "delete"),
    "price": ("create",),
    "prompt": ("create", "update", "end"),
    "setting": ("update", "delete"),
    "session": ("login", "login_failed", "end"),
}
ACTIONS = tuple(f"{kind}.{verb}" for kind, verbs in _VERBS.items() for verb in verbs)
# As a browser's field has it: a time in UTC, to the minute
_MINUTE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}(:[0-9]{2})?")


async def page(visit: Visit) -> Response:
    problem, filters = None, audit.Filters()
    times = {name: _time(visit.query.get(name)) for name in ("start", "end")}
    wanted = {name: visit.query.get(name) for name in ("actor", "action", "object")}
    try:
        filters = audit.Filters(
            wanted["actor"],
            wanted["action"],
            object_of(wanted["object"]),
            time_of("start", times["start"]),
            time_of("end", times["end"]),
        )
    except Invalid as exc:
        problem = exc
    after = lists.after(visit, str)
    rows = await audit.page_of(
        visit.plane, audit.query(visit.act.principal, filters), lists.ROWS + 1, after and after[0]
    )
    found = lists.page(rows, lambda row: [row.id])
    return visit.render(
        "audit.html",
        status=problem.status if problem else 200,
        rows=() if problem else changes.shown(found.rows),
        after=None if problem else found.after,
        actions=ACTIONS,
        times={name: (text or "")[:16] for name, text in times.items()},
        exports=visit.may_somewhere("audit.export"),
        export=url("/api/v1/audit", format="ndjson", **wanted, **times),
        filtered=any({**wanted, **times}.values()),
        problem=problem,
    )


def _time(text: str | None) -> str | None:
    """As the API takes it. Raises Invalid where it is neither that nor what a browser sends."""
    if text is None or not _MINUTE.fullmatch(text):
        return text
    return f"{text if len(text) > 16 else f'{text}:00'}Z"


PAGE = Page("/console/audit", "Audit", page, "audit.see", MANAGE)
