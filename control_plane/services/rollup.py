"""Sums of hours from rows, and of days from hours: made anew, never added to, so that they mend themselves.

On PostgreSQL one replica does it at a time: who has the advisory lock in the transaction. Marks of changes go before
the rows are read: a batch that comes meanwhile leaves its own.
"""

import asyncio
import time
from collections.abc import Iterable
from typing import Any

from sqlalchemy import Row, Table, delete, func, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from control_plane.data.usage_tables import (
    DIMENSION_COLUMNS,
    MEASURES,
    usage,
    usage_changed,
    usage_day,
    usage_hour,
    usage_made,
)
from control_plane.plane import Plane
from control_plane.pure import histogram
from control_plane.pure.records import DAY, HOUR
from control_plane.services.sums import measures, of_buckets

_LEADER_LOCK = 0x7573_6167_0003


async def leads(connection: AsyncConnection, lock: int = _LEADER_LOCK) -> bool:
    """Whether this transaction may do what one replica does at a time."""
    if connection.dialect.name == "sqlite":
        return True
    found = await connection.execute(select(func.pg_try_advisory_xact_lock(lock)))
    return bool(found.scalar_one())


async def roll_up(plane: Plane, until: int | None = None, patience: float | None = None) -> int:
    """Make the sums of all changed spans that end by `until`, at most now. Returns how many were made.

    Stops when another replica is at it, or after `patience` seconds: the rest stays marked.
    """
    until = plane.clock() if until is None else until
    deadline = None if patience is None else time.monotonic() + patience
    made = 0
    for span, one in ((HOUR, _sum_hour), (DAY, _sum_day)):
        for at in await _changed(plane, span, until):
            async with plane.database.usage.write() as connection:
                if not await leads(connection):
                    return made
                done = await one(connection, at)
            made += done
            if deadline is not None and time.monotonic() > deadline:
                return made
    return made


async def unsummed(plane: Plane) -> int:
    """Closed hours whose sums lack rows."""
    return len(await _changed(plane, HOUR, plane.clock()))


async def _changed(plane: Plane, span: int, until: int) -> list[int]:
    query = select(usage_changed.c.at).distinct().order_by(usage_changed.c.at.desc())
    query = query.where(usage_changed.c.span == span, usage_changed.c.at <= until - span)
    async with plane.database.usage.read() as connection:
        return list((await connection.execute(query)).scalars())


async def _sum_hour(connection: AsyncConnection, hour: int) -> bool:
    await _unmark(connection, HOUR, hour)
    by = [usage.c[name] for name in DIMENSION_COLUMNS]
    of_hour = usage.c.at >= hour, usage.c.at < hour + HOUR
    sums = (await connection.execute(select(*by, *measures(usage)).where(*of_hour).group_by(*by))).all()
    counts: list[Row[Any]] = []
    for query in of_buckets(by):
        counts += (await connection.execute(query.where(*of_hour, usage.c.kind == "request"))).all()
    await _replace(connection, usage_hour, HOUR, hour, await asyncio.to_thread(_of_rows, sums, counts))
    await connection.execute(insert(usage_changed).values(span=DAY, at=hour - hour % DAY))
    return True


async def _sum_day(connection: AsyncConnection, day: int) -> bool:
    of_day = usage_changed.c.at >= day, usage_changed.c.at < day + DAY
    open_hours = await connection.execute(select(usage_changed.c.at).where(usage_changed.c.span == HOUR, *of_day))
    if open_hours.first() is not None:
        return False
    await _unmark(connection, DAY, day)
    rows = (
        await connection.execute(select(usage_hour).where(usage_hour.c.at >= day, usage_hour.c.at < day + DAY))
    ).all()
    await _replace(connection, usage_day, DAY, day, await asyncio.to_thread(_of_sums, rows))
    return True


async def _unmark(connection: AsyncConnection, span: int, at: int) -> None:
    await connection.execute(delete(usage_changed).where(usage_changed.c.span == span, usage_changed.c.at == at))


async def _replace(connection: AsyncConnection, table: Table, span: int, at: int, sums: list[dict[str, Any]]) -> None:
    await connection.execute(delete(table).where(table.c.at == at))
    if sums:
        await connection.execute(insert(table), [{**one, "at": at} for one in sums])
    this = usage_made.c.span == span, usage_made.c.at == at
    number = (await connection.execute(select(usage_made.c.number).where(*this))).scalar_one_or_none() or 0
    await connection.execute(delete(usage_made).where(*this))
    await connection.execute(insert(usage_made).values(span=span, at=at, number=number + 1))


class _Sums:
    """Rows of sums that are added up, one for each value of the dimensions."""

    def __init__(self) -> None:
        self._found: dict[tuple[Any, ...], dict[str, Any]] = {}

    def of(self, row: Row[Any]) -> dict[str, Any]:
        key = tuple(row._mapping[name] for name in DIMENSION_COLUMNS)
        found = self._found.get(key)
        if found is None:
            found = dict(zip(DIMENSION_COLUMNS, key, strict=True)) | dict.fromkeys(MEASURES, 0)
            self._found[key] = found | {"latency": 0, "ttft": 0}
        return self._found[key]

    def add(self, row: Row[Any]) -> dict[str, Any]:
        into = self.of(row)
        for name in MEASURES:
            into[name] += row._mapping[name]
        return into

    def rows(self) -> list[dict[str, Any]]:
        dump = histogram.dump
        return [{**one, "latency": dump(one["latency"]), "ttft": dump(one["ttft"])} for one in self._found.values()]


def _of_rows(sums: Iterable[Row[Any]], counts: Iterable[Row[Any]]) -> list[dict[str, Any]]:
    found = _Sums()
    for row in sums:
        found.add(row)
    for row in counts:
        name, index = ("ttft", row.ttft) if row.latency is None else ("latency", row.latency)
        found.of(row)[name] += histogram.single(index, row.number)
    return found.rows()


def _of_sums(rows: Iterable[Row[Any]]) -> list[dict[str, Any]]:
    found = _Sums()
    for row in rows:
        into = found.add(row)
        for name in ("latency", "ttft"):
            into[name] += histogram.load(row._mapping[name])
    return found.rows()
