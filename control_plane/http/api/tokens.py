"""/api/v1/tokens: management tokens, which act for their maker, and service tokens of routers."""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from control_plane.http.api.access import Acting, ThePlane
from control_plane.http.api.paging import Page, Paging, page
from control_plane.http.api.patches import Patch, patched
from control_plane.http.api.preconditions import etag_of, require
from control_plane.pure.times import read
from control_plane.services import issuing

router = APIRouter(tags=["tokens"])


class NewToken(issuing.TokenFields):
    model_config = ConfigDict(
        extra="ignore",
        json_schema_extra={"examples": [{"name": "ci", "kind": "management", "organisation": "team-a"}]},
    )

    kind: issuing.Kind = "management"


class Token(BaseModel):
    id: str
    name: str
    kind: issuing.Kind
    scopes: list[str] | None
    organisation: str | None
    role: str | None
    user: str | None
    expires: str | None
    disabled: bool
    state: issuing.State
    previous_until: str | None
    created_at: str
    created_by: str | None
    last_used_at: str | None


class MadeToken(Token):
    """`token`: shown this once."""

    token: str


class TokenRotation(BaseModel):
    model_config = ConfigDict(extra="ignore")

    overlap: Annotated[int, Field(ge=0, le=604_800, strict=True)] = Field(
        default=86_400, description="seconds that the old secret stays valid"
    )


@router.get("/tokens", response_model=Page[Token])
async def list_tokens(
    act: Acting,
    plane: ThePlane,
    place: Paging,
    organisation: Annotated[str | None, Query(max_length=128)] = None,
    user: Annotated[str | None, Query(max_length=128)] = None,
    state: Annotated[issuing.State | None, Query()] = None,
) -> Any:
    """The newest first: the own ones, and for admins of the platform the service tokens."""
    filters = issuing.Filters(organisation, user, state)
    found = await issuing.listed(plane, act, place.limit, place.key(int, str), filters)
    return page(found, place, lambda one: [read(one["created_at"]), one["id"]], Token.model_validate)


@router.post("/tokens", status_code=201, response_model=MadeToken)
async def create_token(new: NewToken, act: Acting, plane: ThePlane, response: Response) -> Any:
    """The answer has the token, which is stored nowhere."""
    made, secret = await issuing.create(plane, act, new.kind, new)
    response.headers["Location"] = f"/api/v1/tokens/{made['id']}"
    return {**_tagged(response, made), "token": secret}


@router.get("/tokens/{id}", response_model=Token)
async def read_token(id: str, act: Acting, plane: ThePlane, response: Response) -> Any:
    return _tagged(response, await issuing.one(plane, act, id))


@router.patch("/tokens/{id}", response_model=Token)
async def change_token(
    id: str, patch: Patch, act: Acting, plane: ThePlane, request: Request, response: Response
) -> Any:
    def decide(before: dict[str, Any]) -> issuing.TokenFields:
        require(request, etag_of(issuing.tag_of(before)))
        return patched(issuing.TokenFields, {field: before[field] for field in issuing.FIELDS}, patch)

    return _tagged(response, await issuing.change(plane, act, id, decide))


@router.delete("/tokens/{id}", status_code=204)
async def end_token(id: str, act: Acting, plane: ThePlane, request: Request) -> None:
    """It no longer holds at the next request; a service token within a second."""
    await issuing.end(plane, act, id, lambda found: require(request, etag_of(issuing.tag_of(found))))


@router.post("/tokens/{id}/rotate", response_model=MadeToken)
async def rotate_token(
    id: str, act: Acting, plane: ThePlane, response: Response, body: TokenRotation | None = None
) -> Any:
    """The token keeps its id. The old secret is valid for `overlap` seconds more, a day unless said otherwise."""
    made, secret = await issuing.rotate(plane, act, id, (body or TokenRotation()).overlap)
    return {**_tagged(response, made), "token": secret}


def _tagged(response: Response, token: dict[str, Any]) -> dict[str, Any]:
    response.headers["ETag"] = etag_of(issuing.tag_of(token))
    return token
