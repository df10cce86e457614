"""/console/models/{name}: one model, by tabs."""

from starlette.responses import RedirectResponse, Response

from control_plane.errors import NotFound, Refused
from control_plane.http.console.filters import path
from control_plane.http.console.shell import Page, Visit, url
from control_plane.http.console.tabs import Look, Tab, backends, engine, entry, history, logs, metrics, prices, tests
from control_plane.services import model_use, models, overview
from control_plane.services.model_use import ModelUse

NOTICES = {
    "created": "The model is stored. Routers serve it within seconds, and report how its backends are.",
    "saved": "The entry is stored. Routers take it within seconds.",
    **engine.NOTICES,
    "tested": "The test has ended; its result is below.",
    "priced": "The price is stored. Requests from then on cost that; those before cost what they did.",
}
# In the order of the page
TABS: tuple[Tab, ...] = (
    backends.TAB,
    engine.TAB,
    logs.TAB,
    tests.TAB,
    metrics.TAB,
    prices.TAB,
    entry.TAB,
    history.TAB,
)


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
    look = Look(visit, name, catalogue.stored.get(name), standing, TABS)
    look.engine, look.failed = looked.engines.each.get(name), looked.failed.get(name)
    if visit.posting:
        try:
            answer = await look.do(await visit.form())
        except Refused as exc:
            look.problem = exc
        else:
            if answer is not None:
                return answer
    return await _rendered(look)


async def _rendered(look: Look) -> Response:
    visit, problem = look.visit, look.problem
    tab = look.tab
    context = await tab.show(look)
    if isinstance(context, Response):
        return context
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
            "looked": look.engine,
            "failed": look.failed,
            "use": use,
            "asked_by": look.asked_by,
            "tabs": look.tabs.values(),
            "tab": tab,
            "problem": problem,
            "given": look.given,
            "naming": models.naming(visit.plane, look.name) if visit.may("models.see") else ([], []),
            "deleting": visit.query.get("act") == "delete" and visit.may("catalogue.write"),
            "notices": NOTICES,
            "live": tab.live,
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


PAGE = Page("/console/models/{name:path}", "Model", model, "models.see", None, posts="self")
