"""The text of metrics: what prometheus_client would write, in slices that are bounded whatever there is to show."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from prometheus_client.registry import Collector

from inference_api.observe.exposition import Family, slices, write
from inference_api.observe.series import Histogram

BOUNDS = (0.1, 1, 2.5)
values = st.one_of(st.integers(0, 2**70), st.floats(allow_nan=True))
series = st.lists(st.tuples(st.tuples(st.text(), st.text()), values), max_size=3, unique_by=lambda one: one[0])


class Theirs(Collector):
    """The same families as prometheus_client has them."""

    def __init__(self, families: list[Family]) -> None:
        self.families = families

    def collect(self) -> Iterator[Metric]:
        for kind, name, text, names, found in self.families:
            family: Any
            if kind == "histogram":
                family = HistogramMetricFamily(name, text, labels=names)
                for labels, histogram in found:
                    assert isinstance(histogram, Histogram)
                    limits = [*map(str, map(float, BOUNDS)), "+Inf"]
                    buckets = list(zip(limits, histogram.cumulative(), strict=True))
                    family.add_metric(labels, buckets, histogram.sum)
            else:
                family = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily}[kind](name, text, labels=names)
                for labels, value in found:
                    family.add_metric(labels, value)
            yield family


def theirs(families: list[Family], openmetrics: bool) -> list[Metric]:
    registry = CollectorRegistry()
    registry.register(Theirs(families))
    if openmetrics:
        page = generate_openmetrics(registry).decode()  # type: ignore[no-untyped-call]
        return list(parse_openmetrics(page))  # type: ignore[no-untyped-call]
    return list(parse_text(generate_latest(registry).decode()))


def ours(families: list[Family], openmetrics: bool) -> list[Metric]:
    page = "".join(write(families, openmetrics))
    if openmetrics:
        return list(parse_openmetrics(page + "# EOF\n"))  # type: ignore[no-untyped-call]
    return list(parse_text(page))


def told(metrics: list[Metric]) -> list[Any]:
    """As values that are equal to themselves."""
    samples = [
        (
            metric.name,
            metric.type,
            metric.documentation,
            [(s.name, s.labels, str(float(s.value))) for s in metric.samples],
        )
        for metric in metrics
    ]
    return samples


@pytest.mark.parametrize("openmetrics", [False, True])
@given(gauges=series, counters=series, observed=st.lists(st.lists(st.floats(0, 10), max_size=5), max_size=3))
def test_a_page_says_what_prometheus_client_would_say(
    openmetrics: bool, gauges: Any, counters: Any, observed: list[list[float]]
) -> None:
    histograms: list[Any] = []
    for number, seen in enumerate(observed):
        histogram = Histogram(BOUNDS)
        for value in seen:
            histogram.observe(value)
        histograms.append(((f"100 % of {number}", '"\\\n'), histogram))
    # A counter is a number that is not negative; OpenMetrics' parser holds it to that.
    counters = [(labels, abs(value)) for labels, value in counters if not math.isnan(value)]
    families = [
        Family("gauge", "a_gauge", 'Text "with" \\ and\nlines.', ("one", "two"), gauges),
        Family("counter", "some", "Text.", ("one", "two"), counters),
        Family("counter", "alone", "Text.", (), [((), 7)]),
        Family("histogram", "seconds", "Text.", ("one", "two"), histograms),
        Family("histogram", "bare", "Text.", (), [((), Histogram(BOUNDS))]),
        Family("gauge", "nothing", "Text.", ("one",), []),
    ]

    assert told(ours(families, openmetrics)) == told(theirs(families, openmetrics))


def test_a_series_without_a_value_is_not_there() -> None:
    page = "".join(write([Family("gauge", "a", "Text.", ("one",), [(("x",), None), (("y",), 0)])]))

    assert page == '# HELP a Text.\n# TYPE a gauge\na{one="y"} 0\n'


def test_histograms_of_one_family_may_have_different_bounds() -> None:
    found = [(("x",), Histogram((1,))), (("y",), Histogram((2, 3)))]
    (family,) = parse_text("".join(write([Family("histogram", "a", "Text.", ("one",), found)])))

    limits = [(s.labels["one"], s.labels["le"]) for s in family.samples if "le" in s.labels]
    assert limits == [("x", "1.0"), ("x", "+Inf"), ("y", "2.0"), ("y", "3.0"), ("y", "+Inf")]


@given(st.lists(st.text("x", max_size=300)), st.integers(1, 1000))
def test_slices_are_the_whole_and_none_is_much_longer_than_it_may_be(pieces: list[str], size: int) -> None:
    found = list(slices(pieces, size))

    assert "".join(found) == "".join(pieces)
    assert all(len(one) < size + 300 for one in found)


def test_series_that_show_nothing_are_looked_at_in_slices_too() -> None:
    read = 0

    def nothing() -> Iterator[str]:
        nonlocal read
        for _ in range(100_000):
            read += 1
            yield ""

    most = before = 0
    for _ in slices(nothing(), 10_000):
        most, before = max(most, read - before), read
    assert read == 100_000
    assert most <= 500
