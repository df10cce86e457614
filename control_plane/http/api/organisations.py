"""/api/v1/organisations and their members."""

from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field, StrictBool

from control_plane.errors import Forbidden, NotFound
from control_plane.http.api.access import Acting, ThePlane
from control_plane.http.api.paging import Page, Paging, page
from control_plane.http.api.patches import Patch, patched
from control_plane.http.api.preconditions import etag_of, require, tagged
from control_plane.plane import Act, Plane
from control_plane.pure.names import Name
from control_plane.pure.roles import OrganisationRole, Permission
from control_plane.services import organisations
from inference_api.policy.document import Budget, Limit, Patterns

router = APIRouter(tags=["organisations"])
_EXAMPLE: dict[str, Any] = {
    "name": "team-a",
    "title": "Team A",
    "models": ["llama-*", "chat"],
    "limits": [{"requests": 600, "per": 60}],
    "budget": {"cost": 500, "per": "month", "soft": 0.8},
}


class OrganisationFields(BaseModel):
    """What can be changed. `models`: patterns of the names that its keys may use, null: all."""

    model_config = ConfigDict(extra="ignore", hide_input_in_errors=True)

    title: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    disabled: StrictBool = False
    models: Patterns = None
    limits: tuple[Limit, ...] = ()
    budget: Budget | None = None

    @property
    def written(self) -> dict[str, Any]:
        """As it is stored: of limits and budget what was given, no default is frozen."""
        return {
            "title": self.title,
            "disabled": self.disabled,
            "models": None if self.models is None else list(self.models),
            "limits": [limit.model_dump(mode="json", exclude_unset=True) for limit in self.limits],
            "budget": self.budget and self.budget.model_dump(mode="json", exclude_unset=True),
        }


class NewOrganisation(OrganisationFields):
    model_config = ConfigDict(extra="ignore", hide_input_in_errors=True, json_schema_extra={"examples": [_EXAMPLE]})

    name: Name


class Organisation(BaseModel):
    name: str
    title: str | None
    disabled: bool
    models: list[str] | None
    limits: list[dict[str, Any]]
    budget: dict[str, Any] | None
    created_at: str
    created_by: str | None


class NewRole(BaseModel):
    model_config = ConfigDict(extra="ignore", json_schema_extra={"examples": [{"role": "member"}]})

    role: OrganisationRole


class Member(BaseModel):
    user: str
    title: str | None
    role: str
    created_at: str


@router.get("/organisations", response_model=Page[Organisation])
async def list_organisations(act: Acting, plane: ThePlane, place: Paging) -> Any:
    after = (place.key(str) or [None])[0]
    found = await organisations.page_of(plane, act.principal.scope("organisations.see"), place.limit, after)
    return page(found, place, lambda one: [one["name"]], Organisation.model_validate)


@router.post("/organisations", status_code=201, response_model=Organisation)
async def create_organisation(new: NewOrganisation, act: Acting, plane: ThePlane, response: Response) -> Any:
    made = await organisations.create(plane, act, new.name, new.written)
    response.headers["Location"] = f"/api/v1/organisations/{new.name}"
    return tagged(response, made)


@router.get("/organisations/{name}", response_model=Organisation)
async def read_organisation(name: str, act: Acting, plane: ThePlane, response: Response) -> Any:
    return tagged(response, await visible(plane, act, name))


@router.patch("/organisations/{name}", response_model=Organisation)
async def change_organisation(
    name: str, patch: Patch, act: Acting, plane: ThePlane, request: Request, response: Response
) -> Any:
    def decide(before: dict[str, Any]) -> dict[str, Any]:
        require(request, etag_of(before))
        return patched(OrganisationFields, {field: before[field] for field in organisations.FIELDS}, patch).written

    _refuse_others(act, name)
    return tagged(response, await organisations.change(plane, act, name, decide))


@router.delete("/organisations/{name}", status_code=204)
async def end_organisation(name: str, act: Acting, plane: ThePlane, request: Request) -> None:
    _refuse_others(act, name)
    await organisations.end(plane, act, name, lambda found: require(request, etag_of(found)))


@router.get("/organisations/{name}/members", response_model=Page[Member])
async def list_members(name: str, act: Acting, plane: ThePlane, place: Paging) -> Any:
    await allowed(plane, act, "members.see", name)
    after = (place.key(str) or [None])[0]
    found = await organisations.members(plane, name, place.limit, after)
    return page(found, place, lambda one: [one["user"]], Member.model_validate)


@router.get("/organisations/{name}/members/{user}", response_model=Member)
async def read_member(name: str, user: str, act: Acting, plane: ThePlane, response: Response) -> Any:
    await allowed(plane, act, "members.see", name)
    found = await organisations.member(plane, name, user)
    if found is None:
        raise NotFound("member", user)
    return tagged(response, found)


@router.put("/organisations/{name}/members/{user}", response_model=Member, responses={201: {"model": Member}})
async def set_member(
    name: str, user: str, new: NewRole, act: Acting, plane: ThePlane, request: Request, response: Response
) -> Any:
    await allowed(plane, act, "members.write", name)

    def check(found: dict[str, Any] | None) -> None:
        require(request, None if found is None else etag_of(found), creates=True)

    made, created = await organisations.set_member(plane, act, name, user, new.role, check)
    response.status_code = 201 if created else 200
    return tagged(response, made)


@router.delete("/organisations/{name}/members/{user}", status_code=204)
async def end_member(name: str, user: str, act: Acting, plane: ThePlane, request: Request) -> None:
    await allowed(plane, act, "members.write", name)
    await organisations.end_member(plane, act, name, user, lambda found: require(request, etag_of(found)))


async def visible(plane: Plane, act: Act, name: str) -> dict[str, Any]:
    """Raises NotFound, for organisations of others, too."""
    _refuse_others(act, name)
    return await organisations.one(plane, name)


def _refuse_others(act: Act, name: str) -> None:
    if not act.principal.may("organisations.see", name):
        raise NotFound("organisation", name)


async def allowed(plane: Plane, act: Act, permission: Permission, name: str) -> None:
    """Raises NotFound for organisations of others, Forbidden for rights that are missing in the own one."""
    if not act.principal.may(permission, name):
        await visible(plane, act, name)
        raise Forbidden(f"This needs the permission {permission} in {name!r}.")
