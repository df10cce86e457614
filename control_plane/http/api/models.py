"""/api/v1/models: the catalogue, by the same service as the machine side's /models."""

from typing import Any

import orjson
from fastapi import APIRouter, Request, Response

from control_plane.errors import NotFound, Refused
from control_plane.http.api.access import Acting, ThePlane
from control_plane.http.api.paging import Page, Paging, page
from control_plane.http.api.preconditions import require
from control_plane.plane import Act
from control_plane.services import models
from control_plane.services.visibility import visible_models
from registry_stub.errors import Refused as RegistryRefused
from registry_stub.store import Stored
from registry_stub.wire import read_entry

router = APIRouter(tags=["models"])
# Keys of an entry that an organisation sees
_FOR_ALL = frozenset(
    {"name", "aliases", "version", "owner", "created", "max_model_len", "price", "split", "race", "consensus"}
)


@router.get("/models")
async def list_models(act: Acting, plane: ThePlane, place: Paging) -> Page[dict[str, Any]]:
    after = place.key(str)
    visible = await visible_models(plane, act)
    found = [stored for name, stored in models.catalogue(plane).stored.items() if visible(name)]
    found.sort(key=lambda stored: stored.entry.name)
    if after is not None:
        found = [stored for stored in found if stored.entry.name > after[0]]
    return page(found[: place.limit + 1], place, lambda stored: [stored.entry.name], lambda stored: shown(act, stored))


@router.get("/models/{name:path}")
async def read_model(name: str, act: Acting, plane: ThePlane, response: Response) -> dict[str, Any]:
    stored = models.catalogue(plane).stored.get(name)
    if stored is None or not (await visible_models(plane, act))(name):
        raise NotFound("model", name)
    response.headers["ETag"] = stored.etag
    return shown(act, stored)


@router.put("/models/{name:path}", responses={201: {"description": "Created"}})
async def put_model(name: str, act: Acting, plane: ThePlane, request: Request) -> Response:
    try:
        entry = await read_entry(request, name)
    except RegistryRefused as exc:
        raise Refused(exc.status, exc.code, exc.message, param=exc.param, headers=exc.headers) from None
    stored, created = await models.put(
        plane, act, entry, lambda stored: require(request, stored.etag if stored else None, creates=True)
    )
    headers = {"ETag": stored.etag, **({"Location": f"/api/v1/models/{name}"} if created else {})}
    return Response(stored.body, 201 if created else 200, headers, media_type="application/json")


@router.delete("/models/{name:path}", status_code=204)
async def delete_model(name: str, act: Acting, plane: ThePlane, request: Request) -> None:
    def check(stored: Stored | None) -> None:
        if stored is None:
            raise NotFound("model", name)
        require(request, stored.etag)

    await models.delete(plane, act, name, check)


def shown(act: Act, stored: Stored) -> dict[str, Any]:
    """The entry; for an organisation without what belongs to operators, such as the addresses of backends."""
    found: dict[str, Any] = orjson.loads(stored.body)
    if act.principal.scope("models.see").everything:
        return found
    return {name: value for name, value in found.items() if name in _FOR_ALL}
