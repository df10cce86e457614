"""The numbers of a metric: one cell per set of labels."""

from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from itertools import accumulate
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Count:
    """A number that grows."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class Histogram:
    """Counts per bucket, and the sum."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def cumulative(self) -> list[int]:
        """The cumulative counts per bound, and the total."""
        return list(accumulate(self.counts))


class Series(dict[K, V], Generic[K, V]):
    """Cells by labels, created on first use.

    `keep`: whether to keep the cell of these labels. Others get a temporary cell: a request that ends after its model
    was removed must not restore the series.
    """

    def __init__(self, make: Callable[[K], V], keep: Callable[[K], bool] = lambda key: True) -> None:
        super().__init__()
        self._make = make
        self._keep = keep

    def __missing__(self, key: K) -> V:
        cell = self._make(key)
        if self._keep(key):
            self[key] = cell
        return cell

    def forget(self, keep: Callable[[K], bool] | None = None) -> None:
        """Drop cells that are no longer kept. `keep`: a faster test with the same result."""
        keep = keep or self._keep
        for key in [key for key in self if not keep(key)]:
            del self[key]

    def snapshot(self) -> dict[K, V]:
        """A copy for a scrape, which may run on the thread of OPS_PORT while the event loop adds a cell.

        A dict is copied in one go. A list of its items is not: it makes a tuple for each, that may start a garbage
        collection, and that may let the other thread run.
        """
        return dict(self)
