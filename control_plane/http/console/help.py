"""/console/help: the runbook and the guides to which failed requests point."""

from starlette.responses import Response

from control_plane.errors import NotFound
from control_plane.http.console.shell import Page, Visit
from control_plane.web.manual import manuals


async def manual(visit: Visit) -> Response:
    name = visit.path("name")
    found = manuals().get(name)
    if found is None:
        raise NotFound("page of the manual", name)
    return visit.render("help.html", title=found.title, manual=found, name=name, names=list(manuals()))


PAGE = Page("/console/help/{name}", "Help", manual)
