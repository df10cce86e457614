"""Settings that people change while it runs: one type per key.

What this release does not know stays, and is not shown.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, TypeAdapter, ValidationError
from sqlalchemy import delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from control_plane.data.tables import config_kv
from control_plane.errors import Invalid, NotFound, Problem, problems_of
from control_plane.plane import Act, Plane
from control_plane.services import audit, policy
from control_plane.settings import PREFIX, Settings
from inference_api.policy.document import Limit

Source = Literal["default", "database", "environment"]


class Value(NamedTuple):
    key: str
    value: Any
    source: Source

    def shown(self) -> dict[str, Any]:
        return self._asdict()


class _Known(NamedTuple):
    """`default`: from the settings of the process. `variable`: the setting that stands above it. `documents`: what
    routers poll that depends on it."""

    kind: TypeAdapter[Any]
    default: Callable[[Settings], Any]
    variable: str | None = None
    documents: tuple[str, ...] = ()


RECORD_DAYS, HOURLY_DAYS = "usage.record_days", "usage.hourly_days"
_Days = Annotated[int, Field(strict=True, ge=1, le=3660)]
KEYS: dict[str, _Known] = {
    policy.ANONYMOUS: _Known(TypeAdapter(tuple[Limit, ...]), lambda settings: [], documents=(policy.DOCUMENT,)),
    HOURLY_DAYS: _Known(TypeAdapter(_Days), lambda settings: settings.hourly_days, "hourly_days"),
    RECORD_DAYS: _Known(TypeAdapter(_Days), lambda settings: settings.record_days, "usage_days"),
}
Check = Callable[[Value], None]


async def listed(plane: Plane) -> list[Value]:
    """All, by key."""
    async with plane.database.main.read() as connection:
        return [await _read(plane, connection, key) for key in sorted(KEYS)]


async def found(plane: Plane, key: str) -> Value:
    """Raises NotFound."""
    async with plane.database.main.read() as connection:
        return await _read(plane, connection, key)


async def put(plane: Plane, act: Act, key: str, value: Any, check: Check) -> Value:
    """Raises Refused."""
    known = _known(key)
    async with plane.change(*known.documents) as connection:
        old = await _read(plane, connection, key)
        check(old)
        if old.source == "environment":
            variable = f"{PREFIX}{(known.variable or '').upper()}"
            raise Invalid(Problem("value", f"is set by {variable} of the process; unset that first"))
        try:
            given = known.kind.validate_python(value)
        except ValidationError as exc:
            problems = [Problem(".".join(filter(None, ("value", one.param))), one.message) for one in problems_of(exc)]
            raise Invalid(*problems) from None
        stored = known.kind.dump_python(given, mode="json", exclude_unset=True)
        policy.refuse_without_room(plane, len(str(stored)))
        values = {"value": stored, "updated_at": act.at, "updated_by": act.principal.user}
        changed = await connection.execute(update(config_kv).where(config_kv.c.key == key).values(**values))
        if changed.rowcount == 0:
            await connection.execute(insert(config_kv).values(key=key, **values))
        what = audit.Object("setting", key)
        await audit.record(connection, act, "setting.update", what, {"value": old.value}, {"value": stored})
    return Value(key, stored, "database")


async def reset(plane: Plane, act: Act, key: str, check: Check) -> None:
    """Back to the default. Raises Refused."""
    async with plane.change(*_known(key).documents) as connection:
        old = await _read(plane, connection, key)
        check(old)
        await connection.execute(delete(config_kv).where(config_kv.c.key == key))
        if old.source == "database":
            await audit.record(connection, act, "setting.delete", audit.Object("setting", key), {"value": old.value})


def _known(key: str) -> _Known:
    if key not in KEYS:
        raise NotFound("setting", key)
    return KEYS[key]


async def _read(plane: Plane, connection: AsyncConnection, key: str) -> Value:
    known = _known(key)
    default = known.default(plane.settings)
    if known.variable in plane.settings.model_fields_set:
        return Value(key, default, "environment")
    row = (await connection.execute(select(config_kv.c.value).where(config_kv.c.key == key))).one_or_none()
    try:
        if row is not None:
            # Another release may have written what this one cannot use.
            known.kind.validate_python(row.value)
            return Value(key, row.value, "database")
    except ValidationError:
        pass
    return Value(key, default, "default")
