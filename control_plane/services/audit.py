"""The audit log: a row in the transaction of every change, without secrets. Nothing changes or deletes a row."""

import logging
from typing import Any, NamedTuple

from sqlalchemy import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from control_plane.data.database import after_commit
from control_plane.data.tables import audit
from control_plane.plane import Act, Plane
from control_plane.pure.ids import new_id

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
            object_id=object.id,
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
