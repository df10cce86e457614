"""The tab History: who has changed its entry."""

from typing import Any

from control_plane.http.console import changes, lists
from control_plane.http.console.tabs import Look, Tab, served
from control_plane.services import audit

# Rows, each with its difference
_CHANGES = 20


async def _of_history(look: Look) -> dict[str, Any]:
    visit = look.visit
    after = lists.after(visit, str)
    wanted = audit.query(visit.act.principal, audit.Filters(object=("model", look.name)))
    rows = await audit.page_of(visit.plane, wanted, _CHANGES + 1, after and after[0])
    found = lists.page(rows, lambda row: [row.id], _CHANGES)
    return {"changes": changes.shown(found.rows), "after": found.after}


TAB = Tab("history", "History", served("audit.see", True), _of_history)
