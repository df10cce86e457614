"""The tab Engine: what runs the model, in what state and why; start, stop, scale, and which object it is."""

import asyncio
from collections.abc import Sequence
from typing import Any

from starlette.responses import Response

from control_plane.errors import Invalid, NotFound, Problem
from control_plane.http.api.engines import DeploymentBody
from control_plane.http.api.preconditions import etag_of
from control_plane.http.console.forms import Form, body, unchanged
from control_plane.http.console.tabs import Acts, Look, Tab, of_engine
from control_plane.pure.lifecycle import Driver, DriverError
from control_plane.services import deployments, lifecycle
from control_plane.services.deployments import Deployment
from control_plane.services.lifecycle import Looked

NOTICES = {
    "started": "It starts. What happens is below, as soon as the driver sees it.",
    "stopped": "It stops. What happens is below, as soon as the driver sees it.",
    "scaled": "The number of instances is set. What happens is below, as soon as the driver sees it.",
    "deployed": "The deployment is stored. Nothing was started or stopped by it.",
    "forgotten": "The deployment is forgotten. What runs goes on.",
}
# Seconds that a page waits for the names of a driver's objects
_PATIENCE = 3.0
_DIALOGS = ("start", "stop", "scale", "deploy", "forget")


async def _start(look: Look, form: Form) -> Response | None:
    await lifecycle.start(look.visit.plane, look.visit.act, look.name, _reason(form))
    return look.visit.back("started", tab="engine")


async def _stop(look: Look, form: Form) -> Response | None:
    await lifecycle.stop(look.visit.plane, look.visit.act, look.name, _needed(form))
    return look.visit.back("stopped", tab="engine")


async def _scale(look: Look, form: Form) -> Response | None:
    wanted = form.number("replicas")
    if wanted is None:
        raise Invalid(Problem("replicas", "is needed"))
    looked = await lifecycle.look(look.visit.plane, look.name)
    fewer = wanted < (looked.observed.wanted or 0)
    reason = _needed(form) if fewer else _reason(form)
    await lifecycle.scale(look.visit.plane, look.visit.act, look.name, wanted, reason)
    return look.visit.back("scaled", tab="engine")


async def _deploy(look: Look, form: Form) -> Response | None:
    fields = {
        "driver": form.text("driver"),
        "object": form.text("object"),
        **{name: number for name in ("min", "max") if (number := form.number(name)) is not None},
        "idle_seconds": form.number("idle_seconds"),
        "scale_to_zero": form.text("scale_to_zero") == "1",
    }
    wanted = body(DeploymentBody, fields).wanted(look.name)
    await deployments.put(look.visit.plane, look.visit.act, wanted, _same(form))
    return look.visit.back("deployed", tab="engine")


async def _forget(look: Look, form: Form) -> Response | None:
    await deployments.remove(look.visit.plane, look.visit.act, look.name, _same(form))
    return look.visit.back("forgotten", tab="engine")


def _same(form: Form) -> deployments.Check:
    """Refuses to change a deployment that is no longer the one of the form; without an ETag: that there was none."""
    check = unchanged(form.text("etag"), lambda found: "" if found is None else found.body)

    def same(found: Deployment | None) -> None:
        if found is not None or form.text("etag"):
            check(found)

    return same


def _reason(form: Form) -> str | None:
    reason = form.optional("reason")
    if reason is not None and len(reason) > 500:
        raise Invalid(Problem("reason", "must have 500 characters at most"))
    return reason


def _needed(form: Form) -> str:
    """Raises Invalid."""
    reason = _reason(form)
    if reason is None:
        raise Invalid(Problem("reason", "say why, for those who see it in an incident"))
    return reason


async def _of_engine(look: Look) -> dict[str, Any]:
    plane = look.visit.plane
    drivers = plane.connections.drivers
    looked = await _looked(look)
    # Of this moment: the head shows the same.
    look.engine = looked or look.engine
    driver = None if looked is None else drivers.get(looked.deployment.driver)
    return {
        "drivers": sorted(drivers),
        "engine": looked,
        "starts": looked is not None and deployments.starts_by_request(plane, looked.deployment),
        "scales": driver is not None and driver.scales,
        "etag_of_deployment": "" if looked is None else etag_of(looked.deployment.body),
        "act": await _dialog(look, looked, driver),
    }


async def _looked(look: Look) -> Looked | None:
    try:
        return await lifecycle.look(look.visit.plane, look.name)
    except NotFound:
        return None


async def _dialog(look: Look, looked: Looked | None, driver: Driver | None) -> dict[str, Any] | None:
    """What the dialog of the URL needs; None: there is none."""
    act = look.visit.query.get("act")
    if act not in _DIALOGS or not look.visit.may("backends.operate"):
        return None
    if act == "deploy":
        names, problems = await _objects(look)
        return {"is": act, "objects": names, "problems": problems}
    if looked is None or (act != "forget" and (driver is None or not driver.scales or looked.observed.owner)):
        return None
    return {"is": act}


async def _objects(look: Look) -> tuple[Sequence[str], Sequence[str]]:
    """Names of all drivers' objects, and why some are not known."""
    names: set[str] = set()
    problems = []
    for driver in look.visit.plane.connections.drivers.values():
        try:
            async with asyncio.timeout(_PATIENCE):
                names.update(await driver.objects())
        except TimeoutError:
            problems.append(f"{driver.name} does not say in {_PATIENCE:g} s which objects it has.")
        except DriverError as exc:
            problems.append(str(exc))
    return sorted(names), problems


ACTS: Acts = {
    "start": ("backends.operate", _start),
    "stop": ("backends.operate", _stop),
    "scale": ("backends.operate", _scale),
    "deploy": ("backends.operate", _deploy),
    "forget": ("backends.operate", _forget),
}
TAB = Tab(
    "engine", "Engine", of_engine("backends.see"), _of_engine, ACTS, live=True, dialogs="model/engine_dialogs.html"
)
