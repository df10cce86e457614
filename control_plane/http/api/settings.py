"""/api/v1/settings: what can be changed while it runs."""

from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from control_plane.http.api.access import Acting, ThePlane
from control_plane.http.api.documents import shows
from control_plane.http.api.paging import Page, Paging, page
from control_plane.http.api.preconditions import etag_of, require, tagged
from control_plane.services import config

router = APIRouter(tags=["settings"])


class SettingValue(BaseModel):
    value: Any = Field(examples=[14])


class SettingShown(SettingValue):
    """`source`: environment stands above database, and that above default."""

    key: str = Field(examples=["usage.record_days"])
    source: config.Source


@router.get("/settings", summary="List the settings", responses=shows(Page[SettingShown]))
async def list_settings(act: Acting, plane: ThePlane, place: Paging) -> Page[dict[str, Any]]:
    """Those that can be changed while it runs; the others are variables of the process."""
    after = place.key(str)
    found = [one for one in await config.listed(plane) if after is None or one.key > after[0]]
    return page(found[: place.limit + 1], place, lambda one: [one.key], config.Value.shown)


@router.get("/settings/{key}", summary="Read a setting", responses=shows(SettingShown))
async def read_setting(key: str, act: Acting, plane: ThePlane, response: Response) -> Any:
    return tagged(response, (await config.found(plane, key)).shown())


@router.put("/settings/{key}", summary="Change a setting", responses=shows(SettingShown))
async def put_setting(
    key: str, act: Acting, plane: ThePlane, request: Request, response: Response, body: SettingValue
) -> Any:
    """With `If-Match`, or `If-None-Match: *` while it has its default."""

    def check(old: config.Value) -> None:
        is_new = old.source == "default" and not request.headers.getlist("if-match")
        require(request, None if is_new else etag_of(old.shown()), creates=True)

    return tagged(response, (await config.put(plane, act, key, body.value, check)).shown())


@router.delete("/settings/{key}", status_code=204, summary="Give a setting its default")
async def reset_setting(key: str, act: Acting, plane: ThePlane, request: Request) -> None:
    await config.reset(plane, act, key, lambda old: require(request, etag_of(old.shown())))
