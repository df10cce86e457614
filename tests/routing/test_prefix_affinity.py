"""What prefix affinity is for, by simulation: prefix-cache hits, bounded load, and few keys that move."""

import heapq
from collections import Counter, OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from math import ceil, sqrt
from random import Random
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference_api.routing.affinity import affinity_key
from inference_api.routing.backend import Backend
from inference_api.routing.balance import make_balancer
from inference_api.routing.balancer import Balancer

KEYS = [affinity_key("m", {}, f"session-{number}") for number in range(10_000)]
BLOCK = 16


def backends_of(*weights: float) -> tuple[Backend, ...]:
    return tuple(Backend("m", f"http://r{number}:8000", weight) for number, weight in enumerate(weights))


def affinity(seed: int = 1) -> Balancer[Backend]:
    return make_balancer("prefix_affinity", Random(seed).random)


def homes(backends: Sequence[Backend]) -> dict[str, str]:
    """The URL that each key goes to while nothing is in flight."""
    chooser, found = affinity(), {}
    for key in KEYS:
        home = chooser.choose(backends, key)
        assert home is not None
        found[key] = home.url
    return found


def capacity(backend: Backend, backends: Sequence[Backend]) -> int:
    """What it may hold with the next request: 1.25 of its share of all, and the share's square root, rounded up."""
    requests = sum(other.origin.in_flight for other in backends) + 1
    share = requests * backend.weight / sum(other.weight for other in backends)
    return ceil(1.25 * share + sqrt(share) + 1e-9)


# Where keys go


def test_a_ninth_backend_takes_a_ninth_of_the_keys_and_moves_no_other() -> None:
    backends = backends_of(*[1] * 9)
    before, after = homes(backends[:8]), homes(backends)
    moved = [key for key in KEYS if before[key] != after[key]]
    assert 0.07 < len(moved) / len(KEYS) < 0.16
    assert {after[key] for key in moved} == {backends[8].url}


@pytest.mark.parametrize("weights", [(1, 1, 1, 1, 1, 1, 1, 1), (1, 2, 1, 4, 1, 1, 3, 1)])
def test_a_backend_that_leaves_moves_only_its_own_keys(weights: tuple[float, ...]) -> None:
    backends = backends_of(*weights)
    before, after = homes(backends), homes(backends[:3] + backends[4:])
    assert {before[key] for key in KEYS if before[key] != after[key]} == {backends[3].url}
    assert backends[3].url not in after.values()


def test_the_order_of_backends_and_the_router_do_not_matter() -> None:
    backends = backends_of(1, 2, 1, 3, 1)
    assert homes(backends) == homes(backends_of(1, 2, 1, 3, 1)[::-1])


def test_homes_stay_the_same_from_release_to_release() -> None:
    """Routers of two releases run side by side in a rollout; if they disagreed, each would spoil the other's caches."""
    chooser, backends = affinity(), backends_of(1, 2, 1)
    found = [chooser.choose(backends, f"key-{number}") for number in range(12)]
    assert [backends.index(home) for home in found if home] == [1, 1, 1, 1, 2, 1, 2, 1, 0, 2, 0, 0]


@pytest.mark.parametrize("weights", [(1, 1, 1, 1), (1, 2, 5), (0.1, 0.3), (100, 300, 200), (1,) * 40])
def test_idle_backends_get_keys_by_weight(weights: tuple[float, ...]) -> None:
    backends = backends_of(*weights)
    found = Counter(homes(backends).values())
    for backend in backends:
        assert found[backend.url] == pytest.approx(len(KEYS) * backend.weight / sum(weights), rel=0.35)


def test_more_backends_than_a_fine_ring_can_hold_all_get_keys() -> None:
    assert len(set(homes(backends_of(*[1] * 300)).values())) > 295


# How full they get


