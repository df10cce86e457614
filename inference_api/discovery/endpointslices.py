"""From a Service to backends, as its cluster's API server tells it: EndpointSlices are listed, and then watched.

For backends with `discovery: dns` whose host name is that of a Service, if DISCOVERY is `endpointslices`; the others
are looked up by `discovery`. One round is a list, and watches that go on from where it was, until it is time for the
next list. What a watch forgets, the next list knows; while neither can be had, the last that was known stays.
"""

import asyncio
import logging
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import NamedTuple

from inference_api.discovery.cluster import Api, ApiError, Cluster, Event
from inference_api.discovery.slices import Located, Service, Slice, locate, read_slice, service_of
from inference_api.pace import back_off, spread
from inference_api.routing.fleet import Fleet

logger = logging.getLogger(__name__)

# What happens while everything is in order: a server ends watches, and remembers only so much.
_USUAL = frozenset({"gone", "closed"})
# Seconds; a watch that lasts no longer is one of several in a row.
_SHORT = 1.0
_CHANGES = frozenset({"ADDED", "MODIFIED", "DELETED"})

# URL of a backend -> the names of the models that have it.
_Users = Mapping[str, list[str]]


def watched_in(cluster: Cluster) -> Callable[[str], bool]:
    """Whether a host name is that of a Service, and so found here."""
    return lambda host: service_of(host, cluster.namespace) is not None


class Timing(NamedTuple):
    """Seconds. `cold_start`: for the first lists. `ready_within`: after which a router need not know all Services to be
    ready, polled every `poll`; with the former and the registry's start well within the minute of the chart's startup
    probe. After failures in a row the next round comes within `first_back_off`, twice that ... `longest_back_off`.
    """

    cold_start: float = 5.0
    ready_within: float = 30.0
    poll: float = 0.1
    first_back_off: float = 1.0
    longest_back_off: float = 30.0


TIMING = Timing()


class Rhythm:
    """When to list and retry. `relist`: seconds between two lists, +-20 %; `rand` gives [0, 1), `now` seconds."""

    def __init__(
        self, relist: float, rand: Callable[[], float], now: Callable[[], float], timing: Timing = TIMING
    ) -> None:
        self.now = now
        self._relist = relist
        self._rand = rand
        self._first = min(timing.first_back_off, relist)
        # After a round of more seconds than this a failure is not one of several in a row.
        self.longest = min(timing.longest_back_off, relist)

    def round(self) -> float:
        """Seconds from one list to the next."""
        return spread(self._relist, self._rand())

    def pause(self, failed_in_a_row: int) -> float:
        return back_off(failed_in_a_row, self._first, self.longest, self._rand())


