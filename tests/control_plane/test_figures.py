"""Numbers as people read them: the units, and what must never be rounded away."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.pure import figures
from control_plane.pure.figures import DASH
from control_plane.pure.times import shown

NOON = 1_795_867_200_000
HOUR = 3_600_000


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (figures.count(1_234_567), "1,234,567"),
        (figures.count(None), DASH),
        (figures.counted(1, "request"), "1 request"),
        (figures.counted(1_234, "request"), "1,234 requests"),
        (figures.short(1_234_567), "1.2M"),
        (figures.short(310_000_000), "310M"),
        (figures.short(999_999), "1M"),
        (figures.short(999.6), "1k"),
        (figures.short(0.0042), "0.0042"),
        (figures.ms(95), "95 ms"),
        (figures.ms(2310), "2.31 s"),
        (figures.ms(0.4), "0.4 ms"),
        (figures.ms(59_999), "1 min"),
        (figures.ms(250_000), "4 min 10 s"),
        (figures.ms(3_720_000), "1 h 2 min"),
        (figures.ms(76 * HOUR), "3 d 4 h"),
        (figures.money(412_100_000_000, "USD"), "412.10 USD"),
        (figures.money(1_234_567_000_000_000, "EUR"), "1,234,567.00 EUR"),
        (figures.money(420_000, "USD"), "0.00042 USD"),
        (figures.money(1, "USD"), "0.000000001 USD"),
        (figures.money(99_600_000, "USD"), "0.10 USD"),
        (figures.money(0, "USD"), "0.00 USD"),
        (figures.money(None, "USD"), "unknown"),
        (figures.money(-5_000_000_000, "USD"), "-5.00 USD"),
        (figures.share(0.0123), "1.2 %"),
        (figures.share(0.62), "62 %"),
        (figures.share(0.9998), "99.98 %"),
        (figures.share(1e-9), "< 0.001 %"),
        (figures.share(0.9999999), "> 99.999 %"),
        (figures.share(1.4), "140 %"),
        (figures.rate(42), "42/s"),
        (figures.rate(0.02), "1.2/min"),
        (figures.bytes(1536), "1.5 KiB"),
        (figures.bytes(1023.6), "1 KiB"),
        (figures.ago(NOON - 2 * 60_000, NOON), "2 min ago"),
        (figures.ago(shown(NOON + 3 * HOUR), NOON), "in 3 h"),
        (figures.ago(NOON, NOON), "now"),
        (figures.clock("2026-11-28T12:03:07Z"), "12:03:07"),
        (figures.stamp("2026-11-28T12:03:07.500Z"), "2026-11-28 12:03:07"),
        (figures.day(NOON), "2026-11-28"),
        (figures.stamp(None), DASH),
    ],
)
def test_a_figure(text: str, wanted: str) -> None:
    assert text == wanted


@given(st.floats(0, 1e15))
def test_a_duration_has_one_or_two_units(value: float) -> None:
    assert re.fullmatch(r"[\d,.]+ (ms|s|min|h|d)( \d+ (s|min|h))?", figures.ms(value))


@given(st.floats(0, 1))
def test_a_share_is_not_rounded_to_an_end(value: float) -> None:
    assert (figures.share(value) == "0 %") == (value == 0)
    assert (figures.share(value) == "100 %") == (value * 100 == 100)


@given(st.integers(1, 10**18))
def test_no_amount_is_rounded_to_nothing(nanos: int) -> None:
    text = figures.money(nanos, "USD").removesuffix(" USD").replace(",", "")

    assert float(text) > 0
    assert abs(float(text) * 1e9 - nanos) <= max(0.06 * nanos, 1)


@given(st.floats(0, 1e15))
def test_a_short_figure_is_short_and_near(value: float) -> None:
    text = figures.short(value)
    unit = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}.get(text[-1], 1)

    assert len(text.lstrip("0.")) <= 6
    assert float(text.rstrip("kMGT")) * unit == pytest.approx(value, rel=0.06, abs=1e-11)


@given(st.one_of(st.none(), st.floats(), st.integers()))
def test_any_number_has_a_text(value: float | None) -> None:
    for write in (figures.count, figures.short, figures.ms, figures.share, figures.rate, figures.bytes):
        assert write(value)


@given(st.integers(0, 2 * 10**12), st.integers(0, 2 * 10**12))
def test_a_time_is_read_either_way(then: int, now: int) -> None:
    text = shown(then)

    assert text is not None
    assert figures.ago(text, now) == figures.ago(then, now)
    assert figures.stamp(text) == figures.stamp(then)


def test_why_there_is_no_value() -> None:
    assert figures.missing("no <price>").count("no &lt;price&gt;") == 2
    assert DASH in figures.missing()
