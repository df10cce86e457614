"""Reloads files when they change, or at SIGHUP.

A poll once a second compares identity, size and time of each file, and follows the symbolic links of ConfigMaps and
Secrets. A change counts once two polls agree, not while the file is being written. An invalid file is logged once, and
the previous content stays in use.
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
_SHOWN_PROBLEMS = 3
# Identity, size and time of each file; None: missing.
_Signature = list[tuple[int, int, int, int] | None]


class Watched(Protocol):
    """An object that is read from files."""

    def poll(self, now: bool) -> Callable[[], None] | None:
        """Read changed files, or all of them with `now`, in a thread. The result is called on the event loop."""
        ...


class Changes:
    """Detects changes of files since they were last read."""

    def __init__(self, *paths: str | Path) -> None:
        self._paths = paths
        self._read = self._seen = _signature(paths)

    def settled(self, now: bool = False) -> bool:
        """Whether they changed, and not since the last poll; or `now`."""
        before, self._seen = self._seen, _signature(self._paths)
        if not now and (self._seen == self._read or self._seen != before):
            return False
        # Recorded before reading: a change during it is a new one.
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
    """The static catalogue. `take` gets it after each reload.

    `prepare` is called before that, in the thread that reads.
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
        # Model -> time of the file that first named it, Unix seconds
        self._created: dict[str, int] = {}
        self.take: Callable[[Catalogue], None] = lambda catalogue: None

    def load(self) -> Catalogue:
        """Read it at the start, when entries may be refused one by one. Raises CatalogueError."""
        catalogue = self._dated(load_catalogue(self._path, self._entry_type))
        self._prepare(catalogue)
        return catalogue

    def _dated(self, catalogue: Catalogue) -> Catalogue:
        """The catalogue with a time in each entry; a model keeps its earlier time, so that its entry stays equal."""
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
            # The complete previous catalogue is better than a part of the new one.
            problems = "; ".join(catalogue.problems[:_SHOWN_PROBLEMS])
            return partial(self._keep, f"catalogue {str(self._path)!r}: {problems}")
        return partial(self._use, catalogue)

    def _use(self, catalogue: Catalogue) -> None:
        self._complaint = ""
        self.take(catalogue)

    def _keep(self, complaint: str) -> None:
        if complaint != self._complaint:
            self._complaint = complaint
            logger.warning("the catalogue could not be reloaded, the previous one stays: %s", complaint)


class GivenCatalogue:
    """A catalogue without a file, which never changes."""

    def __init__(self, catalogue: Catalogue, prepare: Callable[[Catalogue], None]) -> None:
        self._catalogue = catalogue
        self._prepare = prepare
        self.take: Callable[[Catalogue], None] = lambda catalogue: None

    def load(self) -> Catalogue:
        self._prepare(self._catalogue)
        return self._catalogue

    def poll(self, now: bool) -> None:
        """Return None: it never changes."""


def static_source(
    path: Path,
    given: Catalogue | None,
    prepare: Callable[[Catalogue], None],
    entry_type: type[CatalogueEntry] = CatalogueEntry,
) -> CatalogueFile | GivenCatalogue:
    """The source of the static catalogue: the file, unless one is `given`."""
    return CatalogueFile(path, prepare, entry_type) if given is None else GivenCatalogue(given, prepare)


class Reloader:
    """Polls each of these `every` so many seconds; a poll that hangs delays no other."""

    def __init__(self, watched: Iterable[Watched], every: float = _EVERY) -> None:
        self._every = every
        self._watched = [(one, asyncio.Event()) for one in watched]

    def add(self, watched: Watched) -> None:
        """Poll this, too; before `run`."""
        self._watched.append((watched, asyncio.Event()))

    async def run(self) -> None:
        """Poll until cancelled."""
        async with asyncio.TaskGroup() as group:
            for one, reload in self._watched:
                group.create_task(self._follow(one, reload))

    def now(self) -> None:
        """Reload everything, changed or not."""
        for _, reload in self._watched:
            reload.set()

    async def _follow(self, one: Watched, reload: asyncio.Event) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._every):
                    await reload.wait()
            now = reload.is_set()
            reload.clear()
            try:
                take = await in_thread(partial(one.poll, now), "reload")
                if take is not None:
                    take()
            except Exception:
                # The boundary of a background task: it must survive for the next poll.
                logger.exception("reloading a file failed")
