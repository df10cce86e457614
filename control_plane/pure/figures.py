"""How the console writes numbers, amounts and times: text, in one place, so that a figure looks the same everywhere.

Times are Unix milliseconds, or the RFC 3339 text that services show; all are shown in UTC. A value that is not known
is a dash; where the reason is known, `missing` says it. Zero is never a dash, and never rounded to.
"""

import math
from datetime import UTC, datetime

from markupsafe import Markup

from control_plane.pure.times import read
from inference_api.policy.document import NANOS

# Unix milliseconds, or a time of RFC 3339
When = int | float | str
Number = int | float

# Also of ranges
DASH = "\N{EN DASH}"
MISSING = DASH
UNPRICED = "unknown"
_SECOND, _MINUTE, _HOUR, _DAY = 1_000, 60_000, 3_600_000, 86_400_000
_SHORT = ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k"))
_BINARY = ("KiB", "MiB", "GiB", "TiB", "PiB")
# Percents next to 0 and to 100 that are not told apart from each other
_NEAR = 0.001


def missing(reason: str | None = None) -> Markup:
    """A dash, and for pointers and screen readers why there is no value: `missing("no price")`."""
    if not reason:
        return Markup('<span class="missing">{}</span>').format(MISSING)
    return Markup(
        '<span class="missing" title="{0}"><span aria-hidden="true">{1}</span>'
        '<span class="visually-hidden">{0}</span></span>'
    ).format(reason, MISSING)


def count(value: Number | None) -> str:
    """`1,234,567`; of a mean, with one digit after the point: `1,234.5`."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{value:,}" if isinstance(value, int) else trimmed(f"{value:,.1f}")


def counted(value: int, noun: str) -> str:
    """`1 request`, `1,234 requests`; for nouns that take an s."""
    return f"{count(value)} {noun}{'' if value == 1 else 's'}"


def short(value: Number | None) -> str:
    """Three digits at most: `950`, `1.2k`, `12.3k`, `310M`. For axes and tiles; tables have `count`."""
    if value is None or not math.isfinite(value):
        return MISSING
    for size, letter in _SHORT:
        # What would be rounded to 1000 of a unit is 1 of the next one.
        if abs(value) >= size * 0.9995:
            return _three(value / size) + letter
    return _three(value)


def _three(value: Number) -> str:
    """Up to 999.9, with the digits that are seen: `0.0042`, `1.2`, `12.3`, `310`."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:.0f}"
    if abs(value) >= 1:
        return trimmed(f"{value:.1f}")
    return trimmed(f"{value:.{_places(value, 2)}f}")


def _places(value: Number, digits: int) -> int:
    """Places after the point that show so many digits of a fraction."""
    return min(max(digits - 1 - math.floor(math.log10(abs(value))), 0), 12)


def trimmed(text: str) -> str:
    """Without zeros after the point."""
    return text.rstrip("0").rstrip(".") if "." in text else text


def ms(value: Number | None) -> str:
    """A duration in milliseconds: `0.4 ms`, `95 ms`, `2.31 s`, `12.3 s`, `4 min 10 s`, `1 h 2 min`, `3 d 4 h`."""
    if value is None or not math.isfinite(value):
        return MISSING
    size = abs(value)
    if size < 999.5:
        return f"{_three(value) if size < 9.95 else f'{value:.0f}'} ms"
    if size < 59_950:
        return trimmed(f"{value / _SECOND:.{2 if size < 9_995 else 1}f}") + " s"
    sign = "-" if value < 0 else ""
    if round(size / _SECOND) < 3600:
        return sign + _two(round(size / _SECOND), 60, "min", "s")
    if round(size / _MINUTE) < 1440:
        return sign + _two(round(size / _MINUTE), 60, "h", "min")
    return sign + _two(round(size / _HOUR), 24, "d", "h")


def _two(amount: int, base: int, larger: str, smaller: str) -> str:
    whole, rest = divmod(amount, base)
    return f"{whole:,} {larger} {rest} {smaller}" if rest else f"{whole:,} {larger}"


