"""How long usage stays: rows `usage.record_days`, sums `usage.hourly_days`, which are settings.

What is summed stays as it is when its rows go.
"""

import time

from sqlalchemy import delete, select, text

from control_plane.data import partitions
from control_plane.data.usage_tables import usage_changed, usage_day, usage_hour, usage_made, usage_state
from control_plane.plane import Plane
from control_plane.pure.records import DAY, HOUR
from control_plane.services import config
from control_plane.services.ingest import KEPT_FROM, KEPT_LOCK, read_kept_from
from control_plane.services.rollup import leads, roll_up

# Days whose partitions are made before they begin
AHEAD = 3
# Rows that are deleted in one transaction of SQLite: ingestion waits for it.
BATCH = 5000
# Seconds that one turn deletes; the rest is left to the next one.
PATIENCE = 10.0


async def make_partitions(plane: Plane) -> None:
    """Those of today and of the days to come, so that no batch of records has to wait for one."""
    if plane.database.dialect == "postgresql":
        today = plane.clock() // DAY * DAY
        async with plane.database.usage.write() as connection:
            await partitions.make(connection, range(today, today + (AHEAD + 1) * DAY, DAY))


async def retain(plane: Plane, batch: int = BATCH, patience: float = PATIENCE) -> bool:
    """Delete what is too old; returns whether all of it is gone. `patience`: seconds.

    Records of a time whose rows may be deleted are refused from then on: its sums could not be made anew.
    """
    now = plane.clock()
    unit = DAY if plane.database.dialect == "postgresql" else HOUR
    record_days = (await config.found(plane, config.RECORD_DAYS)).value
    kept_from = (now - record_days * DAY) // unit * unit
    await _keep_from(plane, kept_from)
    await roll_up(plane, kept_from)
    if await _is_changed_before(plane, kept_from):
        # Another replica sums it up.
        return False
    deadline = time.monotonic() + patience
    if plane.database.dialect == "postgresql":
        async with plane.database.usage.write() as connection:
            if not await leads(connection):
                return False
            await partitions.drop_before(connection, kept_from)
        if not await _delete(plane, "usage_ids", "id", kept_from, batch, deadline):
            return False
    elif not await _delete(plane, "usage", "rowid", kept_from, batch, deadline):
        return False
    hourly_days = (await config.found(plane, config.HOURLY_DAYS)).value
    oldest = (now - hourly_days * DAY) // DAY * DAY
    async with plane.database.usage.write() as connection:
        await connection.execute(delete(usage_made).where(usage_made.c.at < oldest))
    done = [await _delete(plane, table.name, "id", oldest, batch, deadline) for table in (usage_hour, usage_day)]
    return all(done)


async def _keep_from(plane: Plane, at: int) -> None:
    async with plane.database.usage.write() as connection:
        if plane.database.dialect == "postgresql":
            # Waits for the batches that are being stored.
            await connection.execute(text(f"SELECT pg_advisory_xact_lock({KEPT_LOCK})"))
        if at > await read_kept_from(connection):
            await connection.execute(delete(usage_state).where(usage_state.c.name == KEPT_FROM))
            await connection.execute(usage_state.insert().values(name=KEPT_FROM, value=at))


async def _is_changed_before(plane: Plane, at: int) -> bool:
    query = select(usage_changed.c.id).where(usage_changed.c.span == HOUR, usage_changed.c.at < at).limit(1)
    async with plane.database.usage.read() as connection:
        return (await connection.execute(query)).first() is not None


async def _delete(plane: Plane, table: str, key: str, before: int, batch: int, deadline: float) -> bool:
    """Delete in batches until the deadline; whether all are gone."""
    few = text(f"DELETE FROM {table} WHERE {key} IN (SELECT {key} FROM {table} WHERE at < :before LIMIT {batch})")
    while True:
        async with plane.database.usage.write() as connection:
            deleted = (await connection.execute(few, {"before": before})).rowcount
        if deleted < batch:
            return True
        if time.monotonic() > deadline:
            return False
