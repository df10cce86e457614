"""Overrides: people take a backend out of use, or close its circuit, on all routers at once."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import orjson
from sqlalchemy import Row, and_, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.sql.elements import ColumnElement

from control_plane.data.tables import overrides
from control_plane.documents import Built, Document
from control_plane.errors import NotFound, Refused
from control_plane.plane import Act, Plane
from control_plane.pure.ids import new_id
from control_plane.pure.reports import USABLE, MergedBackend, Reported, acknowledged, merged
from control_plane.pure.times import shown
from control_plane.services import audit, models, reports
from inference_api.routing.addresses import place_of

DOCUMENT = "overrides"
Action = Literal["drain", "out", "reset_circuit"]
OUT_OF_USE = ("drain", "out")
# Milliseconds for which a reset is listed: routers that were away obey it, too.
_RESET = 600_000
Stored = Row[tuple[Any, ...]]


class Wanted(NamedTuple):
    """`model`: None: every model with this backend. `seconds`: until it ends by itself; None: until it is ended."""

    backend: str
    model: str | None
    action: Action
    reason: str
    seconds: int | None
    force: bool


async def build(connection: AsyncConnection, known: Document | None, now: int) -> Built:
    """GET /overrides: those that hold now."""
    query = select(overrides).where(_holds(now)).order_by(overrides.c.id)
    rows = (await connection.execute(query)).all()
    ends = [row.expires_at for row in rows if row.expires_at is not None]
    body = orjson.dumps({"overrides": [_item(row) for row in rows]})
    return Built(body, until=min(ends, default=None))


async def create(plane: Plane, act: Act, wanted: Wanted) -> dict[str, Any]:
    """Make an override; as it is shown. Raises Refused if it takes a model's last usable backend, without `force`."""
    async with plane.change(DOCUMENT) as connection:
        present = await reports.present(connection, act.at)
        if wanted.action in OUT_OF_USE and not wanted.force:
            await _refuse_last(plane, connection, act.at, wanted, present)
        id = new_id("ovr", act.at)
        seconds = _RESET // 1000 if wanted.action == "reset_circuit" else wanted.seconds
        values = {
            "id": id,
            "backend": wanted.backend,
            "model": wanted.model,
            "action": wanted.action,
            "reason": wanted.reason,
            "created_at": act.at,
            "created_by": act.principal.user,
            "expires_at": None if seconds is None else act.at + seconds * 1000,
        }
        row = (await connection.execute(insert(overrides).values(**values).returning(overrides))).one()
        what = audit.Object("override", id)
        await audit.record(connection, act, "override.create", what, None, _item(row), wanted.reason)
        return _shown(row, present)


async def end_all(plane: Plane, act: Act, backend: str, model: str | None, reason: str | None) -> list[str]:
    """Return a backend to use: end what takes it out, for one model or (None) for all; the ids."""
    async with plane.change(DOCUMENT) as connection:
        query = select(overrides).where(
            _holds(act.at), overrides.c.backend == backend, overrides.c.action.in_(OUT_OF_USE)
        )
        if model is not None:
            query = query.where(overrides.c.model == model)
        rows = (await connection.execute(query.order_by(overrides.c.id))).all()
        for row in rows:
            await _end(connection, act, row, reason)
        return [row.id for row in rows]


async def end(plane: Plane, act: Act, id: str) -> None:
    """End one override. Raises NotFound."""
    async with plane.change(DOCUMENT) as connection:
        row = (await connection.execute(select(overrides).where(overrides.c.id == id, _holds(act.at)))).one_or_none()
        if row is None:
            raise NotFound("override", id)
        await _end(connection, act, row, None)


async def get(plane: Plane, id: str) -> dict[str, Any]:
    """Raises NotFound."""
    async with plane.database.main.read() as connection:
        row = (await connection.execute(select(overrides).where(overrides.c.id == id))).one_or_none()
        if row is None:
            raise NotFound("override", id)
        return _shown(row, await reports.present(connection, plane.clock()))


async def listed(
    plane: Plane, limit: int, before: str | None, backend: str | None, active: bool | None
) -> list[dict[str, Any]]:
    """The newest first, at most `limit`. `before`: those made before this id. `active`: those that hold, or do not."""
    now = plane.clock()
    query = select(overrides).order_by(overrides.c.id.desc()).limit(limit)
    if before is not None:
        query = query.where(overrides.c.id < before)
    if backend is not None:
        query = query.where(overrides.c.backend == backend)
    if active is not None:
        query = query.where(_holds(now) if active else ~_holds(now))
    async with plane.database.main.read() as connection:
        rows = (await connection.execute(query)).all()
        present = await reports.present(connection, now)
    return [_shown(row, present) for row in rows]


async def holding(connection: AsyncConnection, now: int) -> Sequence[Stored]:
    """The overrides that hold, from the oldest."""
    return (await connection.execute(select(overrides).where(_holds(now)).order_by(overrides.c.id))).all()


def version(item: dict[str, Any]) -> dict[str, Any]:
    """What an ETag stands for: not how many routers have it, which changes by itself."""
    return {name: value for name, value in item.items() if name != "acknowledged"}


async def _end(connection: AsyncConnection, act: Act, row: Stored, reason: str | None) -> None:
    ended = {"ended_at": act.at, "ended_by": act.principal.user}
    await connection.execute(update(overrides).where(overrides.c.id == row.id).values(**ended))
    await audit.record(connection, act, "override.end", audit.Object("override", row.id), _item(row), None, reason)


async def _refuse_last(
    plane: Plane, connection: AsyncConnection, now: int, wanted: Wanted, present: Sequence[Reported]
) -> None:
    """Raises Refused if a model would have no usable backend any more, and has one now."""
    rows = (await connection.execute(select(overrides).where(_holds(now)))).all()
    out = [(row.backend, row.model) for row in rows if row.action in OUT_OF_USE]
    for model, usable in _usable(plane, merged(present), out).items():
        if wanted.model in (None, model) and usable == {wanted.backend}:
            message = (
                f"{wanted.backend!r} is the last usable backend of the model {model!r}: without it its requests are "
                "refused. Return another one first, or send force: true."
            )
            raise Refused(409, "last_backend", message, param="backend")


def _usable(plane: Plane, known: Iterable[MergedBackend], out: Iterable[tuple[str, str | None]]) -> dict[str, set[str]]:
    """The backends of each model that take requests: as routers report them, else as the catalogue has them."""
    found: dict[str, set[str]] = {}
    for one in known:
        usable = found.setdefault(one.model, set())
        if one.state in USABLE:
            usable.add(one.backend)
    for name, stored in models.catalogue(plane).stored.items():
        if name not in found:
            found[name] = {place_of(backend.url) for backend in stored.entry.backends}
    for backend, model in out:
        for name in found if model is None else [model]:
            found.get(name, set()).discard(backend)
    return found


def _holds(now: int) -> ColumnElement[bool]:
    return and_(overrides.c.ended_at.is_(None), or_(overrides.c.expires_at.is_(None), overrides.c.expires_at > now))


def _item(row: Stored) -> dict[str, Any]:
    """As routers get it."""
    return {
        "id": row.id,
        "backend": row.backend,
        "model": row.model,
        "action": row.action,
        "reason": row.reason,
        "created_by": row.created_by or "system",
        "created_at": shown(row.created_at),
        "expires_at": shown(row.expires_at),
    }


def _shown(row: Stored, present: Sequence[Reported]) -> dict[str, Any]:
    return {
        **_item(row),
        "ended_at": shown(row.ended_at),
        "acknowledged": acknowledged(row.id, present)._asdict(),
    }
