"""Limits and budgets of the platform: items of the policy with an id. Those of organisations and keys are in these."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from sqlalchemy import Table, delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from control_plane.data import tables
from control_plane.errors import NotFound
from control_plane.plane import Act, Plane
from control_plane.pure.ids import new_id
from control_plane.services import audit, policy
from inference_api.policy.document import ScopedBudget, ScopedLimit

Kind = Literal["limit", "budget"]
Check = Callable[[Mapping[str, Any]], None]


class _Place(NamedTuple):
    table: Table
    prefix: str


_PLACES: dict[Kind, _Place] = {"limit": _Place(tables.limits, "lim"), "budget": _Place(tables.budgets, "bud")}


async def listed(plane: Plane, kind: Kind, limit: int, after: str | None) -> list[dict[str, Any]]:
    """One more than `limit`, behind the id `after`."""
    table = _PLACES[kind].table
    query = select(table.c.id, table.c.body).order_by(table.c.id).limit(limit + 1)
    if after is not None:
        query = query.where(table.c.id > after)
    async with plane.database.main.read() as connection:
        return [{"id": row.id, **row.body} for row in await connection.execute(query)]


async def found(plane: Plane, kind: Kind, id: str) -> dict[str, Any]:
    """Raises NotFound."""
    async with plane.database.main.read() as connection:
        return await _find(connection, kind, id)


async def create(plane: Plane, act: Act, item: ScopedLimit | ScopedBudget) -> dict[str, Any]:
    """Raises Refused."""
    kind = _kind(item)
    place = _PLACES[kind]
    async with plane.change(policy.DOCUMENT) as connection:
        values = await _values(plane, connection, item)
        id = new_id(place.prefix, act.at)
        made = {"created_at": act.at, "created_by": act.principal.user}
        await connection.execute(insert(place.table).values(id=id, **made, **values))
        await audit.record(connection, act, f"{kind}.create", audit.Object(kind, id), None, values["body"])
    return {"id": id, **values["body"]}


async def replace(plane: Plane, act: Act, id: str, item: ScopedLimit | ScopedBudget, check: Check) -> dict[str, Any]:
    """Raises Refused."""
    kind = _kind(item)
    table = _PLACES[kind].table
    async with plane.change(policy.DOCUMENT) as connection:
        old = await _find(connection, kind, id)
        check(old)
        values = await _values(plane, connection, item, id)
        await connection.execute(update(table).where(table.c.id == id).values(**values))
        before = {name: value for name, value in old.items() if name != "id"}
        await audit.record(connection, act, f"{kind}.update", audit.Object(kind, id), before, values["body"])
    return {"id": id, **values["body"]}


async def remove(plane: Plane, act: Act, kind: Kind, id: str, check: Check) -> None:
    """Raises Refused."""
    table = _PLACES[kind].table
    async with plane.change(policy.DOCUMENT) as connection:
        old = await _find(connection, kind, id)
        check(old)
        await connection.execute(delete(table).where(table.c.id == id))
        before = {name: value for name, value in old.items() if name != "id"}
        await audit.record(connection, act, f"{kind}.delete", audit.Object(kind, id), before)


def _kind(item: ScopedLimit | ScopedBudget) -> Kind:
    return "limit" if isinstance(item, ScopedLimit) else "budget"


async def _find(connection: AsyncConnection, kind: Kind, id: str) -> dict[str, Any]:
    table = _PLACES[kind].table
    row = (await connection.execute(select(table.c.id, table.c.body).where(table.c.id == id))).one_or_none()
    if row is None:
        raise NotFound(kind, id)
    return {"id": row.id, **row.body}


async def _values(
    plane: Plane, connection: AsyncConnection, item: ScopedLimit | ScopedBudget, id: str | None = None
) -> dict[str, Any]:
    """The columns of an item. Raises Refused."""
    await policy.refuse_unknown(connection, item.scope, item.name)
    body = policy.rendered([item])[0]
    policy.refuse_without_room(plane, len(str(body)))
    if isinstance(item, ScopedLimit):
        return {"body": body}
    await policy.refuse_second_budget(connection, item.scope, item.name, item, id)
    return {"scope": item.scope, "name": item.name or "", "unit": item.unit, "per": item.per, "body": body}
