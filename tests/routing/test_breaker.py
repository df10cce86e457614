"""The circuit breaker: when it opens, who is let through, and that the probe's place is always given back."""

from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from inference_api.routing.backend import Origin
from inference_api.routing.breaker import Breaker, due

COOLDOWN = 60.0
# With rand() = 0.5 there is no jitter.
BREAKER = Breaker(threshold=5, cooldown=COOLDOWN, rand=lambda: 0.5)


class Request:
    """Whoever makes attempts; `over` when its task is."""

    def __init__(self) -> None:
        self.over = False

    def done(self) -> bool:
        return self.over


def closed() -> Origin:
    return Origin("http://a")


def opened(now: float = 0.0) -> Origin:
    circuit = closed()
    for _ in range(5):
        BREAKER.failed(circuit, now, Request())
    return circuit


# Opening


def test_the_fifth_failure_in_a_row_opens() -> None:
    circuit = closed()

    assert [BREAKER.failed(circuit, float(now), Request()) for now in range(5)] == [False] * 4 + [True]
    assert (circuit.failures, circuit.opened, due(circuit)) == (5, 4.0, 64.0)


def test_a_good_answer_begins_the_count_anew() -> None:
    circuit = closed()

    for _ in range(100):
        for _ in range(4):
            assert not BREAKER.failed(circuit, 0.0, Request())
        assert not BREAKER.succeeded(circuit, Request())
        assert circuit.failures == 0


def test_what_was_nobodys_attempt_changes_no_open_circuit() -> None:
    circuit = opened()

    assert not BREAKER.succeeded(circuit, None)
    assert not BREAKER.failed(circuit, 30.0, None)
    assert (circuit.opened, due(circuit)) == (0.0, COOLDOWN)


def test_a_closed_circuit_has_no_probe_and_is_never_due() -> None:
    circuit = closed()

    assert not BREAKER.take(circuit, 1e9, Request())
    assert due(circuit) == float("inf")


def test_cooldowns_differ_so_that_backends_do_not_come_back_together() -> None:
    breaker, circuits = Breaker(1, COOLDOWN, Random(1).random), [closed() for _ in range(10)]
    for circuit in circuits:
        breaker.failed(circuit, 0.0, Request())

    assert len({due(circuit) for circuit in circuits}) == 10


def test_what_began_before_it_opened_neither_closes_it_nor_keeps_it_open() -> None:
    circuit, before = opened(), Request()

    assert not BREAKER.succeeded(circuit, before)
    assert not BREAKER.failed(circuit, 30.0, before)
    BREAKER.released(circuit, before)
    assert (circuit.opened, due(circuit)) == (0.0, COOLDOWN)
    assert circuit.failures == 6


# Half-open


def test_nobody_is_let_through_before_the_cooldown_is_over() -> None:
    circuit = opened()

    assert not BREAKER.take(circuit, COOLDOWN - 0.001, Request())
    assert BREAKER.take(circuit, COOLDOWN, Request())


def test_a_cooldown_can_be_cut_short() -> None:
    circuit = opened()

    assert not BREAKER.take(circuit, 0.9, Request(), at_most=1.0)
    assert BREAKER.take(circuit, 1.0, Request(), at_most=1.0)
    assert not BREAKER.take(opened(), COOLDOWN - 1, Request(), at_most=2 * COOLDOWN)


def test_one_is_let_through_at_a_time() -> None:
    circuit = opened()

    assert [BREAKER.take(circuit, COOLDOWN, Request()) for _ in range(500)] == [True] + [False] * 499


def test_the_probes_good_answer_closes() -> None:
    circuit, probe = opened(), Request()
    BREAKER.take(circuit, COOLDOWN, probe)

    assert BREAKER.succeeded(circuit, probe)
    assert (circuit.opened, circuit.failures, circuit.probe) == (None, 0, None)
    # It is one of many from then on.
    assert not BREAKER.failed(circuit, COOLDOWN + 600, probe)
    assert circuit.opened is None


