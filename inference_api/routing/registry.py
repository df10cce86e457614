"""From a model's name to the Model: a registry, polled in the background, over a static catalogue.

    registry answers      its catalogue is served                               source "registry"
    it stops answering    its last good catalogue is served, however old        source "stale"
    it never answered     the static catalogue is served                        source "static"
                          a name that is not in it may exist: 503, not 404

A request looks the name up in memory and never waits for the registry; the start of the process waits, up to 5 s.
"""

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import islice
from typing import NamedTuple

import httpx
import orjson
from cachetools import TTLCache

from inference_api.errors import ModelNotFound, RegistryUnavailable
from inference_api.models import Caller
from inference_api.pace import back_off, spread
from inference_api.routing.catalogue import Catalogue, CatalogueError, parse_catalogue
from inference_api.routing.causes import cause_of
from inference_api.routing.changes import changes
from inference_api.routing.entries import CatalogueEntry
from inference_api.routing.fleet import Fleet, Model, may_use

logger = logging.getLogger(__name__)

# Limit of an answer; 10,000 models are about 3 MB. Decoding blocks the event loop.
MAX_BYTES = 16 * 1024 * 1024
# Seconds to the next poll after failures in a row: any time up to 1, 2, 4 ... 30.
FIRST_BACKOFF, LONGEST_BACKOFF = 1.0, 30.0
_SHOWN_KEYS = 10
# Bytes of a chunk of an answer; more in one piece would stop the event loop when it is copied or freed.
CHUNK = 64 * 1024
# A longer ETag is not sent back.
_MAX_ETAG = 256


class RegistryStatus(NamedTuple):
    """The state of the registry client; `last_success` is Unix seconds, 0 for never."""

    source: str
    models: int
    last_success: float
    failures: Mapping[str, int]


