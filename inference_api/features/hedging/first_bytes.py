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
    """The latest `size` of them; below `least` nothing is known. Adding one takes the same time at any size.

    `skips`: of how many requests the first bytes may be left out after one, when there are enough.
    """

    __slots__ = ("_above", "_at", "_counts", "_latest", "_least", "_size", "_skips", "p95", "skipped")

    def __init__(self, size: int = 250, least: int = 100, skips: int = 7) -> None:
        self._size = size
        self._least = least
        self._skips = skips
        self._latest: deque[int] = deque()
        self._counts = [0] * (_LAST + 1)
        # The bucket of the percentile, and how many are in those above it
        self._at = self._above = 0
        # Of how many the caller may keep quiet until the next one: once there are enough, a few of them say the same.
        self.skipped = 0
        # Seconds, rounded up; None: not known yet
        self.p95: float | None = None

    def add(self, seconds: float) -> None:
        bucket = 0 if seconds <= _SHORTEST else min(int(log(seconds / _SHORTEST) / _STEP), _LAST)
        latest, counts, at = self._latest, self._counts, self._at
        latest.append(bucket)
        counts[bucket] += 1
        above = self._above + (bucket > at)
        size = len(latest)
        if size > self._size:
            oldest = latest.popleft()
            counts[oldest] -= 1
            above -= oldest > at
            size -= 1
        if size >= self._least:
            self.skipped = self._skips
        most = size // _SHARE
        while above > most:
            at += 1
            above -= counts[at]
        while at and above + counts[at] <= most:
            above += counts[at]
            at -= 1
        self._above = above
        if at != self._at or size == self._least:
            self._at = at
            if size >= self._least:
                self.p95 = _SHORTEST * exp((at + 1) * _STEP)
