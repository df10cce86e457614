"""The reports of the routers: the last one of each, by which the state of backends and overrides is known."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import orjson
from prometheus_client import Gauge
from sqlalchemy import Text, cast, delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from control_plane.data.tables import routers
from control_plane.errors import StorageUnavailable
from control_plane.plane import Plane, Task
from control_plane.pure.reports import Following, MergedBackend, Reported, following, interval_after, merged

# Milliseconds after which a router that is gone is forgotten
_FORGOTTEN = 24 * 3600 * 1000
# Documents that routers poll
POLLED = ("models", "policy", "overrides")
# Seconds between two counts
_EVERY = 5.0


async def store(plane: Plane, instance: str, report: dict[str, Any]) -> None:
    """Replace the report of a router."""
    now = plane.clock()
    async with plane.database.main.write() as connection:
        rows = await _read(connection, instance)
        known = rows[0] if rows else None
        values = {"report": report, "at": now, "interval": interval_after(known, report["boot"], now)}
        if known is None:
            await connection.execute(insert(routers).values(instance=instance, **values))
        else:
            await connection.execute(update(routers).where(routers.c.instance == instance).values(**values))


async def all_of(plane: Plane) -> list[Reported]:
    """The last report of every router, the lost ones included."""
    async with plane.database.main.read() as connection:
        return await _read(connection)


class Seen(NamedTuple):
    """`now`: Unix milliseconds. `reported`: the last reports, of which `present` are of routers that are not lost."""

    now: int
    reported: tuple[Reported, ...]
    present: tuple[Reported, ...]
    backends: Sequence[MergedBackend]


async def seen(plane: Plane) -> Seen:
    """What all routers together see; made anew only where a report is another one. Raises StorageUnavailable."""
    now = plane.clock()
    async with plane.database.main.read() as connection:
        rows = (await connection.execute(_ROWS)).all()

    async def read(text: str) -> dict[str, Any]:
        found: dict[str, Any] = await asyncio.to_thread(orjson.loads, text)
        return found

    reported = []
    for row in rows:
        report = await plane.kept.made_of(("report", row.instance), row.report, partial(read, row.report))
        reported.append(Reported(row.instance, report, row.at, row.interval))
    present = [one for one in reported if not one.lost(now)]
    texts = {row.instance: row.report for row in rows}
    # Routers get new names with every roll-out, and reports are large.
    plane.kept.retain("report", texts)
    version = [(one.instance, texts[one.instance]) for one in present]
    backends = await plane.kept.made_of("backends", version, partial(asyncio.to_thread, merged, present))
    return Seen(now, tuple(reported), tuple(present), backends)


async def present(connection: AsyncConnection, now: int) -> list[Reported]:
    """The last reports of the routers that are not lost."""
    return [one for one in await _read(connection) if not one.lost(now)]


def housekeeping(plane: Plane) -> Task:
    """Counts the routers for metrics, and removes the reports of those that have been gone for a day."""
    counts = Gauge(
        "control_plane_routers", "Routers by whether they report.", ["state"], registry=plane.metrics.registry
    )

    async def run() -> None:
        while True:
            with suppress(StorageUnavailable):
                found = await all_of(plane)
                now = plane.clock()
                lost = sum(one.lost(now) for one in found)
                counts.labels("reporting").set(len(found) - lost)
                counts.labels("lost").set(lost)
                if any(one.at < now - _FORGOTTEN for one in found):
                    async with plane.database.main.write() as connection:
                        await connection.execute(delete(routers).where(routers.c.at < now - _FORGOTTEN))
            await asyncio.sleep(_EVERY)

    return run


def etags(plane: Plane) -> dict[str, str | None]:
    """Of the documents that routers poll, as they are now."""
    documents = plane.documents
    return {name: documents.get(name).etag if name in documents.names else None for name in POLLED}


def made_at(plane: Plane) -> dict[str, int]:
    """Unix milliseconds since which, at least, each of these documents is as it is now."""
    return {name: plane.documents.get(name).made_at for name in POLLED if name in plane.documents.names}


# A report as text: with thousands of models the driver's way to read it takes three times as long.
_ROWS = select(
    routers.c.instance, cast(routers.c.report, Text).label("report"), routers.c.at, routers.c.interval
).order_by(routers.c.instance)


async def followers(plane: Plane, document: str) -> Following:
    """Which routers have a document as it is now. Raises StorageUnavailable."""
    return following(document, etags(plane)[document], (await seen(plane)).present)


async def _read(connection: AsyncConnection, instance: str | None = None) -> list[Reported]:
    query = _ROWS if instance is None else _ROWS.where(routers.c.instance == instance)
    rows = await connection.execute(query)
    return [Reported(row.instance, orjson.loads(row.report), row.at, row.interval) for row in rows]
