"""The protocols of a balancing algorithm, and of the backends that it chooses from."""

from collections.abc import Callable, Collection, Sequence
from itertools import accumulate
from typing import Any, Protocol, TypeVar


class Load(Protocol):
    """The load of an address, for all of its models: this router's attempts, and the load that the engine reports."""

    @property
    def in_flight(self) -> int: ...
    @property
    def reported(self) -> float: ...


class BackendView(Protocol):
    """The part of a backend that a balancer uses.

    `weight`: its share of the traffic, above 0. `extra`: requests added to its load because it fails more often than
    others.
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
    """Chooses one of `backends` that is not in `tried`, or None if none is left.

    One per model. `backends` are the available ones, as the same tuple until they or their weights change. `key` is
    equal for requests with the same beginning, and "" unless the model's balancing uses it.
    """

    def choose(self, backends: Sequence[R], key: str, tried: Collection[R] = ()) -> R | None: ...


MakeBalancer = Callable[[Random], Balancer[Any]]


def running_weights(backends: Sequence[BackendView]) -> list[float]:
    """The running sums of the weights, for a random choice by bisection."""
    return list(accumulate(backend.weight for backend in backends))
