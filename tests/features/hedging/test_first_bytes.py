"""The percentile of first bytes."""

from time import perf_counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_api.features.hedging.first_bytes import FirstBytes


def of(seconds: list[float], **more: int) -> FirstBytes:
    times = FirstBytes(**more)
    for one in seconds:
        times.add(one)
    return times


def test_nothing_is_known_of_a_few() -> None:
    assert of([0.1] * 99).p95 is None
    assert of([0.1] * 100).p95 == pytest.approx(0.1, rel=0.06)


def test_one_in_twenty_is_above_it() -> None:
    assert of([0.1] * 95 + [9.0] * 5).p95 == pytest.approx(0.1, rel=0.06)
    assert of([0.1] * 94 + [9.0] * 6).p95 == pytest.approx(9.0, rel=0.06)


def test_the_latest_count() -> None:
    assert of([9.0] * 100 + [0.1] * 100, size=100).p95 == pytest.approx(0.1, rel=0.06)
    assert of([0.1] * 100 + [9.0] * 10, size=100).p95 == pytest.approx(9.0, rel=0.06)


@given(st.lists(st.floats(0.0, 1e5), min_size=1, max_size=300), st.integers(1, 50))
def test_it_is_that_of_the_latest_sorted(seconds: list[float], size: int) -> None:
    latest = sorted(seconds[-size:])
    exact = latest[len(latest) - 1 - len(latest) // 20]

    found = of(seconds, size=size, least=1).p95

    assert found is not None
    assert min(max(exact, 0.001), 3600.0) * 0.95 <= found <= max(exact, 0.001) * 1.06


def test_when_there_are_enough_some_may_be_left_out() -> None:
    assert of([0.1] * 99, skips=7).skipped == 0
    assert of([0.1] * 100, skips=7).skipped == 7


def test_times_that_no_clock_gives_do_no_harm() -> None:
    assert of([-1.0, 0.0, 1e300] * 50).p95 is not None


def test_adding_one_takes_the_same_time_at_any_size() -> None:
    def took(times: FirstBytes) -> float:
        began = perf_counter()
        for number in range(2000):
            times.add(0.01 * (number % 100))
        return perf_counter() - began

    few, many = of([0.1], size=10), of([0.1 * n for n in range(20_000)], size=20_000)

    assert min(took(many) for _ in range(3)) < 20 * min(took(few) for _ in range(3))
