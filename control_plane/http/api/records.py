"""/api/v1/requests: usage records, by the filters that sums have, and by the id that a client got."""

from typing import Annotated, Any

from fastapi import APIRouter, Query

from control_plane.http.api.access import Acting, ThePlane
from control_plane.http.api.paging import Page, Paging, page
from control_plane.http.api.usage import Filters, Text, kinds_of, moment
from control_plane.services import requests
from control_plane.services.requests import Wanted

router = APIRouter(tags=["requests"])


@router.get("/requests")
async def list_requests(
    act: Acting,
    plane: ThePlane,
    place: Paging,
    given: Filters,
    id: Annotated[str | None, Query(max_length=128, description="a request id, or its beginning")] = None,
    start: Text = None,
    end: Text = None,
    kind: Annotated[list[str] | None, Query(description="default: all")] = None,
) -> Page[dict[str, Any]]:
    """The newest first."""
    wanted = Wanted(
        id or None,
        None if start is None else moment("start", start),
        None if end is None else moment("end", end),
        {name: value for name, value in given.items() if value},
        kinds_of(kind),
    )
    found = await requests.listing(plane, act, wanted, place.key(int, str), place.limit)
    return page(found, place, lambda one: [one["at"], one["id"]], lambda one: one)


@router.get("/requests/{id}")
async def read_request(id: str, act: Acting, plane: ThePlane) -> dict[str, Any]:
    """By the id of its usage record, or its request id."""
    return await requests.one(plane, act, id)
