"""/console/triage: what went wrong with a model, and what was found before.

Who links here gives `?model=`, `pod`, `previous=1` and `minutes`; the form sends the same.
"""

from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from control_plane.errors import NotFound, Refused
from control_plane.http.api.triage import TriageBody
from control_plane.http.console import lists
from control_plane.http.console.forms import Form, body
from control_plane.http.console.shell import Page, Visit
from control_plane.services import lifecycle, models, triage
from control_plane.web.manual import FILES, manuals

# Minutes that the form offers
_SPANS = (("10", "10 minutes"), ("30", "30 minutes"), ("120", "2 hours"), ("720", "12 hours"), ("1440", "24 hours"))
_FIELDS = ("model", "pod", "previous", "minutes", "summary")


async def page(visit: Visit) -> Response:
    form = await visit.form() if visit.posting else None
    typed = visit.query if form is None else form.values
    given = {name: typed.get(name, "") for name in _FIELDS}
    found, problem = None, None
    try:
        if form is not None:
            found = await triage.create(visit.plane, visit.act, _asked(form))
        elif "id" in visit.query:
            found = await triage.one(visit.plane, visit.query["id"])
    except Refused as exc:
        problem = exc
    model = found["model"] if found else given["model"] or None
    before = lists.after(visit, str)
    rows = lists.page(
        await triage.listed(visit.plane, model, lists.ROWS, before and before[0]), lambda one: [one["id"]]
    )
    return visit.render(
        "triage.html",
        title=f"Triage of {model}" if model else "Triage",
        status=problem.status if problem else 200,
        found=found,
        model=model,
        rows=rows.rows,
        after=rows.after,
        given={**given, "minutes": given["minutes"] or "30"},
        models=sorted(models.catalogue(visit.plane).stored),
        instances=await _instances(visit, model),
        spans=_SPANS,
        sections=_sections(),
        settings=visit.plane.settings,
        problem=problem,
    )


def _asked(form: Form) -> triage.Asked:
    """Raises Invalid."""
    fields: Mapping[str, Any] = {
        "model": form.text("model"),
        "pod": form.optional("pod"),
        "previous": form.text("previous") == "1",
        "minutes": form.number("minutes") or 30,
        "summary": form.text("summary") == "1",
    }
    return body(TriageBody, fields).asked()


def _sections() -> Mapping[str, str]:
    """Titles of the sections that groups may point to, by file and anchor."""
    found = {f"{FILES[name]}#{anchor}": title for name, one in manuals().items() for title, anchor in one.parts}
    return {**{file: manuals()[name].title for name, file in FILES.items()}, **found}


async def _instances(visit: Visit, model: str | None) -> list[str]:
    """Names of pods or processes that the form offers."""
    if model is None:
        return []
    try:
        return [one.name for one in (await lifecycle.look(visit.plane, model)).observed.instances]
    except NotFound:
        return []


PAGE = Page("/console/triage", "Triage", page, "backends.operate", posts="backends.operate")
