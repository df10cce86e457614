"""/api/v1/users: who may log in, and roles on the platform."""

from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field, StrictBool

from control_plane.http.api.access import Acting, ThePlane
from control_plane.http.api.paging import Page, Paging, page
from control_plane.http.api.patches import Patch, patched
from control_plane.http.api.preconditions import etag_of, require, tagged
from control_plane.http.api.session import Membership
from control_plane.pure.names import Email, Name
from control_plane.pure.roles import PlatformRole
from control_plane.services import users

router = APIRouter(tags=["users"])


class UserFields(BaseModel):
    """What can be changed. Users of an OpenID provider may have no e-mail address."""

    model_config = ConfigDict(extra="ignore", hide_input_in_errors=True)

    email: Email | None = None
    title: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    platform_role: PlatformRole | None = None
    disabled: StrictBool = False


class NewUser(BaseModel):
    model_config = ConfigDict(
        extra="ignore",
        hide_input_in_errors=True,
        json_schema_extra={"examples": [{"name": "ana", "email": "ana@example.org", "platform_role": "operator"}]},
    )

    name: Name
    email: Email
    title: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    platform_role: PlatformRole | None = None


class User(BaseModel):
    name: str
    email: str | None
    title: str | None
    platform_role: str | None
    disabled: bool
    memberships: list[Membership]
    created_at: str
    created_by: str | None
    last_login_at: str | None


class MadeUser(User):
    """`setup_url`: shown once, for a day; the user chooses a password there."""

    setup_url: str | None


class SetupUrl(BaseModel):
    setup_url: str | None


@router.get("/users", response_model=Page[User])
async def list_users(act: Acting, plane: ThePlane, place: Paging) -> Any:
    after = (place.key(str) or [None])[0]
    found = await users.page_of(plane, place.limit, after)
    return page(found, place, lambda one: [one["name"]], User.model_validate)


@router.post("/users", status_code=201, response_model=MadeUser)
async def create_user(new: NewUser, act: Acting, plane: ThePlane, response: Response) -> Any:
    made, url = await users.create(plane, act, new.name, new.email, new.title, new.platform_role)
    response.headers["Location"] = f"/api/v1/users/{new.name}"
    return {**tagged(response, made), "setup_url": url}


@router.get("/users/{name}", response_model=User)
async def read_user(name: str, act: Acting, plane: ThePlane, response: Response) -> Any:
    return tagged(response, await users.one(plane, name))


@router.patch("/users/{name}", response_model=User)
async def change_user(
    name: str, patch: Patch, act: Acting, plane: ThePlane, request: Request, response: Response
) -> Any:
    def decide(before: dict[str, Any]) -> dict[str, Any]:
        require(request, etag_of(before))
        return patched(UserFields, {field: before[field] for field in users.FIELDS}, patch).model_dump()

    return tagged(response, await users.change(plane, act, name, decide))


@router.delete("/users/{name}", status_code=204)
async def end_user(name: str, act: Acting, plane: ThePlane, request: Request) -> None:
    """End a user: no login, token or role is left, and the e-mail address is erased."""
    await users.end_user(plane, act, name, lambda found: require(request, etag_of(found)))


@router.delete("/users/{name}/sessions", status_code=204)
async def end_sessions(name: str, act: Acting, plane: ThePlane) -> None:
    await users.end_sessions(plane, act, name)


@router.post("/users/{name}/setup", response_model=SetupUrl)
async def set_up_again(name: str, act: Acting, plane: ThePlane) -> Any:
    """Another one-time URL, for a user who has lost the password; earlier ones no longer hold."""
    return {"setup_url": await users.set_up_again(plane, act, name)}
