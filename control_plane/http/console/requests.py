"""/console/requests: which requests there were, found by the id that a client got and by filters in the URL."""

from typing import Any, NamedTuple

from starlette.responses import RedirectResponse, Response

from control_plane.errors import Invalid, NotFound, Problem
from control_plane.http.console import lists, narrowing, ranges
from control_plane.http.console.ranges import Range
from control_plane.http.console.shell import OPERATE, Page, Visit, url
from control_plane.pure import charts, outcomes
from control_plane.pure.records import DAY, KINDS
from control_plane.services import requests
from control_plane.services.requests import Histogram, Wanted

PATH = "/console/requests"
RANGES, DEFAULT = ("15m", "1h", "24h", "7d"), "1h"
# Ranges of which new requests are shown as they come
LIVE = ("15m", "1h")
FAILED, FINE = "failed", "fine"
# Outcomes that people look for, the most frequent first; any other one is one of the URL.
OUTCOMES = tuple(dict.fromkeys(("ok", "client_gone", "upstream_4xx", "upstream_5xx", *outcomes.OUTCOMES)))
# Parameters that are no filters, and filters that are always seen
_PLACES, _SEEN = ("range", "start", "end", "after", "kind"), ("id", "model", "key", "outcome")
# What is pasted with an id
_BESIDE = " \t\r\n\"'`<>,;"


class Asked(NamedTuple):
    """What the URL asks for. `range` None: an id is looked for at all times."""

    wanted: Wanted
    range: Range | None
    after: list[str | int] | None


async def listing(visit: Visit) -> Response:
    try:
        asked = read(visit)
    except Invalid as exc:
        spare = ranges.fixed(visit.act.at, DEFAULT, RANGES)
        return await _shown(visit, Asked(Wanted(), spare, None), [], None, exc)
    rows = await _rows(visit, asked)
    if asked.wanted.id is not None and not visit.partial:
        found = await _only(visit, asked, rows)
        if found is not None:
            return RedirectResponse(url(f"{PATH}/{found}"), 303)
    bars = await requests.histogram(visit.plane, visit.act, asked.wanted)
    return await _shown(visit, asked, rows, bars)


def read(visit: Visit) -> Asked:
    """Raises Invalid."""
    query = visit.query
    id = query.get("id", "").strip(_BESIDE)[:128] or None
    everywhere = id is not None and not {"range", "start", "end"} & query.keys()
    chosen = None if everywhere else ranges.chosen(visit, RANGES, DEFAULT)
    filters = narrowing.filters(visit)
    if filters.get("outcome") in (FAILED, FINE):
        del filters["outcome"]
    kind = visit.choice("kind", "request", "all", *KINDS[1:])
    status = visit.choice("status", "", *map(str, range(1, 6)))
    wanted = Wanted(
        id,
        None if chosen is None else chosen.start,
        None if chosen is None else chosen.end,
        filters,
        () if kind == "all" else (kind,),
        {FAILED: True, FINE: False}.get(query.get("outcome", "")),
        int(status) if status else None,
        visit.choice("tries", "", "more") == "more",
        _slower(query.get("slower")),
    )
    return Asked(wanted, chosen, lists.after(visit, int, str))


def _slower(given: str | None) -> float | None:
    """Milliseconds of seconds. Raises Invalid."""
    if given is None:
        return None
    try:
        seconds = float(given.replace(",", "."))
    except ValueError:
        seconds = -1
    if not 0 <= seconds < 1e9:
        raise Invalid(Problem("slower", f"must be seconds such as 2.5, not {given[:40]!r}"))
    return seconds * 1000


async def _rows(visit: Visit, asked: Asked) -> list[dict[str, Any]]:
    return await requests.listing(visit.plane, visit.act, asked.wanted, asked.after, lists.ROWS)


async def _only(visit: Visit, asked: Asked, rows: list[dict[str, Any]]) -> str | None:
    """The one request that an id finds: by request id or its beginning, or by the id of a record."""
    if "kind" in visit.query or asked.after is not None:
        return None
    if not rows:
        # Of a request there may be legs only; and people also paste ids of records.
        rows = await _rows(visit, asked._replace(wanted=asked.wanted._replace(kinds=())))
    if not rows and asked.wanted.id is not None:
        try:
            rows = [await requests.one(visit.plane, visit.act, asked.wanted.id)]
        except NotFound:
            return None
    return str(rows[0]["id"]) if len(rows) == 1 else None


async def _shown(
    visit: Visit, asked: Asked, rows: list[dict[str, Any]], bars: Histogram | None, problem: Invalid | None = None
) -> Response:
    found = lists.page(rows, lambda row: [row["at"], row["id"]])
    chosen = asked.range
    live = problem is None and asked.after is None and chosen is not None and chosen.name in LIVE
    return visit.render(
        "requests.html",
        status=problem.status if problem else 200,
        problem=problem,
        asked=asked.wanted,
        chosen=chosen,
        long=chosen is None or chosen.end - chosen.start > DAY,
        rows=[(row, outcomes.explain(row)) for row in found.rows],
        after=found.after,
        chart=None if bars is None else _chart(visit, bars),
        total=None if bars is None else sum(one.ok + one.failed for one in bars.bars),
        failed=None if bars is None else sum(one.failed for one in bars.bars),
        filtered=any(name not in _PLACES for name in visit.query),
        opened=any(name not in (*_PLACES, *_SEEN) for name in visit.query) or "kind" in visit.query,
        kinds=KINDS[1:],
        outcome_choices=_outcome_choices(visit),
        missing=await narrowing.missing(visit) if not rows and problem is None else "",
        choices={} if visit.partial else await narrowing.choices(visit),
        live=live,
    )


def _outcome_choices(visit: Visit) -> list[tuple[str, str]]:
    found = [("", "all"), (FAILED, "all that failed"), (FINE, "all that did not fail")]
    found += [(name, name.replace("_", " ")) for name in OUTCOMES]
    given = visit.query.get("outcome")
    if given is not None and given not in dict(found):
        found.append((given, given))
    return found


def _chart(visit: Visit, bars: Histogram) -> Any:
    """Each column leads to its part of the range."""
    bins = []
    for bar in bars.bars:
        start, end = max(bar.at, bars.start), min(bar.at + bars.bucket, bars.end)
        narrower = visit.address(**ranges.between(start, end), after=None)
        bins.append(charts.Bin(bar.at, bar.ok, bar.failed, narrower if bar.ok or bar.failed else None))
    return charts.histogram(bins, title="Requests by time", bucket_ms=bars.bucket)


PAGE = Page(PATH, "Requests", listing, "requests.see", OPERATE)
