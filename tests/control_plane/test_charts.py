"""Charts: valid, small, escaped, with round ticks, and with words for those who do not see them."""

import itertools
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup

from control_plane import web
from control_plane.pure import axes, charts
from control_plane.pure.axes import BYTES, COUNT, MILLISECONDS, SHARE, time_ticks
from control_plane.pure.charts import Bar, Bin, Series
from control_plane.pure.figures import DASH

HOUR = 3_600_000
NOON = 1_795_867_200_000
EVIL = "\"><script>alert(1)</script>&'{}"
VALUES = st.lists(st.one_of(st.none(), st.floats(0, 1e12)), min_size=1, max_size=40).map(tuple)


def parsed(markup: Markup) -> ElementTree.Element:
    return ElementTree.fromstring(str(markup))


def times(size: int) -> list[int]:
    return [NOON + place * HOUR for place in range(size)]


def draw(kind: str, *series: Series) -> Markup:
    function = charts.columns if kind == "columns" else charts.lines
    return function(times(len(series[0].values)), series, title="Requests", bucket_ms=HOUR)


def texts(found: ElementTree.Element, kind: str) -> list[str | None]:
    return [one.text for one in found.iter("text") if kind in (one.get("class") or "").split()]


@pytest.mark.parametrize("kind", ["columns", "lines"])
@given(values=st.lists(VALUES, min_size=1, max_size=12))
def test_any_values_are_drawn(kind: str, values: list[charts.Values]) -> None:
    size = min(len(one) for one in values)
    found = parsed(draw(kind, *(Series(f"s{place}", one[:size]) for place, one in enumerate(values))))

    assert len([one for one in found.iter("path") if "s0" in (one.get("class") or "")]) <= 1
    for path in found.iter("path"):
        assert re.fullmatch(r"[MHVhvlz\d -]*", path.get("d") or "")


@pytest.mark.parametrize("kind", ["columns", "lines"])
def test_nothing_of_a_name_is_markup(kind: str) -> None:
    found = draw(kind, Series(EVIL, (1, 2), EVIL), Series("b", (2, 3)))

    assert "<script" not in found
    assert "style=" not in found
    assert [one.get("href") for one in parsed(found).iter("a")] == [EVIL]


def test_a_chart_has_a_name_and_its_numbers_in_words() -> None:
    (picture,) = [one for one in parsed(draw("columns", Series("llama", (3, 1_234)))) if one.tag == "svg"]

    assert picture.get("role") == "img"
    assert picture.findtext("title") == "Requests"
    assert picture.findtext("desc") == "2026-11-28 12:00:00 to 2026-11-28 14:00:00 UTC. llama: 1,237."


@pytest.mark.parametrize("kind", ["columns", "lines"])
def test_a_large_chart_is_small(kind: str) -> None:
    many = [Series(f"model-{n}", tuple((n + 1) * (place * 37 % 101) for place in range(900))) for n in range(20)]
    found = draw(kind, *many)

    assert len(found.encode()) < 20_000
    assert len([one for one in parsed(found).iter("li")]) == 8


def test_what_is_beyond_the_top_is_one() -> None:
    found = charts.top([Series(f"m{n}", (n, None)) for n in range(10)])

    assert [one.name for one in found] == ["m9", "m8", "m7", "m6", "m5", "m4", "m3", "other"]
    assert found[-1].values == (3, None)


def test_an_other_of_the_answer_stays_the_last() -> None:
    found = charts.top([Series("a", (1,)), Series("other", (50,)), Series("b", (2,))])

    assert [one.name for one in found] == ["b", "a", "other"]


def test_no_data_is_a_sentence() -> None:
    found = draw("columns", Series("a", (0, 0)))

    assert texts(parsed(found), "nothing") == ["Nothing in this time."]
    assert texts(parsed(charts.columns([], [], title="x", bucket_ms=HOUR)), "nothing") == ["Nothing in this time."]