def test_the_probes_failure_opens_for_another_cooldown() -> None:
    circuit, probe = opened(), Request()
    BREAKER.take(circuit, COOLDOWN, probe)

    assert BREAKER.failed(circuit, 70.0, probe)
    assert due(circuit) == 70 + COOLDOWN
    assert not BREAKER.take(circuit, 69 + COOLDOWN, Request())
    assert BREAKER.take(circuit, 70 + COOLDOWN, Request())


def test_a_probe_without_a_verdict_makes_room_for_the_next() -> None:
    circuit, probe, following = opened(), Request(), Request()
    BREAKER.take(circuit, COOLDOWN, probe)

    BREAKER.released(circuit, probe)

    assert circuit.opened is not None
    assert BREAKER.take(circuit, COOLDOWN, following)
    # What the first one still reports is no longer the probe's.
    assert not BREAKER.succeeded(circuit, probe)
    assert not BREAKER.failed(circuit, COOLDOWN, probe)
    assert circuit.probe is following


def test_a_probe_that_nobody_reports_of_ends_with_its_request() -> None:
    circuit, lost = opened(), Request()
    BREAKER.take(circuit, COOLDOWN, lost)
    assert not BREAKER.take(circuit, 2 * COOLDOWN, Request())

    lost.over = True

    assert BREAKER.take(circuit, 2 * COOLDOWN, Request())


@pytest.mark.parametrize("circuit", [closed(), opened()])
def test_a_suspect_is_half_open_at_once_and_not_in_good_standing(circuit: Origin) -> None:
    BREAKER.suspect(circuit, 1000.0)

    assert circuit.failures > 0
    assert BREAKER.take(circuit, 1000.0, Request())
    assert not BREAKER.take(circuit, 1000.0, Request())


# Any order of events


class Traffic(RuleBasedStateMachine):
    """Requests that begin, end and vanish in any order, as Health would report them."""

    @initialize(threshold=st.integers(1, 3), cooldown=st.floats(0.1, 10), seed=st.integers(0, 9))
    def start(self, threshold: int, cooldown: float, seed: int) -> None:
        self.breaker = Breaker(threshold, cooldown, Random(seed).random)
        self.circuit = closed()
        self.now = 0.0
        self.requests: list[Request] = []
        # Those that were let through as a probe and of which there has been no verdict.
        self.probes: list[Request] = []

    @rule(seconds=st.floats(0, 20))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def begins(self) -> None:
        request = Request()
        was_half_open = due(self.circuit) <= self.now
        if self.breaker.take(self.circuit, self.now, request):
            assert was_half_open
            self.probes.append(request)
        else:
            assert not was_half_open or self.probes, "the place of a probe was not given back"
        # Let through or not: with all circuits open, a model uses its backends all the same.
        self.requests.append(request)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), end=st.sampled_from(["good", "bad", "none", "vanished"]))
    def ends(self, data: st.DataObject, end: str) -> None:
        request = self.requests.pop(data.draw(st.integers(0, len(self.requests) - 1)))
        was_closed, was_probe = self.circuit.opened is None, request in self.probes
        if was_probe:
            self.probes.remove(request)
        if end == "good":
            assert self.breaker.succeeded(self.circuit, request) is was_probe
        elif end == "bad":
            changed = self.breaker.failed(self.circuit, self.now, request)
            assert changed is (was_probe or (was_closed and self.circuit.opened is not None))
        if end == "vanished":
            request.over = True
        else:
            self.breaker.released(self.circuit, request)

    @precondition(lambda self: self.probes)
    @rule()
    def probe_is_answered_and_goes_on(self) -> None:
        [probe] = self.probes
        self.probes.clear()
        assert self.breaker.succeeded(self.circuit, probe)

    @invariant()
    def at_most_one_probe(self) -> None:
        assert len(self.probes) <= 1

    @invariant()
    def failures_tell_whether_it_is_open(self) -> None:
        if self.circuit.opened is not None:
            assert self.circuit.failures > 0
        else:
            assert self.circuit.probe is None


TestTraffic = settings(max_examples=100, stateful_step_count=40, deadline=None)(Traffic).TestCase
