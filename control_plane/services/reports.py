"""The reports of the routers: the last one of each, by which the state of backends and overrides is known."""

import asyncio
from contextlib import suppress
from typing import Any

from prometheus_client import Gauge
from sqlalchemy import delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from control_plane.data.tables import routers
from control_plane.errors import StorageUnavailable
from control_plane.plane import Plane, Task
from control_plane.pure.reports import Reported, interval_after

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


async def every(connection: AsyncConnection) -> list[Reported]:
    """As `all_of`, within a transaction."""
    return await _read(connection)


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


async def _read(connection: AsyncConnection, instance: str | None = None) -> list[Reported]:
    query = select(routers.c.instance, routers.c.report, routers.c.at, routers.c.interval).order_by(routers.c.instance)
    if instance is not None:
        query = query.where(routers.c.instance == instance)
    return [Reported(*row) for row in await connection.execute(query)]
