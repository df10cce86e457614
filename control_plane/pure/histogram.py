"""Percentiles of sums: a count per logarithmic bucket, as in DDSketch. Two histograms add up to that of both.

The bucket `i` has the values from BASE^(i-1) to BASE^i; its middle is at most ERROR off, whatever the values are. A
histogram is one large integer, WIDTH bits for each count, so that adding two is one addition: a question about a month
adds tens of thousands.
"""

import math
from collections.abc import Iterator, Sequence

ERROR = 0.05
BASE = (1 + ERROR) / (1 - ERROR)
_LOG = math.log(BASE)
# What is shorter or longer counts as these.
SHORTEST, LONGEST = 0.001, 1e8
# Bits of a count
WIDTH = 40
_BYTES = WIDTH // 8
_MASK = (1 << WIDTH) - 1
QUANTILES = (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))


def bucket(value: float) -> int:
    return math.ceil(math.log(min(max(value, SHORTEST), LONGEST)) / _LOG)


_LOWEST = bucket(SHORTEST)


def middle(index: int) -> float:
    """The value that differs from each in the bucket by ERROR at most."""
    return float(2 * BASE**index / (1 + BASE))


def single(index: int, count: int = 1) -> int:
    """The histogram of `count` values in one bucket."""
    return count << WIDTH * (index - _LOWEST)


def dump(histogram: int) -> bytes | None:
    """The first bucket that has values, and the counts from there on; None for no values."""
    if not histogram:
        return None
    first = ((histogram & -histogram).bit_length() - 1) // WIDTH
    counts = histogram >> WIDTH * first
    return bytes((first,)) + counts.to_bytes((counts.bit_length() + 7) // 8, "little")


def load(data: bytes | None) -> int:
    return 0 if data is None else int.from_bytes(data[1:], "little") << WIDTH * data[0]


class Sum:
    """Adds histograms up as they are stored: those that begin with the same bucket without their place."""

    __slots__ = ("_by_first",)

    def __init__(self) -> None:
        self._by_first: dict[int, int] = {}

    def add(self, data: bytes | None) -> None:
        if data is not None:
            first = data[0]
            self._by_first[first] = self._by_first.get(first, 0) + int.from_bytes(data[1:], "little")

    def count(self, index: int | None, number: int) -> None:
        """`number` of values in one bucket."""
        if index is not None:
            first = index - _LOWEST
            self._by_first[first] = self._by_first.get(first, 0) + number

    @property
    def total(self) -> int:
        return sum(counts << WIDTH * first for first, counts in self._by_first.items())


def counts_of(histogram: int) -> Iterator[tuple[int, int]]:
    """(bucket, count) from the lowest, of those that have values."""
    index = _LOWEST
    while histogram:
        if count := histogram & _MASK:
            yield index, count
        histogram >>= WIDTH
        index += 1


def quantiles(histogram: int, wanted: Sequence[float]) -> list[float | None]:
    """`wanted`: from the smallest, each within 0 and 1. None for no values."""
    found: list[float | None] = []
    ordered = list(counts_of(histogram))
    total, seen, place = sum(count for _, count in ordered), 0, -1
    for share in wanted:
        rank = share * (total - 1)
        while place + 1 < len(ordered) and seen <= rank:
            place += 1
            seen += ordered[place][1]
        found.append(middle(ordered[place][0]) if ordered else None)
    return found


def percentiles(histogram: int) -> dict[str, int | float | None]:
    """As answers show them: `{"p50": 800, "p95": 2300, "p99": 4100}`."""
    found = quantiles(histogram, [share for _, share in QUANTILES])
    return {name: None if value is None else _shown(value) for (name, _), value in zip(QUANTILES, found, strict=True)}


def _shown(value: float) -> int | float:
    """Digits that the error leaves a meaning."""
    return round(value) if value >= 10 else round(value, 2)
