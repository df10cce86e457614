"""From a Service to backends: lists and watches the EndpointSlices of the Kubernetes API.

For backends with `discovery: dns` whose host name is that of a Service, if DISCOVERY is `endpointslices`; `dns` looks
up the others. One round is a list, and watches from its version on, until the next list is due. The next list repairs
what a watch missed; while both fail, the backends stay as they are.
"""

import asyncio
import logging
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress

from inference_api.discovery.cluster import Cluster
from inference_api.discovery.slices import Located, Service, Slice, locate, service_of
from inference_api.discovery.watch import TIMING, Rhythm, Timing, Watch
from inference_api.routing.fleet import Fleet

logger = logging.getLogger(__name__)

# URL of a backend -> names of its models.
_Users = Mapping[str, list[str]]


def watched_in(cluster: Cluster) -> Callable[[str], bool]:
    """Whether a host name is that of a Service."""
    return lambda host: service_of(host, cluster.namespace) is not None


class EndpointSlices:
    """Keeps the backends of a Fleet up to date with EndpointSlices. `relist`: seconds between two lists, +-20 %.

    `failures` counts failures by reason; `rand` gives [0, 1), `now` seconds. `on_leave` is called after
    backends were removed.
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
        # Shared: the Services in use, the version of the fleet, and one watch per namespace
        self._users: dict[Service, _Users] = {}
        self._version = -1
        self._watches: dict[str, Watch] = {}
        self._woken = asyncio.Event()
        # Failures that were logged already
        self._odd: dict[str, Located] = {}

    async def start(self) -> None:
        """The first lists, before the first request, for at most 5 s."""
        self._rebuild()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._timing.cold_start):
                for watch in list(self._watches.values()):
                    await watch.tried.wait()

    async def run(self) -> None:
        """Follow the catalogue until cancelled."""
        try:
            while True:
                try:
                    self._rebuild()
                except Exception:
                    # The boundary of a background task: it must survive for the next catalogue.
                    logger.exception("following the Services of the catalogue failed")
                await self._woken.wait()
                self._woken.clear()
        finally:
            for watch in self._watches.values():
                watch.stop()
            await asyncio.gather(*(watch.task for watch in self._watches.values()), return_exceptions=True)

    async def known(self) -> None:
        """Return once every namespace was listed; after 30 s, once one was, or a backend is known.

        A new router that cannot list (no Role, API server not reachable) would otherwise be ready without backends, and
        a rollout would replace all working routers. A single namespace does not block for ever: the catalogue may
        name one that does not exist.
        """
        until = self._rhythm.now() + self._timing.ready_within
        warned = False
        while missing := [watch.namespace for watch in self._watches.values() if watch.slices is None]:
            if self._rhythm.now() >= until:
                if len(missing) < len(self._watches) or any(model.backends for model in self._fleet.models.values()):
                    logger.warning("ready, although the Services of %r have never been listed", missing)
                    return
                if not warned:
                    warned = True
                    logger.warning(
                        "not ready: the Services of %r have never been listed, and no backend is known", missing
                    )
            await asyncio.sleep(self._timing.poll)

    def wake(self) -> None:
        """Wake the task, since the catalogue may name other Services."""
        self._woken.set()

    def _rebuild(self) -> None:
        """Update the Services if the catalogue changed, and restart the watches of changed namespaces."""
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
                # A known Service may have a new URL.
                self._notify(watch, names)
                continue
            if watch is not None:
                watch.stop()
            self._watches[namespace] = Watch(
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

    def _notify(self, watch: Watch, names: Iterable[str]) -> None:
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
        """Apply the addresses of a URL. True: backends were removed."""
        self._warn_once(service, url, located)
        known = self._fleet.addresses.get(url)
        if known == located.urls:
            return False
        self._fleet.resolve(url, located.urls, models)
        come, gone = {*located.urls} - {*(known or ())}, {*(known or ())} - {*located.urls}
        fields = {"addresses": len(located.urls), "come": len(come), "gone": len(gone)}
        level = logging.INFO if located.urls else logging.WARNING
        logger.log(level, "addresses of the Service %r changed", str(service), extra={"fields": fields})
        return bool(gone)

    def _warn_once(self, service: Service, url: str, located: Located) -> None:
        before = self._odd.get(url)
        if located.refused and (before is None or before.refused != located.refused):
            text = "%d addresses of the Service %r are refused, first %.64r"
            logger.warning(text, len(located.refused), str(service), located.refused[0])
        if located.portless and (before is None or not before.portless):
            self._failures["port"] += 1
            text = "the Service %r has several ports, and none is named like the scheme of %r: name one so"
            logger.warning(text, str(service), url)
        self._odd[url] = located
