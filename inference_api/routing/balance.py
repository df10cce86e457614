"""Choose a backend. Four pure balancers: in-flight counts, a key and a source of randomness in, a backend out.

A balancer caches what it precomputes for a set of backends until it gets another tuple.
"""

import random
from bisect import bisect
from collections.abc import Collection, Iterator, Sequence
from hashlib import blake2b, shake_128
from heapq import heapify, heapreplace
from math import log, sqrt
from operator import attrgetter
from struct import unpack
from typing import Any, Generic

from inference_api.routing.balancer import BackendView, Balancer, MakeBalancer, R, Random, running_weights

# Load of a full backend, relative to its share: Mirrokni, Thorup, Zadimoghaddam, "Consistent Hashing with Bounded
# Loads" (2018). A lower bound spills sooner and loses prefixes, a higher one makes hot backends.
_BOUND = 1.25
# Allowance on top, in square roots of its share, which is the random scatter of counts: one router of many has few
# requests at each backend, and without this, noise moves its keys. With 2, the fullest backend gets too much.
_NOISE = 1.0
# Points on the ring for a backend of average weight, and places of a key; the place with the nearest point decides. The
# keys of a backend are then 4 % off its share, or 14 % with 8 points each in a ring of many backends (9 and 36 % with
# one place): Appleton, O'Reilly, "Multi-probe consistent hashing" (2015).
_POINTS = 128
_PROBES = 4
_PLACES = f">{_PROBES}Q"
# From so many backends on, the total in flight is not counted for every choice, see PrefixAffinity.
_COUNTED = 32
_AROUND = 1 << 64
_in_flight = attrgetter("origin.in_flight")


class RoundRobin(Generic[R]):
    """Each backend in turn, heavier ones more often, evenly spread."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._backends: Sequence[R] = ()
        self._slots: list[R] = []
        self._next = 0

    def choose(self, backends: Sequence[R], key: str, tried: Collection[R] = ()) -> R | None:
        if backends is not self._backends:
            self._rebuild(backends)
        if not self._slots:
            return None
        turn = self._next
        if tried:
            # A retry takes no turn: otherwise the backend after a bad one would get all of its retries.
            return next((backend for backend in self._slots[turn:] + self._slots[:turn] if backend not in tried), None)
        self._next = turn + 1 if turn + 1 < len(self._slots) else 0
        return self._slots[turn]

    def _rebuild(self, backends: Sequence[R]) -> None:
        self._backends = backends
        self._slots = _schedule(backends)
        # Random start: routers that start together, or lose the same backend, must not run in step.
        self._next = int(self._random() * len(self._slots))


class LeastInFlight(Generic[R]):
    """The backend with the fewest in flight for its weight; random among equals, to not favour the first."""

    def __init__(self, random: Random) -> None:
        self._random = random

    def choose(self, backends: Sequence[R], key: str, tried: Collection[R] = ()) -> R | None:
        if tried:
            backends = [backend for backend in backends if backend not in tried]
        if not backends:
            return None
        loads = self.loads(backends)
        least = min(loads)
        equals = [backend for backend, load in zip(backends, loads, strict=True) if load == least]
        return equals[_draw(running_weights(equals), self._random())]

    def loads(self, backends: Sequence[R]) -> list[float]:
        """Load by weight, per backend."""
        return [(backend.origin.in_flight + backend.extra) / backend.weight for backend in backends]


class TwoChoices(Generic[R]):
    """The less loaded of two random backends: nearly as even as least in flight, without reading all of them."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._backends: Sequence[R] = ()
        # Running sums of the weights; None when all weights are equal.
        self._ends: list[float] | None = None

    def choose(self, backends: Sequence[R], key: str, tried: Collection[R] = ()) -> R | None:
        if tried:
            left = type(self)(self._random)
            return left.choose([backend for backend in backends if backend not in tried], key)
        if backends is not self._backends:
            self._backends, self._ends = backends, self.ends(backends)
        n = len(backends)
        if n < 2:
            return backends[0] if n else None
        if self._ends is not None:
            return self._choose_weighted(backends, self._ends)
        i = int(self._random() * n)
        j = int(self._random() * (n - 1))
        first, second = backends[i], backends[j + (j >= i)]
        return first if first.origin.in_flight + first.extra <= second.origin.in_flight + second.extra else second

    def ends(self, backends: Sequence[R]) -> list[float] | None:
        """Running sums of the weights, or None if all are equal, for a faster choice."""
        return None if _alike(backends) else running_weights(backends)

    def _choose_weighted(self, backends: Sequence[R], ends: list[float]) -> R:
        i = _draw(ends, self._random())
        first = backends[i]
        # The second is drawn from the others, by weight; drawing until they differ could take long.
        at = self._random() * (ends[-1] - first.weight)
        if at >= ends[i] - first.weight:
            at += first.weight
        j = bisect(ends, at, 0, len(ends) - 1)
        # Only rounding can yield the first again.
        second = backends[j if j != i else i - 1]
        return first if self.is_lighter(first, second) else second

    def is_lighter(self, first: R, second: R) -> bool:
        """Whether the first would be less loaded than the second with this request."""
        # (in_flight + 1) / weight: how loaded each would be with this request.
        load, other = first.origin.in_flight + first.extra, second.origin.in_flight + second.extra
        return (load + 1) * second.weight <= (other + 1) * first.weight


