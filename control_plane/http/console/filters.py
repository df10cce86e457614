"""What templates may use: figures as text, states as kinds."""

from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

from control_plane.pure import allowances, figures
from control_plane.pure.engines import shown_line
from control_plane.pure.times import shown
from control_plane.web.manual import address

# Kinds of states, by which they look: ok, warn, bad, off, info
_KINDS = {
    **dict.fromkeys(("ok", "ready", "closed", "in_step", "active"), "ok"),
    **dict.fromkeys(("degraded", "draining", "half_open", "recovering", "resting", "expired", "behind"), "warn"),
    **dict.fromkeys(("failing", "out", "open", "unhealthy", "stuck", "lost", "failed"), "bad"),
    **dict.fromkeys(("asleep", "disabled", "ended", "unknown", "left", "stopped", "skipped"), "off"),
    **dict.fromkeys(("waiting", "pulling", "loading", "stopping"), "warn"),
}


def kind(state: str) -> str:
    """How a state looks; what is not known looks neither good nor bad."""
    return _KINDS.get(state, "info")


def iso(when: figures.When) -> str:
    return when if isinstance(when, str) else shown(int(when)) or ""


def words(name: str) -> str:
    """A value of the API as text: `half_open` -> `half open`."""
    return name.replace("_", " ")


def path(name: str) -> str:
    """A name as a part of a URL's path; slashes stay."""
    return quote(name, safe="/")


def twice(value: str) -> tuple[str, str]:
    """A choice of a list that is shown as it is sent."""
    return value, value


FILTERS: Mapping[str, Callable[..., Any]] = {
    "ago": figures.ago,
    "amount": allowances.amount,
    "budget": allowances.budget,
    "bytes": figures.bytes,
    "count": figures.count,
    "counted": figures.counted,
    "day": figures.day,
    "help": address,
    "iso": iso,
    "kind": kind,
    "limit": allowances.limit,
    "log_line": shown_line,
    "minute": figures.minute,
    "money": figures.money,
    "ms": figures.ms,
    "path": path,
    "rate": figures.rate,
    "share": figures.share,
    "short": figures.short,
    "stamp": figures.stamp,
    "time": figures.clock,
    "twice": twice,
    "words": words,
}
