"""/api/v1/triage: what went wrong with a model, as groups of what says the same."""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StringConstraints

from control_plane.http.api.access import Acting, ThePlane
from control_plane.http.api.documents import OUTSIDE
from control_plane.http.api.paging import Page, Paging, page
from control_plane.services import triage
from inference_api.routing.entries import ModelName

router = APIRouter(tags=["engines"])


class TriageBody(BaseModel):
    """`pod`: one pod or process; null: all of the model. `previous`: only the logs before the last restart.

    `minutes`: how far back. `summary`: ask the model of CONTROL_PLANE_TRIAGE_MODEL.
    """

    model_config = ConfigDict(extra="ignore", hide_input_in_errors=True)

    model: ModelName
    pod: Annotated[str, StringConstraints(min_length=1, max_length=253)] | None = None
    previous: StrictBool = False
    minutes: Annotated[int, Field(strict=True, ge=1, le=1440)] = 30
    summary: StrictBool = False

    def asked(self) -> triage.Asked:
        return triage.Asked(self.model, self.pod, self.previous, self.minutes, self.summary)


@router.get("/triage")
async def list_triages(
    act: Acting, plane: ThePlane, place: Paging, model: Annotated[str | None, Query(max_length=128)] = None
) -> Page[dict[str, Any]]:
    """In short, the newest first; they are kept for 7 days."""
    before = place.key(str)
    rows = await triage.listed(plane, model, place.limit, before and before[0])
    return page(rows, place, lambda one: [one["id"]], lambda one: one)


@router.post("/triage", status_code=201, responses=OUTSIDE)
async def create_triage(body: TriageBody, act: Acting, plane: ThePlane, response: Response) -> dict[str, Any]:
    """`examples`, lines of logs by the id of their group, are in this answer alone: no line is stored."""
    found = await triage.create(plane, act, body.asked())
    response.headers["Location"] = f"/api/v1/triage/{found['id']}"
    return found


@router.get("/triage/{id}")
async def read_triage(id: str, act: Acting, plane: ThePlane) -> dict[str, Any]:
    """Without examples."""
    return await triage.one(plane, id)
