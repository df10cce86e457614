"""/api/v1/inspections: what a hub, a folder or a file says of a model, and which GPUs hold it: an estimate."""

from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from control_plane.http.api.access import Acting, ThePlane
from control_plane.http.api.paging import Page, Paging, page
from control_plane.services import inspections
from control_plane.services.inspections import Source, Wanted

router = APIRouter(tags=["inspections"])
_SOURCE_FAILS: dict[int | str, dict[str, Any]] = {
    502: {"description": "The hub or the disk answers with something that cannot be used."}
}


class InspectionBody(BaseModel):
    """`ref`: `org/name` or `org/name/FILE.gguf` of the hub; an absolute path. `revision`: of the hub."""

    model_config = ConfigDict(extra="ignore", hide_input_in_errors=True)

    source: Source
    ref: Annotated[str, Field(min_length=1, max_length=1024)]
    revision: Annotated[str | None, Field(min_length=1, max_length=128)] = None


@router.get("/inspections")
async def list_inspections(act: Acting, plane: ThePlane, place: Paging) -> Page[dict[str, Any]]:
    """Of the last 30 days, the newest first."""
    after = place.key(str)
    rows = await inspections.listing(plane, None if after is None else after[0], place.limit)
    return page(rows, place, lambda row: [row.id], inspections.view)


@router.post("/inspections", status_code=201, responses=_SOURCE_FAILS)
async def inspect_model(body: InspectionBody, act: Acting, plane: ThePlane) -> dict[str, Any]:
    """Read what is there now, 20 seconds at most."""
    return await inspections.create(plane, act, Wanted(body.source, body.ref, body.revision))


@router.get("/inspections/{id}")
async def read_inspection(id: str, act: Acting, plane: ThePlane) -> dict[str, Any]:
    return await inspections.get(plane, id)