def test_a_line_has_a_gap_where_nothing_is_known() -> None:
    (line,) = [
        one
        for one in parsed(draw("lines", Series("p50", (1, 1, None, 1)))).iter("path")
        if one.get("class") == "line s0"
    ]

    assert line.get("d") == "M5 0h0l10 0M35 0h0"


def test_a_line_has_its_last_value_beside_it() -> None:
    found = parsed(draw("lines", Series("p50", (100, 300)), Series("p99", (200, 310))))

    ends = [one for one in found.iter("text") if "end" in (one.get("class") or "")]
    assert [one.text for one in ends] == ["300 ms", "310 ms"]
    assert abs(int(ends[0].get("y") or 0) - int(ends[1].get("y") or 0)) >= 13


def test_one_error_of_many_is_seen() -> None:
    bins = [Bin(NOON, 10_000, 0), Bin(NOON + HOUR, 0, 1, "?x")]
    found = parsed(charts.histogram(bins, title="Requests", bucket_ms=HOUR))

    (failed,) = [one for one in found.iter("path") if one.get("class") == "area failed"]
    assert failed.get("d") == "M11 142h8v2h-8z"


def test_each_column_of_a_histogram_is_a_link_with_words() -> None:
    bins = [Bin(NOON, 5, 1, EVIL), Bin(NOON + HOUR, 0, 0, "?none"), Bin(NOON + 2 * HOUR, 1, 0, "?end=1")]
    found = parsed(charts.histogram(bins, title="Requests", bucket_ms=HOUR))

    # With the keyboard, one stops only where something failed.
    assert [(one.get("href"), one.findtext("title"), one.get("tabindex")) for one in found.iter("a")] == [
        (EVIL, f"28 Nov 12:00{DASH}13:00: 6 requests, 1 failed", None),
        ("?end=1", f"28 Nov 14:00{DASH}15:00: 1 request", "-1"),
    ]
    # What is an image would hide its links.
    assert [one.get("role") for one in found.iter("svg")] == ["group", "none"]


def test_a_request_as_a_waterfall() -> None:
    rows = [
        Bar("10.0.0.11:8000", "no first byte in 2 min", "failed", 1, 120_000),
        Bar(EVIL, "answered", "ok", 120_001, 1_000, 120_500, href=EVIL),
    ]
    found = charts.waterfall(rows, 121_001, title="Attempts")

    assert "<script" not in found
    assert "after 120 s" not in found
    items = [" ".join("".join(one.itertext()).split()) for one in parsed(found).iter("li")]
    assert "no first byte in 2 min, after 1 ms, for 2 min" in items[1]
    assert "after 2 min, for 1 s, first byte after 2 min" in items[2]


def test_a_request_that_reached_no_backend() -> None:
    assert "No backend was tried." in charts.waterfall([], 3, title="Attempts")


@given(st.lists(st.tuples(st.floats(0, 1e7), st.floats(0, 1e7)), max_size=16), st.floats(0, 1e7))
def test_no_bar_is_outside_of_its_lane(spans: list[tuple[float, float]], duration: float) -> None:
    rows = [Bar("b", "w", "ok", start, took, start) for start, took in spans]

    for bar in parsed(charts.waterfall(rows, duration, title="x")).iter("rect"):
        assert float((bar.get("x") or "")[:-1]) + float((bar.get("width") or "")[:-1]) <= 100.02


def test_a_table_of_the_same_numbers() -> None:
    table = charts.table_of(times(2), [Series(EVIL, (1, None))], title="Requests", bucket_ms=HOUR)

    assert table.rows == ((f"28 Nov 12:00{DASH}13:00", "1"), (f"28 Nov 13:00{DASH}14:00", DASH))
    assert parsed(table.__html__()).findtext("caption") == "Requests"


def test_points_of_an_answer_at_all_times() -> None:
    at = charts.buckets("2026-11-28T12:30:00Z", "2026-11-28T15:00:00Z", HOUR)
    points = [{"at": "2026-11-28T13:00:00Z", "requests": 7}]

    assert at == tuple(times(3))
    assert charts.spread(points, at, "requests") == (0, 7, 0)


