"""/api/v1/keys: API keys, and their rotation."""

from typing import Annotated, Any

from fastapi import APIRouter, Body, Query, Request, Response
from pydantic import BaseModel, Field

from control_plane.http.api.access import Acting, ThePlane
from control_plane.http.api.documents import MERGE_PATCH, shows
from control_plane.http.api.paging import Page, Paging, page
from control_plane.http.api.preconditions import etag_of, require
from control_plane.plane import Act
from control_plane.services import keys
from inference_api.policy.document import Budget, Limit

router = APIRouter(tags=["keys"])

_EXAMPLE: dict[str, Any] = {
    "id": "k3v9Qm2XbT7a",
    "name": "batch",
    "organisation": "team-a",
    "user": "ana",
    "models": ["llama-*"],
    "limits": [{"requests": 60, "per": 60}],
    "budget": None,
    "priority": 0,
    "weight": 1,
    "expires": None,
    "disabled": False,
    "state": "ok",
    "previous_until": None,
    "created_at": "2026-11-28T12:00:00Z",
    "created_by": "ana",
    "last_used_at": None,
}


class Key(BaseModel):
    """A key as it is shown. A viewer of the platform sees `id` only."""

    id: str
    name: str
    organisation: str | None
    user: str | None
    models: list[str] | None
    limits: list[Limit]
    budget: Budget | None
    priority: int
    weight: float
    expires: str | None
    disabled: bool
    state: keys.State
    previous_until: str | None
    created_at: str
    created_by: str | None
    last_used_at: str | None

    model_config = {"json_schema_extra": {"examples": [_EXAMPLE]}}


class CreatedKey(Key):
    """A key with its secret, which is shown this once."""

    key: str = Field(examples=["sk-ia-k3v9Qm2XbT7a-AbCdEfGhIjKlMnOpQrStUvWxYz0123456789abcdefg01vVfr"])


class Rotation(BaseModel):
    overlap: int = Field(
        default=86_400, ge=0, le=604_800, strict=True, description="seconds that the old secret stays valid"
    )


@router.get("/keys", summary="List keys", responses=shows(Page[Key]))
async def list_keys(
    act: Acting,
    plane: ThePlane,
    place: Paging,
    organisation: Annotated[str | None, Query(max_length=128)] = None,
    user: Annotated[str | None, Query(max_length=128)] = None,
    state: Annotated[keys.State | None, Query()] = None,
) -> Page[dict[str, Any]]:
    """The newest first; those that the caller may see."""
    found = await keys.listed(plane, act, place.limit, place.key(int, str), keys.Filters(organisation, user, state))
    return page(found, place, lambda key: [key.row.created_at, key.row.id], lambda key: _shown(act, key))


@router.post("/keys", status_code=201, summary="Make a key", responses=shows(CreatedKey, 201))
async def create_key(act: Acting, plane: ThePlane, response: Response, body: keys.KeyBody) -> dict[str, Any]:
    """The answer has the secret, which is stored nowhere. Members of an organisation make keys for themselves."""
    key, secret = await keys.create(plane, act, body)
    response.headers["Location"] = f"/api/v1/keys/{key.row.id}"
    response.headers["ETag"] = _etag(key)
    return {**key.shown(), "key": secret}


@router.get("/keys/{id}", summary="Read a key", responses=shows(Key))
async def read_key(id: str, act: Acting, plane: ThePlane, response: Response) -> dict[str, Any]:
    key = await keys.found(plane, act, id)
    response.headers["ETag"] = _etag(key)
    return _shown(act, key)


@router.patch("/keys/{id}", summary="Change a key", responses=shows(Key))
async def change_key(
    id: str,
    act: Acting,
    plane: ThePlane,
    request: Request,
    response: Response,
    patch: Annotated[dict[str, Any], Body(description=MERGE_PATCH, examples=[{"disabled": True}])],
) -> dict[str, Any]:
    """All that was given when it was made, and `disabled`."""
    key = await keys.change(plane, act, id, patch, lambda shown: require(request, etag_of(keys.tag_of(shown))))
    response.headers["ETag"] = _etag(key)
    return key.shown()


@router.delete("/keys/{id}", status_code=204, summary="End a key")
async def end_key(id: str, act: Acting, plane: ThePlane, request: Request) -> None:
    """It leaves the policy of all routers within a second, for ever; its records stay."""
    await keys.end(plane, act, id, lambda shown: require(request, etag_of(keys.tag_of(shown))))


@router.post("/keys/{id}/rotate", summary="Give a key another secret", responses=shows(CreatedKey))
async def rotate_key(
    id: str, act: Acting, plane: ThePlane, response: Response, body: Rotation | None = None
) -> dict[str, Any]:
    """The key keeps its id. The old secret is valid for `overlap` seconds more, a day unless said otherwise."""
    key, secret = await keys.rotate(plane, act, id, (body or Rotation()).overlap)
    response.headers["ETag"] = _etag(key)
    return {**key.shown(), "key": secret}


def _etag(key: keys.Found) -> str:
    return etag_of(keys.tag_of(key.shown()))


def _shown(act: Act, key: keys.Found) -> dict[str, Any]:
    return key.shown() if keys.is_shown(act, key) else {"id": key.row.id}
