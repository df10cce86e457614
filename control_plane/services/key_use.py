"""What keys were used for in the last day or hour, and what is spent of their budgets.

How much of a limit is used at the moment nobody here knows: routers count it, or Redis for them, and do not report it.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Table

from control_plane.plane import Act, Plane
from control_plane.pure.records import BILLED, DAY, HOUR
from control_plane.services import spend, sums
from control_plane.services.spend import BudgetUse
from control_plane.services.usage import reached

# Milliseconds for which sums are shown again
KEPT = 5_000
LIMITS_ARE_UNKNOWN = "Routers count limits, and do not report how much of one is used."
_MEASURES = ("requests", "errors", "input_tokens", "output_tokens", "cost_nanos", "unpriced")


class KeyUse(NamedTuple):
    """Sums of a time, as of GET /usage. `unpriced`: requests without a known cost."""

    requests: int = 0
    errors: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost_nanos: int = 0
    unpriced: int = 0


async def last_day(plane: Plane, act: Act, ids: Iterable[str]) -> dict[str, KeyUse]:
    """By the id of each key, by one query: what the caller may see of it. Raises StorageUnavailable."""
    return await _last(plane, act, ids, DAY)


async def last_hour(plane: Plane, act: Act, ids: Iterable[str]) -> dict[str, KeyUse]:
    """As `last_day`."""
    return await _last(plane, act, ids, HOUR)


async def _last(plane: Plane, act: Act, ids: Iterable[str], milliseconds: int) -> dict[str, KeyUse]:
    wanted = tuple(sorted(set(ids)))
    if not wanted:
        return {}
    scope, user = act.principal.scope("usage.see"), act.principal.user

    def where(table: Table) -> Iterable[ColumnElement[bool]]:
        yield table.c.kind.in_(BILLED)
        yield table.c.key_id.in_(wanted)
        yield reached(table, scope, user)

    async def read() -> dict[str, KeyUse]:
        async with plane.database.usage.read() as connection:
            await sums.begin(connection)
            cover = await sums.cover(connection, act.at - milliseconds, act.at)
            rows = (await connection.execute(sums.grouped(cover, where, ("key_id",)))).all()
        found = {row.key_id: KeyUse(*(row._mapping[name] for name in _MEASURES)) for row in rows}
        return {id: found.get(id, KeyUse()) for id in wanted}

    question = ("keys", milliseconds, wanted, scope, None if scope.everything else user)
    return await plane.kept.get(question, act.at, KEPT, read)


async def budgets(plane: Plane, keys: Sequence[Mapping[str, Any]]) -> dict[str, BudgetUse]:
    """By the id of each key that has a budget of its own. `keys`: with `id` and `budget`, as they are shown."""
    return await spend.uses(plane, "key", {key["id"]: key["budget"] for key in keys})
