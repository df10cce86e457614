"""Removes what no longer holds: sessions, logins under way, one-time URLs, kept answers, old results of tests."""

import asyncio
import logging

from sqlalchemy import delete, or_

from control_plane.data.tables import (
    idempotency,
    inspections,
    login_failures,
    login_states,
    model_tests,
    sessions,
    setups,
    triages,
)
from control_plane.errors import StorageUnavailable
from control_plane.plane import Plane, Task
from control_plane.pure.records import DAY
from control_plane.services.idempotency import KEPT
from control_plane.services.logins import WINDOW
from control_plane.services.sessions import IDLE

log = logging.getLogger(__name__)

# Seconds between two looks
_EVERY = 600.0
# Milliseconds that results stay
RESULTS = {model_tests: 30 * DAY, inspections: 30 * DAY, triages: 7 * DAY}


def sweeping(plane: Plane) -> Task:
    async def run() -> None:
        while True:
            try:
                await sweep(plane)
            except StorageUnavailable:
                log.warning("what no longer holds is removed later")
            await asyncio.sleep(_EVERY)

    return run


async def sweep(plane: Plane) -> None:
    """Whether a row holds is said by its time, when it is used: this is for the space."""
    now = plane.clock()
    async with plane.database.main.write() as connection:
        ended = or_(sessions.c.expires_at <= now, sessions.c.seen_at <= now - IDLE)
        await connection.execute(delete(sessions).where(ended))
        await connection.execute(delete(login_states).where(login_states.c.expires_at <= now))
        await connection.execute(delete(setups).where(or_(setups.c.expires_at <= now, setups.c.used_at.is_not(None))))
        await connection.execute(delete(login_failures).where(login_failures.c.at <= now - WINDOW))
        await connection.execute(delete(idempotency).where(idempotency.c.at <= now - KEPT))
        for table, kept in RESULTS.items():
            await connection.execute(delete(table).where(table.c.at <= now - kept))
