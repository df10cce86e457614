"""How long a model takes to its first byte, at most, in 95 of 100 requests. Pure."""

from collections import deque
from math import exp, log

# Width of a bucket, as a ratio: what is reported is at most 5 % too high.
_STEP = log(1.05)
_SHORTEST, _LONGEST = 0.001, 3600.0
_LAST = int(log(_LONGEST / _SHORTEST) / _STEP)
# One of so many is above the percentile.
_SHARE = 20


class FirstBytes:
    """The latest `size` of them; below `least` nothing is known. Adding one takes the same time at any size."""

    __slots__ = ("_above", "_at", "_counts", "_latest", "_least", "_size")

    def __init__(self, size: int = 1000, least: int = 100) -> None:
        self._size = size
        self._least = least
        self._latest: deque[int] = deque()
        self._counts = [0] * (_LAST + 1)
        # The bucket of the percentile, and how many are in those above it
        self._at = self._above = 0

    def add(self, seconds: float) -> None:
        bucket = 0 if seconds <= _SHORTEST else min(int(log(seconds / _SHORTEST) / _STEP), _LAST)
        latest, counts = self._latest, self._counts
        latest.append(bucket)
        counts[bucket] += 1
        self._above += bucket > self._at
        if len(latest) > self._size:
            oldest = latest.popleft()
            counts[oldest] -= 1
            self._above -= oldest > self._at
        most = len(latest) // _SHARE
        while self._above > most:
            self._at += 1
            self._above -= counts[self._at]
        while self._at and self._above + counts[self._at] <= most:
            self._above += counts[self._at]
            self._at -= 1

    @property
    def p95(self) -> float | None:
        """Seconds, rounded up; None: not known yet."""
        return None if len(self._latest) < self._least else _SHORTEST * exp((self._at + 1) * _STEP)
