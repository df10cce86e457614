"""Log buckets: percentiles within 5 %, and two histograms are one of both."""

import math

from hypothesis import given
from hypothesis import strategies as st

from control_plane.pure.histogram import ERROR, SHORTEST, Counts, add, bucket, middle, percentiles, quantiles

VALUES = st.lists(st.floats(SHORTEST, 1e7), min_size=1, max_size=200)


def counted(values: list[float]) -> Counts:
    counts: Counts = {}
    for value in values:
        add(counts, {str(bucket(value)): 1})
    return counts


@given(VALUES, st.floats(0, 1))
def test_a_percentile_is_within_the_error_of_the_exact_one(values: list[float], share: float) -> None:
    (found,) = quantiles(counted(values), [share])

    exact = sorted(values)[math.floor(share * (len(values) - 1))]
    assert found is not None
    assert abs(found - exact) <= exact * ERROR * (1 + 1e-9)


@given(VALUES, VALUES)
def test_histograms_add_up(first: list[float], second: list[float]) -> None:
    both = counted(first)
    add(both, counted(second))

    assert both == counted(first + second)


@given(st.floats(0, 1e9))
def test_what_is_shorter_than_the_shortest_counts_as_it(value: float) -> None:
    assert bucket(value) >= bucket(SHORTEST)
    assert middle(bucket(0)) < 2 * SHORTEST


def test_of_no_values_there_is_no_percentile() -> None:
    assert percentiles({}) == {"p50": None, "p95": None, "p99": None}


def test_percentiles_have_the_digits_that_mean_something() -> None:
    assert percentiles(counted([1000.0])) == {"p50": 1048, "p95": 1048, "p99": 1048}
    assert percentiles(counted([0.5])) == {"p50": 0.52, "p95": 0.52, "p99": 0.52}
