"""Results of tests of models: rows, the newest first, and those whose last one has failed."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from sqlalchemy import Row, func, insert, select

from control_plane.data.tables import model_tests
from control_plane.plane import Act, Plane
from control_plane.pure.ids import new_id
from control_plane.pure.model_tests import Kind, Step
from control_plane.pure.records import DAY
from control_plane.pure.times import shown
from control_plane.services import audit

# Milliseconds for which the last results are shown again
_FRESH = 2_000


class Result(NamedTuple):
    """`backend` None: through the router. `by` None: by the schedule. `at`: when it began, Unix milliseconds."""

    id: str
    model: str
    backend: str | None
    kind: Kind
    at: int
    by: str | None
    ok: bool
    steps: tuple[Step, ...]

    @property
    def failed(self) -> Step | None:
        """The first step that has."""
        return next((step for step in self.steps if step.verdict == "failed"), None)

    @property
    def body(self) -> dict[str, Any]:
        """As the API shows it."""
        return {**self._asdict(), "at": shown(self.at), "steps": [step._asdict() for step in self.steps]}


async def add(
    plane: Plane, act: Act, model: str, backend: str | None, kind: Kind, at: int, steps: tuple[Step, ...]
) -> Result:
    """With an audit row, if somebody has tested it by hand."""
    ok = all(step.verdict != "failed" for step in steps)
    result = Result(new_id("mdt", at), model, backend, kind, at, act.principal.user, ok, steps)
    async with plane.database.main.write() as connection:
        values = {**result._asdict(), "steps": [step._asdict() for step in steps]}
        await connection.execute(insert(model_tests).values(**values))
        if result.by is not None:
            after = {"id": result.id, "kind": kind, "backend": backend, "ok": ok}
            await audit.record(connection, act, "model.test", audit.Object("model", model), None, after)
    plane.kept.drop(_LAST)
    return result


async def listed(plane: Plane, model: str | None, limit: int, before: str | None = None) -> list[Result]:
    """The newest first. `before`: an id."""
    query = select(model_tests).order_by(model_tests.c.id.desc()).limit(limit)
    if model is not None:
        query = query.where(model_tests.c.model == model)
    if before is not None:
        query = query.where(model_tests.c.id < before)
    async with plane.database.main.read() as connection:
        return [_read(row) for row in await connection.execute(query)]


async def failed(plane: Plane) -> Mapping[str, Result]:
    """Of models whose last test has failed, within a day or three turns of the schedule."""
    every = (plane.settings.model_test_every or 0) * 1000
    since = plane.clock() - max(DAY, 3 * every)

    async def found() -> Mapping[str, Result]:
        last = select(func.max(model_tests.c.id)).where(model_tests.c.at >= since).group_by(model_tests.c.model)
        query = select(model_tests).where(model_tests.c.id.in_(last), ~model_tests.c.ok)
        async with plane.database.main.read() as connection:
            return {row.model: _read(row) for row in await connection.execute(query)}

    return await plane.kept.get(_LAST, plane.clock(), _FRESH, found)


async def scheduled(plane: Plane) -> Mapping[str, int]:
    """When the schedule has tested each model last, Unix milliseconds."""
    query = select(model_tests.c.model, func.max(model_tests.c.at)).where(model_tests.c.by.is_(None))
    async with plane.database.main.read() as connection:
        return {model: at for model, at in await connection.execute(query.group_by(model_tests.c.model))}


def _read(row: Row[Any]) -> Result:
    steps = tuple(Step(**step) for step in row.steps)
    return Result(row.id, row.model, row.backend, row.kind, row.at, row.by, row.ok, steps)


_LAST = "failed model tests"
