"""Asks the backends of models with `discover` for their lists: every ENGINE_INTERVAL, and new ones at once."""

import asyncio
import logging
import random
from collections.abc import Callable, Mapping, MutableMapping
from time import monotonic

import httpx
import orjson

from inference_api.discovery.listing import fetch, listing_of
from inference_api.discovery.lists import Lists, Place, place_of_list
from inference_api.discovery.naming import IGNORES_NAMES, misnamed
from inference_api.pace import spread
from inference_api.routing.backend import Backend
from inference_api.routing.entries import CatalogueEntry
from inference_api.routing.fleet import Fleet, Model

logger = logging.getLogger(__name__)


class ListPoller:
    """Feeds `lists`, and links the names of the fleet anew when they change.

    `headers`: of the router's own requests to the backends of an entry. `on_name(backend, lacks)` gets what each
    backend serves instead of its model, or None; `on_missing` each backend whose list lacks its model, and `on_change`
    is called when names have changed. `failures` counts lists that could not be read, under `models`. `tick`: seconds
    until a new backend is found. `timeout`: seconds for one list.
    """

    def __init__(
        self,
        fleet: Fleet,
        lists: Lists,
        transport: httpx.AsyncBaseTransport,
        every: float,
        *,
        headers: Callable[[CatalogueEntry], Mapping[str, str]] = lambda entry: {},
        on_name: Callable[[Backend, str | None], None] = lambda backend, lacks: None,
        on_missing: Callable[[Backend], None] = lambda backend: None,
        on_change: Callable[[], None] = lambda: None,
        failures: MutableMapping[str, int] | None = None,
        rand: Callable[[], float] = random.random,
        timeout: float = 5.0,
        concurrency: int = 16,
        tick: float = 0.25,
    ) -> None:
        # Configuration
        self._headers = headers
        self._on_name = on_name
        self._on_missing = on_missing
        self._on_change = on_change
        self._rand = rand
        self._timeout = timeout
        self._tick = tick
        self._fleet = fleet
        self._lists = lists
        self._transport = transport
        self._every = every
        self._failures = {} if failures is None else failures
        self._slots = asyncio.Semaphore(concurrency)
        # Models with `discover`, and their backends when they were last looked at
        self._seen: list[tuple[Model, tuple[Backend, ...]]] = []
        self._version = -1
        # Their backends by place; those with a running task; those that were asked
        self._places: dict[Place, list[Backend]] = {}
        self._watched: dict[Place, asyncio.Task[None]] = {}
        self._asked: set[Place] = set()
        # Whether the first lists are there, or were waited for
        self._began: float | None = None
        self.is_open = False

    async def run(self) -> None:
        """Ask until cancelled."""
        self._began = monotonic()
        async with asyncio.TaskGroup() as group:
            while True:
                try:
                    self._enrol(group)
                    self._apply()
                except Exception:
                    # The boundary of a background task: the names stay as they are.
                    logger.exception("the names that engines list could not be applied")
                await asyncio.sleep(self._tick)

    def ready(self) -> str | None:
        """Not before the first lists are there, or have been waited for: an adapter would be unknown."""
        if not self.is_open and any(model.entry.discover for model in self._fleet.models.values()):
            return "starting"
        self.is_open = True
        return None

    def _enrol(self, group: asyncio.TaskGroup) -> None:
        """Begin to ask new backends, and end with those that are gone."""
        if self._version != self._fleet.version or any(model.backends is not seen for model, seen in self._seen):
            self._look()
        for place in self._watched.keys() - self._places.keys():
            # One that comes back is asked at once again.
            self._watched.pop(place).cancel()
        for place in self._places.keys() - self._watched.keys():
            self._watched[place] = group.create_task(self._watch(place))

    def _look(self) -> None:
        self._version = self._fleet.version
        before = {backend for backends in self._places.values() for backend in backends}
        models = [model for model in self._fleet.models.values() if model.entry.discover]
        self._seen = [(model, model.backends) for model in models]
        self._places = {}
        for _, backends in self._seen:
            for backend in backends:
                self._places.setdefault(place_of_list(backend), []).append(backend)
        for backend in before - {backend for backends in self._places.values() for backend in backends}:
            self._on_name(backend, None)
        self._asked &= self._places.keys()

    def _apply(self) -> None:
        for place in self._lists.expire(self._places):
            # What it said is too old to keep it out.
            for backend in self._places.get(place, ()):
                self._on_name(backend, None)
        if self._lists.changed:
            self._fleet.link()
            # Only the names are new: the models are those of before.
            self._version = self._fleet.version
            self._on_change()
        late = self._began is not None and monotonic() - self._began > self._timeout + 1.0
        self.is_open = self.is_open or late or self._asked >= self._places.keys()

    async def _watch(self, place: Place) -> None:
        while True:
            try:
                async with self._slots:
                    await self._ask(place)
            except Exception:
                logger.exception("a list of models could not be read", extra={"fields": {"backend": place[0]}})
            self._asked.add(place)
            await asyncio.sleep(spread(self._every, self._rand()))

    async def _ask(self, place: Place) -> None:
        backend = next(iter(self._places.get(place, ())), None)
        model = None if backend is None else self._fleet.models.get(backend.model)
        if backend is None or model is None:
            return
        try:
            async with asyncio.timeout(self._timeout):
                status, body = await fetch(self._transport, backend, self._headers(model.entry), self._timeout)
            listing = listing_of(orjson.loads(body)) if status == 200 else None
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, ValueError):
            listing = None
        if listing is None:
            self._failures["models"] = self._failures.get("models", 0) + 1
            return
        self._lists.answered(backend, listing)
        for backend in self._places.get(place, ()):
            self._compare(backend, list(listing.names))

    def _compare(self, backend: Backend, names: list[str]) -> None:
        model = self._fleet.models.get(backend.model)
        if model is None:
            return
        lacks = None if model.entry.engine in IGNORES_NAMES else misnamed(model.entry, names)
        self._on_name(backend, lacks)
        if lacks is not None:
            self._on_missing(backend)
