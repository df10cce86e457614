"""The tab Tests: one small request, step by step."""

from typing import Any

from starlette.responses import Response

from control_plane.http.console import trial
from control_plane.http.console.forms import Form
from control_plane.http.console.tabs import Look, Tab, served


async def _try(look: Look, form: Form) -> Response | None:
    router = look.visit.plane.connections.router
    if router is not None and look.standing is not None:
        look.results["steps"] = await trial.tried(look.visit, router, look.standing)
    return None


async def _of_tests(look: Look) -> dict[str, Any]:
    return {
        "routed": look.visit.plane.connections.router is not None,
        "steps": look.results.get("steps"),
        "seconds": trial.SECONDS,
    }


TAB = Tab("tests", "Tests", served("backends.operate"), _of_tests, {"try": ("backends.operate", _try)})
