"""PromQL from templates: only values of labels and the window of rates are put in, and no value can end its string."""

import re
from collections.abc import Iterable
from string import Template
from typing import NamedTuple


class Places(NamedTuple):
    """What templates have room for: matchers, but `names` (within a string) and `window` (a duration)."""

    site: str
    model: str
    names: str
    engine: str
    host: str
    window: str


def placed(template: str, places: Places) -> str:
    return Template(template).substitute(places._asdict())


def places_of(template: str) -> frozenset[str]:
    """Those that a template has room for."""
    return frozenset(Template(template).get_identifiers())


def quantiles(histogram: str) -> dict[str, str]:
    """Five templates by legend, of `name{matchers}`."""
    name, _, matchers = histogram.removesuffix("}").partition("{")

    def rate(ending: str) -> str:
        return f"(rate({name}_{ending}{{{matchers}}}[$window]))"

    shares = (50, 90, 95, 99)
    found = {f"p{share}": f"histogram_quantile({share / 100:g}, sum by (le) {rate('bucket')})" for share in shares}
    return {**found, "mean": f"sum{rate('sum')} / sum{rate('count')}"}


def any_of(values: Iterable[str], ending: str = "") -> str:
    """What stands in the string of a matcher `=~` for these values alone. `ending`: a regular expression after each."""
    return quoted(f"(?:{'|'.join(map(literal, values))}){ending}")


def literal(value: str) -> str:
    """A regular expression of RE2 that this value alone matches."""
    return re.sub(r"[\\.+*?()|\[\]{}^$]", r"\\\g<0>", value)


def quoted(value: str) -> str:
    """What stands between the double quotes of a string."""
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\r", "\\r")