class Pause:
    """A wait between two polls, which can be cut short."""

    def __init__(self) -> None:
        self._over = asyncio.Event()

    def end(self) -> None:
        """End the wait, or the next one if there is none."""
        self._over.set()

    async def wait(self, seconds: float) -> bool:
        """Returns whether it was cut short."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._over.wait()
        cut = self._over.is_set()
        self._over.clear()
        return cut


class RegistryError(Exception):
    """A poll of the registry failed; `reason` is a short word for metrics."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Registry:
    """Keeps a Fleet up to date with the registry. `refresh`: seconds between two polls, +-20 %; less after a failure.

    `clock` is monotonic seconds, `rand` gives [0, 1). `prepare` gets each catalogue before it takes effect, in a
    thread. `cold_start`: seconds that the start waits; `timeout`: for a whole poll, since httpx's own limit is per
    read, which a trickling answer never exceeds. `max_bytes`: of an answer.
    """

    def __init__(
        self,
        fleet: Fleet,
        static: Catalogue,
        client: httpx.AsyncClient | None = None,
        refresh: float = 15.0,
        clock: Callable[[], float] = time.monotonic,
        rand: Callable[[], float] = random.random,
        on_change: Callable[[], None] = lambda: None,
        prepare: Callable[[Catalogue], None] = lambda catalogue: None,
        cold_start: float = 5.0,
        timeout: float = 10.0,
        max_bytes: int = MAX_BYTES,
        entry_type: type[CatalogueEntry] = CatalogueEntry,
    ) -> None:
        # Configuration
        self._entry_type = entry_type
        self._cold_start = cold_start
        self._timeout = timeout
        self._max_bytes = max_bytes
        self._fleet = fleet
        self._client = client
        self._refresh_every = refresh
        self._rand = rand
        self._on_change = on_change
        self._prepare = prepare
        # Shared: the cache holds the catalogue while it counts as live
        self._live: TTLCache[str, Catalogue] = TTLCache(maxsize=1, ttl=2.5 * refresh, timer=clock)
        self._last_good: Catalogue | None = None
        # Of the catalogue in use
        self.etag: str | None = None
        self._empty_once = False
        self._last_success = 0.0
        self._failures: Counter[str] = Counter()
        self._failed_in_a_row = 0
        # Unknown keys that were logged
        self._ignored: frozenset[str] = frozenset()
        # Source and reason of the failure that was logged, or None
        self._logged: tuple[str, str] | None = None
        self._polling: asyncio.Task[None] | None = None
        self._between = Pause()
        self._static = static
        self._take(static, "static catalogue")

    def resolve(self, name: str, caller: Caller | None = None) -> Model:
        """The Model of a name or alias. Raises ModelNotFound, or RegistryUnavailable before the first answer."""
        model = self._fleet.by_name.get(name)
        if model is None:
            if self.awaited:
                raise RegistryUnavailable(name)
            known = (model.name for model in self._fleet.served.values() if may_use(caller, model))
            raise ModelNotFound(name, list(islice(known, 11)))
        return model

    def replace_static(self, catalogue: Catalogue) -> None:
        """Apply a reloaded static catalogue, unless a registry has answered."""
        fields = {"models": len(catalogue), "serving": self.source, **changes(self._static, catalogue)}
        logger.info("the static catalogue was reloaded", extra={"fields": fields})
        changed, self._static = catalogue != self._static, catalogue
        if changed and self._last_good is None:
            self._take(catalogue, "static catalogue")
            self._on_change()

    @property
    def awaited(self) -> bool:
        """Whether a registry is set and has not given a catalogue yet."""
        return self._client is not None and self._last_good is None

    @property
    def source(self) -> str:
        if self._last_good is None:
            return "static"
        return "registry" if "catalogue" in self._live else "stale"

    def status(self) -> RegistryStatus:
        return RegistryStatus(self.source, len(self._fleet.models), self._last_success, dict(self._failures))

    async def start(self) -> None:
        """The first poll, before the first request; if it fails, the static catalogue is served."""
        if self._client is None:
            return
        try:
            async with asyncio.timeout(self._cold_start):
                await self.refresh()
        except TimeoutError:
            self._failed(RegistryError("timeout", f"no answer within {self._cold_start:.0f} s of the start"))

    async def run(self) -> None:
        """Poll until cancelled."""
        while self._client is not None:
            await self._between.wait(self._pause())
            await self.refresh()

    def poll_now(self) -> None:
        """Poll without further wait: the registry has another catalogue."""
        self._between.end()

    def _pause(self) -> float:
        if not self._failed_in_a_row:
            return spread(self._refresh_every, self._rand())
        first = min(FIRST_BACKOFF, self._refresh_every)
        return back_off(self._failed_in_a_row, first, LONGEST_BACKOFF, self._rand())

    async def refresh(self) -> None:
        """Poll once. Concurrent callers wait for the poll under way."""
        if self._polling is None:
            self._polling = asyncio.create_task(self._poll())
            self._polling.add_done_callback(self._polled)
        await asyncio.shield(self._polling)

    def _polled(self, task: asyncio.Task[None]) -> None:
        self._polling = None

    async def _poll(self) -> None:
        try:
            async with asyncio.timeout(self._timeout):
                catalogue = await self._fetch()
        except RegistryError as exc:
            self._failed(exc)
            return
        except TimeoutError:
            self._failed(RegistryError("timeout", f"its answer did not end within {self._timeout:.0f} s"))
            return
        except Exception:
            # The boundary of a background task: it must survive for the next poll.
            logger.exception("polling the registry failed")
            self._failures["internal"] += 1
            self._failed_in_a_row += 1
            return
        self._failed_in_a_row = 0
        self._last_success = time.time()
        if catalogue is not None:
            if self.source != "registry" or self._logged:
                logger.info("the registry answers", extra={"fields": {"models": len(catalogue)}})
            self._logged = None
            self._live["catalogue"] = catalogue
            if catalogue is not self._last_good:
                self._tell_changes(catalogue)
                self._last_good = catalogue
                self._take(catalogue, "registry")
                self._on_change()

    async def _fetch(self) -> Catalogue | None:
        """The registry's catalogue, or the previous one if unchanged; None: keep the current one."""
        assert self._client is not None
        # Not compressed: a few KB could expand to more than the memory.
        headers = {"accept-encoding": "identity"} | ({} if self.etag is None else {"if-none-match": self.etag})
        try:
            async with self._client.stream("GET", "/models", headers=headers, follow_redirects=False) as response:
                content = b"".join(await read_body(response, self._max_bytes))
        except httpx.TimeoutException as exc:
            raise RegistryError("timeout", "it did not answer in time") from exc
        except (httpx.HTTPError, httpx.InvalidURL) as exc:
            raise RegistryError("connect", f"it cannot be reached ({cause_of(exc)})") from exc
        if response.status_code == 304 and self._last_good is not None:
            self._empty_once = False
            return self._last_good
        if response.status_code != 200:
            raise RegistryError("status", f"it answered with the status {response.status_code}")
        # 10,000 entries take about 0.2 s to check: not on the event loop.
        catalogue = await asyncio.to_thread(self._read, content)
        if not catalogue and self._fleet.models and not self._empty_once:
            # An empty catalogue is more often a fault than intended, and a new registry is empty before it is filled:
            # accept it the second time.
            self._empty_once = True
            logger.warning("the registry lists no models; the previous catalogue stays until a second poll agrees")
            return None
        self._empty_once = False
        self.etag = etag_of(response)
        if (
            catalogue == self._last_good
            and catalogue.problems == self._last_good.problems
            and catalogue.warnings == self._last_good.warnings
            and not catalogue.ignored - self._ignored
        ):
            return self._last_good
        return catalogue

    def _read(self, content: bytes) -> Catalogue:
        catalogue = _read(content, self._entry_type)
        self._prepare(catalogue)
        return catalogue

    def _failed(self, error: RegistryError) -> None:
        state = self.source, error.reason
        if state != self._logged:
            if state[0] == "stale" and (self._logged is None or self._logged[0] != "stale"):
                logger.warning("the registry's catalogue is stale, and stays in use until the registry answers")
            if self._logged is None or state[1] != self._logged[1]:
                logger.warning("the registry cannot be used: %s", error, extra={"fields": {"serving": self.source}})
            self._logged = state
        self._failures[error.reason] += 1
        self._failed_in_a_row += 1
        self._empty_once = False

    def _tell_changes(self, catalogue: Catalogue) -> None:
        """Log the changes of the served catalogue; the first one of the registry replaces the static one."""
        before = self._static if self._last_good is None else self._last_good
        if changed := changes(before, catalogue):
            logger.info("the catalogue has changed", extra={"fields": {"models": len(catalogue), **changed}})

    def _take(self, catalogue: Catalogue, source: str) -> None:
        if catalogue.ignored - self._ignored:
            names = ", ".join(sorted(catalogue.ignored)[:_SHOWN_KEYS])
            logger.warning("unknown keys in the registry's entries are ignored: %s", names)
            self._ignored = catalogue.ignored
        for problem in catalogue.problems:
            logger.warning("an entry of the %s is refused: %s", source, problem)
        for warning in catalogue.warnings:
            logger.warning("in the %s: %s", source, warning)
        self._fleet.update(catalogue)


