"""Addresses below /console that are no page."""

from starlette.responses import Response

from control_plane.errors import Refused
from control_plane.http.console.shell import Page, Visit


async def unknown(visit: Visit) -> Response:
    raise Refused(404, "unknown_url", f"The console has no page {visit.request.scope['path'][:128]!r}.")


PAGE = Page("/console/{rest:path}", "Unknown", unknown, posts="self")
