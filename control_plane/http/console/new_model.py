"""/console/new-model: a model by a form, or as JSON; first what would be stored, then it is."""

from typing import Any, get_args

from starlette.responses import Response

from control_plane.errors import Invalid, Problem, Refused
from control_plane.http.console import entries
from control_plane.http.console.entries import Draft
from control_plane.http.console.filters import path
from control_plane.http.console.forms import Form
from control_plane.http.console.shell import Page, Visit
from control_plane.services import models
from inference_api.routing.entries import CatalogueEntry, Engine

_EXAMPLE = '{\n  "name": "",\n  "backends": [\n    {"url": ""}\n  ]\n}'


async def new_model(visit: Visit) -> Response:
    way = visit.choice("way", "form", "json")
    problem: Refused | None = None
    draft: Draft | None = None
    given: dict[str, Any] = {"entry": _EXAMPLE, "engine": "vllm"}
    if visit.posting:
        form = await visit.form()
        given = dict(form.values)
        try:
            entry = _entry(way, form)
            known = models.catalogue(visit.plane).stored
            entries.unused(known.get(entry.name))
            draft = entries.draft(entry, None)
            if form.text("do") == "save":
                await models.put(visit.plane, visit.act, entry, entries.unused)
                return visit.back("created", to=f"/console/models/{path(entry.name)}")
        except Refused as exc:
            problem = exc
    return visit.render(
        "new_model.html",
        status=problem.status if problem else 200,
        way=way,
        given=given,
        engines=get_args(Engine),
        draft=draft,
        problem=problem,
        taken=problem is not None and problem.code == "name_taken",
    )


def _entry(way: str, form: Form) -> CatalogueEntry:
    """Raises Invalid: with the field that a sentence is about, as far as it is known."""
    if way == "json":
        return entries.read(form.raw("entry"))
    value = entries.of_form(form)
    try:
        return entries.checked(value)
    except Invalid as exc:
        raise Invalid(*(Problem(_field(one.message), one.message) for one in exc.errors)) from None


def _field(sentence: str) -> str:
    """`aliases.0 'a b': no spaces ...` is about the field `aliases`."""
    first = sentence.replace(":", " ").replace(".", " ").split()[0]
    return first if first in ("name", "aliases", "owner", "engine", "backends", "served_model_name") else "entry"


PAGE = Page("/console/new-model", "New model", new_model, "catalogue.write", None, posts="catalogue.write")
