"""/api/v1/usage: sums of what was asked, taken and paid."""

import csv
import io
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Depends, Query, Request, Response

from control_plane.data.usage_tables import DIMENSIONS
from control_plane.errors import Invalid, Problem
from control_plane.http.api.access import Acting, ThePlane
from control_plane.plane import Act
from control_plane.pure.records import BILLED, DAY, KINDS
from control_plane.pure.times import read
from control_plane.services import usage
from control_plane.services.usage import Question

router = APIRouter(tags=["usage"])
LONGEST = 400 * DAY
_PERCENTILES = ("p50", "p95", "p99")
Text = Annotated[str | None, Query(max_length=2048)]


def _filters(
    model: Text = None,
    asked_model: Text = None,
    key: Text = None,
    user: Text = None,
    organisation: Text = None,
    backend: Text = None,
    route: Text = None,
    outcome: Text = None,
    variant: Text = None,
) -> dict[str, str]:
    """Those that are given, in the order of DIMENSIONS."""
    found = {
        "model": model, "asked_model": asked_model, "key": key, "user": user, "organisation": organisation,
        "backend": backend, "route": route, "outcome": outcome, "variant": variant,
    }  # fmt: skip
    return {name: value for name, value in found.items() if value is not None}


Filters = Annotated[dict[str, str], Depends(_filters)]


@router.get("/usage", responses={200: {"content": {"text/csv": {}}}})
async def read_usage(
    act: Acting,
    plane: ThePlane,
    request: Request,
    given: Filters,
    start: Text = None,
    end: Text = None,
    bucket: Literal["1h", "1d"] = "1d",
    group_by: Annotated[list[str] | None, Query(description=f"two at most of {', '.join(DIMENSIONS)}")] = None,
    kind: Annotated[list[str] | None, Query(description="default: request,race,vote")] = None,
) -> Response:
    """Without `start` and `end`: the last 24 hours. An empty filter is of those without one: `?key=`."""
    filters = tuple((name, value or None) for name, value in given.items())
    span = _span(act, start, end)
    question = Question(*span, bucket, _listed("group_by", group_by, DIMENSIONS, 2), filters, kinds_of(kind) or BILLED)
    answer = await usage.report(plane, act, question)
    if "text/csv" in request.headers.get("accept", ""):
        return Response(table(answer), media_type="text/csv", headers={"vary": "accept"})
    return Response(orjson.dumps(answer), media_type="application/json", headers={"vary": "accept"})


def _span(act: Act, start: str | None, end: str | None) -> tuple[int, int]:
    last = act.at if end is None else moment("end", end)
    first = last - DAY if start is None else moment("start", start)
    if first >= last:
        raise Invalid(Problem("end", "must be after start"))
    if last - first > LONGEST:
        raise Invalid(Problem("start", "must be at most 400 days before end"))
    return first, last


def moment(param: str, value: str) -> int:
    """Unix milliseconds. Raises Invalid."""
    try:
        return read(value)
    except ValueError as exc:
        raise Invalid(Problem(param, str(exc))) from None


def kinds_of(given: list[str] | None) -> tuple[str, ...]:
    return _listed("kind", given, KINDS, len(KINDS))


def _listed(param: str, given: list[str] | None, known: Any, most: int) -> tuple[str, ...]:
    """`?param=a,b` or `?param=a&param=b`. Raises Invalid."""
    found = tuple(dict.fromkeys(one for part in given or () for one in part.split(",") if one))
    if any(one not in known for one in found):
        raise Invalid(Problem(param, f"must be of {', '.join(known)}"))
    if len(found) > most:
        raise Invalid(Problem(param, f"must have {most} names at most"))
    return found


def table(answer: dict[str, Any]) -> str:
    """The rows as CSV: a column for each part of the group, then the sums."""
    columns = [*answer["group_by"], "other", *usage.SHOWN]
    columns += [f"{name}_{share}" for name in ("latency_ms", "ttft_ms") for share in _PERCENTILES]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerow(columns)
    for row in answer["rows"]:
        group = row["group"] or {}
        line = [_cell(group.get(name)) for name in answer["group_by"]]
        line += ["true" if row.get("other") else "", *(row[name] for name in usage.SHOWN)]
        writer.writerow([*line, *(row[name][share] for name in ("latency_ms", "ttft_ms") for share in _PERCENTILES)])
    return text.getvalue()


def _cell(value: str | None) -> str | None:
    """A spreadsheet must not take a name for a formula."""
    return f"'{value}" if value and value[0] in "=+-@" else value
