"""/api/v1/prompts: prompts, their versions and labels."""

from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response
from pydantic import BaseModel, Field

from control_plane.http.api.access import Acting, ThePlane
from control_plane.http.api.documents import shows
from control_plane.http.api.paging import Page, Paging, page
from control_plane.http.api.preconditions import etag_of, require, tagged
from control_plane.services import prompts

router = APIRouter(tags=["prompts"])
Number = Annotated[int, Path(ge=1, le=2**31 - 1)]


class PromptShown(BaseModel):
    """`labels`: names of versions. `latest`: the newest version, null: there is none yet."""

    name: str = Field(examples=["support"])
    organisation: str | None = Field(examples=["team-a"])
    labels: dict[str, int] = Field(examples=[{"production": 2}])
    latest: int | None = Field(examples=[2])
    created_at: str
    created_by: str | None


class VersionShown(prompts.VersionBody):
    version: int
    created_at: str
    created_by: str | None


class LabelBody(BaseModel):
    version: int = Field(ge=1, le=2**31 - 1, strict=True, examples=[2])


class LabelShown(LabelBody):
    label: str = Field(examples=["production"])
    moved_at: str
    moved_by: str | None


@router.get("/prompts", summary="List prompts", responses=shows(Page[PromptShown]))
async def list_prompts(act: Acting, plane: ThePlane, place: Paging) -> Page[dict[str, Any]]:
    """Those of the caller's organisations, and those of none."""
    after = place.key(str)
    found = await prompts.listed(plane, act, place.limit, after and after[0])
    return page(found, place, lambda one: [one["name"]], lambda one: one)


@router.post("/prompts", status_code=201, summary="Make a prompt", responses=shows(PromptShown, 201))
async def create_prompt(act: Acting, plane: ThePlane, response: Response, body: prompts.PromptBody) -> Any:
    """It has no version yet. Its name is never used again."""
    made = await prompts.create(plane, act, body)
    response.headers["Location"] = f"/api/v1/prompts/{made['name']}"
    return tagged(response, made)


@router.get("/prompts/{name}", summary="Read a prompt", responses=shows(PromptShown))
async def read_prompt(name: str, act: Acting, plane: ThePlane, response: Response) -> Any:
    return tagged(response, await prompts.found(plane, act, name))


@router.delete("/prompts/{name}", status_code=204, summary="End a prompt")
async def end_prompt(name: str, act: Acting, plane: ThePlane, request: Request) -> None:
    """Routers answer requests that name it with 404 from then on."""
    await prompts.end(plane, act, name, lambda old: require(request, etag_of(old)))


@router.get("/prompts/{name}/versions", summary="List the versions of a prompt", responses=shows(Page[VersionShown]))
async def list_versions(name: str, act: Acting, plane: ThePlane, place: Paging) -> Page[dict[str, Any]]:
    """The newest first."""
    after = place.key(int)
    found = await prompts.versions(plane, act, name, place.limit, after and after[0])
    return page(found, place, lambda one: [one["version"]], lambda one: one)


@router.post("/prompts/{name}/versions", status_code=201, summary="Add a version", responses=shows(VersionShown, 201))
async def add_version(name: str, act: Acting, plane: ThePlane, response: Response, body: prompts.VersionBody) -> Any:
    """A version never changes; nobody uses it by a label before one is set to it."""
    made = await prompts.add_version(plane, act, name, body)
    response.headers["Location"] = f"/api/v1/prompts/{name}/versions/{made['version']}"
    return tagged(response, made)


@router.get("/prompts/{name}/versions/{n}", summary="Read a version", responses=shows(VersionShown))
async def read_version(name: str, n: Number, act: Acting, plane: ThePlane, response: Response) -> Any:
    return tagged(response, await prompts.version(plane, act, name, n))


@router.get("/prompts/{name}/labels/{label}", summary="Read a label", responses=shows(LabelShown))
async def read_label(name: str, label: str, act: Acting, plane: ThePlane, response: Response) -> Any:
    return tagged(response, await prompts.label(plane, act, name, label))


@router.put(
    "/prompts/{name}/labels/{label}",
    summary="Set a label",
    responses={**shows(LabelShown), **shows(LabelShown, 201)},
)
async def put_label(
    name: str, label: str, act: Acting, plane: ThePlane, request: Request, response: Response, body: LabelBody
) -> Any:
    """Requests that name the label get this version from then on; without one they get `production`."""
    new, created = await prompts.put_label(
        plane,
        act,
        name,
        label,
        body.version,
        lambda old: require(request, None if old is None else etag_of(old), creates=True),
    )
    if created:
        response.status_code = 201
        response.headers["Location"] = f"/api/v1/prompts/{name}/labels/{label}"
    return tagged(response, new)


@router.delete("/prompts/{name}/labels/{label}", status_code=204, summary="Delete a label")
async def delete_label(name: str, label: str, act: Acting, plane: ThePlane, request: Request) -> None:
    await prompts.delete_label(
        plane, act, name, label, lambda old: require(request, None if old is None else etag_of(old))
    )
