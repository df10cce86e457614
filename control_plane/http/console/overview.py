"""/console/: what works and what does not, the worst first; the last hour, routers, and what people have changed."""

from typing import Any, get_args

from markupsafe import Markup
from starlette.responses import Response

from control_plane.http.console.shell import OPERATE, Page, Visit
from control_plane.pure import axes, charts
from control_plane.pure.charts import Series
from control_plane.pure.fleet import ModelStanding
from control_plane.services import models, overview, recent
from control_plane.services.recent import Asked, Length, Recent

# Models and routers that are shown; the others are behind a link
MOST = 20
_MOST_ROUTERS = 8
LENGTHS: dict[Length, str] = {"15m": "15 min", "1h": "1 h", "6h": "6 h"}


async def home(visit: Visit) -> Response:
    length: Any = visit.choice("range", "1h", *(one for one in get_args(Length) if one != "1h"))
    found = await overview.overview(visit.plane, visit.act)
    bad = [one for one in found.models if _is_bad(one, found)]
    last = await recent.recent(visit.plane, visit.act, Asked(length)) if visit.may_somewhere("usage.see") else None
    return visit.render(
        "overview.html",
        overview=found,
        bad=bad[:MOST],
        more_bad=len(bad) - MOST,
        rest=[one for one in found.models if not _is_bad(one, found)][:MOST],
        more_rest=len(found.models) - len(bad) - MOST,
        total=len(found.models),
        problems=len(models.catalogue(visit.plane).problems) if visit.may("models.see") else 0,
        routers=found.routers.each[:_MOST_ROUTERS],
        more_routers=len(found.routers.each) - _MOST_ROUTERS,
        recent=last,
        whole=visit.may("usage.see"),
        drawn=drawn(last) if last is not None and last.totals.requests else (),
        length=length,
        lengths=LENGTHS.items(),
        words=LENGTHS[length],
        live=True,
    )


def _is_bad(one: ModelStanding, found: overview.Overview) -> bool:
    return one.state in ("failing", "degraded") or one.name in found.failed


def drawn(found: Recent) -> tuple[Markup, ...]:
    """Requests, times to the first token, and tokens per second, of the whole and of one model alike."""
    times = [point.at for point in found.points]
    minutes = found.bucket // 60_000
    fine = tuple(point.requests - point.errors for point in found.points)
    return (
        charts.columns(
            times,
            (Series("ok", fine, kind="ok"), Series("errors", tuple(p.errors for p in found.points), kind="failed")),
            title="Requests",
            bucket_ms=found.bucket,
            unit_text="per minute" if minutes == 1 else f"in {minutes} minutes",
            empty="No request in this time.",
        ),
        charts.lines(
            times,
            tuple(Series(name, tuple(getattr(p, f"ttft_{name}") for p in found.points)) for name in ("p50", "p95")),
            title="Time to first token",
            bucket_ms=found.bucket,
            empty="No answer with a first token in this time.",
        ),
        charts.lines(
            times,
            (Series("output tokens", tuple(point.tokens_per_second for point in found.points)),),
            title="Output tokens",
            bucket_ms=found.bucket,
            unit=axes.PER_SECOND,
            unit_text="per second",
            empty="No tokens in this time.",
        ),
    )


PAGE = Page("/console/", "Overview", home, None, OPERATE)
