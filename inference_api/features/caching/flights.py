"""Equal requests at the same time: one of them leads and asks a backend, the others wait for its answer."""

import asyncio
from collections import deque

from inference_api.features.caching.answers import CachedAnswer
from inference_api.features.caching.keys import Digest

# What a request that waits gets: the answer, or whether it leads now; False: it asks for itself.
Verdict = CachedAnswer | bool


class Flights:
    """By key, the requests that wait for the one that leads. Every leader ends with one of `land`, `pass_on`, `part`.

    A leader that leaves, or fails, passes on to the one that has waited longest, so that no request waits for one that
    is not there.
    """

    def __init__(self) -> None:
        self._waiting: dict[Digest, deque[asyncio.Future[Verdict]]] = {}

    def lead(self, key: Digest) -> bool:
        """Whether this request leads; otherwise there is one already."""
        if key in self._waiting:
            return False
        self._waiting[key] = deque()
        return True

    async def wait(self, key: Digest, seconds: float) -> Verdict:
        """Raises TimeoutError."""
        waiter: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
        self._waiting[key].append(waiter)
        try:
            async with asyncio.timeout(seconds):
                return await waiter
        except BaseException:
            if waiter.done() and not waiter.cancelled() and waiter.result() is True:
                # It was made the leader in the moment in which it left.
                self.pass_on(key)
            raise

    def land(self, key: Digest, answer: CachedAnswer) -> None:
        """All that wait get this answer."""
        self._end(key, answer)

    def part(self, key: Digest) -> None:
        """The answer is not for others: each asks for itself."""
        self._end(key, False)

    def pass_on(self, key: Digest) -> None:
        """There was no answer: the next one leads."""
        waiting = self._waiting[key]
        while waiting:
            waiter = waiting.popleft()
            if not waiter.done():
                waiter.set_result(True)
                return
        del self._waiting[key]

    def _end(self, key: Digest, verdict: Verdict) -> None:
        for waiter in self._waiting.pop(key):
            if not waiter.done():
                waiter.set_result(verdict)

    def __len__(self) -> int:
        return len(self._waiting)


class Leading:
    """The part of one leader: it ends once."""

    __slots__ = ("_flights", "_is_over", "_key")

    def __init__(self, flights: Flights, key: Digest) -> None:
        self._flights = flights
        self._key = key
        self._is_over = False

    def land(self, answer: CachedAnswer) -> None:
        if not self._is_over:
            self._is_over = True
            self._flights.land(self._key, answer)

    def part(self) -> None:
        if not self._is_over:
            self._is_over = True
            self._flights.part(self._key)

    def pass_on(self) -> None:
        if not self._is_over:
            self._is_over = True
            self._flights.pass_on(self._key)
