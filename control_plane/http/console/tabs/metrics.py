"""The tab Metrics: what its requests were like, its figures by router, and the series of its engines and hosts."""

from typing import Any

from control_plane.errors import Refused
from control_plane.http.console.overview import LENGTHS, drawn
from control_plane.http.console.series import Section, section
from control_plane.http.console.tabs import Look, Tab, served
from control_plane.services import recent, reports, series
from control_plane.services.recent import Asked, Recent
from control_plane.services.series import Counted

QUERIES = (
    *("requests", "errors", "aborts", "first_token", "token_time", "tokens", "in_flight"),
    *("engine_running", "engine_waiting", "kv_cache", "prefix_cache", "preemptions"),
    *("host_cpu", "host_memory", "gpu_memory", "gpu_utilisation"),
)


async def _of_metrics(look: Look) -> dict[str, Any]:
    visit = look.visit
    length: Any = visit.choice("range", "1h", "15m", "6h")
    found = await recent.recent(visit.plane, visit.act, Asked(length, ((look.asked_by, look.name),)))
    rows: list[dict[str, Any]] = []
    prometheus = counted = None
    if visit.may("backends.see"):
        # Others answer for a virtual model: the series are theirs.
        if not look.is_virtual:
            prometheus, counted = await _of_prometheus(look, found)
        seen = await reports.seen(visit.plane)
        rows = [
            {"router": one.instance, **row}
            for one in seen.present
            for row in one.report["models"]
            if row["name"] == look.name
        ]
    return {
        "recent": found,
        "drawn": drawn(found) if found.totals.requests else (),
        "lengths": LENGTHS.items(),
        "length": length,
        "words": LENGTHS[length],
        "by_router": rows,
        "section": prometheus,
        "counted": counted,
    }


async def _of_prometheus(look: Look, found: Recent) -> tuple[Section, Counted | None]:
    """Of the same time as the figures of usage."""
    visit, asked = look.visit, series.Asked(found.start, found.end, look.name)
    shown = await section(visit, QUERIES, asked)
    if not shown.configured or shown.problem:
        return shown, None
    try:
        return shown, await series.counted(visit.plane, visit.act, look.name, found.start, found.end)
    except Refused as exc:
        shown.problem = exc.message
        return shown, None


TAB = Tab("metrics", "Metrics", served("usage.see", True), _of_metrics, live=True)
