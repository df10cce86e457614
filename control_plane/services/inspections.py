"""Inspections of models: what a hub, a folder or a file says of one, read now and kept for a month."""

import asyncio
from collections.abc import Awaitable
from typing import Any, Literal, NamedTuple, get_args

from sqlalchemy import Row, insert, select

from control_plane.data.tables import inspections
from control_plane.errors import Invalid, NotFound, Problem, Refused
from control_plane.plane import Act, Plane
from control_plane.pure import inspected
from control_plane.pure.ids import new_id
from control_plane.pure.inspected import Measured
from control_plane.pure.reading import SourceError, Unreadable
from control_plane.pure.records import DAY
from control_plane.pure.times import shown
from control_plane.services import audit
from control_plane.services.measuring import measure
from control_plane.services.sweeping import RESULTS
from control_plane.services.turns import turn

Source = Literal["hub", "folder", "file"]
SOURCES: tuple[Source, ...] = get_args(Source)
# Milliseconds that a row is kept, and what was found of a commit
_KEPT, _OF_COMMIT = RESULTS[inspections], DAY
# Seconds of one inspection, and how many at once
PATIENCE, AT_ONCE = 20.0, 4
_SETTINGS: dict[Source, str] = {
    "hub": "CONTROL_PLANE_HUB_ENDPOINT",
    "folder": "CONTROL_PLANE_MODEL_ROOTS",
    "file": "CONTROL_PLANE_MODEL_ROOTS",
}
# Status and code of what a source says
_REFUSALS: dict[str, tuple[int, str]] = {
    "not_found": (404, "not_found"),
    "refused": (403, "source_refused"),
    "invalid": (422, "validation_error"),
    "away": (503, "source_away"),
    "busy": (503, "source_busy"),
    "failed": (502, "source_failed"),
}


class Wanted(NamedTuple):
    """`ref`: `org/name` or `org/name/FILE.gguf` of a hub; an absolute path. `revision`: of a hub."""

    source: Source
    ref: str
    revision: str | None = None


def missing(plane: Plane) -> dict[Source, str]:
    """The sources that are not switched on, and the setting that does."""
    on = {"hub": plane.connections.hub, "folder": plane.connections.roots, "file": plane.connections.roots}
    return {source: _SETTINGS[source] for source in SOURCES if on[source] is None}


async def create(plane: Plane, act: Act, wanted: Wanted, patience: float = PATIENCE) -> dict[str, Any]:
    """Inspect a model; returns the inspection. `patience`: seconds. Raises Refused."""
    if wanted.revision is not None and wanted.source != "hub":
        raise Invalid(Problem("revision", "only the source `hub` has revisions"))
    with turn(plane, "inspections", AT_ONCE):
        measured = await _within(patience, _measured(plane, wanted))
    result = inspected.result(inspected.name_of(wanted.ref), measured)
    values = {
        "id": new_id("ins", act.at),
        "source": wanted.source,
        "ref": wanted.ref,
        "at": act.at,
        "by": act.principal.user,
        "result": {"revision": wanted.revision, **result},
    }
    async with plane.database.main.write() as connection:
        row = (await connection.execute(insert(inspections).values(values).returning(*inspections.c))).one()
        what = audit.Object("inspection", row.id)
        after = {"source": wanted.source, "ref": wanted.ref, "commit": measured.commit}
        await audit.record(connection, act, "inspection.create", what, None, after)
    return view(row)


async def get(plane: Plane, id: str) -> dict[str, Any]:
    """Raises NotFound."""
    async with plane.database.main.read() as connection:
        row = (await connection.execute(select(inspections).where(inspections.c.id == id))).one_or_none()
    if row is None or row.at <= plane.clock() - _KEPT:
        raise NotFound("inspection", id)
    return view(row)


async def listing(plane: Plane, before: str | None, limit: int) -> list[Row[Any]]:
    """The newest first, one more than `limit` at most. `before`: an id."""
    query = select(inspections).where(inspections.c.at > plane.clock() - _KEPT)
    if before is not None:
        query = query.where(inspections.c.id < before)
    async with plane.database.main.read() as connection:
        return list(await connection.execute(query.order_by(inspections.c.id.desc()).limit(limit + 1)))


def view(row: Row[Any]) -> dict[str, Any]:
    """As it is shown."""
    return {
        "id": row.id,
        "source": row.source,
        "ref": row.ref,
        "at": shown(row.at),
        "by": row.by,
        "result": row.result,
    }


async def _measured(plane: Plane, wanted: Wanted) -> Measured:
    """Raises Refused, Unreadable, SourceError."""
    hub, roots = plane.connections.hub, plane.connections.roots
    if wanted.source == "hub" and hub is not None:
        name, pick = _parted(wanted.ref)
        repository = await hub.repository(name, wanted.revision)
        key = (name, repository.commit, pick)
        return await hub.kept.get(key, plane.clock(), _OF_COMMIT, lambda: measure(repository, pick))
    if wanted.source == "folder" and roots is not None:
        return await measure(await roots.folder(wanted.ref))
    if wanted.source == "file" and roots is not None:
        return await measure(*await roots.beside(wanted.ref))
    setting = _SETTINGS[wanted.source]
    message = f"The source {wanted.source!r} is not switched on: it needs the setting {setting}."
    raise Refused(403, "inspection_disabled", message, param="source")


def _parted(ref: str) -> tuple[str, str | None]:
    """`org/name/FILE.gguf`: a repository, and a file in it."""
    parts = ref.split("/", 2)
    return "/".join(parts[:2]), parts[2] if len(parts) > 2 else None


async def _within(seconds: float, measuring: Awaitable[Measured]) -> Measured:
    """Raises Refused."""
    try:
        async with asyncio.timeout(seconds):
            return await measuring
    except TimeoutError:
        message = f"The inspection took more than {seconds:g} s; try again later, or inspect one file of it."
        raise Refused(503, "source_away", message, param="ref", headers={"Retry-After": "30"}) from None
    except Unreadable as exc:
        raise Invalid(Problem("ref", str(exc))) from None
    except SourceError as exc:
        if exc.reason == "invalid":
            raise Invalid(Problem("ref", str(exc))) from None
        status, code = _REFUSALS[exc.reason]
        headers = {} if exc.seconds is None else {"Retry-After": str(exc.seconds)}
        raise Refused(status, code, str(exc), param="ref", headers=headers) from None