class PrefixAffinity(Generic[R]):
    """Consistent hashing with bounded loads: equal keys go to the same backend, and its prefix cache, unless it is
    full; then to the one that would get its keys if it left. Routers agree without communication, and adding or
    removing a backend moves only its own share of the keys.

    With s its share of all that is in flight, this request included, a backend is full at `_BOUND` s + `_NOISE`
    sqrt(s), rounded up. An idle home needs no total. Otherwise s is counted, and from `_COUNTED` backends on only once
    in n / `_COUNTED` choices, so that the cost of a choice does not grow with n: s is then about 1 / `_COUNTED` off.
    """

    def __init__(self, random: Random) -> None:
        self._keyless: TwoChoices[R] = TwoChoices(random)
        self._backends: Sequence[R] = ()
        self._points: list[int] = []
        self._owners: list[R] = []
        self._weight = 0.0
        self._total = 0
        # Choices since the last count.
        self._age = 0

    def choose(self, backends: Sequence[R], key: str, tried: Collection[R] = ()) -> R | None:
        if backends is not self._backends:
            self._rebuild(backends)
        self._age += 1
        if not key or not backends:
            return self._keyless.choose(backends, key, tried)
        digest = blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8 * _PROBES).digest()
        places = unpack(_PLACES, digest)
        home = self._home(places)
        if not tried and not home.origin.in_flight:
            return home
        unit = (self._count() + 1) / self._weight
        if not tried and _has_room(home, unit):
            return home
        # At least a fifth of the ring has room.
        for owner in self._around(places):
            if owner not in tried and _has_room(owner, unit):
                return owner
        # Only backends that were tried have room.
        return self._keyless.choose(backends, key, tried)

    def _home(self, places: Sequence[int]) -> R:
        points, found, nearest = self._points, 0, _AROUND
        for place in places:
            at = bisect(points, place)
            if points[at] - place < nearest:
                found, nearest = at, points[at] - place
        return self._owners[found]

    def _around(self, places: Sequence[int]) -> Iterator[R]:
        """The owners of the points in the order of distance: each is the choice if those before it left."""
        points, owners = self._points, self._owners
        last = len(points) - 1
        ways = [(points[at] - place, at, place) for place in places for at in [bisect(points, place)]]
        heapify(ways)
        for _ in range(_PROBES * last):
            _, at, place = ways[0]
            yield owners[at]
            if at == last:
                at, place = 0, place - _AROUND
            heapreplace(ways, (points[at + 1] - place, at + 1, place))

    def _count(self) -> int:
        if self._age > len(self._backends) // _COUNTED:
            self._total = sum(map(_in_flight, self._backends))
            self._age = 0
        return self._total

    def _rebuild(self, backends: Sequence[R]) -> None:
        self._backends = backends
        self._weight = sum(backend.weight for backend in backends)
        ring = _ring(backends, self._weight)
        self._points = sorted(ring)
        self._owners = [ring[point] for point in self._points]
        # The first point follows the last.
        self._points += [point + _AROUND for point in self._points[:1]]
        self._owners += self._owners[:1]
        self._age = len(backends)


# Values of `balancing` in an entry
BALANCERS: dict[str, MakeBalancer] = {
    "round_robin": RoundRobin,
    "least_in_flight": LeastInFlight,
    "two_choices": TwoChoices,
    "prefix_affinity": PrefixAffinity,
}


def make_balancer(name: str, random: Random = random.random) -> Balancer[Any]:
    """Make a balancer, one per model. `random` returns floats in [0, 1)."""
    return BALANCERS[name](random)


def _has_room(backend: BackendView, unit: float) -> bool:
    """Whether it may take one more, if `unit` is the fair share of each unit of weight."""
    share = unit * backend.weight
    return backend.origin.in_flight < _BOUND * share + _NOISE * sqrt(share)


def _alike(backends: Sequence[BackendView]) -> bool:
    return len({backend.weight for backend in backends}) <= 1


def _draw(ends: list[float], at: float) -> int:
    """The index of the part that contains `at`, in [0, 1); parts are as wide as the weights."""
    return bisect(ends, at * ends[-1], 0, len(ends) - 1)


def _schedule(backends: Sequence[R]) -> list[R]:
    """One round: each backend at least once, in proportion to its weight, at even distances."""
    if _alike(backends):
        return list(backends)
    slots = max(1024, 4 * len(backends))
    total = sum(backend.weight for backend in backends)
    places: list[tuple[float, int]] = []
    for number, backend in enumerate(backends):
        times = max(1, round(slots * backend.weight / total))
        # Multiples of the golden ratio: spreads the turns of backends of equal weight.
        offset = number * 0.6180339887 % 1
        places += [((turn + offset) / times, number) for turn in range(times)]
    return [backends[number] for _, number in sorted(places)]


def _ring(backends: Sequence[R], total: float) -> dict[int, R]:
    """Point -> owner. The points depend on the URL alone, so every router computes the same ring.

    Their number follows the weight, in a unit that rarely changes, because a change moves most keys: the
    power of 16 next to the mean weight. Beyond 256 backends it is the next power, to build any ring in milliseconds.
    """
    ring: dict[int, R] = {}
    unit = 16 ** round(log(total / min(len(backends), 64), 16)) if backends else 1
    for backend in backends:
        count = max(1, round(_POINTS * backend.weight / unit))
        # shake_128 has any length, and a longer digest begins with the shorter one.
        ring |= dict.fromkeys(unpack(f">{count}Q", shake_128(backend.url.encode()).digest(8 * count)), backend)
    return ring
