"""Files that are read again when they change, or at SIGHUP: the router goes on as they say.

A change is seen by a poll of the file's identity, size and time once a second, through the symbolic links of which
Kubernetes makes a ConfigMap or Secret. It counts when two polls have seen the same: not while the file is written. What
cannot be used is logged once, and what there was before stays.
"""

import asyncio
import logging
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Protocol

from inference_api.routing.catalogue import Catalogue, CatalogueError, dated, load_catalogue
from inference_api.routing.entries import CatalogueEntry
from inference_api.threads import in_thread

logger = logging.getLogger(__name__)

_EVERY = 1.0
_TOLD_PROBLEMS = 3
# Identity, size and time of each file; None: there is none.
_Signature = list[tuple[int, int, int, int] | None]


class Watched(Protocol):
    """Something that is read from files."""

    def poll(self, now: bool) -> Callable[[], None] | None:
        """In a thread: read what has changed, or `now` everything. What it returns is called on the event loop."""
        ...


class Changes:
    """Whether files have changed since they were last read."""

    def __init__(self, *paths: str | Path) -> None:
        self._paths = paths
        self._read = self._seen = _signature(paths)

    def settled(self, now: bool = False) -> bool:
        """They have, and did not change since the last poll; or they are to be read `now`."""
        before, self._seen = self._seen, _signature(self._paths)
        if not now and (self._seen == self._read or self._seen != before):
            return False
        # Before they are read: a change meanwhile is another one.
        self._read = self._seen
        return True


def _signature(paths: Iterable[str | Path]) -> _Signature:
    return [_stat(path) for path in paths]


def _stat(path: str | Path) -> tuple[int, int, int, int] | None:
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


class CatalogueFile:
    """The static catalogue. `take` gets it whenever it has been read again.

    `prepare` is called in the thread that reads, before.
    """

    def __init__(
        self,
        path: Path,
        prepare: Callable[[Catalogue], None] = lambda catalogue: None,
        entry_type: type[CatalogueEntry] = CatalogueEntry,
    ) -> None:
        self._path = path
        self._entry_type = entry_type
        self._prepare = prepare
        self._changes = Changes(path)
        self._complaint = ""
        # When the file that first named a model was written, Unix seconds
        self._created: dict[str, int] = {}
        self.take: Callable[[Catalogue], None] = lambda catalogue: None

    def load(self) -> Catalogue:
        """For the start, when entries may be refused one by one. Raises CatalogueError."""
        catalogue = self._dated(load_catalogue(self._path, self._entry_type))
        self._prepare(catalogue)
        return catalogue

    def _dated(self, catalogue: Catalogue) -> Catalogue:
        """With a time in each entry, the same as before in one that was there before: it did not change by that."""
        written = int(self._path.stat().st_mtime)
        self._created = {name: self._created.get(name, written) for name in catalogue}
        return dated(catalogue, self._created)

    def poll(self, now: bool) -> Callable[[], None] | None:
        if not self._changes.settled(now):
            return None
        try:
            catalogue = self.load()
        except CatalogueError as exc:
            return partial(self._keep, str(exc))
        if catalogue.problems:
            # What was served a moment ago is worth more than a part of what is meant.
            told = "; ".join(catalogue.problems[:_TOLD_PROBLEMS])
            return partial(self._keep, f"catalogue {str(self._path)!r}: {told}")
        return partial(self._use, catalogue)

    def _use(self, catalogue: Catalogue) -> None:
        self._complaint = ""
        self.take(catalogue)

    def _keep(self, complaint: str) -> None:
        if complaint != self._complaint:
            self._complaint = complaint
            logger.warning("the catalogue could not be reloaded, the previous one stays: %s", complaint)


class GivenCatalogue:
    """A catalogue that is no file's and stays as it is."""

    def __init__(self, catalogue: Catalogue, prepare: Callable[[Catalogue], None]) -> None:
        self._catalogue = catalogue
        self._prepare = prepare
        self.take: Callable[[Catalogue], None] = lambda catalogue: None

    def load(self) -> Catalogue:
        self._prepare(self._catalogue)
        return self._catalogue

    def poll(self, now: bool) -> None:
        """Nothing changes it."""


def static_source(
    path: Path,
    given: Catalogue | None,
    prepare: Callable[[Catalogue], None],
    entry_type: type[CatalogueEntry] = CatalogueEntry,
) -> CatalogueFile | GivenCatalogue:
    """Where the static catalogue comes from: the file, unless one is `given`."""
    return CatalogueFile(path, prepare, entry_type) if given is None else GivenCatalogue(given, prepare)


class Reloader:
    """Has each of these look at its files, `every` so many seconds; a look that hangs holds up no other."""

    def __init__(self, watched: Iterable[Watched], every: float = _EVERY) -> None:
        self._every = every
        self._watched = [(one, asyncio.Event()) for one in watched]

    async def run(self) -> None:
        """Poll until cancelled."""
        async with asyncio.TaskGroup() as group:
            for one, told in self._watched:
                group.create_task(self._follow(one, told))

    def now(self) -> None:
        """Have everything read again, changed or not."""
        for _, told in self._watched:
            told.set()

    async def _follow(self, one: Watched, told: asyncio.Event) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._every):
                    await told.wait()
            now = told.is_set()
            told.clear()
            try:
                take = await in_thread(partial(one.poll, now), "reload")
                if take is not None:
                    take()
            except Exception:
                # The boundary of a background task: it has to be there for the next poll.
                logger.exception("reading a file again failed")
