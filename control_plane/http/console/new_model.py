"""/console/new-model: a model by a form, or as JSON; first what would be stored, then it is.

Or an inspection first: what a hub, a folder or a file says of a model fills the form, and nothing else.
"""

from typing import Any, get_args

from starlette.responses import Response

from control_plane.errors import Invalid, NotFound, Problem, Refused
from control_plane.http.api.inspections import InspectionBody
from control_plane.http.console import entries
from control_plane.http.console.entries import Draft
from control_plane.http.console.filters import path
from control_plane.http.console.forms import Form, body
from control_plane.http.console.shell import Page, Visit
from control_plane.services import inspections, models
from control_plane.services.inspections import SOURCES, Wanted
from inference_api.routing.entries import CatalogueEntry, Engine

_EXAMPLE = '{\n  "name": "",\n  "backends": [\n    {"url": ""}\n  ]\n}'
_SWITCHES = "CONTROL_PLANE_HUB_ENDPOINT=https://huggingface.co\nCONTROL_PLANE_MODEL_ROOTS=/models"
_FIELDS = ("name", "aliases", "owner", "engine", "backends", "served_model_name", "max_model_len")
_LABELS = {"hub": "Hub", "folder": "Folder", "file": "File"}


async def new_model(visit: Visit) -> Response:
    off = inspections.missing(visit.plane)
    usual = "form" if len(off) == len(SOURCES) else "inspect"
    way = visit.choice("way", usual, *(one for one in ("inspect", "form", "json") if one != usual))
    inspection, problem = await _inspection(visit)
    draft: Draft | None = None
    given: dict[str, Any] = {"entry": _EXAMPLE, "engine": "vllm", **_suggested(inspection)}
    if visit.posting:
        form = await visit.form()
        given = dict(form.values)
        try:
            if way == "inspect":
                return await _inspect(visit, form)
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
        inspection=inspection,
        sources=[(source, _LABELS[source]) for source in SOURCES if source not in off],
        off={_LABELS[source]: setting for source, setting in off.items()},
        switches=_SWITCHES,
        notices={"inspected": "Inspected. Nothing is stored: look at the form, and check it."},
    )


async def _inspect(visit: Visit, form: Form) -> Response:
    """To the form, with what was found in its URL. Raises Refused."""
    fields = {"source": form.text("source"), "ref": form.text("ref"), "revision": form.optional("revision")}
    wanted = body(InspectionBody, fields)
    made = await inspections.create(visit.plane, visit.act, Wanted(wanted.source, wanted.ref, wanted.revision))
    return visit.back("inspected", to=visit.here, way="form", inspection=made["id"])


async def _inspection(visit: Visit) -> tuple[dict[str, Any] | None, Refused | None]:
    """The one of the URL, or why there is none."""
    id = visit.query.get("inspection")
    if id is None:
        return None, None
    try:
        return await inspections.get(visit.plane, id), None
    except NotFound as exc:
        return None, exc


def _suggested(inspection: dict[str, Any] | None) -> dict[str, Any]:
    """Fields of the form."""
    if inspection is None:
        return {}
    found = inspection["result"]["suggestion"]
    values = {"name": found["name"], "max_model_len": found["max_model_len"], **(found["hardware"] or {})}
    return {name: value for name, value in values.items() if value is not None}


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
    """`aliases.0 'a b': no spaces ...` is about the field `aliases`, `hardware.gpu_count: ...` about `gpu_count`."""
    words = sentence.replace(":", " ").replace(".", " ").split()
    first = words[1] if words[0] == "hardware" and len(words) > 1 else words[0]
    return first if first in (*_FIELDS, *entries.HARDWARE) else "entry"


PAGE = Page("/console/new-model", "New model", new_model, "catalogue.write", None, posts="catalogue.write")
