"""The documents that routers poll: made from the database, kept in memory, served without it.

Each has a revision in the database, raised in the transaction of every change: that is how a replica learns of the
changes of others, within POLL seconds. A database that is away leaves the documents as they were.
"""

import asyncio
import gzip
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from control_plane.data.database import Store
from control_plane.data.tables import revisions
from control_plane.errors import StorageUnavailable
from registry_stub.conditional import etag_of

log = logging.getLogger(__name__)

# Seconds between two looks at the revisions
POLL = 0.5


@dataclass(frozen=True)
class Built:
    """`parts`: what was made of it on the way. `until`: Unix milliseconds at which it changes by itself.

    `compressed`: its gzip, and `identity`: what its ETag is made of instead of the body, if the builder has them.
    """

    body: bytes
    parts: Any = None
    until: int | None = None
    compressed: bytes | None = None
    identity: bytes | None = None


@dataclass(frozen=True)
class Document:
    """JSON as it goes out, the same by gzip, its strong ETag, and what belongs to it.

    `made_at`: Unix milliseconds since which it is so; here: another process may have made it before.
    """

    body: bytes
    compressed: bytes
    etag: str
    revision: int
    parts: Any = None
    until: int | None = None
    made_at: int = 0


# Makes a document from a transaction that reads; gets the one before it, and the time in Unix milliseconds.
Builder = Callable[[AsyncConnection, Document | None, int], Awaitable[Built]]


async def bump(connection: AsyncConnection, document: str) -> int:
    """Raise the revision of a document; others who do it wait for the end of the transaction."""
    statement = (
        update(revisions)
        .where(revisions.c.document == document)
        .values(revision=revisions.c.revision + 1)
        .returning(revisions.c.revision)
    )
    found: int = (await connection.execute(statement)).scalar_one()
    return found


def _document(built: Built, revision: int, known: Document | None, now: int) -> Document:
    etag = etag_of(built.body if built.identity is None else built.identity)
    if known is not None and known.etag == etag:
        return replace(known, revision=revision, parts=built.parts, until=built.until)
    compressed = gzip.compress(built.body, compresslevel=6) if built.compressed is None else built.compressed
    return Document(built.body, compressed, etag, revision, built.parts, built.until, now)


class Documents:
    """`clock`: Unix milliseconds. `poll`: seconds."""

    def __init__(
        self, store: Store, builders: Mapping[str, Builder], clock: Callable[[], int], poll: float = POLL
    ) -> None:
        self._store = store
        self._builders = builders
        self._clock = clock
        self._poll = poll
        self._current: dict[str, Document] = {}
        self._changed = asyncio.Condition()
        self._building = {name: asyncio.Lock() for name in builders}
        self._failed = False
        # Requests that wait for a change
        self.waiting = 0
        self.stopping = False

    @property
    def filled(self) -> bool:
        return self._current.keys() == self._builders.keys()

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._builders)

    @property
    def reachable(self) -> bool:
        """Whether the database answered when last asked."""
        return not self._failed

    def get(self, name: str) -> Document:
        """Raises StorageUnavailable before the first one is made."""
        found = self._current.get(name)
        if found is None:
            raise StorageUnavailable
        return found

    async def refresh(self, name: str) -> Document:
        """Make a document anew if the database has another revision, or its time has come."""
        async with self._building[name]:
            known = self._current.get(name)
            async with self._store.read(at_once=True) as connection:
                query = select(revisions.c.revision).where(revisions.c.document == name)
                revision: int = (await connection.execute(query)).scalar_one()
                if known is not None and known.revision == revision and not self._due(known):
                    return known
                now = self._clock()
                built = await self._builders[name](connection, known, now)
            # A large one would stop the event loop.
            document = await asyncio.to_thread(_document, built, revision, known, now)
            same = known is not None and known.etag == document.etag
            self._current[name] = document
            if not same:
                async with self._changed:
                    self._changed.notify_all()
            return document

    async def wait(self, name: str, etag_in: Callable[[], str | None], known: str, seconds: float) -> None:
        """Wait until the ETag differs from `known`, the time is over, or the control plane stops."""
        self.waiting += 1
        try:
            async with asyncio.timeout(seconds), self._changed:
                await self._changed.wait_for(lambda: self.stopping or etag_in() != known)
        except TimeoutError:
            return
        finally:
            self.waiting -= 1

    async def stop(self) -> None:
        """Answer all who wait, and let nobody wait any more."""
        self.stopping = True
        async with self._changed:
            self._changed.notify_all()

    async def run(self) -> None:
        """Follow the revisions until cancelled."""
        while True:
            await self.follow()
            await asyncio.sleep(self._poll)

    async def follow(self) -> None:
        """Look once at the revisions, and make anew what has changed."""
        try:
            async with self._store.read() as connection:
                rows = (await connection.execute(select(revisions.c.document, revisions.c.revision))).all()
            for name, revision in rows:
                known = self._current.get(name)
                if name in self._builders and (known is None or known.revision != revision or self._due(known)):
                    await self.refresh(name)
        except StorageUnavailable:
            if not self._failed:
                log.warning("the database is away; routers get what was known before")
            self._failed = True
            return
        except Exception:
            log.exception("documents cannot be made")
            return
        if self._failed:
            log.info("the database is back")
        self._failed = False

    def _due(self, document: Document) -> bool:
        return document.until is not None and document.until <= self._clock()
