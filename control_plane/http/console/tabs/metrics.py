"""The tab Metrics: what its requests were like, and its figures by router."""

from typing import Any

from control_plane.http.console.overview import LENGTHS, drawn
from control_plane.http.console.tabs import Look, Tab, served
from control_plane.services import recent, reports
from control_plane.services.recent import Asked


async def _of_metrics(look: Look) -> dict[str, Any]:
    visit = look.visit
    length: Any = visit.choice("range", "1h", "15m", "6h")
    found = await recent.recent(visit.plane, visit.act, Asked(length, ((look.asked_by, look.name),)))
    rows: list[dict[str, Any]] = []
    if visit.may("backends.see"):
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
    }


TAB = Tab("metrics", "Metrics", served("usage.see", True), _of_metrics, live=True)
