"""/console/usage: what was asked, taken and paid, by whom and when; the same answer as GET /api/v1/usage."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from starlette.responses import Response

from control_plane.data.usage_tables import DIMENSIONS
from control_plane.errors import Invalid, NotFound, Problem
from control_plane.http.api.usage import table
from control_plane.http.console import narrowing, ranges
from control_plane.http.console.ranges import Range
from control_plane.http.console.requests import PATH as REQUESTS
from control_plane.http.console.shell import USE, Page, Visit, url
from control_plane.pure import axes, charts
from control_plane.pure.axes import Unit
from control_plane.pure.charts import Series
from control_plane.pure.records import DAY
from control_plane.services import keys, organisations, spend
from control_plane.services import usage as sums
from control_plane.services.spend import BudgetUse
from control_plane.services.usage import BUCKETS, Question

PATH = "/console/usage"
RANGES, DEFAULT = ("24h", "7d", "30d"), "24h"
# Milliseconds up to which the buckets are hours
_HOURLY = 3 * DAY
# Milliseconds for which the present stays the same: who looks at another measure or order gets the same answer.
_STEP = 20_000
NOTHING = "none"
_MOST_BUDGETS = 5
Row = Mapping[str, Any]


class Measure(NamedTuple):
    """What the chart shows: the sum of `fields` of each point."""

    label: str
    fields: tuple[str, ...]


MEASURES = {
    "requests": Measure("Requests", ("requests",)),
    "errors": Measure("Errors", ("errors",)),
    "tokens": Measure("Tokens", ("input_tokens", "output_tokens")),
    "spend": Measure("Spend", ("cost_nanos",)),
}


def share_of(row: Row) -> float | None:
    """Errors of requests."""
    return row["errors"] / row["requests"] if row["requests"] else None


# Columns that rows can be sorted by; None: nothing is known, which is last
SORTS: Mapping[str, Callable[[Row], Any]] = {
    "requests": lambda row: row["requests"],
    "errors": lambda row: row["errors"],
    "share": share_of,
    "input": lambda row: row["input_tokens"],
    "cached": lambda row: row["cached_input_tokens"],
    "output": lambda row: row["output_tokens"],
    "spend": lambda row: row["cost_nanos"],
    "p50": lambda row: row["latency_ms"]["p50"],
    "p95": lambda row: row["latency_ms"]["p95"],
    "ttft": lambda row: row["ttft_ms"]["p95"],
}


class Asked(NamedTuple):
    """`sort`: of SORTS, with `-` before it from the largest on; None: as the API has them."""

    question: Question
    range: Range
    measure: str
    sort: str | None


async def usage(visit: Visit) -> Response:
    try:
        asked = _read(visit)
    except Invalid as exc:
        spare = ranges.fixed(visit.act.at, DEFAULT, RANGES)
        asked = Asked(Question(spare.start, spare.end, "1h"), spare, "requests", None)
        return await _shown(visit, asked, None, exc)
    answer = await sums.report(visit.plane, visit.act, asked.question)
    if visit.choice("format", "html", "csv") == "csv":
        return _csv(answer)
    return await _shown(visit, asked, answer)


def _read(visit: Visit) -> Asked:
    """Raises Invalid."""
    chosen = ranges.chosen(visit, RANGES, DEFAULT, _STEP)
    bucket = "1h" if chosen.end - chosen.start <= _HOURLY else "1d"
    filters = tuple(narrowing.filters(visit).items())
    sort = visit.query.get("sort")
    if sort is not None and sort.removeprefix("-") not in SORTS:
        raise Invalid(Problem("sort", f"must be one of {', '.join(SORTS)}, not {sort[:40]!r}"))
    visit.choice("format", "html", "csv")
    question = Question(chosen.start, chosen.end, bucket, _groups(visit), filters)
    return Asked(question, chosen, visit.choice("measure", *MEASURES), sort)


def _groups(visit: Visit) -> tuple[str, ...]:
    """Of `?group_by=model,key`, or as the form has it, `?group_by=model&then=key`. Raises Invalid."""
    given = [*visit.query.get("group_by", "model").split(","), visit.query.get("then", "")]
    names = tuple(dict.fromkeys(one for one in given if one and one != NOTHING))
    if any(name not in DIMENSIONS for name in names):
        raise Invalid(Problem("group_by", f"must be of {', '.join(DIMENSIONS)}"))
    if len(names) > 2:
        raise Invalid(Problem("group_by", "must have 2 names at most"))
    return names


def _csv(answer: Row) -> Response:
    name = f"usage-{answer['start'][:10]}-{answer['end'][:10]}.csv"
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return Response(table(dict(answer)), media_type="text/csv", headers=headers)


async def _shown(visit: Visit, asked: Asked, answer: Row | None, problem: Invalid | None = None) -> Response:
    empty = answer is None or not answer["rows"] or not answer["totals"]["requests"] + answer["coverage"]["received"]
    names = {} if answer is None else await _key_names(visit, answer)
    organisation = visit.query.get("organisation")
    return visit.render(
        "usage.html",
        status=problem.status if problem else 200,
        problem=problem,
        chosen=asked.range,
        as_of=visit.act.at if asked.range.custom else asked.range.end,
        groups=asked.question.group_by,
        measure=asked.measure,
        measures={name: one.label for name, one in MEASURES.items()},
        sort=asked.sort,
        answer=answer,
        empty=empty,
        missing=await narrowing.missing(visit) if empty and problem is None else "",
        filtered=any(name in DIMENSIONS for name in visit.query),
        opened=any(name in visit.query for name in DIMENSIONS if name not in ("model", "key", "organisation")),
        dimensions=[(NOTHING, "nothing"), *((name, name.replace("_", " ")) for name in DIMENSIONS)],
        choices=await narrowing.choices(visit),
        error_share=None if answer is None else share_of(answer["totals"]),
        rows=[] if answer is None else _rows(visit, asked, answer, names),
        budgets=await _budgets(visit, organisation),
        **({} if answer is None or empty else _charts(visit, asked, answer, names)),
    )


async def _key_names(visit: Visit, answer: Row) -> Mapping[str, str]:
    """By id, of the keys in an answer."""
    groups = [row["group"] or {} for row in answer["rows"]]
    ids = {group["key"] for group in groups if group.get("key") is not None}
    return await keys.names(visit.plane, visit.act, ids) if ids else {}


def _word(name: str, value: str | None, names: Mapping[str, str]) -> str:
    """A value of a group as people read it."""
    if value is None:
        return f"no {name}"
    return names.get(value, value) if name == "key" else value


# The chart


def _charts(visit: Visit, asked: Asked, answer: Row, names: Mapping[str, str]) -> dict[str, Any]:
    bucket = BUCKETS[answer["bucket"]]
    times = charts.buckets(answer["start"], answer["end"], bucket)
    measure = MEASURES[asked.measure]
    series = tuple(_series(visit, one, times, measure, names) for one in answer["series"])
    unit = _unit(asked.measure, answer["currency"])
    by = f" by {' and '.join(one.replace('_', ' ') for one in answer['group_by'])}" if answer["group_by"] else ""
    title = f"{measure.label}{by}"
    each = "per hour" if answer["bucket"] == "1h" else "per day"
    return {
        "chart": charts.columns(times, series, title=title, bucket_ms=bucket, unit=unit, unit_text=f"{each}, UTC"),
        "numbers": charts.table_of(times, series, title=f"{title}, {each}", bucket_ms=bucket, unit=unit),
    }


def _unit(measure: str, currency: str) -> Unit:
    return axes.money(currency) if measure == "spend" else axes.COUNT


def _series(visit: Visit, one: Row, times: tuple[int, ...], measure: Measure, names: Mapping[str, str]) -> Series:
    points = [{"at": point["at"], "sum": sum(point[field] for field in measure.fields)} for point in one["points"]]
    values = charts.spread(points, times, "sum")
    if one.get("other"):
        return Series("other", values, kind=charts.OTHER)
    group = one["group"]
    name = " · ".join(_word(key, value, names) for key, value in group.items()) or measure.label
    return Series(name, values, _narrowed(visit, group) if group else None)


def _narrowed(visit: Visit, group: Mapping[str, str | None]) -> str:
    """This page, of one group only."""
    return visit.address(**_filters(group))


def _filters(group: Mapping[str, str | None]) -> dict[str, str]:
    return {name: narrowing.WITHOUT if value is None else value for name, value in group.items()}


# The table


def _rows(visit: Visit, asked: Asked, answer: Row, names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Sorted; what is other is last."""
    rows, sort = list(answer["rows"]), asked.sort
    if sort is not None:
        key = SORTS[sort.removeprefix("-")]
        known = [row for row in rows if key(row) is not None]
        known.sort(key=key, reverse=sort.startswith("-"))
        rows = [*known, *(row for row in rows if key(row) is None)]
    rows.sort(key=lambda row: bool(row.get("other")))
    return [_row(visit, asked, row, names) for row in rows]


