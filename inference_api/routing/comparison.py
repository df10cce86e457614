"""Decides whether errors are the fault of a backend or of its requests. Pure.

The answers alone do not show that, nor do those of other backends: a client with a session id, or with a bad request in
every third place, determines which backend gets the bad ones. A random choice rules that out. During a comparison, a
random half of the requests for the backend goes to the others. The backend is at fault only if these get good answers
and it gives none.
"""

from collections.abc import Callable
from enum import Enum, auto
from typing import NamedTuple

from inference_api.routing.backend import Backend
from inference_api.routing.breaker import Owner

# Errors of the backend after which all of its requests go to others, whose good answers may take longer; and errors
# still required after these, so that a short run of bad requests does not decide.
_BEFORE, _AFTER = 3, 1
# Good answers required of others, and how many more for each bad one. If a share p of the requests fails on every
# backend, the probability of a wrong result is at most 0.0002, at p = 0.22.
_GOOD, _GOOD_PER_BAD = 12, 8
# Bad answers of others after which the requests are at fault.
_BAD = 3
# Seconds; then the comparison ends without a result.
_LONGEST = 600.0


class Fault(Enum):
    BACKEND = auto()
    REQUESTS = auto()


class Comparison:
    """Counts the results of requests for a backend: those that it got, and those that went to others."""

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
        """Record an answer of the backend. None: no result yet."""
        if good:
            return Fault.REQUESTS
        if self._enough:
            self._after += 1
        else:
            self._before += 1
        return Fault.BACKEND if self._after >= _AFTER else None

    def other(self, good: bool) -> Fault | None:
        """Record an answer of another backend in its place."""
        if good:
            self._good += 1
        else:
            self._bad += 1
        return Fault.REQUESTS if self._bad >= _BAD else None


class Sample(NamedTuple):
    """An attempt that counts in a comparison: the compared backend, and the one that gets the attempt."""

    of: Backend
    on: Backend


class Comparisons:
    """The running comparisons. `samples`: owner -> attempt that counts in one; nearly always empty."""

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
        """The backend for a request that balancing gave to a compared one; `other()` chooses an alternative."""
        comparison, _ = self._open[backend]
        chosen = backend if comparison.keeps(self._rand()) else other() or backend
        self.samples[owner] = Sample(backend, chosen)
        return chosen

    def result(self, owner: Owner, on: Backend, good: bool) -> tuple[Backend, Fault] | None:
        """Record the answer to an attempt. Returns the compared backend if this decides its comparison."""
        sample = self.samples.pop(owner, None)
        if sample is None or sample.on is not on:
            return None
        comparison, _ = self._open[sample.of]
        fault = comparison.own(good) if on is sample.of else comparison.other(good)
        return None if fault is None else (sample.of, fault)
