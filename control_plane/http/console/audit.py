"""/console/audit: who has done what; an organisation's people see what was done there, and what they did."""

from starlette.responses import Response

from control_plane.errors import Invalid
from control_plane.http.api.audit import object_of
from control_plane.http.console import changes, lists, ranges
from control_plane.http.console.shell import MANAGE, Page, Visit, url
from control_plane.pure.times import shown
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


async def page(visit: Visit) -> Response:
    problem, filters = None, audit.Filters()
    typed = {name: visit.query.get(name) for name in ("start", "end")}
    times: dict[str, int | None] = dict.fromkeys(typed)
    wanted = {name: visit.query.get(name) for name in ("actor", "action", "object")}
    try:
        about = object_of(wanted["object"])
        times = {name: None if text is None else ranges.moment(name, text) for name, text in typed.items()}
        filters = audit.Filters(wanted["actor"], wanted["action"], about, **times)
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
        times={name: "" if at is None else ranges.field(at) for name, at in times.items()},
        exports=visit.may_somewhere("audit.export"),
        export=url("/api/v1/audit", format="ndjson", **wanted, **{name: shown(at) for name, at in times.items()}),
        filtered=any({**wanted, **typed}.values()),
        problem=problem,
    )


PAGE = Page("/console/audit", "Audit", page, "audit.see", MANAGE)
