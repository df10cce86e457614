"""Requests, one by one: usage records with the name of their key, and those that belong to the same request."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Row, select, tuple_
from sqlalchemy.ext.asyncio import AsyncConnection

from control_plane.data.usage_tables import DIMENSIONS, usage
from control_plane.errors import NotFound
from control_plane.plane import Act, Plane
from control_plane.pure.records import FIELDS, HOUR
from control_plane.pure.times import shown
from control_plane.services.usage import reached

# Clients may send one request id again and again: related is what is near, and no more than so many.
_NEAR = HOUR
_MOST_RELATED = 1000
# Sorts after every text with the same beginning.
_LAST = "\U0010ffff"


class Wanted(NamedTuple):
    """`id`: a request id or its beginning. `start`, `end`: Unix milliseconds. `filters`: by dimension."""

    id: str | None = None
    start: int | None = None
    end: int | None = None
    filters: Mapping[str, str] = {}
    kinds: tuple[str, ...] = ()


class Related(NamedTuple):
    id: str
    request_id: str
    at: int


async def listing(
    plane: Plane, act: Act, wanted: Wanted, after: list[str | int] | None, limit: int
) -> list[dict[str, Any]]:
    """The newest first, one more than `limit` at most."""
    query = select(usage).where(_reached(act), *_conditions(wanted))
    if after is not None:
        query = query.where(tuple_(usage.c.at, usage.c.id) < tuple(after))
    query = query.order_by(usage.c.at.desc(), usage.c.id.desc()).limit(limit + 1)
    async with plane.database.usage.read() as connection:
        rows = (await connection.execute(query)).all()
        return await _shown(connection, act, rows)


async def one(plane: Plane, act: Act, id: str) -> dict[str, Any]:
    """By the id of a record, or the newest one with this request id. Raises NotFound."""
    newest = select(usage).where(_reached(act)).order_by(usage.c.at.desc(), usage.c.id.desc()).limit(1)
    async with plane.database.usage.read() as connection:
        for condition in (usage.c.id == id, (usage.c.request_id == id) & (usage.c.kind == "request")):
            rows = (await connection.execute(newest.where(condition))).all()
            if rows:
                return (await _shown(connection, act, rows))[0]
    raise NotFound("request", id)


def _reached(act: Act) -> ColumnElement[bool]:
    return reached(usage, act.principal.scope("requests.see"), act.principal.user)


def _conditions(wanted: Wanted) -> Iterable[ColumnElement[bool]]:
    if wanted.id is not None:
        yield usage.c.request_id >= wanted.id
        yield usage.c.request_id < wanted.id + _LAST
    if wanted.start is not None:
        yield usage.c.at >= wanted.start
    if wanted.end is not None:
        yield usage.c.at < wanted.end
    if wanted.kinds:
        yield usage.c.kind.in_(wanted.kinds)
    for name, value in wanted.filters.items():
        yield usage.c[DIMENSIONS[name]] == value


async def _shown(connection: AsyncConnection, act: Act, rows: Sequence[Row[Any]]) -> list[dict[str, Any]]:
    if not rows:
        return []
    times = [row.at for row in rows]
    query = select(usage.c.id, usage.c.request_id, usage.c.at).where(
        usage.c.request_id.in_({row.request_id for row in rows}),
        usage.c.at >= min(times) - _NEAR,
        usage.c.at <= max(times) + _NEAR,
        _reached(act),
    )
    found = await connection.execute(query.order_by(usage.c.at, usage.c.id).limit(_MOST_RELATED))
    near = [Related(*row) for row in found]
    return [_view(row, near) for row in rows]


def _view(row: Row[Any], near: Iterable[Related]) -> dict[str, Any]:
    found = {name: row._mapping[name] for name in FIELDS}
    if found["attempt_details"] is None:
        del found["attempt_details"]
    related = [
        other.id
        for other in near
        if other.request_id == row.request_id and other.id != row.id and abs(other.at - row.at) <= _NEAR
    ]
    return {**found, "key_name": row.key_name, "received_at": shown(row.received_at), "related": related}
