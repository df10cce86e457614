"""/api/v1/model-tests: what tests of models have found. `POST /model-actions` with the action `test` makes one."""

from typing import Annotated, Any

from fastapi import APIRouter, Query

from control_plane.http.api.access import Acting, ThePlane
from control_plane.http.api.paging import Page, Paging, page
from control_plane.services import model_results

router = APIRouter(tags=["engines"])


@router.get("/model-tests")
async def list_model_tests(
    act: Acting, plane: ThePlane, place: Paging, model: Annotated[str | None, Query(max_length=128)] = None
) -> Page[dict[str, Any]]:
    """Tests of the last 30 days, the newest first, each with its steps."""
    before = place.key(str)
    rows = await model_results.listed(plane, model, place.limit + 1, before and before[0])
    return page(rows, place, lambda one: [one.id], lambda one: one.body)
