"""What commands have in common: a plane over a database whose schema fits, and who acts."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from control_plane.data import schema
from control_plane.plane import Act, Plane, offline
from control_plane.pure.roles import SYSTEM
from control_plane.settings import load_settings


@asynccontextmanager
async def ready() -> AsyncIterator[Plane]:
    """The control plane of the environment. Raises SettingsError, DatabaseError."""
    settings = load_settings()
    if settings.upgrades:
        await schema.migrate(settings.url)
    schema.check(await schema.standings(settings.url))
    async with offline(settings) as plane:
        yield plane


def act(plane: Plane) -> Act:
    return Act(SYSTEM, plane.clock())
