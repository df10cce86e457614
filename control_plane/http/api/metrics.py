"""/api/v1/metrics: what Prometheus knows of routers, engines and hosts, by named queries: no caller sends PromQL."""

from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from control_plane.errors import Invalid, Problem
from control_plane.http.api.access import Acting, ThePlane
from control_plane.http.api.documents import OUTSIDE
from control_plane.http.api.paging import Page, Paging, page
from control_plane.http.api.usage import LONGEST, Text, moment
from control_plane.panels import Query as Named
from control_plane.panels import Source, Unit, queries
from control_plane.plane import Act
from control_plane.pure.records import HOUR, MINUTE
from control_plane.pure.times import shown
from control_plane.services import series
from control_plane.services.series import Asked, Read

router = APIRouter(tags=["metrics"])


class NamedQuery(BaseModel):
    """`parameters`: what it may be narrowed by."""

    name: str = Field(examples=["kv_cache"])
    title: str = Field(examples=["KV cache used"])
    text: str = Field(examples=["Of each instance, the fullest cache."])
    unit: Unit
    source: Source
    parameters: list[str] = Field(examples=[["model", "backend"]])


class OneSeries(BaseModel):
    """`points`: [time, value] from `start` to `end`, each `step` seconds; null: a gap."""

    name: str = Field(examples=["llama-3-8b 10.0.0.11:8000"])
    labels: dict[str, str] = Field(examples=[{"model_name": "llama-3-8b", "instance": "10.0.0.11:8000"}])
    points: list[tuple[str, float | None]] = Field(examples=[[["2026-11-28T12:00:00Z", 0.42]]])


class Answered(BaseModel):
    """`missing`: which exporter or setting gives it, if there is no series. `warnings`: of Prometheus."""

    query: NamedQuery
    start: str = Field(examples=["2026-11-28T11:00:15Z"])
    end: str = Field(examples=["2026-11-28T12:00:00Z"])
    step: int = Field(examples=[15])
    series: list[OneSeries]
    warnings: list[str]
    missing: str | None


@router.get("/metrics")
async def list_queries(act: Acting, place: Paging) -> Page[NamedQuery]:
    """By name."""
    found = sorted(queries().items())
    if (after := place.key(str)) is not None:
        found = [one for one in found if one[0] > after[0]]
    return page(found[: place.limit + 1], place, lambda one: [one[0]], lambda one: _named(one[1]))


@router.get("/metrics/{query}", responses=OUTSIDE)
async def read_metrics(
    act: Acting,
    plane: ThePlane,
    query: str,
    start: Text = None,
    end: Text = None,
    model: Annotated[str | None, Query(max_length=128)] = None,
    backend: Annotated[str | None, Query(max_length=2048, description="its label, or URL")] = None,
) -> Answered:
    """Without `start` and `end`: the last hour. 409 `metrics_not_configured` without a Prometheus."""
    return _answered(await series.read(plane, act, query, Asked(*_span(act, start, end), model, backend)))


def _span(act: Act, start: str | None, end: str | None) -> tuple[int, int]:
    last = act.at if end is None else moment("end", end)
    first = last - HOUR if start is None else moment("start", start)
    if not MINUTE <= last - first <= LONGEST:
        raise Invalid(Problem("start", "must be a minute to 400 days before end"))
    return first, last


def _named(query: Named) -> NamedQuery:
    panel = query.panel
    return NamedQuery(
        name=panel.query,
        title=panel.title,
        text=panel.text,
        unit=panel.unit,
        source=query.source,
        parameters=series.parameters(query),
    )


def _answered(found: Read) -> Answered:
    at = found.times
    moments: list[Any] = [shown(each) for each in at.all]
    return Answered(
        query=_named(found.query),
        start=moments[0],
        end=moments[-1],
        step=at.step // 1000,
        series=[
            OneSeries(name=one.name, labels=dict(one.labels), points=list(zip(moments, one.values, strict=True)))
            for one in found.series
        ],
        warnings=list(found.warnings),
        missing=found.missing,
    )
