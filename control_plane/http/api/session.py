"""/api/v1/session, /me and /me/sessions: logins, and what people see and change of themselves."""

from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field, SecretStr
from sqlalchemy import Row

from control_plane.http.api.access import Acting, ThePlane
from control_plane.http.api.paging import Page, Paging, page
from control_plane.http.api.preconditions import etag_of, require, tagged
from control_plane.http.cookies import SESSION
from control_plane.http.identity import PRINCIPAL, cookies_of, set_session
from control_plane.plane import Act
from control_plane.pure.passwords import LONGEST
from control_plane.pure.times import shown
from control_plane.services import accounts, logins

router = APIRouter(tags=["me"])
Password = Annotated[SecretStr, Field(max_length=LONGEST)]
Title = Annotated[str, Field(min_length=1, max_length=256)]


class Login(BaseModel):
    model_config = ConfigDict(
        extra="ignore", json_schema_extra={"examples": [{"email": "ana@example.org", "password": "a long password"}]}
    )

    email: str = Field(max_length=320)
    password: Password


class PasswordChange(BaseModel):
    model_config = ConfigDict(extra="ignore")

    current: Password
    new: Password


class MeChange(BaseModel):
    model_config = ConfigDict(extra="ignore", json_schema_extra={"examples": [{"title": "Ana Example"}]})

    title: Title | None = None
    password: PasswordChange | None = None


class Membership(BaseModel):
    organisation: str
    role: str


class Me(BaseModel):
    """Who is logged in, or the maker of a management token, with the rights of now."""

    name: str
    email: str | None
    title: str | None
    platform_role: str | None
    memberships: list[Membership]


class ShownSession(BaseModel):
    id: str
    created_at: str
    seen_at: str
    expires_at: str
    address: str | None
    agent: str | None
    current: bool


@router.post("/session", response_model=Me)
async def log_in(login: Login, act: Acting, plane: ThePlane, request: Request, response: Response) -> Any:
    begun = await logins.log_in(
        plane,
        act,
        login.email,
        login.password.get_secret_value(),
        request.headers.get("user-agent"),
        cookies_of(request).read(request.scope, SESSION),
    )
    set_session(request, begun.secret)
    request.scope[PRINCIPAL] = begun.principal
    return tagged(response, await accounts.me(plane, act._replace(principal=begun.principal)))


@router.delete("/session", status_code=204)
async def log_out(act: Acting, plane: ThePlane, request: Request) -> None:
    if act.principal.session is not None:
        await accounts.end_session(plane, act, act.principal.session)
        set_session(request, None)


@router.get("/me", response_model=Me)
async def read_me(act: Acting, plane: ThePlane, response: Response) -> Any:
    return tagged(response, await accounts.me(plane, act))


@router.patch("/me", response_model=Me)
async def change_me(change: MeChange, act: Acting, plane: ThePlane, request: Request, response: Response) -> Any:
    require(request, etag_of(await accounts.me(plane, act)))
    if change.password is not None:
        given = change.password
        secret = await accounts.change_password(
            plane, act, given.current.get_secret_value(), given.new.get_secret_value()
        )
        if secret is not None:
            set_session(request, secret)
    if "title" in change.model_fields_set:
        await accounts.retitle(plane, act, change.title)
    return tagged(response, await accounts.me(plane, act))


@router.get("/me/sessions")
async def list_sessions(act: Acting, plane: ThePlane, place: Paging) -> Page[ShownSession]:
    after = (place.key(str) or [None])[0]
    rows = await accounts.list_sessions(plane, act.principal.user or "", place.limit, after)
    return page(rows, place, lambda row: [row.id], lambda row: _shown(act, row))


@router.delete("/me/sessions", status_code=204)
async def end_other_sessions(act: Acting, plane: ThePlane) -> None:
    """End all sessions but the one that asks."""
    await accounts.end_other_sessions(plane, act)


@router.get("/me/sessions/{id}")
async def read_session(id: str, act: Acting, plane: ThePlane, response: Response) -> ShownSession:
    row = await accounts.read_session(plane, act.principal.user or "", id)
    response.headers["ETag"] = _etag(row)
    return _shown(act, row)


@router.delete("/me/sessions/{id}", status_code=204)
async def end_session(id: str, act: Acting, plane: ThePlane, request: Request) -> None:
    require(request, _etag(await accounts.read_session(plane, act.principal.user or "", id)))
    await accounts.end_session(plane, act, id)
    if id == act.principal.session:
        set_session(request, None)


def _etag(row: Row[Any]) -> str:
    """Of what does not change by being used."""
    return etag_of([row.id, row.created_at])


def _shown(act: Act, row: Row[Any]) -> ShownSession:
    return ShownSession(
        id=row.id,
        created_at=shown(row.created_at) or "",
        seen_at=shown(row.seen_at) or "",
        expires_at=shown(row.expires_at) or "",
        address=row.address,
        agent=row.agent,
        current=row.id == act.principal.session,
    )
