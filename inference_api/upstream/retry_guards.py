"""Guards against harmful retries: a budget, a record of requests that kill backends, and Retry-After pauses.

Pure, and used only after a failed attempt.
"""

import os
from collections.abc import Callable, Collection
from datetime import UTC
from email.utils import parsedate_to_datetime
from hashlib import blake2b
from math import ceil
from typing import NamedTuple

from cachetools import TTLCache

from inference_api.models import Outcome, RawHeaders, Reply
from inference_api.routing.backend import Backend

# Bytes at either end of a body that identify it
_HASHED = 2 * 1024 * 1024
# Envoy's minimum: enough for a small model to survive a backend's restart.
_LEAST = 3
# Seconds; longer Retry-After pauses are cut to this.
_LONGEST_PAUSE = 30.0
# Seconds, and bodies.
_MEMORY = 60.0
_BODIES = 1024
# Seconds. A backend that dies breaks all of its connections at once, which counts as one death.
_ONE_DEATH = 1.0


class RetryBudget:
    """Limits the concurrent retries of a model to `share` of its requests in flight, but at least three."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._drawn: dict[str, int] = {}

    def draw(self, model: str, in_flight: int) -> "Permit | None":
        """A permit for one retry, or None if the budget is spent."""
        drawn = self._drawn.get(model, 0)
        if drawn >= max(_LEAST, int(self._share * in_flight)):
            return None
        self._drawn[model] = drawn + 1
        return Permit(lambda: self._return(model))

    def drawn(self, model: str) -> int:
        return self._drawn.get(model, 0)

    def _return(self, model: str) -> None:
        self._drawn[model] -= 1
        if not self._drawn[model]:
            del self._drawn[model]


class Permit:
    """Permission for one retry, from before it is sent to the end of its answer's body."""

    __slots__ = ("_on_release",)

    def __init__(self, on_release: Callable[[], None] | None) -> None:
        self._on_release = on_release

    def release(self) -> None:
        """Return it to the budget; idempotent."""
        on_release, self._on_release = self._on_release, None
        if on_release is not None:
            on_release()

    def ended(self, reply: Reply, outcome: Outcome) -> None:
        """For `Reply.on_end`."""
        self.release()


# For a free retry
FREE = Permit(None)


class _Deaths(NamedTuple):
    total: int
    # Label of a backend -> time of its last death over this body
    last: dict[str, float]


class PoisonGuard:
    """Remembers requests over which backends died.

    Stores a keyed digest of each body, so that a memory dump reveals no prompt.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._key = os.urandom(32)
        self._known: TTLCache[bytes, _Deaths] = TTLCache(_BODIES, _MEMORY, timer=clock)

    def record(self, body: bytes, backends: Collection[str]) -> bool:
        """Record that these backends (by label) died over `body`; True: it is poison now."""
        digest, now = self._digest(body), self._clock()
        count, last = self._known.get(digest, _Deaths(0, {}))
        for backend in backends:
            if now - last.get(backend, -_ONE_DEATH) >= _ONE_DEATH:
                count += 1
                last = last | {backend: now}
        # A record is kept for a minute, so its deaths are at most a minute apart.
        self._known[digest] = _Deaths(count, last)
        return count > 1

    def is_poison(self, body: bytes) -> bool:
        """Whether two backends died over it, at most a minute apart."""
        if not self._known:
            return False
        deaths = self._known.get(self._digest(body))
        return deaths is not None and deaths.total > 1

    def __len__(self) -> int:
        return len(self._known)

    def _digest(self, body: bytes) -> bytes:
        """Digest of a body; only both ends of a large one, since all of it would block the event loop."""
        digest = blake2b(b"%d" % len(body), digest_size=16, key=self._key)
        digest.update(body if len(body) <= 2 * _HASHED else body[:_HASHED] + body[-_HASHED:])
        return digest.digest()


class RetryAfter(dict[Backend, float]):
    """Backends that sent Retry-After, and the ends of their pauses; nearly always empty."""

    def pause(self, backend: Backend, seconds: float, now: float) -> None:
        self[backend] = now + min(seconds, _LONGEST_PAUSE)

    def paused(self, now: float) -> list[Backend]:
        """The backends that pause at `now`; drops the others."""
        for backend in [backend for backend, until in self.items() if until <= now]:
            del self[backend]
        return list(self)


def retry_after(headers: RawHeaders, now: float) -> int | None:
    """The seconds that a Retry-After header asks for, or None; `now` is Unix seconds.

    A date is compared with the answer's own Date, if it has one: the clock of its host may be wrong.
    """
    value = _value_of(headers, b"retry-after")
    if value.isdigit():
        return int(value) if len(value) < 10 else None
    until = _unix(value)
    if until is None:
        return None
    said = _unix(_value_of(headers, b"date"))
    return max(0, ceil(until - (now if said is None else said)))


def _value_of(headers: RawHeaders, name: bytes) -> bytes:
    return next((value for key, value in headers if key == name), b"")


def _unix(date: bytes) -> float | None:
    """Unix seconds of an HTTP date in any of its three forms, or None. It is in UTC, whether it says so or not."""
    # Longer text is not a date.
    if not date or len(date) > 64:
        return None
    try:
        parsed = parsedate_to_datetime(date.decode("ascii"))
        return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None
