"""What Requests and Usage share: filters of the URL, what their fields suggest, and why there may be nothing."""

from control_plane.data.usage_tables import DIMENSIONS
from control_plane.http.console.shell import Visit
from control_plane.services import keys, models, reports
from control_plane.services.keys import Found
from control_plane.services.visibility import visible_models

# What a filter has for requests without such a thing
WITHOUT = "-"
_MOST_CHOICES = 200


def filters(visit: Visit) -> dict[str, str | None]:
    """By dimension; None: without one."""
    query = visit.query
    return {name: None if query[name] == WITHOUT else query[name] for name in DIMENSIONS if name in query}


async def choices(visit: Visit) -> dict[str, list[tuple[str, str]]]:
    """What fields suggest: (value, name), of models and keys that the caller may see."""
    visible = await visible_models(visit.plane, visit.act)
    names = [name for name in models.catalogue(visit.plane).stored if visible(name)][:_MOST_CHOICES]
    found = {"model": [(name, "") for name in names], "key": []}
    if visit.may_somewhere("keys.see"):
        known = await keys.listed(visit.plane, visit.act, _MOST_CHOICES, None)
        found["key"] = [(one.row.id, _name(visit, one)) for one in known]
    return found


def _name(visit: Visit, key: Found) -> str:
    return f"{key.row.name} {key.row.organisation or ''}" if keys.is_shown(visit.act, key) else ""


async def missing(visit: Visit) -> str:
    """Why there may be no requests at all: `routers`, `recording`, or empty if nothing is known."""
    if not visit.may("backends.see"):
        return ""
    async with visit.plane.database.main.read() as connection:
        present = await reports.present(connection, visit.act.at)
    if not present:
        return "routers"
    made = sum(one.report["usage"]["made"] for one in present)
    asked = sum(model["requests"] for one in present for model in one.report["models"])
    return "recording" if asked and not made else ""
