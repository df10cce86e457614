"""Whose fault errors are: what is shown by the requests that a coin gave to others, and how often it is wrong."""

from random import Random
from typing import Any

import pytest

from inference_api.routing.backend import Backend
from inference_api.routing.comparison import Comparison, Comparisons, Fault


class Request:
    def done(self) -> bool:
        return False


def compared(rand: Random, own: float, others: float, until: int = 10_000) -> Fault | None:
    """The result, if a backend and the others answer with errors so often."""
    comparison = Comparison()
    for _ in range(until):
        if comparison.keeps(rand.random()):
            fault = comparison.own(rand.random() >= own)
        else:
            fault = comparison.other(rand.random() >= others)
        if fault is not None:
            return fault
    return None


def share_of(fault: Fault, own: float, others: float, times: int) -> float:
    rand = Random(1)
    return sum(compared(rand, own, others) is fault for _ in range(times)) / times


def test_errors_that_others_do_not_give_are_the_backends() -> None:
    assert share_of(Fault.BACKEND, own=1.0, others=0.0, times=200) == 1.0


def test_errors_that_others_give_too_are_the_requests() -> None:
    assert share_of(Fault.REQUESTS, own=1.0, others=1.0, times=200) == 1.0


@pytest.mark.parametrize("bad", [0.05, 0.1, 0.2, 0.22, 0.3, 0.5, 0.9])
def test_where_a_share_of_the_requests_is_bad_nobody_is_blamed(bad: float) -> None:
    assert share_of(Fault.BACKEND, own=bad, others=bad, times=20_000) < 0.001


def test_a_backend_that_only_fails_is_found_among_a_few_bad_requests() -> None:
    assert share_of(Fault.BACKEND, own=1.0, others=0.05, times=500) > 0.75


@pytest.mark.parametrize("length", range(60))
def test_a_run_of_bad_requests_blames_nobody_wherever_it_ends(length: int) -> None:
    for seed in range(50):
        rand, comparison, fault = Random(seed), Comparison(), None
        for number in range(200):
            keeps, good = comparison.keeps(rand.random()), number >= length
            fault = comparison.own(good) if keeps else comparison.other(good)
            if fault is not None:
                break
        assert fault is Fault.REQUESTS


def test_one_good_answer_ends_it() -> None:
    comparison = Comparison()
    for _ in range(3):
        assert comparison.own(good=False) is None

    assert comparison.own(good=True) is Fault.REQUESTS


def test_after_a_few_errors_a_backend_gets_nothing_until_others_have_answered_well() -> None:
    comparison = Comparison()
    assert comparison.keeps(0.49)
    assert not comparison.keeps(0.5)
    for _ in range(3):
        comparison.own(good=False)

    for _ in range(12):
        assert not comparison.keeps(0.0)
        assert comparison.other(good=True) is None
    assert comparison.keeps(0.49)
    # One of these was bad, and more good ones have to outweigh it.
    comparison.other(good=False)
    assert not comparison.keeps(0.0)
    for _ in range(8):
        comparison.other(good=True)

    assert comparison.own(good=False) is Fault.BACKEND


# Those that are going on


@pytest.fixture
def pair() -> tuple[Backend, Backend]:
    return Backend("m", "http://a"), Backend("m", "http://b")


def beginning(backend: Backend, *draws: float) -> Comparisons:
    comparisons = Comparisons(iter(draws).__next__)
    comparisons.begin(backend, 100.0)
    assert backend.compared
    return comparisons


def test_an_attempt_is_a_sample_by_whoever_makes_it(pair: tuple[Backend, Backend]) -> None:
    a, b = pair
    comparisons = beginning(a, 0.0, 0.9, 0.9)
    stays, moves, alone = Request(), Request(), Request()

    assert comparisons.assign(a, lambda: b, stays) is a
    assert comparisons.assign(a, lambda: b, moves) is b
    assert comparisons.assign(a, lambda: None, alone) is a

    assert comparisons.result(moves, b, good=True) is None
    assert comparisons.result(Request(), a, good=True) is None
    # It went elsewhere than it was meant to.
    assert comparisons.result(alone, b, good=True) is None
    assert comparisons.result(stays, a, good=True) == (a, Fault.REQUESTS)
    assert not comparisons.samples


def test_what_is_still_under_way_at_the_end_counts_nowhere(pair: tuple[Backend, Backend]) -> None:
    a, b = pair
    comparisons = beginning(a, 0.0, 0.9)
    owners: list[Any] = [Request(), Request()]
    for owner in owners:
        comparisons.assign(a, lambda: b, owner)

    comparisons.end(a)

    assert not a.compared
    assert not comparisons.samples
    assert [comparisons.result(owner, a, good=True) for owner in owners] == [None, None]


def test_it_does_not_go_on_for_ever(pair: tuple[Backend, Backend]) -> None:
    comparisons = beginning(pair[0])

    assert comparisons.overdue(700.0) == []
    assert comparisons.overdue(700.1) == [pair[0]]
