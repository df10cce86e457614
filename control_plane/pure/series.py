"""Series of Prometheus: at which times they are asked for, where they apply, and what an answer is made of."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from control_plane.pure.promql import Places, any_of

MOST_POINTS = 300
# Milliseconds: between two points at least; between two scrapes at most, if rates are to have data
_LEAST, _SCRAPE = 15_000, 60_000
# Names of the own machine: engines and exporters on it may be known by any of them
_LOCAL = ("127.0.0.1", "localhost", "[::1]")
_ANY, _PORT = ".*", "(?::[0-9]+)?"
_LABEL = re.compile(r"\{\{(\w+)\}\}")


class Times(NamedTuple):
    """`size` times from `first` on, each `step` after the one before; Unix milliseconds."""

    first: int
    step: int
    size: int

    @property
    def last(self) -> int:
        return self.first + (self.size - 1) * self.step

    @property
    def window(self) -> str:
        """Of rates: nothing is left out between two times, and there are two scrapes in it."""
        return f"{max(self.step + _SCRAPE, 2 * _SCRAPE) // 1000}s"

    @property
    def all(self) -> range:
        return range(self.first, self.last + 1, self.step)


def times(start: int, end: int) -> Times:
    """At most MOST_POINTS round times after `start` and until `end`; those who ask a moment later get the same."""
    seconds = math.ceil((end - start) / MOST_POINTS / 1000)
    step = max(_LEAST, seconds * 1000)
    size = max((end - start) // step, 1)
    return Times(end - end % step - (size - 1) * step, step, size)


class Subject(NamedTuple):
    """What series are of; None: everything. `model`: its name at routers; `served`: those that engines may have.

    `instances`: of engines, as `host:port` or `host`; `hosts`: of exporters.
    """

    model: str | None = None
    served: tuple[str, ...] | None = None
    instances: tuple[str, ...] | None = None
    hosts: tuple[str, ...] | None = None


def places(subject: Subject, window: str) -> Places:
    site = f'cluster=~"{_ANY}"'
    model = _ANY if subject.model is None else any_of([subject.model])
    served = _ANY if subject.served is None else any_of(subject.served)
    instances = _ANY if subject.instances is None else any_of(subject.instances, _PORT)
    hosts = _ANY if subject.hosts is None else any_of(subject.hosts, _PORT)
    return Places(
        site=site,
        model=f'{site}, model_name=~"{model}"',
        names=model,
        engine=f'{site}, model_name=~"{served}", instance=~"{instances}"',
        host=f'{site}, instance=~"{hosts}"',
        window=window,
    )


def place_of(backend: str) -> str:
    """`host:port` of a URL or of a label of a backend; `host`, if it has no port."""
    return backend.partition("://")[2].partition("/")[0] or backend.partition("/")[0]


def hosts_of(backends: Iterable[str]) -> tuple[str, ...]:
    """Their hosts, as exporters on them have it in `instance`, without a port."""
    found = dict.fromkeys(host for backend in backends if (host := _host(place_of(backend))))
    if not found.keys().isdisjoint(_LOCAL):
        found |= dict.fromkeys(_LOCAL)
    return tuple(found)


def _host(place: str) -> str | None:
    try:
        host = urlsplit(f"//{place}").hostname
    except ValueError:
        return None
    return f"[{host}]" if host and ":" in host else host


class Found(NamedTuple):
    """A series as Prometheus has it: (Unix milliseconds, value) of the times at which it has one."""

    labels: Mapping[str, str]
    points: tuple[tuple[int, float], ...]


class Answer(NamedTuple):
    """`warnings`: of Prometheus, and what was left out of its answer."""

    series: tuple[Found, ...]
    warnings: tuple[str, ...] = ()


class Drawn(NamedTuple):
    """A series with a name, and a value per time; None: a gap."""

    name: str
    labels: Mapping[str, str]
    values: tuple[float | None, ...]


def answer(document: Any, most: int) -> Answer:
    """Of the JSON of /query or /query_range, `most` series at most. Raises ValueError."""
    try:
        data = document["data"]
        if document["status"] != "success" or data["resultType"] not in ("matrix", "vector"):
            raise ValueError("no series")
        results: list[Any] = data["result"]
        found = tuple(_series(one) for one in results[:most])
        warnings = tuple(str(one)[:300] for one in document.get("warnings", ())[:5])
    except (AttributeError, KeyError, TypeError, IndexError, OverflowError) as exc:
        raise ValueError(f"not an answer of the API: {type(exc).__name__}") from None
    if len(results) > most:
        warnings += (f"Prometheus has {len(results)} series for this; the first {most} are shown.",)
    return Answer(found, warnings)


def _series(result: Any) -> Found:
    labels = {str(name): str(value) for name, value in result["metric"].items()}
    samples = result["values"] if "values" in result else [result["value"]]
    points = ((round(float(at) * 1000), float(value)) for at, value in samples)
    return Found(labels, tuple((at, value) for at, value in points if math.isfinite(value)))


def drawn(found: Found, legend: str, title: str, at: Times) -> Drawn:
    """A series at these times, named by its legend; of the title, if no label of it is there."""
    values = dict(found.points)
    name = " ".join(_LABEL.sub(lambda label: found.labels.get(label[1], ""), legend).split())
    return Drawn(name or title, found.labels, tuple(values.get(each) for each in at.all))


def highest(series: Sequence[Drawn], most: int) -> list[Drawn]:
    """Those with the highest values, in the order in which they were."""
    ordered = sorted(series, key=lambda one: -max((value for value in one.values if value is not None), default=0))
    kept = {id(one) for one in ordered[:most]}
    return [one for one in series if id(one) in kept]
