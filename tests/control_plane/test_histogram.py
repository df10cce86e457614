"""Log buckets: percentiles within 5 %, and two histograms are one of both."""

import math

from hypothesis import given
from hypothesis import strategies as st

from control_plane.pure.histogram import (
    ERROR,
    LONGEST,
    SHORTEST,
    bucket,
    counts_of,
    dump,
    load,
    middle,
    percentiles,
    quantiles,
    single,
)

VALUES = st.lists(st.floats(SHORTEST, LONGEST), min_size=1, max_size=200)


def counted(values: list[float]) -> int:
    return sum(single(bucket(value)) for value in values)


@given(VALUES, st.floats(0, 1))
def test_a_percentile_is_within_the_error_of_the_exact_one(values: list[float], share: float) -> None:
    (found,) = quantiles(counted(values), [share])

    exact = sorted(values)[math.floor(share * (len(values) - 1))]
    assert found is not None
    assert abs(found - exact) <= exact * ERROR * (1 + 1e-9)


@given(VALUES, VALUES)
def test_histograms_add_up(first: list[float], second: list[float]) -> None:
    assert counted(first) + counted(second) == counted(first + second)


@given(st.dictionaries(st.integers(bucket(SHORTEST), bucket(LONGEST)), st.integers(1, 2**39), max_size=20))
def test_a_histogram_is_stored_and_read_again(counts: dict[int, int]) -> None:
    histogram = sum(single(index, count) for index, count in counts.items())

    assert dict(counts_of(load(dump(histogram)))) == counts


@given(st.floats(0, 1e300))
def test_what_is_out_of_bounds_counts_as_the_bound(value: float) -> None:
    assert bucket(SHORTEST) <= bucket(value) <= bucket(LONGEST)
    assert middle(bucket(0)) < 2 * SHORTEST


def test_of_no_values_there_is_no_percentile() -> None:
    assert percentiles(0) == {"p50": None, "p95": None, "p99": None}


def test_percentiles_have_the_digits_that_mean_something() -> None:
    assert percentiles(counted([1000.0])) == {"p50": 1048, "p95": 1048, "p99": 1048}
    assert percentiles(counted([0.5])) == {"p50": 0.52, "p95": 0.52, "p99": 0.52}
