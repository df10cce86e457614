"""/console/hosts: processors, memory, disks, networks and GPUs of hosts, as their exporters tell Prometheus."""

from typing import Any

from starlette.responses import Response

from control_plane.http.console import series
from control_plane.http.console.shell import OPERATE, Page, Visit
from control_plane.pure.records import DAY, HOUR
from control_plane.services import models
from control_plane.services.series import Asked

QUERIES = (
    *("gpu_memory", "gpu_utilisation", "gpu_temperature", "gpu_power", "gpu_xid"),
    *("host_cpu", "host_memory", "host_disk", "host_network"),
)
LENGTHS = {"1h": ("1 h", HOUR), "6h": ("6 h", 6 * HOUR), "24h": ("24 h", DAY), "7d": ("7 d", 7 * DAY)}


async def hosts(visit: Visit) -> Response:
    length: Any = visit.choice("range", *LENGTHS)
    asked = Asked(visit.act.at - LENGTHS[length][1], visit.act.at, visit.query.get("model") or None)
    return visit.render(
        "hosts.html",
        found=await series.section(visit, QUERIES, asked),
        models=sorted(models.catalogue(visit.plane).stored),
        lengths=[(key, words) for key, (words, _) in LENGTHS.items()],
        length=length,
        live=True,
    )


PAGE = Page("/console/hosts", "Hosts", hosts, "backends.see", OPERATE)
