"""Renders a scrape in slices: the event loop does other work in between, whatever the number of series."""

import asyncio
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator
from functools import partial

from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics_exposition

from inference_api.observe.exposition import Family, slices, write
from inference_api.threads import in_thread

# Characters: 0.3 ms, with compression.
_SLICE = 32 * 1024
# Each has a compressor of 256 KiB, and at most a slice and a full buffer of its client's connection.
_MOST = 32
_END = b"# EOF\n"
# The fastest level: the next six make the page a quarter smaller, and take twice as long.
_LEVEL = 1
_GZIP = 31


def process_collectors() -> CollectorRegistry:
    """A registry with prometheus_client's collectors of the process."""
    collectors = CollectorRegistry()
    # GCCollector does not take None for no registry.
    for collector in (ProcessCollector(registry=None), GCCollector(registry=CollectorRegistry())):
        collectors.register(collector)
    return collectors


class Exposition:
    """Renders all metrics as a page.

    `families`: the router's own, which are read slice by slice between other work of the loop that serves them.
    `collectors`: of prometheus_client, with few numbers each, as their text is made in one step. They may read files,
    and run on a thread of their own, never on the event loop.

    `pause`: seconds between two slices. On the thread of OPS_PORT they release the interpreter: a thread that only
    yields takes it again before the other one has woken up.
    """

    def __init__(
        self,
        families: Callable[[], Iterable[Family]],
        collectors: CollectorRegistry,
        pause: float = 0.0,
        size: int = _SLICE,
        most: int = _MOST,
    ) -> None:
        self._families = families
        self._collectors = collectors
        self._pause = pause
        self._size = size
        self._most = most
        self._scrapes = 0
        # One slice per turn of the loop, whatever the number of scrapes.
        self._turn = asyncio.Lock()

    @property
    def busy(self) -> bool:
        """Whether the limit of concurrent scrapes is reached."""
        return self._scrapes >= self._most

    async def page(self, openmetrics: bool, gzip: bool) -> AsyncGenerator[bytes, None]:
        """The page, in pieces."""
        pack = zlib.compressobj(_LEVEL, zlib.DEFLATED, _GZIP) if gzip else None
        self._scrapes += 1
        try:
            own = slices(write(self._families(), openmetrics), self._size)
            async for data in self._written((text.encode() for text in own), pack):
                yield data
            others = await in_thread(partial(self._collected, openmetrics), "collectors")
            pieces = (others[at : at + self._size] for at in range(0, len(others), self._size))
            async for data in self._written(pieces, pack):
                yield data
            end = _END if openmetrics else b""
            yield end if pack is None else pack.compress(end) + pack.flush()
        finally:
            self._scrapes -= 1

    async def _written(self, pieces: Iterator[bytes], pack: "zlib._Compress | None") -> AsyncIterator[bytes]:
        while True:
            async with self._turn:
                data = next(pieces, None)
                if data is None:
                    return
                if pack is not None:
                    data = pack.compress(data)
                await asyncio.sleep(self._pause)
            if data:
                yield data

    def _collected(self, openmetrics: bool) -> bytes:
        if not openmetrics:
            return generate_latest(self._collectors)
        page: bytes = openmetrics_exposition.generate_latest(self._collectors)  # type: ignore[no-untyped-call]
        return page.removesuffix(_END)
