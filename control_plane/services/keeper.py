"""What is done beside the requests for usage: sums, retention, partitions, and when keys were last used."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from prometheus_client import Gauge
from sqlalchemy import bindparam, func, or_, select, update

from control_plane.data.tables import keys
from control_plane.data.usage_tables import usage
from control_plane.errors import StorageUnavailable
from control_plane.plane import Plane, Task
from control_plane.pure.records import HOUR, MINUTE
from control_plane.services.retention import make_partitions, retain
from control_plane.services.rollup import leads, roll_up, unsummed

log = logging.getLogger(__name__)

# Seconds between two turns, and that one sums up; after a long one, some times what it took, but so much at most.
EVERY, _REST, _LONGEST = 5.0, 1, 10.0
_MINUTELY, _HOURLY = 60.0, 3600.0


def keeping(plane: Plane) -> Task:
    """Keeps the sums, as long as it runs. On PostgreSQL every replica tries, and one does."""
    waiting = Gauge(
        "control_plane_usage_unsummed_hours", "Closed hours whose sums lack rows.", registry=plane.metrics.registry
    )
    keeper = Keeper(plane)

    async def run() -> None:
        while True:
            began = time.monotonic()
            await keeper.turn()
            waiting.set(keeper.unsummed)
            await asyncio.sleep(max(EVERY, min(_LONGEST, _REST * (time.monotonic() - began))))

    return run


class Keeper:
    """Does what is due. `now`: monotonic seconds."""

    def __init__(self, plane: Plane, now: Callable[[], float] = time.monotonic) -> None:
        self._plane = plane
        self._now = now
        self._minute = self._hour = 0.0
        self.unsummed = 0
        # Unix milliseconds from which the use of keys is looked at
        self._since = plane.clock() - 2 * HOUR

    async def turn(self) -> None:
        """Once; what fails is tried again at the next turn."""
        now = self._now()
        if now >= self._hour and await self._did(make_partitions) and await self._did(self._retain):
            self._hour = now + _HOURLY
        await self._did(self._roll_up)
        if now >= self._minute and await self._did(self._note_use):
            self._minute = now + _MINUTELY
        await self._did(self._count)

    async def _did(self, step: Callable[[Plane], Awaitable[object]]) -> bool:
        try:
            return await step(self._plane) is not False
        except StorageUnavailable:
            return False
        except Exception:
            log.exception("usage cannot be kept")
            return False

    async def _count(self, plane: Plane) -> None:
        self.unsummed = await unsummed(plane)

    async def _roll_up(self, plane: Plane) -> None:
        await roll_up(plane, patience=EVERY)

    async def _retain(self, plane: Plane) -> bool:
        return await retain(plane)

    async def _note_use(self, plane: Plane) -> None:
        now = plane.clock()
        await note_use(plane, self._since)
        # Records come some seconds after their time; those that come later count at the next start.
        self._since = now - 10 * MINUTE


async def note_use(plane: Plane, since: int) -> None:
    """Note when keys were last used, to the minute, by the records from `since` on."""
    query = select(usage.c.key_id, func.max(usage.c.at).label("at"))
    query = query.where(usage.c.at >= since, usage.c.key_id.is_not(None)).group_by(usage.c.key_id)
    async with plane.database.usage.read() as connection:
        found = (await connection.execute(query)).all()
    if not found:
        return
    used = [{"key": row.key_id, "used_at": row.at // MINUTE * MINUTE} for row in found]
    later = or_(keys.c.last_used_at.is_(None), keys.c.last_used_at < bindparam("used_at"))
    statement = update(keys).where(keys.c.id == bindparam("key"), later).values(last_used_at=bindparam("used_at"))
    async with plane.database.main.write() as connection:
        if await leads(connection):
            await connection.execute(statement, used)
