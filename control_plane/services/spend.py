"""GET /spend: what each budget has spent in its present period, summed from records; never a running total."""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import orjson
from sqlalchemy import Table, select
from sqlalchemy.ext.asyncio import AsyncConnection

from control_plane.data.tables import budgets, keys, organisations
from control_plane.errors import StorageUnavailable
from control_plane.plane import Plane
from control_plane.pure.records import BILLED, FUTURE
from control_plane.pure.times import shown
from control_plane.services import sums
from inference_api.features.spending.ledger import period
from inference_api.policy.document import BUDGET_UNITS, Budget
from registry_stub.conditional import etag_of

log = logging.getLogger(__name__)

# Milliseconds for which sums are shown again; routers ask every 5 s, and 10 s old is allowed.
OLDEST = 3000
# Seconds that the database may take
PATIENCE = 4.0
_COLUMNS = {"all": (), "organisation": ("organisation",), "user": ("user",), "key": ("key_id",)}
_MEASURES = {"cost": ("cost_nanos",), "tokens": ("input_tokens", "output_tokens"), "requests": ("counted",)}


class Allotted(NamedTuple):
    """A budget: of one holder, or (`name` None) of each of its scope."""

    scope: str
    name: str | None
    unit: str
    per: str


class Spent(NamedTuple):
    """Times in Unix milliseconds. `amount`: nanos for cost, else a count."""

    id: str
    period_start: int
    resets_at: int
    amount: int


class Spend(NamedTuple):
    """`at`: Unix milliseconds; every record that was acknowledged before is in the sums. `asked_at`: last looked."""

    at: int
    body: bytes
    etag: str
    by_id: Mapping[str, Spent]
    asked_at: int


async def current(plane: Plane, patience: float = PATIENCE) -> Spend:
    """The sums, at most OLDEST old; while the database is away the last ones. Raises StorageUnavailable without any."""
    state = plane.usage
    async with state.spending:
        known: Spend | None = state.spend
        now = plane.clock()
        if known is not None and now - known.asked_at < OLDEST:
            return known
        try:
            async with asyncio.timeout(patience):
                found = await _read(plane, now)
        except (StorageUnavailable, TimeoutError):
            if known is None:
                raise StorageUnavailable from None
            log.warning("the spend of budgets cannot be read; routers get that of %s", shown(known.at))
            found = known._replace(asked_at=now)
        state.spend = found
        return found


async def spent(plane: Plane, ids: Iterable[str]) -> dict[str, Spent]:
    """Of budgets by `<scope>:<name>:<unit>:<per>`, those that have spent something or have a holder."""
    found = (await current(plane)).by_id
    return {id: found[id] for id in ids if id in found}


class BudgetUse(NamedTuple):
    """A budget of one holder in its present period. `amount`, `spent`: nanos of a cost, else a count.

    `soft`: the share from which it is announced. `resets_at`: Unix milliseconds.
    """

    unit: str
    per: str
    amount: int
    spent: int
    soft: float
    resets_at: int

    @property
    def share(self) -> float:
        return self.spent / self.amount


async def uses(
    plane: Plane, scope: Literal["organisation", "key"], budgets: Mapping[str, Mapping[str, Any] | None]
) -> dict[str, BudgetUse]:
    """What is spent of the own budgets of organisations or keys, by holder, of those that have one.

    One that was just made has spent nothing that is known. Raises StorageUnavailable.
    """
    given = {holder: Budget.model_validate(budget) for holder, budget in budgets.items() if budget is not None}
    ids = {holder: f"{scope}:{holder}:{one.unit}:{one.per}" for holder, one in given.items()}
    found = await spent(plane, ids.values()) if ids else {}
    uses = {}
    for holder, one in given.items():
        known = found.get(ids[holder])
        end = period(one.per, plane.clock() / 1000)[1]
        uses[holder] = BudgetUse(
            one.unit, one.per, one.amount, 0 if known is None else known.amount, one.soft, round(end * 1000)
        )
    return uses


async def _read(plane: Plane, now: int) -> Spend:
    async with plane.database.main.read() as connection:
        wanted = await _budgets(connection)
    async with plane.database.usage.read() as connection:
        await sums.begin(connection)
        found = [one async for one in _all_spent(connection, wanted, now)]
    by_id = {one.id: one for one in sorted(found)}
    body = orjson.dumps(
        {
            "at": shown(now),
            "currency": plane.settings.currency,
            "budgets": [
                {
                    "id": one.id,
                    "period_start": shown(one.period_start),
                    "resets_at": shown(one.resets_at),
                    "spent": one.amount,
                }
                for one in by_id.values()
            ],
        }
    )
    return Spend(now, body, etag_of(body), by_id, now)


async def _budgets(connection: AsyncConnection) -> set[Allotted]:
    found: set[Allotted] = set()
    for scope, table, key in (("organisation", organisations, "name"), ("key", keys, "id")):
        query = select(table.c[key], table.c.budget).where(table.c.budget.is_not(None), table.c.ended_at.is_(None))
        for name, budget in (await connection.execute(query)).all():
            unit = next(unit for unit in BUDGET_UNITS if budget.get(unit) is not None)
            found.add(Allotted(scope, name, unit, budget["per"]))
    of_platform = select(budgets.c.scope, budgets.c.name, budgets.c.unit, budgets.c.per)
    for scope, name, unit, per in (await connection.execute(of_platform)).all():
        found.add(Allotted(scope, name or None, unit, per))
    return found


async def _all_spent(connection: AsyncConnection, wanted: Iterable[Allotted], now: int) -> Any:
    """One query for each scope and period."""
    groups: dict[tuple[str, str], list[Allotted]] = defaultdict(list)
    for one in wanted:
        groups[one.scope, one.per].append(one)
    for (scope, per), of in groups.items():
        start, end = (round(at * 1000) for at in period(per, now / 1000))
        by_holder = await _sums(connection, _COLUMNS[scope], start, min(end, now + FUTURE + 1))
        for one in of:
            holders = by_holder if one.name is None and scope != "all" else {one.name or "": None}
            for holder in holders:
                row = by_holder.get(holder, {})
                amount = sum(row.get(name, 0) for name in _MEASURES[one.unit])
                yield Spent(f"{scope}:{holder}:{one.unit}:{per}", start, end, amount)


async def _sums(
    connection: AsyncConnection, columns: tuple[str, ...], start: int, end: int
) -> dict[str, dict[str, int]]:
    """By holder; "" is all."""

    def where(table: Table) -> Iterable[Any]:
        yield table.c.kind.in_(BILLED)
        for name in columns:
            yield table.c[name].is_not(None)

    query = sums.grouped(await sums.cover(connection, start, end), where, columns)
    rows = (await connection.execute(query)).all()
    return {row._mapping[columns[0]] if columns else "": dict(row._mapping) for row in rows}