def test_a_series_that_does_not_fit_its_times() -> None:
    with pytest.raises(ValueError, match="a: 1 values for 2 times"):
        charts.columns(times(2), [Series("a", (1,))], title="x", bucket_ms=HOUR)


@pytest.mark.parametrize("unit", [COUNT, MILLISECONDS, SHARE, BYTES, axes.PER_SECOND, axes.money("USD")])
@given(largest=st.floats(1e-6, 1e15))
def test_an_axis_is_round_and_has_room(unit: axes.Unit, largest: float) -> None:
    found = axes.scale(largest, unit)

    values = [value for value, _ in found.ticks]
    assert found.top >= largest * (1 - 1e-9)
    assert values == sorted(set(values))
    assert 2 <= len(values) <= 6
    assert len({text for _, text in found.ticks}) == len(values)


@pytest.mark.parametrize(
    ("largest", "unit", "wanted"),
    [
        (17, COUNT, ["0", "5", "10", "15", "20"]),
        (1, COUNT, ["0", "1"]),
        (2_310, MILLISECONDS, ["0", "1 s", "2 s", "3 s"]),
        (5_000_000, MILLISECONDS, ["0", "30 min", "1 h", "1.5 h"]),
        (200_000, MILLISECONDS, ["0", "1 min", "2 min", "3 min", "4 min"]),
        (0.017, SHARE, ["0", "0.5 %", "1 %", "1.5 %", "2 %"]),
        (3_000_000, BYTES, ["0", "1 MiB", "2 MiB", "3 MiB"]),
        (0, COUNT, ["0"]),
    ],
)
def test_ticks(largest: float, unit: axes.Unit, wanted: list[str]) -> None:
    assert [text for _, text in axes.scale(largest, unit).ticks] == wanted


@given(st.integers(0, 2 * 10**12), st.integers(1, 400 * 24 * HOUR) | st.integers(1, 10**14))
def test_ticks_of_times_are_round_and_few(start: int, span: int) -> None:
    found = time_ticks(start, start + span)

    at = [tick.at for tick in found]
    assert at == sorted(set(at))
    assert len(at) <= 14
    assert all(start <= tick.at < start + span and tick.at % 1000 == 0 for tick in found)
    assert len([tick for tick in found if tick.always]) <= 7
    steps = {b - a for a, b in itertools.pairwise(at)}
    assert len(steps) <= 1


def test_ticks_of_a_day() -> None:
    found = time_ticks(NOON, NOON + 24 * HOUR)

    assert [tick.text for tick in found if tick.always] == ["12:00", "18:00", "29 Nov", "06:00"]
    assert len(found) == 12


def luminance(colour: str) -> float:
    """Of `#1f5fd0` or `#fff`, by WCAG 2."""
    digits = colour.lstrip("#")
    digits = digits if len(digits) == 6 else "".join(2 * digit for digit in digits)
    parts = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
    red, green, blue = (one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    dark, bright = sorted((luminance(one), luminance(other)))
    return (bright + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_series_are_seen_and_neighbours_are_told_apart_in_grey(scheme: str) -> None:
    sheet = web.assets()["console.css"].body.decode()
    dark = re.compile(r"@media \(prefers-color-scheme: dark\) \{\n  :root \{(.*?)\}\n\}", re.DOTALL)
    text = "".join(dark.findall(sheet)) if scheme == "dark" else dark.sub("", sheet)
    colours = dict(re.findall(r"--([\w-]+): (#\w+);", text))
    series = [colours[f"chart-{place}"] for place in range(charts.MOST_SERIES)]

    assert min(contrast(one, colours["panel"]) for one in [*series, colours["chart-ok"], colours["bad"]]) >= 3
    assert min(contrast(*pair) for pair in itertools.pairwise(series)) >= 1.5