def etag_of(response: httpx.Response) -> str | None:
    """The ETag, if it can be sent back."""
    etag = response.headers.get("etag")
    # Other values are not valid in a request header, or too long.
    return etag if etag is not None and etag.isascii() and etag.isprintable() and len(etag) <= _MAX_ETAG else None


async def read_body(response: httpx.Response, limit: int) -> list[bytes]:
    """The body of an answer, in chunks. Raises RegistryError if it is compressed, or larger than `limit`."""
    if response.headers.get("content-encoding", "identity") != "identity":
        raise RegistryError("garbage", "its answer is compressed, although the router does not accept that")
    size, chunks = 0, []
    async for data in response.aiter_bytes(CHUNK):
        size += len(data)
        if size > limit:
            raise RegistryError("garbage", f"its answer has more than {limit} bytes")
        chunks.append(data)
    return chunks


def _read(content: bytes, entry_type: type[CatalogueEntry]) -> Catalogue:
    try:
        catalogue = parse_catalogue(orjson.loads(content), entry_type, lenient=True)
    except (orjson.JSONDecodeError, CatalogueError) as exc:
        raise RegistryError("garbage", f"its answer is not a catalogue: {exc}") from exc
    if catalogue.problems and not catalogue:
        raise RegistryError("garbage", f"none of its entries can be used, first {catalogue.problems[0]}")
    return catalogue
