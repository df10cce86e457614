"""Routers ask for a model whose requests they hold: what runs it is started, once for all who ask."""

from typing import Literal

from sqlalchemy import or_, update

from control_plane.data.tables import deployments as table
from control_plane.errors import NotFound, Refused
from control_plane.plane import Act, Plane
from control_plane.services import deployments, lifecycle, reports
from control_plane.services.deployments import Deployment

# Milliseconds in which a model is started once: routers ask again every 10 s
_ONCE = 9_000
State = Literal["ready", "starting"]


async def activate(plane: Plane, act: Act, model: str, router: str, waiting: int) -> State:
    """Start it unless it runs. Raises Refused: 409 `activation_disabled`, with the reason; 503 if nobody knows.

    An engine that fails is starting, as long as its driver tries.
    """
    if any(one.model == model and one.state == "ready" for one in (await reports.seen(plane)).backends):
        return "ready"
    try:
        found = await lifecycle.look(plane, model)
    except NotFound:
        raise _disabled(model, "no deployment of it is known to the control plane") from None
    _refuse_what_cannot(plane, found)
    if not found.observed.wanted:
        if await _is_first(plane, act, model):
            await lifecycle.start(plane, act, model, f"{waiting} requests are held at {router}")
    else:
        # It is wanted, whether or not it is ready: routers learn of that a little later.
        await deployments.note(plane, model, last_activation_at=act.at)
    return "starting"


def _refuse_what_cannot(plane: Plane, found: lifecycle.Looked) -> None:
    deployment: Deployment = found.deployment
    if not deployment.scale_to_zero:
        raise _disabled(deployment.model, "its deployment has scale_to_zero: false")
    if found.observed.owner is not None:
        raise _disabled(deployment.model, f"{found.observed.owner} sets its number of instances")
    driver = plane.connections.drivers.get(deployment.driver)
    if driver is None or not driver.scales:
        raise _disabled(deployment.model, f"the driver {deployment.driver!r} may not start anything here")
    if found.problem is not None:
        raise Refused(503, "driver_away", found.problem, headers={"Retry-After": "5"})
    if found.observed.wanted is None:
        raise _disabled(deployment.model, f"what its deployment names, {deployment.object!r}, does not exist")


async def _is_first(plane: Plane, act: Act, model: str) -> bool:
    """Whether nobody else has asked just now, here or at another control plane: the one who notes it first starts."""
    noted = table.c.last_activation_at
    statement = update(table).where(table.c.model == model, or_(noted.is_(None), noted <= act.at - _ONCE))
    async with plane.database.main.write() as connection:
        result = await connection.execute(statement.values(last_activation_at=act.at))
        return result.rowcount > 0


def _disabled(model: str, why: str) -> Refused:
    message = f"Nothing can start the model {model[:128]!r}: {why}."
    return Refused(409, "activation_disabled", message, param="model")
