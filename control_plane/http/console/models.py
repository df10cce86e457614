"""/console/models: every model that the caller may see, the worst first, with its use and its price."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from starlette.responses import Response

from control_plane.http.console import lists
from control_plane.http.console.shell import OPERATE, Page, Visit
from control_plane.pure.fleet import MODEL_STATUSES, ModelStanding
from control_plane.services import model_use, models, overview
from control_plane.services.model_use import ModelUse
from inference_api.features.cost import PRICE
from inference_api.features.fallback import FALLBACKS
from inference_api.routing.entries import CatalogueEntry

STATES = {
    "all": "all",
    "bad": "degraded or failing",
    "failing": "failing",
    "degraded": "degraded",
    "unknown": "unknown",
    "ok": "ok",
}
NOTICES = {"deleted": "The model is deleted. Routers refuse its name within seconds."}
_NO_USE = ModelUse()


class Row(NamedTuple):
    """`kind`: plain, or what it does with other models. `engine`, `failed`: as of overview.Looked, or None."""

    standing: ModelStanding
    entry: CatalogueEntry
    kind: str
    use: ModelUse | None
    price: Any
    engine: Any = None
    failed: Any = None


async def listing(visit: Visit) -> Response:
    wanted = visit.choice("state", *STATES)
    text = visit.query.get("name", "").strip().lower()
    looked = await overview.look(visit.plane, visit.act)
    catalogue = models.catalogue(visit.plane)
    entries = {name: one.entry for name, one in catalogue.stored.items()}
    found = [
        one
        for one in looked.models
        if _is_wanted(one.state, wanted) and one.name in entries and _is_named(entries[one.name], text)
    ]
    found.sort(key=_place)
    part = lists.part(visit, found, _place, int, str)
    sees_all = visit.may("models.see")
    return visit.render(
        "models.html",
        rows=await rows(visit, part.rows, entries, looked),
        after=part.after,
        total=len(looked.models),
        states=STATES.items(),
        routers=looked.routers,
        problems=sorted(catalogue.problems.items()) if sees_all else [],
        notices=NOTICES,
        live=True,
    )


async def rows(
    visit: Visit, standing: Sequence[ModelStanding], entries: dict[str, CatalogueEntry], looked: overview.Looked
) -> list[Row]:
    used: dict[str, ModelUse] | None = None
    if visit.may_somewhere("usage.see"):
        plain = [one.name for one in standing if one.kind is None]
        virtual = [one.name for one in standing if one.kind is not None]
        used = await model_use.of_models(visit.plane, visit.act, plain, virtual)
    sees_all = visit.may("models.see")
    return [
        Row(
            one,
            entries[one.name],
            kind_of(one, entries[one.name], sees_all),
            None if used is None else used.get(one.name, _NO_USE),
            PRICE.of(entries[one.name]),
            looked.engines.each.get(one.name),
            looked.failed.get(one.name),
        )
        for one in standing
    ]


def kind_of(standing: ModelStanding, entry: CatalogueEntry, sees_all: bool) -> str:
    """`sees_all`: an organisation does not see which models stand in for its own."""
    if standing.kind is not None:
        return standing.kind
    return "fallback" if sees_all and FALLBACKS.of(entry) else "plain"


def _is_wanted(state: str, wanted: str) -> bool:
    return wanted == "all" or state == wanted or (wanted == "bad" and state in ("failing", "degraded"))


def _is_named(entry: CatalogueEntry, text: str) -> bool:
    return any(text in name.lower() for name in (entry.name, *entry.aliases, entry.owner))


def _place(one: ModelStanding) -> tuple[int, str]:
    """The worst first."""
    return MODEL_STATUSES.index(one.state), one.name


PAGE = Page("/console/models", "Models", listing, "models.see", OPERATE)
