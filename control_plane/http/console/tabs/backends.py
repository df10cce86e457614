"""The tab Backends: how routers see them, and what stands in for them."""

from typing import Any

from control_plane.http.console import backends
from control_plane.http.console.shell import url
from control_plane.http.console.tabs import Look, Tab, served
from control_plane.services import overrides, reports
from inference_api.features.fallback import FALLBACKS


async def _of_backends(look: Look) -> dict[str, Any]:
    plane = look.visit.plane
    seen = await reports.seen(plane)
    held = await overrides.listed(plane, 200, None, None, True)
    rows = [backends.shown(one, held) for one in seen.backends if one.model == look.name]
    entry = look.stored.entry if look.stored else None
    return {
        "rows": rows,
        "configured": [] if entry is None else [one.url for one in entry.backends],
        "fallbacks": [] if entry is None else FALLBACKS.of(entry) or (),
        "reporting": len(seen.present),
        "at_backends": lambda **query: url("/console/backends", model=look.name, **query),
    }


TAB = Tab("backends", "Backends", served("backends.see"), _of_backends, live=True)
