"""Percentiles of sums: a count per logarithmic bucket, as in DDSketch. Two histograms add up to that of both.

The bucket `i` has the values from BASE^(i-1) to BASE^i; its middle is at most ERROR off, whatever the values are.
"""

import math
from collections.abc import Mapping, MutableMapping, Sequence

import orjson

ERROR = 0.05
BASE = (1 + ERROR) / (1 - ERROR)
_LOG = math.log(BASE)
# What is shorter counts as this.
SHORTEST = 0.001
# Counts by bucket, as JSON has them
Counts = MutableMapping[str, int]
QUANTILES = (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))


def bucket(value: float) -> int:
    return math.ceil(math.log(max(value, SHORTEST)) / _LOG)


def middle(index: int) -> float:
    """The value that differs from each in the bucket by ERROR at most."""
    return float(2 * BASE**index / (1 + BASE))


def add(counts: Counts, other: Mapping[str, int]) -> None:
    get = counts.get
    for index, count in other.items():
        counts[index] = get(index, 0) + count


def dump(counts: Mapping[str, int]) -> str | None:
    """Sparse JSON; None for no values."""
    return orjson.dumps(counts).decode() if counts else None


def quantiles(counts: Mapping[str, int], wanted: Sequence[float]) -> list[float | None]:
    """`wanted`: from the smallest, each within 0 and 1. None for no values."""
    found: list[float | None] = []
    ordered = sorted((int(index), count) for index, count in counts.items())
    total, seen, place = sum(counts.values()), 0, -1
    for share in wanted:
        rank = share * (total - 1)
        while place + 1 < len(ordered) and seen <= rank:
            place += 1
            seen += ordered[place][1]
        found.append(middle(ordered[place][0]) if ordered else None)
    return found


def percentiles(counts: Mapping[str, int]) -> dict[str, int | float | None]:
    """As answers show them: `{"p50": 800, "p95": 2300, "p99": 4100}`."""
    found = quantiles(counts, [share for _, share in QUANTILES])
    return {name: None if value is None else _shown(value) for (name, _), value in zip(QUANTILES, found, strict=True)}


def _shown(value: float) -> int | float:
    """Digits that the error leaves a meaning."""
    return round(value) if value >= 10 else round(value, 2)
