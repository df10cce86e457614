"""/console/routers: which routers report, whether they have what this control plane says, and what they send."""

from collections import Counter
from typing import Any

from starlette.responses import Response

from control_plane.http.console import lists, series
from control_plane.http.console.shell import OPERATE, Page, Visit
from control_plane.pure.fleet import ROUTER_STATUSES, RouterStanding, routers_standing
from control_plane.pure.records import HOUR
from control_plane.pure.reports import Reported
from control_plane.services import reports
from control_plane.services.series import Asked

QUERIES = ("router_cpu", "router_memory", "loop_lag", "rejections", "registry_age")
DOCUMENTS = {"models": "catalogue", "policy": "policy", "overrides": "overrides"}


async def routers(visit: Visit) -> Response:
    reported = (await reports.seen(visit.plane)).reported
    standing = routers_standing(reported, reports.etags(visit.plane), visit.act.at)
    by_name = {one.instance: one for one in reported}
    found = lists.part(visit, standing.each, _place, int, str)
    present = [one for one in reported if not one.lost(visit.act.at)]
    return visit.render(
        "routers.html",
        standing=standing,
        rows=[_shown(one, by_name[one.instance]) for one in found.rows],
        after=found.after,
        made=reports.made_at(visit.plane),
        documents=DOCUMENTS,
        versions=Counter(one.report["version"] for one in present).most_common(),
        in_flight=sum(one.report["in_flight"] for one in present),
        waiting=sum(one.queued or 0 for one in standing.each if not one.lost),
        section=await series.section(visit, QUERIES, Asked(visit.act.at - HOUR, visit.act.at)) if reported else None,
        live=True,
    )


def _shown(one: RouterStanding, reported: Reported) -> dict[str, Any]:
    """`held`: by document, whether it has the present version; None: it polls none."""
    held = reported.report["etags"]
    return {
        **one._asdict(),
        "held": {
            name: None if held.get(name) is None and name != "models" else name not in one.behind for name in held
        },
        "usage": reported.report["usage"],
        "interval": reported.interval,
    }


def _place(one: RouterStanding) -> tuple[int, str]:
    """The worst first."""
    return ROUTER_STATUSES.index(one.state), one.instance


PAGE = Page("/console/routers", "Routers", routers, "backends.see", OPERATE)
