"""The tab Entry: the JSON of the catalogue, which its form checks, stores and deletes."""

from typing import Any

from starlette.responses import Response

from control_plane.http.api import models as models_api
from control_plane.http.console import entries
from control_plane.http.console.forms import Form
from control_plane.http.console.tabs import Acts, Look, Tab
from control_plane.pure import diff
from control_plane.services import models


async def _check(look: Look, form: Form) -> Response | None:
    entry = entries.read(form.raw("entry"), look.name)
    look.results["draft"] = entries.draft(entry, look.stored)
    entries.same(form.text("etag"))(look.stored)
    return None


async def _save(look: Look, form: Form) -> Response | None:
    entry = entries.read(form.raw("entry"), look.name)
    look.results["draft"] = entries.draft(entry, look.stored)
    await models.put(look.visit.plane, look.visit.act, entry, entries.same(form.text("etag")))
    return look.visit.back("saved", tab="entry")


async def _delete(look: Look, form: Form) -> Response | None:
    await models.delete(look.visit.plane, look.visit.act, look.name, entries.same(form.text("etag")))
    return look.visit.back("deleted", to="/console/models")


async def _of_entry(look: Look) -> dict[str, Any]:
    visit, stored = look.visit, look.stored
    if stored is None:
        text = await models.unreadable(visit.plane, look.name) or ""
        reason = models.catalogue(visit.plane).problems.get(look.name)
        return {
            "text": look.given.get("entry", entries.pretty(text)),
            "etag": "",
            "draft": look.results.get("draft"),
            "reason": reason,
        }
    shown = models_api.shown(visit.act, stored)
    writes = visit.may("catalogue.write")
    text = entries.pretty(stored.body) if writes else diff.pretty(shown) or ""
    return {"text": look.given.get("entry", text), "draft": look.results.get("draft"), "reason": None}


ACTS: Acts = {
    "check": ("catalogue.write", _check),
    "save": ("catalogue.write", _save),
    "delete": ("catalogue.write", _delete),
}
TAB = Tab("entry", "Entry", lambda look: True, _of_entry, ACTS)
