"""The cached answers: until their time is over, and within a bound of bytes, the least recently used one goes first."""

from collections.abc import Callable
from time import monotonic
from typing import Any

from cachetools import TLRUCache

from inference_api.features.caching.keys import Digest
from inference_api.models import Extra
from inference_api.observe.account import NO_COUNTS
from inference_api.relay.replay import Replay
from inference_api.relay.usage import Counts
from inference_api.routing.fleet import Model

# Bytes of a key, and of all the objects around an answer
OVERHEAD = 1024


class CachedAnswer:
    """A complete answer. `extra`: headers of layers, beside those of its backend.

    `made`: when it was stored, in seconds of the clock of its Answers; `until`: its end. `tokens` and `cost` (10^-9 of
    CURRENCY) are those of the request that it answered first, `ran` is the model that did, if it is another than the
    client asked for; None: not known. `votes`: as noted for the Record of that request, if there was a vote.
    """

    __slots__ = ("cost", "extra", "made", "ran", "replay", "tokens", "until", "votes")

    def __init__(
        self,
        replay: Replay,
        extra: tuple[Extra, ...],
        made: float,
        until: float,
        ran: Model | None = None,
        tokens: Counts = NO_COUNTS,
    ) -> None:
        self.replay = replay
        self.extra = extra
        self.made = made
        self.until = until
        self.ran = ran
        self.tokens = tokens
        self.cost: int | None = None
        self.votes: str | None = None


class Answers(TLRUCache[Digest, CachedAnswer]):
    """Answers by key, at most `size` bytes of them, keys and objects included.

    `bytes`, `entries` and `evicted` are plain numbers, for a scrape on another thread.
    """

    def __init__(self, size: int, clock: Callable[[], float] = monotonic) -> None:
        super().__init__(size, lambda key, answer, now: answer.until, clock, _size_of)
        self.bytes = self.entries = 0
        # By reason
        self.evicted = {"ttl": 0, "size": 0}

    def put(self, key: Digest, answer: CachedAnswer) -> None:
        self[key] = answer
        self._count()

    def find(self, key: Digest) -> CachedAnswer | None:
        found: CachedAnswer | None = self.get(key)
        return found

    def expire(self, time: float | None = None) -> Any:
        gone = super().expire(time)
        if gone:
            self.evicted["ttl"] += len(gone)
            self._count()
        return gone

    def popitem(self) -> tuple[Digest, CachedAnswer]:
        item: tuple[Digest, CachedAnswer] = super().popitem()
        self.evicted["size"] += 1
        return item

    def _count(self) -> None:
        self.bytes, self.entries = int(self.currsize), len(self)


def _size_of(answer: CachedAnswer) -> int:
    replay = answer.replay
    return len(replay.body) + len(replay.lines) + OVERHEAD
