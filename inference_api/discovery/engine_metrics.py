"""Reads the metrics of engines: whether they sleep, and how much load they have.

A sleeping backend passes its health checks, looks idle, and never answers, so sleep is always polled.
`features.engine_load` polls load: a router counts its own requests in flight, but not those of other routers.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Collection
from contextlib import suppress

import httpx

from inference_api.discovery.gauges import TELL_LOAD, TELL_SLEEP, Gauges
from inference_api.pace import spread
from inference_api.routing.backend import Origin
from inference_api.routing.entries import Engine
from inference_api.routing.fleet import Fleet

logger = logging.getLogger(__name__)

# In intervals; the first poll after that drops older reports.
_STALE_AFTER = 2.0


class EngineMetrics:
    """Reads `/metrics` of every backend whose engine reports its load, every `every` seconds, +-20 %.

    `sleep_only`: reads only whether the engine sleeps, and only of backends that sent no byte since the last poll: an
    engine takes milliseconds to render that page, and one that sends tokens is awake. `last_byte_at(url)`: time of the
    last byte of an answer, in seconds of `clock`. `on_failure` gets each backend that did not report its load,
    `on_sleep` each with its sleep state, or None without a recent report. `wall`: Unix seconds. `timeout`: seconds per
    backend. The transport should not be that of the requests: an answer to a scrape does not show that a backend works.
    """

    def __init__(
        self,
        fleet: Fleet,
        transport: httpx.AsyncBaseTransport,
        every: float,
        on_failure: Callable[[Origin], None] = lambda origin: None,
        on_sleep: Callable[[Origin, bool | None], None] = lambda origin, asleep: None,
        *,
        sleep_only: bool = False,
        last_byte_at: Callable[[str], float] = lambda url: 0.0,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        rand: Callable[[], float] = random.random,
        timeout: float = 2.0,
        concurrency: int = 32,
    ) -> None:
        # Configuration
        self._timeout = timeout
        self._concurrency = concurrency
        self._fleet = fleet
        self._transport = transport
        self._every = every
        self._on_failure = on_failure
        self._on_sleep = on_sleep
        self._sleep_only = sleep_only
        self._telling = TELL_SLEEP if sleep_only else TELL_LOAD
        self._last_byte_at = last_byte_at
        self._clock = clock
        self._wall = wall
        self._rand = rand
        # Start of the last poll
        self._polled = clock()
        # By URL: time of the last report, and the backends that failed the last poll
        self._reported_at: dict[str, float] = {}
        self._silent: set[str] = set()

    async def run(self) -> None:
        """Poll until cancelled."""
        while True:
            began = self._clock()
            try:
                await self.poll()
            except Exception:
                # The boundary of a background task: without reports, balancing uses the router's own counts.
                logger.exception("polling the metrics of engines failed")
            pause = spread(self._every, self._rand())
            await asyncio.sleep(max(0.0, began + pause - self._clock()))

    async def poll(self) -> None:
        """Poll every backend once, a few at a time, for at most one interval; then drop old reports."""
        last, self._polled = self._polled, self._clock()
        engines = self._engines()
        # Backends that failed come last, so that they delay only each other.
        asked = iter(sorted(engines, key=lambda origin: origin.url in self._silent))

        async def worker() -> None:
            for origin in asked:
                if self._sleep_only and not origin.asleep and self._last_byte_at(origin.url) >= last:
                    self._reported_at[origin.url] = self._clock()
                else:
                    await self._ask(origin, engines[origin])

        with suppress(TimeoutError):
            async with asyncio.timeout(self._every), asyncio.TaskGroup() as group:
                for _ in range(min(self._concurrency, len(engines))):
                    group.create_task(worker())
        self._drop_old(engines)

    def _engines(self) -> dict[Origin, Engine]:
        """Each address once for all of its models, with the engine of its first one."""
        engines: dict[Origin, Engine] = {}
        for model in self._fleet.models.values():
            for backend in model.backends if model.entry.engine in self._telling else ():
                engines.setdefault(backend.origin, model.entry.engine)
        return engines

    async def _ask(self, origin: Origin, engine: Engine) -> None:
        before = origin.in_flight
        try:
            # Below the interval, so that timeouts occur before the poll ends.
            async with asyncio.timeout(min(self._timeout, self._every / 2)):
                gauges = await self._scrape(origin, engine)
            self._on_sleep(origin, gauges.asleep())
            reading = None if self._sleep_only else gauges.reading()
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, ValueError):
            self._silent.add(origin.url)
            self._on_failure(origin)
            return
        self._silent.discard(origin.url)
        self._reported_at[origin.url] = self._clock()
        if reading is not None:
            # Underestimate others' load, never overestimate: the router's own requests have changed since.
            others = reading.running + reading.waiting - max(before, origin.in_flight)
            origin.reported = max(0.0, others)
            origin.reading = reading
            origin.scraped_at = self._wall()

    async def _scrape(self, origin: Origin, engine: Engine) -> Gauges:
        url, _ = origin.address("/metrics")
        headers = {"accept": "text/plain", "accept-encoding": "identity"}
        extensions = {"timeout": {"connect": self._timeout}, "origin": origin.url}
        request = httpx.Request("GET", url, headers=headers, extensions=extensions)
        response = await self._transport.handle_async_request(request)
        stream = response.stream
        assert isinstance(stream, httpx.AsyncByteStream)
        gauges = Gauges(engine, self._sleep_only)
        try:
            if response.status_code != 200:
                raise ValueError(f"the backend answered with the status {response.status_code}")
            async for data in stream:
                gauges.feed(data)
                if gauges.complete:
                    break
        finally:
            await stream.aclose()
        return gauges

    def _drop_old(self, origins: Collection[Origin]) -> None:
        urls = {origin.url for origin in origins}
        self._silent &= urls
        self._reported_at = {url: at for url, at in self._reported_at.items() if url in urls}
        oldest = self._clock() - _STALE_AFTER * self._every
        # Also backends whose entry has changed to another engine since.
        for origin in list(self._fleet.origins.values()):
            if self._reported_at.get(origin.url, oldest - 1) < oldest:
                if not self._sleep_only:
                    origin.reported, origin.reading = 0.0, None
                if origin.asleep is not None:
                    self._on_sleep(origin, None)
