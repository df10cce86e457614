"""/console/requests/{id}: what became of one request, in words, attempt by attempt, and where to look next."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from starlette.responses import Response

from control_plane.http.console import ranges
from control_plane.http.console.filters import path
from control_plane.http.console.requests import PATH
from control_plane.http.console.shell import Page, Visit, url
from control_plane.pure import charts, elsewhere, figures, outcomes
from control_plane.pure.outcomes import Explanation
from control_plane.pure.records import DAY, HOUR
from control_plane.pure.roles import Permission
from control_plane.pure.times import shown
from control_plane.services import prices, requests
from control_plane.services.requests import Wanted

_MOST_LEGS = 50
# Milliseconds before and after, of which the log is of interest, too
_AROUND = 10_000
_KINDS = {
    "request": "The request of a client",
    "race": "A run of a race: billed, beside the request itself",
    "vote": "A run of a vote: billed, beside the request itself",
    "hedge": "A second run of a slow request: not billed",
    "shadow": "A copy for comparison: not billed",
}
_SOURCES = {
    "reported": "reported by the engine",
    "counted": "counted by events: an estimate",
    "cache": "from the cache: none",
    "none": "not reported",
}


class Log(NamedTuple):
    """Of an engine. `start`, `end`: Unix milliseconds; `address` None: nobody has said where logs are."""

    backend: str
    start: int
    end: int
    address: str | None


async def request(visit: Visit) -> Response:
    found = await requests.one(visit.plane, visit.act, visit.path("id"))
    explained = outcomes.explain(found)
    return visit.render(
        "request.html",
        request=found,
        explained=explained,
        waterfall=_waterfall(visit, found),
        legs=[(one, outcomes.explain(one)) for one in await _legs(visit, found)],
        around=await requests.around(visit.plane, visit.act, found),
        words_of=outcomes.attempt_words,
        state_of=outcomes.state_of,
        kinds=_KINDS,
        sources=_SOURCES,
        price=_price(visit, found),
        speed=_speed(found),
        next_pages=_next(visit, found, explained),
        logs=_logs(visit, found),
        trace=_trace(visit, found),
    )


def _waterfall(visit: Visit, found: Mapping[str, Any]) -> Any:
    bars = outcomes.bars(found)
    if visit.may("backends.see"):
        backends = url("/console/backends", model=found["model"])
        bars = tuple(bar if bar.state == "waited" else bar._replace(href=backends) for bar in bars)
    return charts.waterfall(bars, found["latency_ms"], title="What happened")


async def _legs(visit: Visit, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The other records with the request id, near it."""
    if not found["related"]:
        return []
    wanted = Wanted(found["request_id"], found["at"] - HOUR, found["at"] + HOUR + 1)
    rows = await requests.listing(visit.plane, visit.act, wanted, None, _MOST_LEGS)
    others = [one for one in rows if one["request_id"] == found["request_id"] and one["id"] != found["id"]]
    return sorted(others, key=lambda one: (one["at"], one["id"]))


def _price(visit: Visit, found: Mapping[str, Any]) -> Mapping[str, int] | None:
    """What held for the model then, in nanos per token; for those who may see prices."""
    row = prices.current(visit.plane).at(found["model"], found["at"]) if visit.may("backends.see") else None
    return None if row is None else row.price._asdict()


def _speed(found: Mapping[str, Any]) -> str | None:
    """Tokens per second after the first one."""
    first, tokens = found["ttft_ms"], found["output_tokens"]
    if first is None or not tokens or tokens < 2 or found["latency_ms"] <= first:
        return None
    return figures.short((tokens - 1) / (found["latency_ms"] - first) * 1000)


def _next(visit: Visit, found: Mapping[str, Any], explained: Explanation) -> list[tuple[str, str]]:
    """(address, text) of the pages where an operator looks next, those that help most first."""
    key, prompt = found["key_id"], (found["prompt"] or "").partition("@")[0]
    pages: dict[str, tuple[str, str, Permission]] = {
        "backend": (url("/console/backends", model=found["model"]), f"Backends of {found['model']}", "backends.see"),
        "model": (f"/console/models/{path(found['model'])}", f"Model {found['model']}", "models.see"),
        "key": (f"/console/keys/{key}" if key else "", f"Key {found['key_name'] or key}", "keys.see"),
        "limits": (f"/console/keys/{key}" if key else "", f"Limits of key {found['key_name'] or key}", "keys.see"),
        "prompt": (f"/console/prompts/{path(prompt)}" if prompt else "", f"Prompt {prompt}", "prompts.see"),
        "routers": ("/console/routers", "Routers", "backends.see"),
    }
    chosen = [pages[look] for look in explained.look if look in pages]
    links = {address: text for address, text, needed in chosen if address and visit.may_somewhere(needed)}
    start = found["at"] - HOUR // 2
    near = url(PATH, **ranges.between(start, start + HOUR), outcome=found["outcome"], model=found["model"])
    return [*links.items(), (near, f"Requests of {found['model']} that ended so, in this hour")]


# Logs and traces, for those who may read them


def _logs(visit: Visit, found: Mapping[str, Any]) -> list[Log]:
    """Of the engines that were tried, each for the time in which it was."""
    if not visit.may("backends.operate"):
        return []
    template = visit.plane.settings.log_url
    logs = []
    for one in outcomes.attempts_of(found):
        start = _after(found, one["start_ms"]) - _AROUND
        end = _after(found, one["start_ms"] + one["duration_ms"]) + _AROUND
        values = _values(found, one["backend"], start, end)
        logs.append(Log(one["backend"], start, end, template and elsewhere.filled(template, values)))
    return list(dict.fromkeys(logs))


def _after(found: Mapping[str, Any], milliseconds: float) -> int:
    """A time of a request; of one that says it took for ever a time that can be written."""
    return int(found["at"]) + math.ceil(min(milliseconds, DAY))


def _trace(visit: Visit, found: Mapping[str, Any]) -> str | None:
    template = visit.plane.settings.trace_url
    if template is None or not visit.may("backends.operate"):
        return None
    start, end = found["at"] - _AROUND, _after(found, found["latency_ms"]) + _AROUND
    return elsewhere.filled(template, _values(found, found["backend"] or "", start, end))


def _values(found: Mapping[str, Any], backend: str, start: int, end: int) -> dict[str, str]:
    names = {name: found[name] for name in ("model", "router", "request_id")}
    times = {"start": shown(start) or "", "end": shown(end) or "", "start_ms": str(start), "end_ms": str(end)}
    return {**names, **times, "backend": backend}


PAGE = Page(f"{PATH}/{{id}}", "Request", request, "requests.see")
