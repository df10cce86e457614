"""Prices with their history: rows are only added, an entry of the catalogue shows the one that holds now."""

from typing import Any, NamedTuple

from sqlalchemy import Row, insert, select, tuple_
from sqlalchemy.ext.asyncio import AsyncConnection

from control_plane.data.tables import prices
from control_plane.documents import Built, Document, bump
from control_plane.plane import Act, Plane
from control_plane.pure.ids import new_id
from control_plane.pure.prices import PriceList, PriceRow, amount
from control_plane.pure.times import shown
from control_plane.services import audit
from inference_api.features.cost import Price

DOCUMENT = "prices"
# The catalogue shows prices.
_CATALOGUE = "models"


class NewPrice(NamedTuple):
    """In 10^-9 of CURRENCY; `cached_input` None: as input. `valid_from`: Unix milliseconds."""

    model: str
    valid_from: int
    input: int
    cached_input: int | None
    output: int
    request: int


async def build(connection: AsyncConnection, known: Document | None, now: int) -> Built:
    """All prices, kept in memory for records that come. The document is served to nobody."""
    found = (await connection.execute(select(prices).order_by(prices.c.id))).all()
    return Built(repr([tuple(row) for row in found]).encode(), PriceList((row.model, _row(row)) for row in found))


def current(plane: Plane) -> PriceList:
    """The prices in memory. Raises StorageUnavailable before the first reading."""
    found: PriceList = plane.documents.get(DOCUMENT).parts
    return found


async def read(connection: AsyncConnection) -> PriceList:
    found: PriceList = (await build(connection, None, 0)).parts
    return found


async def add(plane: Plane, act: Act, new: NewPrice) -> dict[str, Any]:
    """Add a row; returns it as it is shown."""
    async with plane.change(_CATALOGUE, DOCUMENT) as connection:
        return await _store(connection, act, new)


async def add_from_entry(connection: AsyncConnection, act: Act, model: str, price: Price, own_cached: bool) -> None:
    """The price of an entry that is put, from now. In the transaction of the entry; then `refresh`."""
    await bump(connection, DOCUMENT)
    cached = price.cached_input if own_cached else None
    await _store(connection, act, NewPrice(model, act.at, price.input, cached, price.output, price.request))


async def refresh(plane: Plane) -> None:
    await plane.documents.refresh(DOCUMENT)


async def listing(plane: Plane, model: str | None, after: list[str | int] | None, limit: int) -> list[Row[Any]]:
    """Rows by model and time, one more than `limit` at most."""
    place = tuple_(prices.c.model, prices.c.valid_from, prices.c.id)
    query = select(prices).order_by(prices.c.model, prices.c.valid_from, prices.c.id).limit(limit + 1)
    if model is not None:
        query = query.where(prices.c.model == model)
    if after is not None:
        query = query.where(place > tuple(after))
    async with plane.database.main.read() as connection:
        return list((await connection.execute(query)).all())


async def _store(connection: AsyncConnection, act: Act, new: NewPrice) -> dict[str, Any]:
    id = new_id("prc", act.at)
    values = {"id": id, "created_at": act.at, "created_by": act.principal.user, **new._asdict()}
    row = (await connection.execute(insert(prices).values(values).returning(*prices.c))).one()
    after = view(row)
    await audit.record(connection, act, "price.create", audit.Object("price", id), None, after)
    return after


def view(row: Row[Any]) -> dict[str, Any]:
    """As it is shown."""
    return {
        "id": row.id,
        "model": row.model,
        "valid_from": shown(row.valid_from),
        "input": amount(row.input),
        "cached_input": None if row.cached_input is None else amount(row.cached_input),
        "output": amount(row.output),
        "request": amount(row.request),
        "created_at": shown(row.created_at),
        "created_by": row.created_by,
    }


def _row(row: Row[Any]) -> PriceRow:
    cached = row.input if row.cached_input is None else row.cached_input
    return PriceRow(row.valid_from, Price(row.input, cached, row.output, row.request), row.cached_input is None)
