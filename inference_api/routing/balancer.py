"""What a balancing algorithm is, and what it sees of a backend."""

from collections.abc import Callable, Collection, Sequence
from itertools import accumulate
from typing import Any, Protocol, TypeVar


class Load(Protocol):
    """What an address has to do, for all of its models: this router's attempts, and what it reports of others'."""

    @property
    def in_flight(self) -> int: ...
    @property
    def reported(self) -> float: ...


class BackendView(Protocol):
    """What a balancer sees of a backend.

    `weight`: its share of the traffic, above 0. `extra`: requests to be added to its load, because it fails more often
    than others.
    """

    @property
    def url(self) -> str: ...
    @property
    def weight(self) -> float: ...
    @property
    def extra(self) -> int: ...
    @property
    def origin(self) -> Load: ...


R = TypeVar("R", bound=BackendView)
# Floats in [0, 1)
Random = Callable[[], float]


class Balancer(Protocol[R]):
    """Chooses one of `backends` that is not in `tried`, or None when nothing is left.

    Each model has one. `backends` are those that are available; it is the same tuple until they or their weights
    change. `key` is equal for requests with the same beginning, "" unless the model goes by that.
    """

    def choose(self, backends: Sequence[R], key: str, tried: Collection[R] = ()) -> R | None: ...


MakeBalancer = Callable[[Random], Balancer[Any]]


def running_weights(backends: Sequence[BackendView]) -> list[float]:
    """The sums of the weights up to each backend: what a random number is looked up in."""
    return list(accumulate(backend.weight for backend in backends))
