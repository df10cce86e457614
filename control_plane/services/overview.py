"""What works and what does not, at one look: models from the worst, routers, and what people have changed last."""

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from control_plane.plane import Act, Plane
from control_plane.pure.engines import with_engine
from control_plane.pure.fleet import (
    MODEL_STATUSES,
    Described,
    ModelStanding,
    Ordered,
    Orders,
    RoutersStanding,
    loads,
    routers_standing,
    standings,
    worst_first,
)
from control_plane.services import audit, engines, lifecycle, model_results, models, overrides, reports
from control_plane.services.deployments import starts_by_request
from control_plane.services.engines import Engines
from control_plane.services.model_results import Result
from control_plane.services.models import Catalogue
from control_plane.services.reports import Seen
from control_plane.services.visibility import visible_models
from inference_api.features.consensus import CONSENSUS
from inference_api.features.fallback import FALLBACKS
from inference_api.routing.entries import CatalogueEntry
from inference_api.routing.references import members_of, virtual_key

# Audit rows that are shown, and in how many they are looked for
LATEST, _NEWEST = 8, 60
# Actions that change nothing of what people operate
_NO_CHANGE = "session.", ".denied"


class Overview(NamedTuple):
    """`as_of`: Unix milliseconds. `counts`: models by state, each of MODEL_STATUSES.

    `changes`: audit rows as /api/v1/audit shows them, the newest first, without logins; None: the caller may see none.
    `engines`, `failed`: as Looked.
    """

    as_of: int
    models: tuple[ModelStanding, ...]
    counts: Mapping[str, int]
    routers: RoutersStanding
    changes: tuple[dict[str, Any], ...] | None
    engines: Engines
    failed: Mapping[str, Result]


class Looked(NamedTuple):
    """`models`: from the worst. `failed`: last tests that have, by model; for those who may see backends."""

    as_of: int
    models: tuple[ModelStanding, ...]
    routers: RoutersStanding
    engines: Engines
    failed: Mapping[str, Result]


async def overview(plane: Plane, act: Act, latest: int = LATEST) -> Overview:
    """`look`, with what was changed last. Raises StorageUnavailable."""
    now, shown, routers, known, failed = await look(plane, act)
    counts: dict[str, int] = {state: sum(one.state == state for one in shown) for state in MODEL_STATUSES}
    return Overview(now, shown, counts, routers, await _changes(plane, act, latest), known, failed)


async def look(plane: Plane, act: Act) -> Looked:
    """What the caller may see: in an organisation the state of its models, without addresses and reasons.

    Raises StorageUnavailable.
    """
    seen = await reports.seen(plane)
    visible = await visible_models(plane, act)
    whole = act.principal.may("backends.see")
    found = [one for one in await standing_models(plane, seen) if visible(one.name)]
    known = await engines.known(plane)
    if known.each:
        found = worst_first(_with_engine(plane, one, known.each.get(one.name), seen.now, whole) for one in found)
    shown = tuple(found if whole else (_state_only(one) for one in found))
    routers = routers_standing(seen.reported, reports.etags(plane), seen.now, whole)
    if not whole:
        return Looked(seen.now, shown, routers, Engines(), {})
    return Looked(seen.now, shown, routers, known, await model_results.failed(plane))


def _with_engine(
    plane: Plane, model: ModelStanding, engine: lifecycle.Looked | None, now: int, whole: bool
) -> ModelStanding:
    if engine is None or engine.problem is not None:
        return model
    return with_engine(model, engine.standing, starts_by_request(plane, engine.deployment), now, whole)


async def standing_models(plane: Plane, seen: Seen) -> Sequence[ModelStanding]:
    """All models of the catalogue, whoever asks, from the worst; made anew if something is another one."""
    async with plane.database.main.read() as connection:
        rows = await overrides.holding(connection, seen.now)
    document = plane.documents.get(models.DOCUMENT)
    loaded = [one.report["models"] for one in seen.present]
    version = document.etag, seen.backends, loaded, [tuple(row) for row in rows]

    def make() -> Sequence[ModelStanding]:
        catalogue: Catalogue = document.parts
        of = _described(catalogue), _owners(catalogue), seen.backends, loads(seen.present), _orders(rows)
        return worst_first(standings(*of).values())

    return await plane.kept.made_of("models", version, partial(asyncio.to_thread, make))


def _described(catalogue: Catalogue) -> list[Described]:
    return [_describe(one.entry) for one in catalogue.stored.values()]


def _describe(entry: CatalogueEntry) -> Described:
    voting = CONSENSUS.of(entry)
    needed = voting.needed if voting is not None and voting.on_split == "error" else 1
    members = tuple(dict.fromkeys(members_of(entry)))
    return Described(
        entry.name,
        len(entry.backends),
        members,
        needed,
        FALLBACKS.of(entry) or (),
        virtual_key(entry) if members else None,
    )


def _owners(catalogue: Catalogue) -> dict[str, str]:
    """Adapters are as their model is."""
    adapters = {name: one.entry.name for one in catalogue.stored.values() for name in one.entry.adapters or ()}
    return {**adapters, **catalogue.owners}


def _orders(rows: Sequence[Any]) -> Orders:
    """What takes a backend out of use for a model: `out` wins over `drain`."""
    found: dict[tuple[str, str | None], Ordered] = {}
    for row in rows:
        if row.action in overrides.OUT_OF_USE:
            place = row.backend, row.model
            if place not in found or row.action == "out":
                by = row.created_by or "system"
                found[place] = Ordered(row.id, row.action, by, row.reason, row.created_at, row.expires_at)

    def of(model: str, backend: str) -> Ordered | None:
        ordered = [one for one in (found.get((backend, model)), found.get((backend, None))) if one is not None]
        return next((one for one in ordered if one.action == "out"), ordered[0] if ordered else None)

    return of


def _state_only(one: ModelStanding) -> ModelStanding:
    return one._replace(why=(), in_flight=None, queued=None, covered_by=None)


async def _changes(plane: Plane, act: Act, latest: int) -> tuple[dict[str, Any], ...] | None:
    if act.principal.scope("audit.see").empty:
        return None
    rows = await audit.page_of(plane, audit.query(act.principal, audit.Filters()), _NEWEST, None)
    begin, end = _NO_CHANGE
    changes = [row for row in rows if not row.action.startswith(begin) and not row.action.endswith(end)]
    return tuple(audit.shown(row) for row in changes[:latest])
