"""The audit log: a row in the transaction of every change, without secrets. Nothing changes or deletes a row."""

from typing import Any, NamedTuple

from sqlalchemy import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from control_plane.data.tables import audit
from control_plane.plane import Act
from control_plane.pure.ids import new_id


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
    await connection.execute(
        insert(audit).values(
            id=new_id("aud", act.at),
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
