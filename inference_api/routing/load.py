"""Asks the replicas for their load, if LOAD_SIGNAL_INTERVAL says so: what others than this router have sent them.

A router knows exactly what it has in flight itself. What other routers, and other clients, have put on a replica only
the replica can tell. The signal is added to the own count, and dropped when it is old: then balancing is what it is
without it.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from typing import NamedTuple

import httpx

from inference_api.routing.backend import Fleet
from inference_api.routing.origin import Origin

logger = logging.getLogger(__name__)

_PATIENCE = 2.0
_AT_ONCE = 32
# Far above what an engine sends; more is not listened to.
_MAX_BYTES = 4 << 20
_MAX_LINE = 64 * 1024
# In intervals; a reading is dropped by the first look after that.
_STALE_AFTER = 2.0


class Reading(NamedTuple):
    """What a replica says of itself: requests it works on, requests it has waiting, used share of its KV cache."""

    running: float
    waiting: float
    kv_cache: float | None


class LoadSignal:
    """Reads `/metrics` of every replica of an engine that is known to tell, every `every` seconds, +-20 %.

    `on_failure` hears of each replica that did not tell. `clock` is monotonic seconds, `wall` Unix seconds.
    The transport should not be that of the requests: a replica that only answers a scrape has not shown that it works.
    """

    def __init__(
        self,
        fleet: Fleet,
        transport: httpx.AsyncBaseTransport,
        every: float,
        on_failure: Callable[[Origin], None] = lambda origin: None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        rand: Callable[[], float] = random.random,
    ) -> None:
        # Configuration
        self._fleet = fleet
        self._transport = transport
        self._every = every
        self._on_failure = on_failure
        self._clock = clock
        self._wall = wall
        self._rand = rand
        # By URL: when a replica last told, and which did not the last time it was asked
        self._told: dict[str, float] = {}
        self._silent: set[str] = set()

    async def run(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            began = self._clock()
            try:
                await self.look()
            except Exception:
                # The boundary of a background task: without the signal, balancing is what it is without it.
                logger.exception("asking the replicas for their load failed")
            pause = self._every * (0.8 + 0.4 * self._rand())
            await asyncio.sleep(max(0.0, began + pause - self._clock()))

    async def look(self) -> None:
        """Ask every replica once, a few at a time, for at most one interval; then drop what is old."""
        origins = self._origins()
        # Those that were silent come last, so that they can delay only each other.
        asked = iter(sorted(origins, key=lambda origin: origin.url in self._silent))

        async def worker() -> None:
            for origin in asked:
                await self._ask(origin)

        with suppress(TimeoutError):
            async with asyncio.timeout(self._every), asyncio.TaskGroup() as group:
                for _ in range(min(_AT_ONCE, len(origins))):
                    group.create_task(worker())
        self._drop_old(origins)

    def _origins(self) -> list[Origin]:
        """Each address once, whatever the number of its models. The API of "openai" is all that is known of it."""
        models = [model for model in self._fleet.models.values() if model.entry.engine != "openai"]
        return list(dict.fromkeys(backend.origin for model in models for backend in model.backends))

    async def _ask(self, origin: Origin) -> None:
        before = origin.in_flight
        try:
            # Below the interval, or a look would end before it knows who is silent.
            async with asyncio.timeout(min(_PATIENCE, self._every / 2)):
                reading = await self._scrape(origin)
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, ValueError):
            self._silent.add(origin.url)
            self._on_failure(origin)
            return
        self._silent.discard(origin.url)
        self._told[origin.url] = self._clock()
        # Some of the own have come or gone since: rather too little is laid to others than too much.
        others = reading.running + reading.waiting - max(before, origin.in_flight)
        origin.reported = max(0.0, others)
        origin.reading = reading
        origin.scraped = self._wall()

    async def _scrape(self, origin: Origin) -> Reading:
        url, _ = origin.address("/metrics")
        headers = {"accept": "text/plain", "accept-encoding": "identity"}
        extensions = {"timeout": {"connect": _PATIENCE}, "origin": origin.url}
        request = httpx.Request("GET", url, headers=headers, extensions=extensions)
        response = await self._transport.handle_async_request(request)
        stream = response.stream
        assert isinstance(stream, httpx.AsyncByteStream)
        gauges = Gauges()
        try:
            if response.status_code != 200:
                raise ValueError(f"the replica answered with the status {response.status_code}")
            async for data in stream:
                gauges.feed(data)
        finally:
            await stream.aclose()
        return gauges.reading()

    def _drop_old(self, origins: Collection[Origin]) -> None:
        urls = {origin.url for origin in origins}
        self._silent &= urls
        self._told = {url: told for url, told in self._told.items() if url in urls}
        oldest = self._clock() - _STALE_AFTER * self._every
        for origin in origins:
            if self._told.get(origin.url, oldest - 1) < oldest:
                origin.reported, origin.reading = 0.0, None


# What the engines call it; vLLM has one series of each per engine core, and older ones have the GPU's cache.
_RUNNING, _WAITING, _KV_CACHE = range(3)
_NAMES = {
    b"\nvllm:num_requests_running": _RUNNING,
    b"\nvllm:num_requests_waiting": _WAITING,
    b"\nvllm:kv_cache_usage_perc": _KV_CACHE,
    b"\nvllm:gpu_cache_usage_perc": _KV_CACHE,
    b"\ntgi_batch_current_size": _RUNNING,
    b"\ntgi_queue_size": _WAITING,
}


class Gauges:
    """Picks a few gauges out of Prometheus' text format as it arrives; the rest of it is only searched."""

    def __init__(self) -> None:
        self._values: tuple[list[float], ...] = ([], [], [])
        # Every line begins with a line break, the first one too.
        self._rest = b"\n"
        self._size = 0

    def feed(self, data: bytes) -> None:
        """Raises ValueError when the text is too long, or no text of this format."""
        self._size += len(data)
        block = self._rest + data
        end = block.rfind(b"\n")
        self._rest = block[end:]
        if self._size > _MAX_BYTES or len(self._rest) > _MAX_LINE:
            raise ValueError("that is not the metrics of an engine")
        for name, kind in _NAMES.items():
            self._values[kind].extend(_samples(block, name, end))

    def reading(self) -> Reading:
        """The sums over an engine's parts, of their caches the mean. Raises ValueError when it tells no load."""
        self.feed(b"\n")
        running, waiting, kv_cache = self._values
        if not running or not waiting:
            raise ValueError("these metrics do not tell the load")
        share = sum(kv_cache) / len(kv_cache) if kv_cache else None
        return Reading(sum(running), sum(waiting), share if share is None or share <= 1 else None)


def _samples(block: bytes, name: bytes, end: int) -> Iterator[float]:
    """The values of a name whose lines are complete before `end`."""
    at = block.find(name, 0, end)
    while at >= 0:
        begin = at + len(name)
        at = block.find(b"\n", begin)
        line = block[begin:at]
        # Otherwise it is a longer name.
        if line[:1] in (b"{", b" "):
            yield _value(line)
        at = block.find(name, at, end)


def _value(line: bytes) -> float:
    # A label may hold anything, a brace too; a timestamp may follow.
    value = float((line.rpartition(b"}")[2].split() or [b""])[0])
    if not 0 <= value < 1e9:
        raise ValueError(f"a load of {value}")
    return value
