"""/console/models/{name}: one model, by tabs: backends, metrics, prices, entry, history, tests."""

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.responses import RedirectResponse, Response

from control_plane.errors import Forbidden, Invalid, NotFound, Problem, Refused
from control_plane.http.api import models as models_api
from control_plane.http.api.prices import PriceBody
from control_plane.http.console import backends, changes, entries, lists, trial
from control_plane.http.console.entries import Draft
from control_plane.http.console.filters import path
from control_plane.http.console.forms import Form, body
from control_plane.http.console.overview import LENGTHS, drawn
from control_plane.http.console.shell import Page, Visit, url
from control_plane.pure import diff
from control_plane.pure.fleet import ModelStanding
from control_plane.pure.roles import Permission
from control_plane.services import audit, model_use, models, overrides, overview, prices, recent, reports
from control_plane.services.model_use import ModelUse
from control_plane.services.recent import Asked
from inference_api.features.fallback import FALLBACKS
from registry_stub.store import Stored

# Rows of the history, each with its difference
_CHANGES = 20
NOTICES = {
    "created": "The model is stored. Routers serve it within seconds, and report how its backends are.",
    "saved": "The entry is stored. Routers take it within seconds.",
    "priced": "The price is stored. Requests from then on cost that; those before cost what they did.",
}
Tab = Callable[["Look"], Awaitable[dict[str, Any]]]


class Look:
    """One model, as somebody looks at it. `stored` None: its entry is not served, for the reason in `problem`."""

    def __init__(self, visit: Visit, name: str, stored: Stored | None, standing: ModelStanding | None) -> None:
        self.visit = visit
        self.name = name
        self.stored = stored
        self.standing = standing
        self.problem: Refused | None = None
        self.given: dict[str, Any] = {}
        self.draft: Draft | None = None
        self.steps: list[trial.Step] | None = None
        self.tabs = {key: title for key, (title, is_there, _) in TABS.items() if is_there(self)}

    @property
    def is_virtual(self) -> bool:
        return self.standing is not None and self.standing.kind is not None

    @property
    def asked_by(self) -> str:
        """The dimension of usage that has its requests: others answer for a virtual one."""
        return "asked_model" if self.is_virtual else "model"

    @property
    def tab(self) -> str:
        """The first one, unless the URL names another."""
        chosen = self.visit.query.get("tab") or next(iter(self.tabs))
        if chosen not in self.tabs:
            raise NotFound("tab", chosen) if chosen not in TABS else Forbidden(f"The tab {chosen!r} is not for you.")
        return chosen


async def model(visit: Visit) -> Response:
    name = visit.path("name")
    catalogue = models.catalogue(visit.plane)
    owner = catalogue.owners.get(name)
    looked = await overview.look(visit.plane, visit.act)
    standing = next((one for one in looked.models if one.name == owner), None)
    if standing is None and not (name in catalogue.problems and visit.may("catalogue.write")):
        raise NotFound("model", name)
    if owner is not None and owner != name:
        # An alias, as requests have it
        return RedirectResponse(url(f"/console/models/{path(owner)}", **visit.query), 303)
    look = Look(visit, name, catalogue.stored.get(name), standing)
    if visit.posting:
        try:
            answer = await _sent(look, await visit.form())
        except Refused as exc:
            look.problem = exc
        else:
            if answer is not None:
                return answer
    return await _rendered(look)


async def _rendered(look: Look) -> Response:
    visit, problem = look.visit, look.problem
    context = await TABS[look.tab][2](look)
    use = None
    if visit.may_somewhere("usage.see") and look.standing is not None:
        use = await _use(look)
    return visit.render(
        "model.html",
        **{
            "title": look.name,
            "status": problem.status if problem else 200,
            "name": look.name,
            "etag": look.stored.etag if look.stored else "",
            "entry": look.stored.entry if look.stored else None,
            "standing": look.standing,
            "use": use,
            "asked_by": look.asked_by,
            "tabs": look.tabs.items(),
            "tab": look.tab,
            "problem": problem,
            "given": look.given,
            "naming": models.naming(visit.plane, look.name) if visit.may("models.see") else ([], []),
            "deleting": visit.query.get("act") == "delete" and visit.may("catalogue.write"),
            "notices": NOTICES,
            "live": look.tab in ("backends", "metrics"),
            **context,
        },
    )


async def _use(look: Look) -> ModelUse:
    virtual = look.standing is not None and look.standing.kind is not None
    names = (look.name,)
    found = await model_use.of_models(
        look.visit.plane, look.visit.act, () if virtual else names, names if virtual else ()
    )
    return found.get(look.name, ModelUse())


# What is sent


async def _sent(look: Look, form: Form) -> Response | None:
    """Do what a form asks for; None: the page shows it. Raises Refused."""
    look.given = dict(form.values)
    act = form.text("do")
    if act not in _ACTS:
        raise Invalid(Problem("do", "must be a button of this page"))
    permission, do = _ACTS[act]
    if not look.visit.may(permission):
        raise Forbidden(f"This needs the permission {permission}.")
    return await do(look, form)


async def _check(look: Look, form: Form) -> Response | None:
    entry = entries.read(form.raw("entry"), look.name)
    look.draft = entries.draft(entry, look.stored)
    entries.same(form.text("etag"))(look.stored)
    return None


