"""Decides whether errors are the fault of a backend or of the requests that it was given. Pure.

The answers alone cannot tell, nor can those of the other backends: who sends a session id, or a bad request in every
third place, decides which backend meets the bad ones. A random choice cannot be decided by anybody. While a backend is
compared, a random half of the requests meant for it goes to the others instead. Only where these get good answers and
it gives none is it the backend.
"""

from collections.abc import Callable
from enum import Enum, auto
from typing import NamedTuple

from inference_api.routing.backend import Backend
from inference_api.routing.breaker import Owner

# Errors that a backend gives until its requests all go to others, whose good answers may take longer; and that it still
# has to give after these, or it would be blamed for bad requests that came in a short run.
_BEFORE, _AFTER = 3, 1
# Good answers of others that are needed, and how many more for each bad one. Where a share p of the requests is bad
# wherever it goes, the result is wrong with a probability of 0.0002 at most, which is at p = 0.22.
_GOOD, _GOOD_PER_BAD = 12, 8
# Bad answers of others after which it is the requests.
_BAD = 3
# Seconds; what has not shown by then is not shown.
_LONGEST = 600.0


class Fault(Enum):
    BACKEND = auto()
    REQUESTS = auto()


class Comparison:
    """Counts what became of the requests meant for a backend: of those it got, and of those that others got."""

    __slots__ = ("_after", "_bad", "_before", "_good")

    def __init__(self) -> None:
        self._before = 0
        self._after = 0
        self._good = 0
        self._bad = 0

    @property
    def _enough(self) -> bool:
        return self._before >= _BEFORE and self._good >= _GOOD + _GOOD_PER_BAD * self._bad

    def keeps(self, random: float) -> bool:
        """Whether the backend itself gets the next request; `random` is in [0, 1)."""
        return (self._before < _BEFORE or self._enough) and random < 0.5

    def own(self, good: bool) -> Fault | None:
        """The backend has answered one. None: it does not show yet."""
        if good:
            return Fault.REQUESTS
        if self._enough:
            self._after += 1
        else:
            self._before += 1
        return Fault.BACKEND if self._after >= _AFTER else None

    def other(self, good: bool) -> Fault | None:
        """Another has answered one that was meant for it."""
        if good:
            self._good += 1
        else:
            self._bad += 1
        return Fault.REQUESTS if self._bad >= _BAD else None


class Sample(NamedTuple):
    """An attempt that counts in a comparison: of which backend, and on which it is made."""

    of: Backend
    on: Backend


class Comparisons:
    """Those that are going on. `samples`: by whom each attempt that counts in one is made; empty nearly always."""

    def __init__(self, rand: Callable[[], float]) -> None:
        self._rand = rand
        self._open: dict[Backend, tuple[Comparison, float]] = {}
        self.samples: dict[Owner, Sample] = {}

    def begin(self, backend: Backend, now: float) -> None:
        self._open[backend] = Comparison(), now
        backend.compared = True

    def end(self, backend: Backend) -> None:
        del self._open[backend]
        backend.compared = False
        for owner in [owner for owner, sample in self.samples.items() if sample.of is backend]:
            del self.samples[owner]

    def overdue(self, now: float) -> list[Backend]:
        return [backend for backend, (_, began) in self._open.items() if now - began > _LONGEST]

    def assign(self, backend: Backend, other: Callable[[], Backend | None], owner: Owner) -> Backend:
        """Who gets a request that is meant for one that is compared; `other()`: who would, if not that one."""
        comparison, _ = self._open[backend]
        chosen = backend if comparison.keeps(self._rand()) else other() or backend
        self.samples[owner] = Sample(backend, chosen)
        return chosen

    def result(self, owner: Owner, on: Backend, good: bool) -> tuple[Backend, Fault] | None:
        """An attempt has had its answer. The backend that it was a sample of, if it shows now whose fault it is."""
        sample = self.samples.pop(owner, None)
        if sample is None or sample.on is not on:
            return None
        comparison, _ = self._open[sample.of]
        fault = comparison.own(good) if on is sample.of else comparison.other(good)
        return None if fault is None else (sample.of, fault)
