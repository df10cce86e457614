"""Stops engines that nobody asks for, where a request would start them again; see docs/engines.md."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Sequence

from sqlalchemy import func, select

from control_plane.data.usage_tables import usage
from control_plane.errors import Refused, StorageUnavailable
from control_plane.plane import Act, Plane, Task
from control_plane.pure.idling import PATIENCE, Life, Watched, is_idle, may_serve, traffic_of
from control_plane.pure.reports import Reported
from control_plane.pure.roles import SYSTEM
from control_plane.services import deployments, lifecycle, reports
from control_plane.services.deployments import Deployment
from control_plane.services.lifecycle import Looked
from control_plane.services.rollup import leads
from control_plane.services.withholding import Withholding

log = logging.getLogger(__name__)

# Seconds between two looks at processes, and between two at requests, which come with the routers' reports
_EVERY, _REPORTS = 1.0, 5.0
# PostgreSQL's advisory lock of the one control plane that stops something
_LOCK = 0x6964_6C65_0001


def idling(plane: Plane) -> Task:
    async def run() -> None:
        service = Idling(plane)
        while plane.connections.drivers:
            try:
                await service.turn()
            except StorageUnavailable:
                log.warning("idle engines are stopped later")
            except Exception:
                log.exception("idle engines cannot be stopped")
            await asyncio.sleep(_EVERY)

    return run


class Idling:
    """`patience`: milliseconds, see `is_idle`. `every`: seconds between two looks at the routers' reports."""

    def __init__(self, plane: Plane, patience: int = PATIENCE, every: float = _REPORTS) -> None:
        self._plane = plane
        self._patience = patience
        self._every = every
        self._withholding = Withholding(plane)
        self._watched = Watched()
        # Monotonic seconds
        self._due = 0.0

    async def turn(self) -> None:
        """Once. Raises StorageUnavailable."""
        is_due = time.monotonic() >= self._due
        # Pods have addresses of their own, which go with them.
        every = await deployments.listed(self._plane)
        models = Counter((one.driver, one.object) for one in every)
        chosen = [one for one in every if one.scale_to_zero and (is_due or one.driver == "processes")]
        looked = await asyncio.gather(*(lifecycle.look_at(self._plane, one) for one in chosen))
        await self._withholding.sync([one for one in looked if one.deployment.driver == "processes"])
        if is_due:
            self._due = time.monotonic() + self._every
            # What runs several models is idle for none: another one may be asked for.
            alone = [one for one in looked if models[one.deployment.driver, one.deployment.object] == 1]
            await self._look_for_idle([one for one in alone if one.problem is None])

    async def _look_for_idle(self, looked: Sequence[Looked]) -> None:
        noted = [await self._noted(one) for one in looked]
        running = [one for one in noted if one.observed.wanted and self._may_stop(one.deployment)]
        names = {one.deployment.model for one in running}
        self._withholding.closing &= names
        present, is_known = await self._routers() if running else ((), False)
        self._watched.see(names, traffic_of(present, names) if is_known else {}, self._plane.clock())
        for one in running:
            await self._consider(one, present)

    def _may_stop(self, found: Deployment) -> bool:
        driver = self._plane.connections.drivers.get(found.driver)
        starts = deployments.starts_by_request(self._plane, found)
        return found.idle_seconds is not None and starts and driver is not None and driver.scales

    async def _routers(self) -> tuple[Sequence[Reported], bool]:
        """Those that report, and whether these are all that may have requests."""
        seen = await reports.seen(self._plane)
        return seen.present, not any(may_serve(one, seen.now, self._patience) for one in seen.reported)

    async def _noted(self, one: Looked) -> Looked:
        """Note when it was ready first, since its start and since it was asked for."""
        found = one.deployment
        at = found.was_ready_at
        if not one.observed.wanted:
            at = None
        elif one.standing.state == "ready" and (at is None or at < (found.last_activation_at or 0)):
            at = self._plane.clock()
        if at != found.was_ready_at:
            await deployments.note(self._plane, found.model, was_ready_at=at)
        return one._replace(deployment=found._replace(was_ready_at=at))

    async def _consider(self, one: Looked, present: Sequence[Reported]) -> None:
        found = one.deployment
        model, closing = found.model, self._withholding.closing
        if one.observed.owner is not None or not self._is_idle(one) or await self._was_used(one):
            closing.discard(model)
            return
        if found.driver == "processes" and not self._is_closed(model, present):
            # First no router sends it any new request; if one is held meanwhile, it goes on.
            closing.add(model)
            return
        await self._stop(one)

    def _is_idle(self, one: Looked) -> bool:
        found, busy_at = one.deployment, self._watched.busy_at(one.deployment.model)
        life = Life(one.standing.state, found.idle_seconds, found.was_ready_at, found.last_activation_at, busy_at)
        return is_idle(life, self._plane.clock(), self._patience)

    def _is_closed(self, model: str, present: Sequence[Reported]) -> bool:
        ids = self._withholding.ids(model)
        return model in self._withholding.closing and all(ids.issubset(one.report["overrides"]) for one in present)

    async def _was_used(self, one: Looked) -> bool:
        """Whether usage records say so: of routers that are gone, or started anew between two reports."""
        model, seconds = one.deployment.model, one.deployment.idle_seconds or 0
        since = self._plane.clock() - seconds * 1000
        query = select(func.max(usage.c.at)).where(usage.c.model == model, usage.c.at > since)
        async with self._plane.database.usage.read() as connection:
            at: int | None = (await connection.execute(query)).scalar_one()
        if at is not None:
            self._watched.note(model, at)
        return at is not None

    async def _stop(self, one: Looked) -> None:
        """On PostgreSQL every control plane tries, and one does."""
        model, plane = one.deployment.model, self._plane
        async with plane.database.main.read() as connection:
            if not await leads(connection, _LOCK):
                return
            now = await lifecycle.look(plane, model)
            if not now.observed.wanted or now.deployment.last_activation_at != one.deployment.last_activation_at:
                return
            try:
                act = Act(SYSTEM, plane.clock())
                await lifecycle.stop(plane, act, model, f"idle for {one.deployment.idle_seconds} s")
            except Refused as exc:
                log.warning("the model %r is idle and was not stopped: %s", model, exc)
                # Tried again after as long, not at once: each try is in the audit log.
                self._watched.note(model, plane.clock())
            else:
                await deployments.note(plane, model, was_ready_at=None)