@settings(deadline=None)
@given(
    weights=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    events=st.lists(st.integers(-30, 9), min_size=1, max_size=300),
)
def test_no_backend_exceeds_its_bound(weights: list[int], events: list[int]) -> None:
    """Any mix of starts (a key, some of them popular) and ends (a request in flight)."""
    backends, chooser = backends_of(*weights), affinity()
    running: list[Backend] = []
    for event in events:
        if event < -15 and running:
            running.pop(event % len(running)).origin.in_flight -= 1
            continue
        allowed = {backend: capacity(backend, backends) for backend in backends}
        chosen = chooser.choose(backends, f"key-{max(event, 0)}")
        assert chosen is not None
        chosen.origin.in_flight += 1
        running.append(chosen)
        assert chosen.origin.in_flight <= allowed[chosen]


def test_one_popular_key_is_spread_no_further_than_needed() -> None:
    backends, chooser = backends_of(*[1] * 8), affinity()
    for _ in range(80):
        chosen = chooser.choose(backends, "popular")
        assert chosen is not None
        chosen.origin.in_flight += 1
    # A share is 10, and 1.25 * 10 + sqrt(10) = 15.7, rounded up: five take them all.
    assert max(backend.origin.in_flight for backend in backends) == 16
    assert sum(backend.origin.in_flight > 0 for backend in backends) <= 6


def test_a_router_with_few_requests_of_its_own_does_not_take_noise_for_load() -> None:
    """One of many: two in flight where its share is one is nothing unusual, and their keys stay at home."""
    backends = backends_of(*[1] * 16)
    idle = homes(backends)
    chooser: Balancer[Backend] = affinity()
    rng, at_home = Random(7), 0
    running: list[Backend] = []
    for number in range(4000):
        key = KEYS[rng.randrange(len(KEYS))]
        chosen = chooser.choose(backends, key)
        assert chosen is not None
        chosen.origin.in_flight += 1
        running.append(chosen)
        at_home += chosen.url == idle[key]
        if number >= 16:
            running.pop(rng.randrange(len(running))).origin.in_flight -= 1
    assert at_home / 4000 > 0.8


def test_a_large_set_that_is_busy_when_first_seen_is_counted_at_once() -> None:
    backends = backends_of(*[1] * 256)
    idle = homes(backends)
    for backend in backends:
        backend.origin.in_flight = 10
    chosen = affinity().choose(backends, KEYS[0])
    assert chosen is not None
    assert chosen.url == idle[KEYS[0]]


def test_the_bound_of_a_large_set_is_off_by_less_than_a_request_per_backend() -> None:
    """256 backends, where the total is counted once in 8 choices; 2,000 requests overlap, and then they all end."""
    backends, chooser, rng = backends_of(*[1] * 256), affinity(), Random(5)
    running: list[Backend] = []
    for number in range(6000):
        chosen = chooser.choose(backends, KEYS[rng.randrange(500)])
        assert chosen is not None
        assert chosen.origin.in_flight < capacity(chosen, backends) + 1
        chosen.origin.in_flight += 1
        running.append(chosen)
        if number >= 2000:
            running.pop(rng.randrange(len(running))).origin.in_flight -= 1
    for backend in running:
        backend.origin.in_flight -= 1
    for _ in range(100):
        pile = chooser.choose(backends, "popular")
        assert pile is not None
        pile.origin.in_flight += 1
    assert max(backend.origin.in_flight for backend in backends) <= 1 + 256 // 32


# What it is for


class PrefixCache:
    """What an engine keeps: blocks of 16 tokens, each one under all that comes before it, the least recent dropped."""

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self._kept: OrderedDict[int, None] = OrderedDict()

    def read(self, prompt: list[int]) -> int:
        """The tokens of `prompt` that are here already; afterwards all of its full blocks are."""
        hits, known, prefix = 0, True, 0
        for start in range(0, len(prompt) - len(prompt) % BLOCK, BLOCK):
            prefix = hash((prefix, *prompt[start : start + BLOCK]))
            known = known and prefix in self._kept
            hits += BLOCK if known else 0
            self._kept[prefix] = None
            self._kept.move_to_end(prefix)
        while len(self._kept) > self._blocks:
            self._kept.popitem(last=False)
        return hits


