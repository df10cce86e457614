"""The tab Logs: the last lines of a pod or process, those before its last exit, and those that come."""

from typing import Any, NamedTuple

from starlette.responses import PlainTextResponse, Response

from control_plane.errors import NotFound, Refused
from control_plane.http.console.shell import url
from control_plane.http.console.tabs import Look, Tab, of_engine
from control_plane.pure.engines import shown_line
from control_plane.pure.lifecycle import Instance
from control_plane.services import lifecycle, logs
from control_plane.services.logs import LogPage, Wanted

LINES = ("100", "500", "2000")
# Of the template, each None where it is not given
_NAMES = "missing", "looked", "chosen", "unread", "found", "lines"


class Chosen(NamedTuple):
    """What the URL says, as far as it does. `previous`: before the last exit."""

    instance: Instance | None
    container: str | None
    previous: bool
    lines: int


async def _of_logs(look: Look) -> dict[str, Any] | Response:
    visit = look.visit
    if not visit.plane.connections.drivers:
        return _context(look, missing="driver")
    try:
        looked = await lifecycle.look(visit.plane, look.name)
    except NotFound:
        return _context(look, missing="deployment")
    driver = visit.plane.connections.drivers.get(looked.deployment.driver)
    if driver is not None and not driver.reads_logs:
        return _context(look, missing="right")
    chosen = _chosen(look, looked.observed.instances)
    if chosen.instance is None:
        return _context(look, looked=looked)
    wanted = Wanted(chosen.instance.name, look.name, chosen.container, chosen.lines, chosen.previous)
    try:
        found = await logs.read(visit.plane, wanted)
    except Refused as exc:
        return _context(look, looked=looked, chosen=chosen, unread=exc)
    lines = [shown_line(line) for line in found.lines]
    if "download" in visit.query:
        return _file(found, lines)
    return _context(look, looked=looked, chosen=chosen, found=found, lines=lines)


def _chosen(look: Look, instances: tuple[Instance, ...]) -> Chosen:
    """The instance of the URL, or the first that fails."""
    visit = look.visit
    name, container = visit.query.get("pod"), visit.query.get("container")
    if name is None:
        found = next((one for one in instances if one.state == "failing"), next(iter(instances), None))
    else:
        found = next((one for one in instances if one.name == name), None)
    if found is not None and container not in found.containers:
        # Of another pod
        container = next(iter(found.containers), None)
    return Chosen(found, container, visit.query.get("previous") == "1", int(visit.choice("lines", "500", *LINES)))


def _context(look: Look, **found: Any) -> dict[str, Any]:
    chosen: Chosen | None = found.get("chosen")
    follows = None
    if chosen is not None and chosen.instance is not None and not chosen.previous:
        asked = {"model": look.name, "pod": chosen.instance.name, "container": chosen.container}
        follows = url("/api/v1/logs", **asked, tail=chosen.lines, follow="true")
    return {**dict.fromkeys(_NAMES), "choices": LINES, "follows": follows, **found}


def _file(found: LogPage, lines: list[str]) -> Response:
    name = f"{found.source.query.instance}{'.previous' if found.source.query.previous else ''}.log"
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return PlainTextResponse("".join(f"{line}\n" for line in lines), headers=headers)


TAB = Tab("logs", "Logs", of_engine("backends.operate"), _of_logs)