def money(nanos: int | None, currency: str) -> str:
    """`412.10 USD` of 10^-9 units; small ones with two digits: `0.00042 USD`. None: `unknown`, which is not 0."""
    if nanos is None:
        return UNPRICED
    sign, size = "-" if nanos < 0 else "", abs(nanos)
    if size == 0 or size >= NANOS // 10:
        cents = (size * 100 + NANOS // 2) // NANOS
        return f"{sign}{cents // 100:,}.{cents % 100:02d} {currency}"
    text = f"{size / NANOS:.{min(_places(size / NANOS, 2), 9)}f}"
    whole, _, rest = text.partition(".")
    return f"{sign}{whole}.{rest.rstrip('0').ljust(2, '0')} {currency}"


def share(value: Number | None) -> str:
    """A share of 1 as percents: `1.2 %`, `62 %`, `99.98 %`. Only 0 is `0 %`, and what is below 1 is below `100 %`."""
    if value is None or not math.isfinite(value * 100):
        return MISSING
    percents = value * 100
    if 0 < percents < _NEAR:
        return f"< {_NEAR} %"
    if 100 - _NEAR < percents < 100:
        return f"> {100 - _NEAR} %"
    places = 0 if 10 <= percents <= 90 or percents >= 100 else 1 if percents >= 1 else _places(percents or 1, 2)
    # Some more digits, until it is not the end of the scale
    while percents not in (0, 100) and float(f"{percents:.{places}f}") in (0, 100) and places < 4:
        places += 1
    return trimmed(f"{percents:,.{places}f}") + " %"


def rate(per_second: Number | None) -> str:
    """`42/s`, `1.2k/s`; what is rare by the minute or hour: `1.2/min`, `5/h`."""
    if per_second is None or not math.isfinite(per_second):
        return MISSING
    if per_second == 0 or abs(per_second) >= 0.1:
        return f"{short(per_second)}/s"
    if abs(per_second) * 60 >= 1:
        return f"{short(per_second * 60)}/min"
    return f"{short(per_second * 3600)}/h"


def bytes(value: Number | None) -> str:
    """`512 B`, `1.5 KiB`, `310 MiB`."""
    if value is None or not math.isfinite(value):
        return MISSING
    if abs(value) < 1023.5:
        return f"{value:.0f} B"
    place = 0
    while abs(value) >= 1023.5 * 1024**place and place < len(_BINARY):
        place += 1
    size, unit = value / 1024**place, _BINARY[place - 1]
    return f"{trimmed(f'{size:.1f}') if abs(size) < 99.95 else f'{size:.0f}'} {unit}"


def unix_ms(value: When) -> int:
    """Unix milliseconds of either way to write a time. Raises ValueError for a text that is no time."""
    return read(value) if isinstance(value, str) else int(value)


def ago(then: When | None, now: When) -> str:
    """`now`, `12 s ago`, `2 min ago`, `3 d ago`; of what comes, `in 3 h`."""
    if then is None:
        return MISSING
    passed = unix_ms(now) - unix_ms(then)
    for size, unit in ((_DAY, "d"), (_HOUR, "h"), (_MINUTE, "min"), (_SECOND, "s")):
        if abs(passed) >= size:
            amount = f"{abs(passed) // size:,} {unit}"
            return f"{amount} ago" if passed > 0 else f"in {amount}"
    return "now"


def _utc(value: When) -> datetime:
    return datetime.fromtimestamp(unix_ms(value) // 1000, UTC)


def clock(value: When | None) -> str:
    """`12:03:07`"""
    return MISSING if value is None else f"{_utc(value):%H:%M:%S}"


def minute(value: When | None) -> str:
    """`12:03`"""
    return MISSING if value is None else f"{_utc(value):%H:%M}"


def day(value: When | None) -> str:
    """`2026-11-28`"""
    return MISSING if value is None else _utc(value).date().isoformat()


def stamp(value: When | None) -> str:
    """`2026-11-28 12:03:07`"""
    return MISSING if value is None else f"{day(value)} {clock(value)}"
