"""Rows of the audit log, as pages show them: with what has changed, line by line."""

from collections.abc import Iterable
from typing import Any

from sqlalchemy import Row

from control_plane.http.console.shell import Visit
from control_plane.pure import diff
from control_plane.services import audit

# Rows of one object that its page shows
_LATEST = 20


async def of(visit: Visit, kind: str, id: str, most: int = _LATEST) -> list[dict[str, Any]] | None:
    """The latest changes of an object; None: the visitor may see none."""
    if not visit.may_somewhere("audit.see"):
        return None
    wanted = audit.query(visit.act.principal, audit.Filters(object=(kind, id)))
    return shown(await audit.page_of(visit.plane, wanted, most, None))


def shown(rows: Iterable[Row[Any]]) -> list[dict[str, Any]]:
    return [{**(one := audit.shown(row)), "diff": diff.of_values(one["before"], one["after"])} for row in rows]
