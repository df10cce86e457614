"""/api/v1/audit: who has done what, listed and exported."""

from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Query, Request
from pydantic import BaseModel
from sqlalchemy import Row
from starlette.responses import Response, StreamingResponse

from control_plane.errors import Forbidden, Invalid, Problem
from control_plane.http.api.access import Acting, ThePlane
from control_plane.http.api.paging import Page, Paging, page
from control_plane.pure.times import read
from control_plane.services import audit

router = APIRouter(tags=["audit"])
NDJSON = "application/x-ndjson"


class Actor(BaseModel):
    """`kind`: user, token, router, system. `name`: of a token the name of its maker."""

    kind: str
    name: str | None


class AuditObject(BaseModel):
    type: str
    id: str | None


class AuditRow(BaseModel):
    id: str
    at: str
    actor: Actor
    action: str
    object: AuditObject
    organisation: str | None
    before: Any
    after: Any
    reason: str | None
    address: str | None
    request_id: str | None


_EXPORT: dict[int | str, dict[str, Any]] = {200: {"model": Page[AuditRow], "content": {NDJSON: {}}}}


@router.get("/audit", responses=_EXPORT, response_model=None)
async def list_audit(
    act: Acting,
    plane: ThePlane,
    place: Paging,
    request: Request,
    actor: Annotated[str | None, Query(max_length=128)] = None,
    action: Annotated[str | None, Query(max_length=64, examples=["key.create"])] = None,
    object: Annotated[str | None, Query(max_length=300, description="type:id", examples=["key:k3v9Qm2XbT7a"])] = None,
    start: Annotated[str | None, Query(description="time, within")] = None,
    end: Annotated[str | None, Query(description="time, not within")] = None,
    format: Annotated[Literal["json", "ndjson"], Query(description="ndjson: as the header, for links")] = "json",
) -> Page[AuditRow] | Response:
    """The newest first. With `accept: application/x-ndjson` all rows, one a line."""
    filters = audit.Filters(actor, action, object_of(object), _time("start", start), _time("end", end))
    wanted = audit.query(act.principal, filters)
    if format == "ndjson" or NDJSON in request.headers.get("accept", ""):
        if act.principal.scope("audit.export").empty:
            raise Forbidden("Exporting the audit log needs the permission audit.export, which no role of yours has.")
        return StreamingResponse(_lines(audit.all_of(plane, wanted)), media_type=NDJSON)
    rows = await audit.page_of(plane, wanted, place.limit + 1, (place.key(str) or [None])[0])
    return page(rows, place, lambda row: [row.id], lambda row: AuditRow.model_validate(audit.shown(row)))


async def _lines(rows: AsyncIterator[Sequence[Row[Any]]]) -> AsyncIterator[bytes]:
    async for some in rows:
        yield b"".join(orjson.dumps(audit.shown(row), option=orjson.OPT_APPEND_NEWLINE) for row in some)


def object_of(text: str | None) -> tuple[str, str] | None:
    if text is None:
        return None
    kind, colon, id = text.partition(":")
    if not colon or not kind or not id:
        raise Invalid(Problem("object", "must be type:id, such as key:k3v9Qm2XbT7a"))
    return kind, id


def _time(name: str, text: str | None) -> int | None:
    try:
        return None if text is None else read(text)
    except ValueError as exc:
        raise Invalid(Problem(name, str(exc))) from None
