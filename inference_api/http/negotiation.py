"""The format and the coding that a scraper prefers, by Accept and Accept-Encoding (RFC 9110 12.5). Pure."""

import re
from collections.abc import Iterator

TEXT = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8; escaping=underscores"

_WEIGHT = re.compile(r"0(?:\.\d{0,3})?|1(?:\.0{0,3})?")
_OPENMETRICS = "application/openmetrics-text"
_TEXT = "text/plain"
# At equal weight, a range that names the format outranks one that includes it.
_ANY = {_OPENMETRICS: ("application/*", "*/*"), _TEXT: ("text/*", "*/*")}


def wants_openmetrics(accept: str) -> bool:
    """Whether OpenMetrics is preferred to Prometheus' text format, which is the default."""
    ranges = list(_ranges(accept))
    openmetrics, text = _rank(ranges, _OPENMETRICS), _rank(ranges, _TEXT)
    return openmetrics[0] > 0 and openmetrics > text


def takes_gzip(accept_encoding: str) -> bool:
    """Whether gzip is accepted, and preferred to no coding."""
    weights = {name: weight for name, _, weight in _ranges(accept_encoding)}
    gzip = weights.get("gzip", weights.get("*", 0.0))
    return gzip > 0 and gzip >= weights.get("identity", 0.0)


def _rank(ranges: list[tuple[str, str | None, float]], name: str) -> tuple[float, int, int]:
    """(weight, specificity, earliness), higher is better. Only the most specific ranges count."""
    found = []
    for place, (media, version, weight) in enumerate(ranges):
        if media == name and (name == _TEXT or version in (None, "1.0.0")):
            found.append((2, -place, weight))
        elif media in _ANY[name]:
            found.append((1 - _ANY[name].index(media), -place, weight))
    if not found:
        return (0.0, 0, 0)
    exactness = max(found)[0]
    weight, place = max((weight, place) for exact, place, weight in found if exact == exactness)
    return (weight, exactness, place)


def _ranges(header: str) -> Iterator[tuple[str, str | None, float]]:
    """(name, its version, its weight) of each element; those with an invalid weight are left out."""
    for element in header.split(","):
        name, *parameters = [part.strip().lower() for part in element.split(";")]
        values = dict(parameter.partition("=")[::2] for parameter in parameters)
        weight = values.get("q", "1").strip()
        if name and _WEIGHT.fullmatch(weight):
            yield name, values.get("version"), float(weight)
