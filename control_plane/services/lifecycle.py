"""Engines are looked at, started, stopped and scaled: by people, and for requests that routers hold."""

import asyncio
from typing import NamedTuple

from control_plane.errors import NotFound, Refused
from control_plane.plane import Act, Plane
from control_plane.pure.lifecycle import DriverError, Observed, Standing, standing
from control_plane.services import audit, deployments
from control_plane.services.deployments import Deployment, driver_of

# Statuses and codes by the reason of a DriverError
_ANSWERS = {
    "not_found": (404, "not_found"),
    "forbidden": (403, ""),
    "conflict": (409, "conflict"),
    "gone": (410, "gone"),
    "invalid": (422, "validation_error"),
    "away": (503, "driver_away"),
    "slow": (503, "driver_away"),
}


class Looked(NamedTuple):
    """A deployment, as it is. `problem`: why nothing is known of it, a sentence."""

    deployment: Deployment
    observed: Observed
    standing: Standing
    problem: str | None = None


async def look(plane: Plane, model: str) -> Looked:
    """Raises NotFound: it has no deployment."""
    return await look_at(plane, await deployments.find(plane, model))


async def look_at(plane: Plane, deployment: Deployment) -> Looked:
    """A driver that does not answer makes the state unknown, with the reason."""
    try:
        observed = await driver_of(plane, deployment.driver).look(deployment.object)
    except (DriverError, Refused) as exc:
        return Looked(deployment, Observed(None), Standing("unknown", 0, 0, str(exc)), str(exc))
    return Looked(deployment, observed, standing(observed))


async def look_at_all(plane: Plane) -> list[Looked]:
    """Every deployment, by model."""
    return list(await asyncio.gather(*(look_at(plane, one) for one in await deployments.listed(plane))))


async def start(plane: Plane, act: Act, model: str, reason: str | None) -> Looked:
    """As many instances as it has at least, and one at least; more that run go on. Raises Refused."""
    return await _scaled(plane, act, model, "start", None, reason)


async def stop(plane: Plane, act: Act, model: str, reason: str | None) -> Looked:
    """No instance any more. Raises Refused."""
    return await _scaled(plane, act, model, "stop", 0, reason)


async def scale(plane: Plane, act: Act, model: str, instances: int, reason: str | None) -> Looked:
    """Within `min` and `max`; 0 stops it. Raises Refused."""
    return await _scaled(plane, act, model, "scale", instances, reason)


async def _scaled(plane: Plane, act: Act, model: str, verb: str, instances: int | None, reason: str | None) -> Looked:
    try:
        found = await look(plane, model)
    except NotFound:
        message = f"Nothing is known that runs the model {model[:128]!r}: add its deployment first."
        raise Refused(409, "no_deployment", message, param="model") from None
    deployment = found.deployment
    driver = driver_of(plane, deployment.driver)
    if found.problem is not None:
        raise Refused(503, "driver_away", found.problem, headers={"Retry-After": "5"})
    if found.observed.owner is not None:
        message = f"{found.observed.owner} sets the number of instances of {deployment.object!r}: change it there."
        raise Refused(409, "owned", message, param="model")
    least = max(1, deployment.min)
    if instances and not least <= instances <= deployment.max:
        message = f"replicas: must be 0, or {least} to {deployment.max}, as the deployment says"
        raise Refused(422, "validation_error", message, param="replicas")
    # Whoever starts what runs already stops nothing.
    wanted = max(least, found.observed.wanted or 0) if instances is None else instances
    what = audit.Object("model", model)
    # Before the change, which no transaction takes back: what is done is in the log, whatever happens next.
    before, after = {"instances": found.observed.wanted}, {"instances": wanted}
    async with plane.database.main.write() as connection:
        await audit.record(connection, act, f"deployment.{verb}", what, before, after, reason)
    try:
        await driver.scale(deployment.object, wanted)
    except DriverError as exc:
        async with plane.database.main.write() as connection:
            await audit.record(connection, act, "deployment.failed", what, after, before, str(exc)[:500])
        raise refused(exc) from None
    return await look_at(plane, deployment)


def refused(error: DriverError, forbidden: str = "scaling_disabled") -> Refused:
    """The answer for what a driver says. `forbidden`: the code where it may not do what it is asked for."""
    status, code = _ANSWERS.get(error.reason, (502, "driver_failed"))
    code = forbidden if status == 403 else code
    headers = {"Retry-After": "5"} if status == 503 else {}
    return Refused(status, code, str(error), headers=headers)