@dataclass
class Session:
    """A conversation: each turn's prompt is the last one, its answer, and a new question."""

    rng: Random
    turns: int
    prompt: list[int]
    fields: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        opening = [("system", "You are a helpful assistant."), ("user", f"Question {self.rng.random()}")]
        self.fields = {"messages": [{"role": role, "content": content} for role, content in opening]}

    def extend(self) -> None:
        said = self.rng.randrange(80, 400)
        self.prompt += [self.rng.getrandbits(16) for _ in range(said)]
        self.fields["messages"] += [{"role": role, "content": str(said)} for role in ("assistant", "user")]
        self.turns -= 1


class Result(NamedTuple):
    hit_rate: float
    # The most any backend was over its bound, and the most in flight at once.
    excess: int
    peak: int


class AlwaysHome:
    """The same hashing without a bound: by twins of the backends, at which nothing is ever in flight."""

    def __init__(self, *weights: float) -> None:
        self._twins, self._affinity = backends_of(*weights), affinity()

    def choose(self, backends: Sequence[Backend], key: str, tried: Collection[Backend] = ()) -> Backend | None:
        home = self._affinity.choose(self._twins, key)
        return home and backends[self._twins.index(home)]


def simulate(balancing: Balancer[Backend], weights: Sequence[float] = (1,) * 8, seed: int = 3) -> Result:
    """400 conversations of 2 to 8 turns in 200 s; every cache holds about a third of what is alive at a time."""
    rng, backends = Random(seed), backends_of(*weights)
    caches = {backend: PrefixCache(blocks=1500) for backend in backends}
    system = [rng.getrandbits(16) for _ in range(64)]
    asked = hits = excess = peak = 0
    events: list[tuple[float, int, Session, Backend | None]] = []
    for number in range(400):
        session = Session(Random(rng.random()), rng.randrange(2, 9), [*system])
        session.extend()
        heapq.heappush(events, (rng.uniform(0, 200), number, session, None))
    while events:
        now, number, session, serving = heapq.heappop(events)
        if serving is not None:
            serving.origin.in_flight -= 1
            session.extend()
            if session.turns > 0:
                heapq.heappush(events, (now + rng.expovariate(1 / 8), number, session, None))
            continue
        allowed = {backend: capacity(backend, backends) for backend in backends}
        chosen = balancing.choose(backends, affinity_key("m", session.fields, None))
        assert chosen is not None
        chosen.origin.in_flight += 1
        excess = max(excess, chosen.origin.in_flight - allowed[chosen])
        peak = max(peak, sum(backend.origin.in_flight for backend in backends))
        found = caches[chosen].read(session.prompt)
        asked, hits = asked + len(session.prompt), hits + found
        # 2,000 tokens a second to read what is not cached, then an answer of 1 to 6 seconds.
        service = (len(session.prompt) - found) / 2000 + rng.uniform(1, 6)
        heapq.heappush(events, (now + service, number, session, chosen))
    assert not any(backend.origin.in_flight for backend in backends)
    return Result(hits / asked, excess, peak)


def test_prefix_affinity_finds_cached_prefixes_that_round_robin_misses() -> None:
    ours, theirs = simulate(affinity()), simulate(make_balancer("round_robin", Random(3).random))
    print(f"prefix-cache hit rate: prefix_affinity {ours.hit_rate:.0%}, round_robin {theirs.hit_rate:.0%}")
    assert min(ours.peak, theirs.peak) > 35, "the load overlaps"
    assert ours.hit_rate > 2 * theirs.hit_rate


@pytest.mark.parametrize("weights", [(1,) * 8, (1, 1, 2, 2, 1, 4, 1, 1)])
def test_under_that_load_no_backend_exceeds_its_bound(weights: tuple[float, ...]) -> None:
    assert simulate(affinity(), weights).excess <= 0
    assert simulate(AlwaysHome(*weights), weights).excess > 0, "a bound that nothing exceeds would prove nothing"
