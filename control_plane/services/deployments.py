"""Which object of which driver runs the engines of a model, and how many instances there may be."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Row, delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from control_plane.data.tables import deployments
from control_plane.errors import Invalid, NotFound, Problem
from control_plane.plane import Act, Plane
from control_plane.pure.lifecycle import Driver, DriverName
from control_plane.services import audit, models
from inference_api.features.hold import KEY as HOLD

# Instances of one object at most, whatever the driver would start
LARGEST = 100
Check = Callable[["Deployment | None"], None]


class Deployment(NamedTuple):
    """`min` to `max`: instances while it runs. `idle_seconds`: it stops after so long without a request; None: never.

    `scale_to_zero`: requests for it start it. `last_activation_at`, `was_ready_at`: Unix milliseconds.
    """

    model: str
    driver: DriverName
    namespace: str | None
    object: str
    min: int = 1
    max: int = 1
    idle_seconds: int | None = None
    scale_to_zero: bool = False
    last_activation_at: int | None = None
    was_ready_at: int | None = None

    @property
    def body(self) -> dict[str, Any]:
        """What people say of it: what its ETag stands for."""
        seen = ("last_activation_at", "was_ready_at")
        return {name: value for name, value in self._asdict().items() if name not in seen}


async def find(plane: Plane, model: str) -> Deployment:
    """Raises NotFound."""
    async with plane.database.main.read() as connection:
        found = await _one(connection, model)
    if found is None:
        raise NotFound("deployment of the model", model)
    return found


async def listed(plane: Plane, after: str | None = None, limit: int | None = None) -> Sequence[Deployment]:
    """By model."""
    query = select(deployments).order_by(deployments.c.model).limit(limit)
    if after is not None:
        query = query.where(deployments.c.model > after)
    async with plane.database.main.read() as connection:
        return [_read(row) for row in await connection.execute(query)]


async def put(plane: Plane, act: Act, wanted: Deployment, check: Check = lambda found: None) -> bool:
    """Create or replace; whether it is new. `check` raises to refuse. Raises Invalid, NotFound."""
    await _refuse_invalid(plane, wanted)
    async with plane.database.main.write() as connection:
        old = await _one(connection, wanted.model)
        check(old)
        values = {**wanted.body, "updated_at": act.at, "updated_by": act.principal.user}
        if old is None:
            await connection.execute(insert(deployments).values(**values))
        else:
            same = old.driver == wanted.driver and old.object == wanted.object
            # Of another object nothing is known.
            forgotten = {} if same else {"last_activation_at": None, "was_ready_at": None}
            chosen = update(deployments).where(deployments.c.model == wanted.model)
            await connection.execute(chosen.values(**values, **forgotten))
        verb, before = ("create", None) if old is None else ("update", old.body)
        await audit.record(connection, act, f"deployment.{verb}", _object(wanted.model), before, wanted.body)
    return old is None


async def remove(plane: Plane, act: Act, model: str, check: Check = lambda found: None) -> None:
    """What runs goes on, and is not known any more. `check` raises to refuse. Raises NotFound."""
    async with plane.database.main.write() as connection:
        old = await _one(connection, model)
        check(old)
        if old is None:
            raise NotFound("deployment of the model", model)
        await connection.execute(delete(deployments).where(deployments.c.model == model))
        await audit.record(connection, act, "deployment.delete", _object(model), old.body)


async def note(plane: Plane, model: str, **times: int | None) -> None:
    """Note `last_activation_at` or `was_ready_at`, Unix milliseconds."""
    async with plane.database.main.write() as connection:
        await connection.execute(update(deployments).where(deployments.c.model == model).values(**times))


def starts_by_request(plane: Plane, found: Deployment) -> bool:
    """Whether a request starts it: routers let requests wait for models alone whose entry has `hold`."""
    stored = models.catalogue(plane).stored.get(found.model)
    return found.scale_to_zero and stored is not None and HOLD.of(stored.entry) is not None


def driver_of(plane: Plane, name: DriverName) -> Driver:
    """Raises Invalid: with the setting that it needs."""
    driver = plane.connections.drivers.get(name)
    if driver is None:
        setting = {"kubernetes": "KUBERNETES_NAMESPACE", "processes": "PROCESSES"}[name]
        raise Invalid(Problem("driver", f"{name!r} is not set up: set CONTROL_PLANE_{setting}"))
    return driver


async def _refuse_invalid(plane: Plane, wanted: Deployment) -> None:
    driver = driver_of(plane, wanted.driver)
    problems = []
    if wanted.model not in models.catalogue(plane).stored:
        problems.append(Problem("model", f"{wanted.model[:128]!r} is not in the catalogue"))
    if wanted.namespace not in (None, driver.namespace):
        problems.append(
            Problem("namespace", f"must be {driver.namespace!r}, which CONTROL_PLANE_KUBERNETES_NAMESPACE names")
        )
    largest = min(LARGEST, driver.largest)
    if not 0 <= wanted.min <= wanted.max or not 1 <= wanted.max <= largest:
        problems.append(Problem("max", f"must be 1 to {largest} for this driver, and min at most that"))
    if wanted.idle_seconds is not None and not wanted.scale_to_zero:
        problems.append(Problem("idle_seconds", "needs scale_to_zero: true, or nothing would start it again"))
    if problems:
        raise Invalid(*problems)


async def _one(connection: AsyncConnection, model: str) -> Deployment | None:
    row = (await connection.execute(select(deployments).where(deployments.c.model == model))).one_or_none()
    return None if row is None else _read(row)


def _read(row: Row[Any]) -> Deployment:
    return Deployment(**{name: getattr(row, name) for name in Deployment._fields})


def _object(model: str) -> audit.Object:
    return audit.Object("deployment", model)
