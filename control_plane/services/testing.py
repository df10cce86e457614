"""The schedule of tests of models: each once in MODEL_TEST_EVERY, spread over it by name.

A test starts no engine and keeps none awake: models that stop when idle are left out, and those that are stopped or on
their way until their next turn.
"""

import asyncio
import logging
from collections.abc import Sequence, Set

from control_plane.errors import Refused, StorageUnavailable
from control_plane.plane import Act, Plane, Task
from control_plane.pure import model_tests
from control_plane.pure.roles import SYSTEM
from control_plane.services import lifecycle, model_results, models
from control_plane.services.model_tests import test
from control_plane.services.rollup import leads

log = logging.getLogger(__name__)
# Seconds between two looks at what is due; tests at once, so that there is room for those by hand
_EVERY, _AT_ONCE = 5.0, 2
# PostgreSQL's advisory lock of the one process that tests
_LOCK = 0x7465_7374_0001


def testing(plane: Plane) -> Task:
    schedule = Schedule(plane)

    async def run() -> None:
        while schedule.every:
            try:
                await schedule.turn()
            except StorageUnavailable:
                log.warning("models are tested later")
            except Exception:
                log.exception("models cannot be tested")
            await asyncio.sleep(_EVERY)

    return run


class Schedule:
    """`every`: milliseconds between two tests of a model; 0: there are none."""

    def __init__(self, plane: Plane) -> None:
        self.every = (plane.settings.model_test_every or 0) * 1000
        self._plane = plane
        # What was due before the start is not made up for, all at once.
        self._began = plane.clock()

    async def turn(self) -> None:
        """Test what is due. On PostgreSQL every process tries, and one does."""
        tried: set[str] = set()
        while some := await self._some(tried):
            tried |= some

    async def _some(self, tried: Set[str]) -> set[str]:
        """Test some that are due; which."""
        # A transaction that only reads has the lock while they run: it holds up no writer, and no cleaning for long.
        async with self._plane.database.main.read() as connection:
            if not await leads(connection, _LOCK):
                return set()
            some = [name for name in await self._due() if name not in tried][:_AT_ONCE]
            await asyncio.gather(*map(self._test, some))
        return set(some)

    async def _due(self) -> Sequence[str]:
        now, last = self._plane.clock(), await model_results.scheduled(self._plane)
        since = {name: max(self._began, last.get(name, 0)) for name in models.catalogue(self._plane).stored}
        due = model_tests.due(since, since, now, self.every)
        if not due or not self._plane.connections.drivers:
            return due
        looked = {one.deployment.model: one for one in await lifecycle.look_at_all(self._plane)}
        return [name for name in due if name not in looked or _is_up(looked[name])]

    async def _test(self, model: str) -> None:
        try:
            await test(self._plane, Act(SYSTEM, self._plane.clock()), model)
        except Refused as exc:
            log.warning("the model %r was not tested: %s", model, exc)


def _is_up(looked: lifecycle.Looked) -> bool:
    if looked.deployment.idle_seconds is not None:
        # Routers count a test as any request.
        return False
    if looked.standing.state == "unknown":
        # Whether a request would start it, nobody can say.
        return not looked.deployment.scale_to_zero
    return looked.standing.state in ("ready", "failing")
