"""What every handler and service has: settings, database, the documents that routers poll, and who acts."""

import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from sqlalchemy.ext.asyncio import AsyncConnection

from control_plane.connections import Connections
from control_plane.data.database import Database
from control_plane.documents import Documents, bump
from control_plane.errors import StorageUnavailable
from control_plane.kept import Kept, Told
from control_plane.metrics import Metrics
from control_plane.passwords import Passwords
from control_plane.pure.roles import Principal
from control_plane.settings import Settings
from control_plane.usage_state import UsageState

log = logging.getLogger(__name__)
T = TypeVar("T")


class Act(NamedTuple):
    """One request of somebody: who, when (Unix milliseconds), from where. Audit rows have it."""

    principal: Principal
    at: int
    address: str | None = None
    request_id: str | None = None


@dataclass(frozen=True)
class Plane:
    """`clock`: Unix milliseconds. `kept`: answers for a moment, `measured` those of Prometheus, which may be large.

    `loans`: keys that are lent, with their secrets. `testing`: models that are tested now. `turns`: of services.turns,
    by kind. `engines`: what services.engines knows.
    """

    settings: Settings
    database: Database
    documents: Documents
    metrics: Metrics
    clock: Callable[[], int]
    passwords: Passwords
    connections: Connections = field(default_factory=Connections)
    usage: UsageState = field(default_factory=UsageState)
    kept: Kept = field(default_factory=Kept)
    measured: Kept = field(default_factory=lambda: Kept(100), repr=False)
    loans: Kept = field(default_factory=lambda: Kept(5_000), repr=False)
    testing: set[str] = field(default_factory=set)
    turns: Counter[str] = field(default_factory=Counter)
    engines: Told = field(default_factory=Told)

    @asynccontextmanager
    async def change(self, *documents: str) -> AsyncIterator[AsyncConnection]:
        """A transaction of the main database after which these documents are made anew, here and in other replicas.

        It begins with their revisions, so that those who change the same document wait for each other.
        """
        async with self.database.main.write() as connection:
            for document in sorted(documents):
                await bump(connection, document)
            yield connection
        # The change is made, whatever becomes of the database now: then the documents follow later.
        with suppress(StorageUnavailable):
            for document in self.documents.names.intersection(documents):
                await self.documents.refresh(document)


@asynccontextmanager
async def offline(settings: Settings) -> AsyncIterator[Plane]:
    """For commands: without documents, which the processes that serve make anew by themselves."""
    database = Database(settings.url)
    passwords = Passwords()
    try:
        yield Plane(settings, database, Documents(database.main, {}, _now), Metrics(), _now, passwords)
    finally:
        passwords.close()
        await database.close()


def _now() -> int:
    return time.time_ns() // 1_000_000


# What runs beside the requests, until it is cancelled
Task = Callable[[], Coroutine[None, None, None]]