class EndpointSlices:
    """Keeps the backends of a Fleet up to date with EndpointSlices. `relist`: seconds between two lists, +-20 %.

    `failures` counts failures by reason; `rand` gives [0, 1), `now` seconds. `on_leave` is called when
    backends have gone.
    """

    def __init__(
        self,
        fleet: Fleet,
        cluster: Cluster,
        failures: Counter[str],
        relist: float = 120.0,
        rand: Callable[[], float] = random.random,
        now: Callable[[], float] = time.monotonic,
        on_leave: Callable[[], None] = lambda: None,
        timing: Timing = TIMING,
    ) -> None:
        # Configuration
        self._fleet = fleet
        self._cluster = cluster
        self._failures = failures
        self._timing = timing
        self._rhythm = Rhythm(relist, rand, now, timing)
        self._on_leave = on_leave
        # Shared: the Services in use, as of a version of the fleet, and one watch for each of their namespaces
        self._users: dict[Service, _Users] = {}
        self._version = -1
        self._watches: dict[str, _Watch] = {}
        self._woken = asyncio.Event()
        # What is known to be wrong, and so is no news
        self._odd: dict[str, Located] = {}

    async def start(self) -> None:
        """The first lists, before any request is taken; what is not there within 5 s comes later."""
        self._rebuild()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._timing.cold_start):
                for watch in list(self._watches.values()):
                    await watch.tried.wait()

    async def run(self) -> None:
        """Follow the catalogue, until cancelled."""
        try:
            while True:
                try:
                    self._rebuild()
                except Exception:
                    # The boundary of a background task: it has to be there for the next catalogue.
                    logger.exception("following the Services of the catalogue failed")
                await self._woken.wait()
                self._woken.clear()
        finally:
            for watch in self._watches.values():
                watch.stop()
            await asyncio.gather(*(watch.task for watch in self._watches.values()), return_exceptions=True)

    async def known(self) -> None:
        """Return once every namespace was listed; after 30 s, once one was, or a backend is known.

        A new router that may not list (no Role, no way to the API server) would otherwise be ready with nobody to send
        to, and a rollout would replace with its like all those that do know. One namespace alone is no reason to wait
        for ever: the catalogue may name one that nobody has, and the others are to be served.
        """
        until = self._rhythm.now() + self._timing.ready_within
        told = False
        while missing := [watch.namespace for watch in self._watches.values() if watch.slices is None]:
            if self._rhythm.now() >= until:
                if len(missing) < len(self._watches) or any(model.backends for model in self._fleet.models.values()):
                    logger.warning("ready, though the Services of %r have never been listed", missing)
                    return
                if not told:
                    told = True
                    logger.warning(
                        "not ready: the Services of %r have never been listed, nor is a backend known", missing
                    )
            await asyncio.sleep(self._timing.poll)

    def wake(self) -> None:
        """The catalogue may name other Services."""
        self._woken.set()

    def _rebuild(self) -> None:
        """Read the Services of the catalogue if it changed, and restart the watches of changed namespaces."""
        if self._version == self._fleet.version:
            return
        self._version = self._fleet.version
        before = {url for urls in self._users.values() for url in urls}
        self._users = self._services()
        for url in before.difference(*self._users.values()):
            self._fleet.addresses.pop(url, None)
            self._odd.pop(url, None)
        wanted: defaultdict[str, list[str]] = defaultdict(list)
        for service in sorted(self._users):
            wanted[service.namespace].append(service.name)
        for namespace in self._watches.keys() - wanted.keys():
            self._watches.pop(namespace).stop()
        for namespace, names in wanted.items():
            watch = self._watches.get(namespace)
            if watch is not None and watch.names == names:
                # A URL may be new where the Service is not.
                self._notify(watch, names)
                continue
            if watch is not None:
                watch.stop()
            self._watches[namespace] = _Watch(
                self._cluster, namespace, names, self._rhythm, self._failures, self._notify
            )

    def _services(self) -> dict[Service, _Users]:
        found: defaultdict[Service, defaultdict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for model in self._fleet.models.values():
            for entry in model.entry.backends:
                service = service_of(entry.host, self._cluster.namespace) if entry.discovery == "dns" else None
                if service is not None:
                    found[service][entry.url].append(model.name)
        return dict(found)

    def _notify(self, watch: "_Watch", names: Iterable[str]) -> None:
        """Update the fleet with these Services of a watch, unless they were never listed."""
        if watch.slices is None:
            return
        by_service: defaultdict[str, list[Slice]] = defaultdict(list)
        for one in watch.slices.values():
            by_service[one.service].append(one)
        left = False
        for name in names:
            service = Service(watch.namespace, name)
            for url, models in self._users.get(service, {}).items():
                left = self._found(service, url, locate(url, by_service[name]), models) or left
        if left:
            self._on_leave()

    def _found(self, service: Service, url: str, located: Located, models: Iterable[str]) -> bool:
        """True: backends have gone."""
        self._warn_once(service, url, located)
        known = self._fleet.addresses.get(url)
        if known == located.urls:
            return False
        self._fleet.resolve(url, located.urls, models)
        come, gone = {*located.urls} - {*(known or ())}, {*(known or ())} - {*located.urls}
        fields = {"addresses": len(located.urls), "come": len(come), "gone": len(gone)}
        level = logging.INFO if located.urls else logging.WARNING
        logger.log(level, "the Service %r has other addresses", str(service), extra={"fields": fields})
        return bool(gone)

    def _warn_once(self, service: Service, url: str, located: Located) -> None:
        before = self._odd.get(url)
        if located.refused and (before is None or before.refused != located.refused):
            text = "%d addresses of the Service %r are refused, first %.64r"
            logger.warning(text, len(located.refused), str(service), located.refused[0])
        if located.portless and (before is None or not before.portless):
            self._failures["port"] += 1
            text = "of the Service %r it cannot be told which port %r means: name one of its ports like the scheme"
            logger.warning(text, str(service), url)
        self._odd[url] = located


class _Watch:
    """The slices of some Services of a namespace, kept current by a task. `notify` gets the Services that changed."""

    def __init__(
        self,
        cluster: Cluster,
        namespace: str,
        names: list[str],
        rhythm: Rhythm,
        failures: Counter[str],
        notify: "Callable[[_Watch, Iterable[str]], None]",
    ) -> None:
        # Configuration
        self._cluster = cluster
        self.namespace = namespace
        self.names = names
        self._rhythm = rhythm
        self._failures = failures
        self._notify = notify
        # Shared: the slices by name, None before the first list, and the version they are of
        self.slices: dict[str, Slice] | None = None
        self._at = ""
        # What is known to be wrong, and so is no news
        self._failing = False
        self._unreadable: set[str] = set()
        # Something has come of the first list, or nothing will for now.
        self.tried = asyncio.Event()
        self.task = asyncio.create_task(self._run())

    def stop(self) -> None:
        self.task.cancel()

    async def _run(self) -> None:
        """Round after round, until cancelled."""
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
                # The boundary of a background task: it has to be there for the next round.
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
                # It goes on from where it was; but a server that ends each one at once is not to be pestered.
                short = 0 if self._rhythm.now() - began > _SHORT else short + 1
                if short:
                    await asyncio.sleep(min(self._rhythm.pause(short), max(0.0, until - self._rhythm.now())))

    def _replace(self, listed: Iterable[tuple[str, Slice | None]]) -> None:
        kept, self.slices = self.slices or {}, {}
        seen: set[str] = set()
        for name, found in listed:
            self._warn_once(name, found)
            seen.add(name)
            # One that cannot be read stays what it was, if that is known.
            found = found or kept.get(name)
            if found is not None and found.service in self.names:
                self.slices[name] = found
        self._unreadable &= seen
        self._notify(self, self.names)

    def _take(self, events: list[Event]) -> None:
        """What a watch said; at its beginning nothing."""
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
        """The Services that it changed."""
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
            logger.warning("an EndpointSlice of the namespace %r makes no sense: %.100r", self.namespace, name)

    def _failed(self, error: ApiError) -> None:
        self._failures[error.reason] += 1
        if error.reason not in _USUAL and not self._failing:
            self._failing = True
            fields = {"serving": len(self.slices or ())}
            text = "the Services of the namespace %r cannot be watched: %s"
            logger.warning(text, self.namespace, error, extra={"fields": fields})


def _read(document: object) -> tuple[str, Slice | None]:
    """A slice by its name; None: it is none, and goes by the name in it, if there is one."""
    try:
        return read_slice(document)
    except ValueError:
        metadata = document.get("metadata") if isinstance(document, dict) else None
        return str(metadata.get("name", "")) if isinstance(metadata, dict) else "", None
