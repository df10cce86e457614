"""Axes of charts: round steps of values (1, 2, 5) and of times, and how the ticks are written."""

import math
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import NamedTuple

from control_plane.pure import figures

_SECOND, _MINUTE, _HOUR, _DAY = 1_000, 60_000, 3_600_000, 86_400_000
# Milliseconds that are round for people, from some seconds on
_DURATIONS = tuple(
    amount * unit
    for unit, amounts in (
        (_SECOND, (15, 30, 60)),
        (_MINUTE, (2, 5, 10, 15, 30)),
        (_HOUR, (1, 2, 3, 6, 12)),
        (_DAY, (1, 2, 5, 10, 20, 50, 100)),
    )
    for amount in amounts
)
_TIMES = tuple(
    amount * unit
    for unit, amounts in (
        (_SECOND, (1, 5, 10, 15, 30)),
        (_MINUTE, (1, 2, 5, 10, 15, 30)),
        (_HOUR, (1, 2, 3, 6, 12)),
        (_DAY, (1, 2, 7, 14, 28, 56, 112)),
    )
    for amount in amounts
)
# A Monday: steps of weeks begin there.
_MONDAY = 4 * _DAY
# Intervals between the ticks of values, about
_INTERVALS = 4


class Unit(NamedTuple):
    """`shown` writes a value in full, `tick` at an axis; `whole`: there are no halves; `steps`: round to people."""

    shown: Callable[[float], str]
    tick: Callable[[float], str]
    whole: bool = False
    steps: Callable[[float], float] | None = None


def _one_two_five(least: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not below."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def _of_duration(least: float) -> float:
    if least <= 10 * _SECOND:
        return _one_two_five(least)
    return next((float(step) for step in _DURATIONS if step >= least), _one_two_five(least / _DAY) * _DAY)


def _of_bytes(least: float) -> float:
    """Powers of two from 1 KiB on."""
    return _one_two_five(least) if least < 512 else float(2 ** math.ceil(math.log2(least) - 1e-9))


def _duration_tick(value: float) -> str:
    """In one unit, for there is little room: `90 s` is `1.5 min`."""
    for size, unit in ((_DAY, "d"), (_HOUR, "h"), (_MINUTE, "min"), (_SECOND, "s")):
        if value >= size:
            return f"{figures.short(value / size)} {unit}"
    return figures.ms(value) if value else "0"


def _bytes_tick(value: float) -> str:
    return figures.bytes(value) if value else "0"


COUNT = Unit(figures.count, figures.short, whole=True)
MILLISECONDS = Unit(figures.ms, _duration_tick, steps=_of_duration)
SHARE = Unit(figures.share, lambda value: f"{figures.short(value * 100)} %" if value else "0")
PER_SECOND = Unit(figures.rate, lambda value: f"{figures.short(value)}/s" if value else "0")
BYTES = Unit(figures.bytes, _bytes_tick, whole=True, steps=_of_bytes)


def _money_tick(value: float) -> str:
    return figures.short(value / 1e9)


def money(currency: str) -> Unit:
    """Of values in nanos, 10^-9 of the currency."""
    return Unit(partial(_money, currency=currency), _money_tick, whole=True)


def _money(value: float, currency: str) -> str:
    return figures.money(round(value), currency)


class Scale(NamedTuple):
    """An axis from 0 to `top`, with `ticks` as (value, text), from the bottom."""

    top: float
    ticks: tuple[tuple[float, str], ...]

    def height(self, value: float, pixels: int) -> int:
        """From the bottom; what is not 0 is seen, and nothing is higher than the axis."""
        if value <= 0:
            return 0
        return min(max(round(value / self.top * pixels), 2), pixels)


def scale(largest: float, unit: Unit, intervals: int = _INTERVALS) -> Scale:
    """An axis that has room for `largest`, with about so many intervals."""
    if not math.isfinite(largest) or largest <= 0:
        return Scale(1, ((0, unit.tick(0)),))
    step = (unit.steps or _one_two_five)(max(largest / intervals, 1e-12))
    if unit.whole:
        step = max(step, 1)
    ticks = max(math.ceil(largest / step * (1 - 1e-9)), 1)
    values = [step * place for place in range(ticks + 1)]
    return Scale(values[-1], tuple((value, unit.tick(_clean(value))) for value in values))


def _clean(value: float) -> float:
    """Without the last digits, which binary fractions leave there; whole numbers as such."""
    value = float(f"{value:.10g}")
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


class Tick(NamedTuple):
    """`at`: Unix milliseconds; `always`: also shown where there is little room; `day`: it begins one."""

    at: int
    text: str
    always: bool
    day: bool


def time_ticks(start: int, end: int, most: int = 13, few: int = 5) -> Sequence[Tick]:
    """Round UTC times from `start` to before `end`, `most` at most; of these about `few` are shown always."""
    if end <= start:
        return ()
    step = round_step(end - start, most)
    least = round_step(end - start, few)
    # Those that are always shown are some of the others.
    coarse = next((other for other in _TIMES if other >= least and other % step == 0), step * math.ceil(most / few))
    places = range(_first(start, step), end, step)
    always = {at for at in places if (at - _origin(coarse)) % coarse == 0}
    if len(always) < 2:
        always = set(places[:: max(math.ceil(len(places) / few), 1)])
    return tuple(Tick(at, _text(at), at in always, step < _DAY and at % _DAY == 0) for at in places)


def _origin(step: int) -> int:
    return _MONDAY if step % (7 * _DAY) == 0 else 0


def _first(start: int, step: int) -> int:
    origin = _origin(step)
    return origin - (origin - start) // step * step


def round_step(span: int, most: int) -> int:
    """Milliseconds of a round step, so that `span` has `most` of them at most."""
    return next((step for step in _TIMES if span <= step * most), 7 * _DAY * math.ceil(span / most / 7 / _DAY))


def _text(at: int) -> str:
    moment = datetime.fromtimestamp(at // 1000, UTC)
    if at % _DAY == 0:
        return date(moment)
    return f"{moment:%H:%M:%S}" if at % _MINUTE else f"{moment:%H:%M}"


def date(moment: datetime) -> str:
    """`28 Nov`"""
    return f"{moment.day} {_MONTHS[moment.month - 1]}"


# Not those of the process's locale
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def span_text(start: int, end: int) -> str:
    """A bucket in words: `28 Nov 12:00-13:00`, `28 Nov` for a whole day, `28 Nov - 4 Dec` for several."""
    begins, ends = (datetime.fromtimestamp(at // 1000, UTC) for at in (start, end))
    if start % _DAY == 0 and end % _DAY == 0:
        last = datetime.fromtimestamp(end // 1000 - 1, UTC)
        return date(begins) if end - start <= _DAY else f"{date(begins)} {figures.DASH} {date(last)}"
    form = "%H:%M" if start % _MINUTE == 0 and end % _MINUTE == 0 else "%H:%M:%S"
    same_day = begins.date() == ends.date() or (end % _DAY == 0 and end - start <= _DAY)
    return f"{date(begins)} {begins:{form}}{figures.DASH}{'' if same_day else f'{date(ends)} '}{ends:{form}}"
