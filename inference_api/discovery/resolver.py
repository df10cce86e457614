"""From a host name to addresses: look-ups that do not delay each other, and a cache that outlives the name server.

The event loop's own look-ups share the four threads of libuv, and the C library may block each for half a minute: four
look-ups in one dead zone would stop all others.

    the last answer is fresh         that answer, without a look-up
    it is older                      a look-up; if that takes more than a moment, the last answer
    the look-up fails                the last answer, however old
    there is no last answer          the result of the look-up, or its error

getaddrinfo does not return a TTL: `ttl` is the default of CoreDNS and Envoy. A name whose addresses refuse connections
is looked up sooner.
"""

import asyncio
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Iterable

from cachetools import LRUCache

from inference_api.threads import in_thread

logger = logging.getLogger(__name__)

Resolve = Callable[[str], Awaitable[Iterable[str]]]

TTL = 5.0
# Concurrent look-ups of names that did not hang before; seconds after which a look-up counts as hanging; hanging ones
# that run beside the others. Names whose last look-up hung have separate places, as many as the first number.
_CONCURRENCY, _LATE, _MOST_LATE = 16, 2.0, 96
# Time that a name with known addresses waits for new ones: in seconds, and as a share of the connect timeout.
_MOMENT, _SHARE = 0.25, 0.25
# Seconds from the end of a look-up to the next one, if it failed or its addresses refused connections.
_AGAIN = 1.0
# Names in the cache; the least recently used are dropped. Catalogues rarely have as many.
_NAMES = 16_384


async def resolve(host: str) -> list[str]:
    """The addresses of a host name in the system's order of preference, of the families that this machine has.

    Raises OSError, or UnicodeError for an invalid name.
    """
    # The loopback interface has both families on every machine, and needs no name server.
    local = host == "localhost" or host.endswith(".localhost")
    flags = 0 if local else socket.AI_ADDRCONFIG
    found = await in_thread(lambda: socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=flags), "look-up")
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


class _Answer:
    """The last addresses of a name, and the time from which they are looked up again.

    `used`: for a connection; `failing`: the look-ups since then failed.
    """

    __slots__ = ("addresses", "failing", "since", "until", "used")

    def __init__(self, addresses: list[str], since: float, until: float, used: bool) -> None:
        self.addresses = addresses
        self.since = since
        self.until = until
        self.used = used
        self.failing = False


class Resolver:
    """Looks host names up, with one look-up at a time per name, and caches their addresses.

    `ttl`: seconds for which an answer is fresh. A look-up hangs after `late` seconds. At most `concurrency` others run
    at once, `most_late` hanging ones, and `concurrency` of names that hung the last time, which wait only for each
    other. `clock`: monotonic seconds.
    """

    def __init__(
        self,
        resolve: Resolve = resolve,
        ttl: float = TTL,
        concurrency: int = _CONCURRENCY,
        late: float = _LATE,
        most_late: int = _MOST_LATE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        # Configuration
        self._resolve = resolve
        self._ttl = ttl
        self._timeout = late
        self._clock = clock
        # Shared
        self._answers: LRUCache[str, _Answer] = LRUCache(_NAMES)
        self._under_way: dict[str, tuple[asyncio.Task[list[str]], float]] = {}
        self._slots, self._slow_slots = asyncio.Semaphore(concurrency), asyncio.Semaphore(concurrency)
        self._late_slots = asyncio.Semaphore(most_late)
        # Names whose last look-up hung
        self._slow: LRUCache[str, None] = LRUCache(_NAMES)

    async def addresses(self, host: str, seconds: float | None = None) -> list[str]:
        """The addresses, within so many seconds. Raises OSError or UnicodeError if none was ever found."""
        known = self._answers.get(host)
        if known is None:
            found = await self.look_up(host)
            if not found:
                raise OSError("the name has no address")
            if (known := self._answers.get(host)) is not None:
                known.used = True
            return found
        known.used = True
        if self._clock() < known.until:
            return known.addresses
        look_up, began = self._join(host)
        moment = _MOMENT if seconds is None else min(_MOMENT, _SHARE * seconds)
        left = began + moment - self._clock()
        if left > 0:
            await asyncio.wait({look_up}, timeout=left)
        return self._answers.get(host, known).addresses

    async def look_up(self, host: str) -> list[str]:
        """The result of the running look-up, or of a new one; raises its error."""
        return await asyncio.shield(self._join(host)[0])

    def doubt(self, host: str) -> None:
        """Look the name up again soon, since no connection to its addresses could be made."""
        known = self._answers.get(host)
        if known is not None:
            known.until = min(known.until, known.since + _AGAIN)

    async def aclose(self) -> None:
        """Abandon the running look-ups."""
        tasks = [task for task, _ in self._under_way.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _join(self, host: str) -> tuple[asyncio.Task[list[str]], float]:
        """The running look-up, and its start."""
        under_way = self._under_way.get(host)
        if under_way is None:
            task = asyncio.create_task(self._look_up(host))
            under_way = self._under_way[host] = task, self._clock()
            task.add_done_callback(lambda task: self._ended(host, task))
        return under_way

    async def _look_up(self, host: str) -> list[str]:
        slots = self._slow_slots if host in self._slow else self._slots
        await slots.acquire()
        looking = asyncio.ensure_future(self._resolve(host))
        try:
            await asyncio.wait({looking}, timeout=self._timeout)
            if looking.done():
                self._slow.pop(host, None)
            else:
                self._slow[host] = None
                if slots is self._slots and not self._late_slots.locked():
                    # Its place is for short look-ups.
                    await self._late_slots.acquire()
                    slots.release()
                    slots = self._late_slots
                await asyncio.wait({looking})
            return list(looking.result())
        finally:
            looking.cancel()
            slots.release()

    def _ended(self, host: str, look_up: asyncio.Task[list[str]]) -> None:
        del self._under_way[host]
        # Mark the exception as retrieved: the waiters may have been cancelled.
        error = None if look_up.cancelled() else look_up.exception()
        known, now = self._answers.get(host), self._clock()
        if look_up.cancelled() or error is not None or not look_up.result():
            if known is not None:
                known.until = now + _AGAIN
                self._failed(host, known, error)
            return
        if known is not None and known.failing:
            logger.info("the host %r resolves again", host)
        used = known is not None and known.used
        self._answers[host] = _Answer(look_up.result(), now, now + self._ttl, used)

    def _failed(self, host: str, known: _Answer, error: BaseException | None) -> None:
        # Only names used for connections; `dns` logs its own.
        if known.used and not known.failing:
            known.failing = True
            reason = str(error or "") or "it has no address"
            fields = {"serving": len(known.addresses)}
            logger.warning("the host %r cannot be looked up: %.200s", host, reason, extra={"fields": fields})

    def __repr__(self) -> str:
        return f"<Resolver of {len(self._answers)} names: {len(self._under_way)} look-ups under way>"
