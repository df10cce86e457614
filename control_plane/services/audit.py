"""The audit log: a row in the transaction of every change, without secrets. Nothing changes or deletes a row."""

import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Row, Select, false, insert, or_, select, true
from sqlalchemy.ext.asyncio import AsyncConnection

from control_plane.data.database import after_commit
from control_plane.data.tables import audit
from control_plane.plane import Act, Plane
from control_plane.pure import times
from control_plane.pure.ids import first_id, new_id
from control_plane.pure.roles import Principal

# Rows of an export that are in memory
_AT_A_TIME = 500
log = logging.getLogger(__name__)


class Object(NamedTuple):
    """What was changed: `key`, `k3v9Qm2XbT7a`."""

    type: str
    id: str | None
    organisation: str | None = None


async def record(
    connection: AsyncConnection,
    act: Act,
    action: str,
    object: Object,
    before: Any = None,
    after: Any = None,
    reason: str | None = None,
) -> None:
    """Write one row. `action`: `key.create`. `before` and `after`: JSON, from which the caller has left out secrets."""
    principal = act.principal
    id = new_id("aud", act.at)
    await connection.execute(
        insert(audit).values(
            id=id,
            at=act.at,
            actor_kind=principal.kind,
            actor=principal.user,
            action=action,
            object_type=object.type,
            object_id=object.id and object.id[:256],
            organisation=object.organisation,
            before=before,
            after=after,
            reason=reason,
            address=act.address,
            request_id=act.request_id,
        )
    )
    fields = {
        "id": id,
        "action": action,
        "actor_kind": principal.kind,
        "actor": principal.user,
        "object": object.id,
        "organisation": object.organisation,
        "address": act.address,
        "request_id": act.request_id,
    }
    shown = {name: value for name, value in fields.items() if value is not None}
    after_commit(connection, lambda: log.info("audit", extra={"fields": shown}))


async def note_denied(plane: Plane, act: Act, resource: str, id: str | None, method: str) -> None:
    """Write that somebody was refused. `resource`: as in the URL, `keys`."""
    kind = resource.removesuffix("s")[:32] or "unknown"
    async with plane.database.main.write() as connection:
        what = Object(kind, id and id[:256])
        await record(connection, act, f"{kind}.denied", what, after={"method": method})


class Filters(NamedTuple):
    """`start`, `end`: Unix milliseconds; the end is not within."""

    actor: str | None = None
    action: str | None = None
    object: tuple[str, str] | None = None
    start: int | None = None
    end: int | None = None


def query(principal: Principal, filters: Filters) -> Select[Any]:
    """The rows that somebody may see, the newest first."""
    found = select(audit).where(_visible(principal)).order_by(audit.c.id.desc())
    if filters.actor is not None:
        found = found.where(audit.c.actor == filters.actor)
    if filters.action is not None:
        found = found.where(audit.c.action == filters.action)
    if filters.object is not None:
        found = found.where(audit.c.object_type == filters.object[0], audit.c.object_id == filters.object[1])
    # Ids begin with their time, and the primary key is by them.
    if filters.start is not None:
        found = found.where(audit.c.id >= first_id("aud", max(0, filters.start)))
    if filters.end is not None:
        found = found.where(audit.c.id < first_id("aud", max(0, filters.end)))
    return found


async def page_of(plane: Plane, wanted: Select[Any], limit: int, after: str | None) -> Sequence[Row[Any]]:
    """Rows before the id `after`."""
    if after is not None:
        wanted = wanted.where(audit.c.id < after)
    async with plane.database.main.read() as connection:
        return list(await connection.execute(wanted.limit(limit)))


async def all_of(plane: Plane, wanted: Select[Any]) -> AsyncIterator[Sequence[Row[Any]]]:
    """All rows, some at a time, each in a transaction of its own: an export is slow, and must not hold one."""
    after: str | None = None
    while rows := await page_of(plane, wanted, _AT_A_TIME, after):
        yield rows
        after = rows[-1].id


def shown(row: Row[Any]) -> dict[str, Any]:
    return {
        "id": row.id,
        "at": times.shown(row.at),
        "actor": {"kind": row.actor_kind, "name": row.actor},
        "action": row.action,
        "object": {"type": row.object_type, "id": row.object_id},
        "organisation": row.organisation,
        "before": row.before,
        "after": row.after,
        "reason": row.reason,
        "address": row.address,
        "request_id": row.request_id,
    }


def _visible(principal: Principal) -> ColumnElement[bool]:
    """All; or those of the own organisations, and those of the own deeds."""
    scope = principal.scope("audit.see")
    if scope.everything:
        return true()
    whole = audit.c.organisation.in_(scope.organisations) if scope.organisations else false()
    return or_(whole, audit.c.actor == principal.user)