async def _save(look: Look, form: Form) -> Response | None:
    entry = entries.read(form.raw("entry"), look.name)
    look.draft = entries.draft(entry, look.stored)
    await models.put(look.visit.plane, look.visit.act, entry, entries.same(form.text("etag")))
    return look.visit.back("saved", tab="entry")


async def _delete(look: Look, form: Form) -> Response | None:
    await models.delete(look.visit.plane, look.visit.act, look.name, entries.same(form.text("etag")))
    return look.visit.back("deleted", to="/console/models")


async def _price(look: Look, form: Form) -> Response | None:
    fields = {
        name: value
        for name in ("input", "cached_input", "output", "request")
        if (value := form.decimal(name)) is not None
    }
    asked = body(PriceBody, {"model": look.name, "valid_from": form.optional("valid_from"), **fields})
    await prices.add(look.visit.plane, look.visit.act, asked.wanted(look.visit.act.at))
    return look.visit.back("priced", tab="prices")


async def _try(look: Look, form: Form) -> Response | None:
    router = look.visit.plane.connections.router
    if router is not None and look.standing is not None:
        look.steps = await trial.tried(look.visit, router, look.standing)
    return None


_ACTS: dict[str, tuple[Permission, Callable[[Look, Form], Awaitable[Response | None]]]] = {
    "check": ("catalogue.write", _check),
    "save": ("catalogue.write", _save),
    "delete": ("catalogue.write", _delete),
    "price": ("prices.write", _price),
    "try": ("backends.operate", _try),
}


# Tabs: what each of them shows


async def _of_backends(look: Look) -> dict[str, Any]:
    plane = look.visit.plane
    seen = await reports.seen(plane)
    held = await overrides.listed(plane, 200, None, None, True)
    rows = [backends.shown(one, held) for one in seen.backends if one.model == look.name]
    entry = look.stored.entry if look.stored else None
    return {
        "rows": rows,
        "configured": [] if entry is None else [one.url for one in entry.backends],
        "fallbacks": [] if entry is None else FALLBACKS.of(entry) or (),
        "reporting": len(seen.present),
        "at_backends": lambda **query: url("/console/backends", model=look.name, **query),
    }


async def _of_metrics(look: Look) -> dict[str, Any]:
    visit = look.visit
    length: Any = visit.choice("range", "1h", "15m", "6h")
    found = await recent.recent(visit.plane, visit.act, Asked(length, ((look.asked_by, look.name),)))
    rows: list[dict[str, Any]] = []
    if visit.may("backends.see"):
        seen = await reports.seen(visit.plane)
        rows = [
            {"router": one.instance, **row}
            for one in seen.present
            for row in one.report["models"]
            if row["name"] == look.name
        ]
    return {
        "recent": found,
        "drawn": drawn(found) if found.totals.requests else (),
        "lengths": LENGTHS.items(),
        "length": length,
        "words": LENGTHS[length],
        "by_router": rows,
    }


async def _of_prices(look: Look) -> dict[str, Any]:
    plane, now = look.visit.plane, look.visit.act.at
    rows: list[Any] = []
    after: list[str | int] | None = None
    while True:
        some = await prices.listing(plane, look.name, after, 200)
        rows += some[:200]
        if len(some) <= 200:
            break
        after = [rows[-1].model, rows[-1].valid_from, rows[-1].id]
    past = [row for row in rows if row.valid_from <= now]
    return {"prices": rows[::-1], "holds": past[-1].id if past else None}


async def _of_entry(look: Look) -> dict[str, Any]:
    visit, stored = look.visit, look.stored
    if stored is None:
        text = await models.unreadable(visit.plane, look.name) or ""
        reason = models.catalogue(visit.plane).problems.get(look.name)
        return {
            "text": look.given.get("entry", entries.pretty(text)),
            "etag": "",
            "draft": look.draft,
            "reason": reason,
        }
    shown = models_api.shown(visit.act, stored)
    writes = visit.may("catalogue.write")
    text = entries.pretty(stored.body) if writes else diff.pretty(shown) or ""
    return {"text": look.given.get("entry", text), "draft": look.draft, "reason": None}


async def _of_history(look: Look) -> dict[str, Any]:
    visit = look.visit
    after = lists.after(visit, str)
    wanted = audit.query(visit.act.principal, audit.Filters(object=("model", look.name)))
    rows = await audit.page_of(visit.plane, wanted, _CHANGES + 1, after and after[0])
    found = lists.page(rows, lambda row: [row.id], _CHANGES)
    return {"changes": changes.shown(found.rows), "after": found.after}


async def _of_tests(look: Look) -> dict[str, Any]:
    return {"routed": look.visit.plane.connections.router is not None, "steps": look.steps, "seconds": trial.SECONDS}


def _served(permission: Permission, somewhere: bool = False) -> Callable[[Look], bool]:
    def is_there(look: Look) -> bool:
        if look.standing is None:
            return False
        return look.visit.may_somewhere(permission) if somewhere else look.visit.may(permission)

    return is_there


TABS: dict[str, tuple[str, Callable[[Look], bool], Tab]] = {
    "backends": ("Backends", _served("backends.see"), _of_backends),
    "metrics": ("Metrics", _served("usage.see", True), _of_metrics),
    "prices": ("Prices", _served("prices.write"), _of_prices),
    "entry": ("Entry", lambda look: True, _of_entry),
    "history": ("History", _served("audit.see", True), _of_history),
    "tests": ("Tests", _served("backends.operate"), _of_tests),
}
PAGE = Page("/console/models/{name:path}", "Model", model, "models.see", None, posts="self")
