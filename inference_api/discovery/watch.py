"""A watch of the EndpointSlices of one namespace: repeats a list, then events."""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

from inference_api.discovery.api import Api, ApiError, Event
from inference_api.discovery.cluster import Cluster
from inference_api.discovery.slices import Slice, read_slice
from inference_api.pace import back_off, spread

logger = logging.getLogger(__name__)

# Normal operation: servers end watches, and keep a limited history.
_USUAL = frozenset({"gone", "closed"})
# Seconds; shorter watches count as several in a row.
_SHORT = 1.0
_CHANGES = frozenset({"ADDED", "MODIFIED", "DELETED"})


class Timing(NamedTuple):
    """Seconds. `cold_start`: for the first lists. `ready_within`: then a router is ready without knowing all Services,
    checked every `poll`; both together with the registry's start stay within the minute of the chart's startup probe.
    After failures in a row the next round begins within `first_back_off`, twice that ... `longest_back_off`.
    """

    cold_start: float = 5.0
    ready_within: float = 30.0
    poll: float = 0.1
    first_back_off: float = 1.0
    longest_back_off: float = 30.0


TIMING = Timing()


class Rhythm:
    """Times of lists and retries. `relist`: seconds between two lists, +-20 %; `rand` gives [0, 1), `now` seconds."""

    def __init__(
        self, relist: float, rand: Callable[[], float], now: Callable[[], float], timing: Timing = TIMING
    ) -> None:
        self.now = now
        self._relist = relist
        self._rand = rand
        self._first = min(timing.first_back_off, relist)
        # Seconds; a failure after a longer round is the first in a row.
        self.longest = min(timing.longest_back_off, relist)

    def round(self) -> float:
        """Seconds from one list to the next."""
        return spread(self._relist, self._rand())

    def pause(self, failed_in_a_row: int) -> float:
        return back_off(failed_in_a_row, self._first, self.longest, self._rand())


class Watch:
    """The slices of some Services of a namespace, kept current by a task. `notify` gets the Services that changed."""

    def __init__(
        self,
        cluster: Cluster,
        namespace: str,
        names: list[str],
        rhythm: Rhythm,
        failures: Counter[str],
        notify: "Callable[[Watch, Iterable[str]], None]",
    ) -> None:
        # Configuration
        self._cluster = cluster
        self.namespace = namespace
        self.names = names
        self._rhythm = rhythm
        self._failures = failures
        self._notify = notify
        # Shared: the slices by name, None before the first list, and their version
        self.slices: dict[str, Slice] | None = None
        self._at = ""
        # Failures that were logged already
        self._failing = False
        self._unreadable: set[str] = set()
        # The first list has succeeded or failed.
        self.tried = asyncio.Event()
        self.task = asyncio.create_task(self._run())

    def stop(self) -> None:
        self.task.cancel()

    async def _run(self) -> None:
        """Run rounds until cancelled."""
        failed_in_a_row = 0
        while True:
            began = self._rhythm.now()
            try:
                await self._round()
                failed_in_a_row = 0
                continue
            except ApiError as exc:
                self._failed(exc)
            except Exception:
                # The boundary of a background task: it must survive for the next round.
                logger.exception("watching the Services of the namespace %r failed", self.namespace)
                self._failures["internal"] += 1
            self.tried.set()
            lasted = self._rhythm.now() - began
            failed_in_a_row = 1 if lasted > self._rhythm.longest else failed_in_a_row + 1
            await asyncio.sleep(self._rhythm.pause(failed_in_a_row))

    async def _round(self) -> None:
        """One list, and watches until it is time for the next. Raises ApiError."""
        async with Api(self._cluster) as api:
            documents, self._at = await api.slices(self.namespace, self.names)
            self._replace(await asyncio.to_thread(lambda: [_read(document) for document in documents]))
            self.tried.set()
            until = self._rhythm.now() + self._rhythm.round()
            short = 0
            while (left := until - self._rhythm.now()) > 0:
                began = self._rhythm.now()
                try:
                    await api.watch(self.namespace, self.names, self._at, left, self._take)
                except ApiError as exc:
                    if exc.reason != "closed":
                        raise
                    self._failed(exc)
                # Continue from the last version, but with a pause if the server ends watches at once.
                short = 0 if self._rhythm.now() - began > _SHORT else short + 1
                if short:
                    await asyncio.sleep(min(self._rhythm.pause(short), max(0.0, until - self._rhythm.now())))

    def _replace(self, listed: Iterable[tuple[str, Slice | None]]) -> None:
        kept, self.slices = self.slices or {}, {}
        seen: set[str] = set()
        for name, found in listed:
            self._warn_once(name, found)
            seen.add(name)
            # A slice that cannot be read keeps its previous content, if there is any.
            found = found or kept.get(name)
            if found is not None and found.service in self.names:
                self.slices[name] = found
        self._unreadable &= seen
        self._notify(self, self.names)

    def _take(self, events: list[Event]) -> None:
        """Apply a batch of events; empty at the beginning of a watch."""
        if self._failing:
            self._failing = False
            logger.info("the Services of the namespace %r are watched again", self.namespace)
        changed: set[str] = set()
        for event in events:
            self._at = event.version
            if event.kind in _CHANGES:
                changed |= self._change(event)
        if changed:
            self._notify(self, changed)

    def _change(self, event: Event) -> set[str]:
        """Apply one event. Returns the Services that it changed."""
        assert self.slices is not None
        name, found = _read(event.document)
        self._warn_once(name, found)
        before = self.slices.get(name)
        if event.kind == "DELETED" or (found is not None and found.service not in self.names):
            self.slices.pop(name, None)
            found = None
        elif found is not None:
            self.slices[name] = found
        return {one.service for one in (before, found) if one is not None}

    def _warn_once(self, name: str, found: Slice | None) -> None:
        if found is not None:
            self._unreadable.discard(name)
            return
        self._failures["garbage"] += 1
        if name not in self._unreadable:
            self._unreadable.add(name)
            logger.warning("an EndpointSlice of the namespace %r is invalid: %.100r", self.namespace, name)

    def _failed(self, error: ApiError) -> None:
        self._failures[error.reason] += 1
        if error.reason not in _USUAL and not self._failing:
            self._failing = True
            fields = {"serving": len(self.slices or ())}
            text = "the Services of the namespace %r cannot be watched: %s"
            logger.warning(text, self.namespace, error, extra={"fields": fields})


def _read(document: object) -> tuple[str, Slice | None]:
    """The name and the slice; None in place of an invalid one, under its name if there is one."""
    try:
        return read_slice(document)
    except ValueError:
        metadata = document.get("metadata") if isinstance(document, dict) else None
        return str(metadata.get("name", "")) if isinstance(metadata, dict) else "", None
