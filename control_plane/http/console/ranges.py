"""The time that a page is about: `?range=1h`, or `?start=..&end=..` in UTC, as RFC 3339 or as forms write it."""

import re
from collections.abc import Iterable
from typing import NamedTuple

from control_plane.errors import Invalid, Problem
from control_plane.http.console.shell import Visit
from control_plane.pure.records import DAY, HOUR, MINUTE
from control_plane.pure.times import read, shown

CUSTOM = "custom"
# Milliseconds by name, and in words: `in the last hour`
LENGTHS = {
    "15m": (15 * MINUTE, "the last 15 minutes"),
    "1h": (HOUR, "the last hour"),
    "24h": (DAY, "the last 24 hours"),
    "7d": (7 * DAY, "the last 7 days"),
    "30d": (30 * DAY, "the last 30 days"),
}
LABELS = {"15m": "15 min", "1h": "1 h", "24h": "24 h", "7d": "7 d", "30d": "30 d", CUSTOM: "Custom"}
LONGEST = 400 * DAY
# A date, or what a field of a date and a time sends: without a zone, which is UTC
_FIELD = re.compile(r"\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d(?:\.\d{1,3})?)?)?")


class Range(NamedTuple):
    """`start`, `end`: Unix milliseconds. `name`: of LENGTHS, or CUSTOM; `choices`: those of the page."""

    name: str
    start: int
    end: int
    choices: tuple[str, ...]

    @property
    def custom(self) -> bool:
        return self.name == CUSTOM

    @property
    def words(self) -> str:
        """`the last hour`; of a custom one `2026-11-28 12:00 to 13:00 UTC`."""
        if not self.custom:
            return LENGTHS[self.name][1]
        start, end = (field(at).replace("T", " ") for at in (self.start, self.end))
        return f"{start} to {end[11:] if start[:10] == end[:10] else end} UTC"

    @property
    def query(self) -> dict[str, str | None]:
        """The parameters of a URL with the same range."""
        if not self.custom:
            return {"range": self.name, "start": None, "end": None}
        return between(self.start, self.end)

    @property
    def links(self) -> list[tuple[str, str, dict[str, str | None]]]:
        """(name, label, parameters) of the choices. The custom one begins as the chosen one is."""
        found = []
        for name in (*self.choices, CUSTOM):
            own = between(self.start, self.end) if name == CUSTOM else {"range": name, "start": None, "end": None}
            found.append((name, LABELS[name], own))
        return found

    @property
    def fields(self) -> tuple[str, str]:
        """As fields of a date and a time have them."""
        return field(self.start), field(self.end)


def between(start: int, end: int) -> dict[str, str | None]:
    """The parameters of a range from `start` to before `end`, Unix milliseconds."""
    return {"range": CUSTOM, "start": shown(start), "end": shown(end)}


def chosen(visit: Visit, choices: Iterable[str], default: str, step: int = 1000) -> Range:
    """The range that the URL names, the default one without any. Raises Invalid.

    `step`: milliseconds for which the present stays the same, so that an answer can be shown again.
    """
    known, now = tuple(choices), visit.act.at // step * step
    name = visit.query.get("range")
    given = {key: visit.query[key] for key in ("start", "end") if key in visit.query}
    if name in (None, CUSTOM) and (given or name == CUSTOM):
        end = moment("end", given["end"]) if "end" in given else now
        start = moment("start", given["start"]) if "start" in given else max(end - LENGTHS[default][0], 0)
        if start >= end:
            raise Invalid(Problem("start", "must be before the end"))
        if end - start > LONGEST:
            raise Invalid(Problem("start", f"must be at most {LONGEST // DAY} days before the end"))
        return Range(CUSTOM, start, end, known)
    if name is not None and name not in known:
        raise Invalid(Problem("range", f"must be one of {', '.join((*known, CUSTOM))}, not {name[:40]!r}"))
    return fixed(now, name or default, known)


def fixed(now: int, name: str, choices: tuple[str, ...]) -> Range:
    """`name`: of LENGTHS."""
    return Range(name, now - LENGTHS[name][0], now, choices)


def moment(param: str, value: str) -> int:
    """Unix milliseconds. Raises Invalid."""
    text = value.strip()
    if _FIELD.fullmatch(text):
        day, clock = text[:10], text[11:] or "00:00"
        text = f"{day}T{clock}{':00' if len(clock) == 5 else ''}Z"
    try:
        found = read(text)
    except ValueError:
        found = -1
    if found < 0:
        raise Invalid(Problem(param, f"must be a time in UTC such as 2026-11-28 12:00, not {value[:40]!r}"))
    return found


def field(at: int) -> str:
    """`2026-11-28T12:00`, with seconds only if it has some."""
    text = (shown(at) or "").removesuffix("Z")
    return text.removesuffix(":00") if text.count(":") == 2 and len(text) == 19 else text
