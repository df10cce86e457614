"""The console's queries of Prometheus, by name: which model or backend they are of, and what came of them."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import NamedTuple

from control_plane.clients.prometheus import Prometheus, PrometheusFailed
from control_plane.errors import NotFound, Refused
from control_plane.panels import Query, Source, queries
from control_plane.plane import Act, Plane
from control_plane.pure.promql import placed, places_of
from control_plane.pure.series import Answer, Drawn, Subject, Times, drawn, hosts_of, place_of, places, times
from control_plane.services import models, reports, usage
from control_plane.services.usage import Question

# Milliseconds for which an answer is shown again
KEPT = 15_000
# Milliseconds after which all requests of a time are counted: usage records and scrapes are late
_SETTLED = 120_000
# Share of the larger number, and requests, by which two counts may differ
_DIFFERENCE, _FEW = 0.01, 2
MISSING: Mapping[Source, str] = {
    "routers": "Prometheus has no such series of routers: let it scrape /metrics of their ops port "
    "(chart: monitoring.serviceMonitor.enabled).",
    "engines": "Prometheus has no such series of engines: let it scrape /metrics of vLLM or TGI, with the label "
    "model_name (chart: monitoring.enginePodMonitor.enabled).",
    "node exporter": "Prometheus has no such series of these hosts: let it scrape a node exporter on each of them, "
    "under the host that the backend has.",
    "DCGM exporter": "Prometheus has no such series of these hosts: let it scrape a DCGM exporter on each host with "
    "NVIDIA GPUs, under the host that the backend has.",
}
_OF = {"model": {"model", "names", "engine", "host"}, "backend": {"engine", "host"}}


class Asked(NamedTuple):
    """`start`, `end`: Unix milliseconds. `backend`: its label or URL."""

    start: int
    end: int
    model: str | None = None
    backend: str | None = None


class Read(NamedTuple):
    """`missing`: which exporter or setting gives it, if there is no series."""

    query: Query
    times: Times
    series: tuple[Drawn, ...]
    warnings: tuple[str, ...]
    missing: str | None


class NotConfigured(Refused):
    def __init__(self) -> None:
        message = "There is no Prometheus to ask: set CONTROL_PLANE_PROMETHEUS_URL."
        super().__init__(409, "metrics_not_configured", message)


def parameters(query: Query) -> list[str]:
    """What it may be narrowed by."""
    found = frozenset[str]().union(*map(places_of, query.lines.values()))
    return [name for name, own in _OF.items() if own & found]


async def read(plane: Plane, act: Act, name: str, asked: Asked) -> Read:
    """At most KEPT old. Raises NotFound, NotConfigured, Refused."""
    query = queries().get(name)
    if query is None:
        raise NotFound("query", name)
    prometheus = _prometheus(plane)
    at = times(asked.start, asked.end)
    put = places(await _subject(plane, asked), at.window)
    expressions = [placed(template, put) for template in query.lines.values()]
    found = await asyncio.gather(
        *(_kept(plane, act, (one, at), partial(prometheus.over, one, at)) for one in expressions)
    )
    answers = [_told(one) for one in found]
    series = tuple(
        drawn(found, legend, query.panel.title, at)
        for legend, answer in zip(query.lines, answers, strict=True)
        for found in answer.series
    )
    warnings = tuple(dict.fromkeys(one for answer in answers for one in answer.warnings))
    empty = all(value is None for one in series for value in one.values)
    return Read(query, at, series, warnings, MISSING[query.source] if empty else None)


async def _subject(plane: Plane, asked: Asked) -> Subject:
    """Raises NotFound, StorageUnavailable."""
    model = served = hosts = None
    if asked.model is not None:
        catalogue = models.catalogue(plane)
        model = catalogue.owners.get(asked.model)
        if model is None:
            raise NotFound("model", asked.model)
        entry = catalogue.stored[model].entry
        # TGI does not know its model: the chart gives it the catalogue's name.
        served = tuple(filter(None, (model, entry.served_model_name)))
        seen = (await reports.seen(plane)).backends
        backends = [*(one.url for one in entry.backends), *(one.backend for one in seen if one.model == model)]
        hosts = hosts_of(backends)
    if asked.backend is None:
        return Subject(model, served, None, hosts)
    return Subject(model, served, (place_of(asked.backend),), hosts_of([asked.backend]))


def _prometheus(plane: Plane) -> Prometheus:
    if plane.connections.prometheus is None:
        raise NotConfigured
    return plane.connections.prometheus


async def _kept(
    plane: Plane, act: Act, key: tuple[str, Times | int], ask: Callable[[], Awaitable[Answer]]
) -> Answer | PrometheusFailed:
    """Who asks the same waits for the same answer; failures are kept too, so that nobody waits for them again."""

    async def made() -> Answer | PrometheusFailed:
        try:
            return await ask()
        except PrometheusFailed as exc:
            return exc

    return await plane.measured.get(key, act.at, KEPT, made)


def _told(found: Answer | PrometheusFailed) -> Answer:
    """Raises Refused."""
    if isinstance(found, Answer):
        return found
    if found.away:
        raise Refused(503, "prometheus_away", str(found), headers={"Retry-After": str(KEPT // 1000)})
    raise Refused(502, "prometheus_failed", str(found))


class Counted(NamedTuple):
    """Requests of a model from `start` to `end`, Unix milliseconds, as routers' metrics and usage records count them.

    `dropped`: records that routers have lost, of whichever model.
    """

    start: int
    end: int
    scraped: int
    recorded: int
    dropped: int

    @property
    def differ(self) -> bool:
        """Rates are extrapolated: of few requests, one or two may be too many."""
        difference = abs(self.scraped - self.recorded)
        return difference > max(_DIFFERENCE * max(self.scraped, self.recorded), _FEW)


async def counted(plane: Plane, act: Act, model: str, start: int, end: int) -> Counted | None:
    """None: the time is too short, or Prometheus has no such series. Raises Refused."""
    prometheus = _prometheus(plane)
    end = min(end, act.at - _SETTLED)
    end -= end % 60_000
    if end - start < _SETTLED:
        return None
    (template,) = queries()["request_rate"].lines.values()
    seconds = (end - start) // 1000
    expression = placed(template, places(await _subject(plane, Asked(start, end, model)), f"{seconds}s"))

    found = _told(await _kept(plane, act, (expression, end), partial(prometheus.at, expression, end)))
    rates = [value for one in found.series for _, value in one.points]
    if not rates:
        return None
    report = await usage.report(plane, act, Question(start, end, "1h", (), (("model", model),)))
    recorded, dropped = report["totals"]["requests"], report["coverage"]["dropped"]
    return Counted(start, end, round(sum(rates) * seconds), recorded, dropped)