def _row(visit: Visit, asked: Asked, row: Row, names: Mapping[str, str]) -> dict[str, Any]:
    group = row["group"]
    cells, link = [], None
    if group is not None:
        for name, value in group.items():
            cells.append((_word(name, value, names), visit.address(**_filters({name: value})), value or ""))
        link = _requests(visit, asked, group)
    return {**row, "cells": cells, "share": share_of(row), "link": link}


def _requests(visit: Visit, asked: Asked, group: Mapping[str, str | None]) -> str | None:
    """The requests that are counted in a row, for those who may see them."""
    if not visit.may_somewhere("requests.see"):
        return None
    given = {**dict(asked.question.filters), **group}
    return url(REQUESTS, **ranges.between(asked.range.start, asked.range.end), **_filters(given))


# Budgets


async def _budgets(visit: Visit, organisation: str | None) -> list[tuple[str, BudgetUse]]:
    """Of the organisation that is chosen, else of the caller's own, as far as all of their usage may be seen."""
    names: Iterable[str] = [organisation] if organisation else sorted(visit.act.principal.roles)[:_MOST_BUDGETS]
    given = {}
    for name in names:
        if visit.may("usage.see", name) and visit.may("organisations.see", name):
            try:
                given[name] = (await organisations.one(visit.plane, name))["budget"]
            except NotFound:
                continue
    return list((await spend.uses(visit.plane, "organisation", given)).items())


PAGE = Page(PATH, "Usage", usage, "usage.see", USE)
