"""From samples to medians, ratios and charts."""

import gzip
from dataclasses import fields
from xml.etree import ElementTree

import pytest

from benchmarks import report, wire
from benchmarks.chart import Panel, Point, bars, lines
from benchmarks.samples import Sample, added, all_medians, ratio

SVG = "{http://www.w3.org/2000/svg}"
MACHINE = {"cpu": "a CPU", "kernel": "6", "python": "3.11"}


def sample(candidate: str, slice_: int, cpu_us: float, *, clean: bool = True, held: float = 0.0) -> Sample:
    numbers = {field.name: 0.0 for field in fields(Sample)}
    values = {**numbers, "candidate": candidate, "load": "rate-1000", "streamed": False, "open_loop": True}
    values |= {"cpu_us": cpu_us, "clean": clean, "slice": slice_, "exact": True, "held_p50": held}
    return Sample(**values)  # type: ignore[arg-type]


def test_a_ratio_is_taken_within_a_slice_so_that_a_machine_that_slows_down_bends_none() -> None:
    samples = [sample("ours", n, 10.0 * 2**n) for n in range(5)] + [sample("nginx", n, 20.0 * 2**n) for n in range(5)]

    assert ratio(samples, "rate-1000", "ours", "nginx") == 0.5


def test_a_noisy_sample_counts_only_when_there_is_no_other() -> None:
    quiet = [sample("nginx", 0, 10.0), sample("nginx", 1, 10.0), sample("ours", 0, 5.0)]
    noisy = sample("ours", 1, 500.0, clean=False)

    assert ratio([*quiet, noisy], "rate-1000", "ours", "nginx") == 0.5
    assert ratio([*quiet[:2], noisy], "rate-1000", "ours", "nginx") == 50.0


def test_added_latency_is_the_difference_to_no_router() -> None:
    samples = [sample("direct", 0, 0.0, held=0.001), sample("ours", 0, 50.0, held=0.0013)]

    assert added(samples, "rate-1000", "ours", "held_p50") == pytest.approx(0.0003)
    assert "ours +0.30 ms to the answer p50, at most 0.3: met" in report.table(samples, {}, MACHINE)


def test_a_missed_budget_is_said() -> None:
    samples = [sample("direct", 0, 0.0), sample("ours", 0, 50.0, held=0.0004)]

    assert "ours +0.40 ms to the answer p50, at most 0.3: MISSED" in report.table(samples, {}, MACHINE)


def test_medians_say_what_set_the_pace() -> None:
    full, idle, bound = sample("ours", 0, 1.0), sample("nginx", 0, 1.0), sample("direct", 0, 1.0)
    full.router_busy, bound.router_busy, bound.load_busy = 0.97, 0.97, 0.99

    assert [row["limit"] for row in all_medians([full, idle, bound])] == ["router", "-", "load"]


def test_a_run_is_drawn_with_a_bar_for_each_router_and_not_for_direct() -> None:
    samples = [sample("direct", 0, 0.0), sample("nginx", 0, 20.0), sample("ours", 0, 50.0)]

    cost = report.panels(samples)[0]

    assert [(point.name, point.value) for point in cost.points] == [("nginx", 20.0), ("ours", 50.0)]


def test_a_bar_is_as_long_as_its_value_and_ours_stands_out() -> None:
    page = ElementTree.fromstring(bars("t", [Panel("a < b", "us", [_point("nginx", 10), _point("ours", 20)])]))

    short, long = page.findall(f"{SVG}g/{SVG}rect")
    assert float(long.attrib["width"]) == pytest.approx(2 * float(short.attrib["width"]), abs=0.1)
    assert short.attrib["fill"] != long.attrib["fill"]
    assert "a < b" in [text.text for text in page.iter(f"{SVG}text")]


def test_a_thousand_times_as_much_leaves_the_small_bar_to_be_seen() -> None:
    page = ElementTree.fromstring(bars("t", [Panel("cost", "us", [_point("ours", 20), _point("litellm", 20_000)])]))

    assert all(float(rect.attrib["width"]) > 20 for rect in page.findall(f"{SVG}g/{SVG}rect"))
    assert "us, logarithmic" in [text.text for text in page.iter(f"{SVG}text")]


def test_a_flat_line_is_flat() -> None:
    page = ElementTree.fromstring(lines("t", [Panel("cost", "us", [_point("1", 50), _point("10000", 50)])]))

    left, right = page.iter(f"{SVG}circle")
    assert left.attrib["cy"] == right.attrib["cy"]
    assert left.attrib["cx"] != right.attrib["cx"]


def test_an_answer_that_a_router_packed_is_unpacked_and_checked() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n"

    assert wire.check(head + gzip.compress(wire.ANSWER), 0).exact
    with pytest.raises(wire.BadAnswer):
        wire.check(head + gzip.compress(b'{"detail":"no"}'), 0)


def test_a_stream_that_lost_an_event_is_a_bad_answer() -> None:
    events = [wire.frame(wire.FIRST_EVENT), *(wire.stamped_frame(n) for n in range(3))]

    assert wire.check(wire.STREAM_HEAD + b"".join(events) + wire.STREAM_END, 3).exact
    with pytest.raises(wire.BadAnswer, match="2 stamped events"):
        wire.check(wire.STREAM_HEAD + b"".join(events[:-1]) + wire.STREAM_END, 3)


def _point(name: str, value: float) -> Point:
    return Point(name, value, value, value)
