"""/api/v1/backends, /routers and /overrides: what routers report, and what people say about backends."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StringConstraints

from control_plane.errors import Invalid, Problem
from control_plane.http.api.access import Acting, ThePlane
from control_plane.http.api.documents import shows
from control_plane.http.api.paging import Page, Paging, page
from control_plane.http.api.preconditions import etag_of, require
from control_plane.plane import Act
from control_plane.pure.reports import Label, MergedBackend, Reported
from control_plane.services import overrides, reports
from control_plane.services.visibility import visible_models
from inference_api.routing.entries import ModelName

router = APIRouter()
# Longest time that an override may be given, in seconds; without one it holds until it is ended.
_LONGEST = 90 * 24 * 3600


class NewOverride(BaseModel):
    """`expires_in`: seconds; null: until it is ended. `force`: also if it is the last usable backend of a model."""

    model_config = ConfigDict(extra="ignore", hide_input_in_errors=True)

    backend: Label
    model: ModelName | None = None
    action: Literal["drain", "out", "return", "reset_circuit"]
    reason: Annotated[str, StringConstraints(min_length=1, max_length=500, strip_whitespace=True)] | None = None
    expires_in: Annotated[int, Field(strict=True, ge=1, le=_LONGEST)] | None = None
    force: StrictBool = False

    def wanted(self) -> overrides.Wanted:
        """Of every action but `return`. Raises Invalid."""
        if self.action == "return" or self.reason is None:
            raise Invalid(Problem("reason", "say why, for those who see it in an incident"))
        return overrides.Wanted(self.backend, self.model, self.action, self.reason, self.expires_in, self.force)


@router.get("/backends", tags=["backends"])
async def list_backends(
    act: Acting, plane: ThePlane, place: Paging, model: Annotated[str | None, Query(max_length=128)] = None
) -> Page[dict[str, Any]]:
    """Backends as the routers see them, by model and label: the worst state counts, `agree` says how many have it."""
    after = place.key(str, str)
    found = (await reports.seen(plane)).backends
    visible = await visible_models(plane, act)
    rows = [one for one in found if visible(one.model) and model in (None, one.model)]
    if after is not None:
        rows = [one for one in rows if (one.model, one.backend) > tuple(after)]
    return page(
        rows[: place.limit + 1], place, lambda one: [one.model, one.backend], lambda one: _shown_backend(act, one)
    )


@router.get("/routers", tags=["routers"])
async def list_routers(act: Acting, plane: ThePlane, place: Paging) -> Page[dict[str, Any]]:
    """The last report of each router; `lost`: three of its reports are missing."""
    after = place.key(str)
    rows = await reports.all_of(plane)
    if after is not None:
        rows = [one for one in rows if one.instance > after[0]]
    return page(
        rows[: place.limit + 1], place, lambda one: [one.instance], lambda one: _shown_router(act, one, plane.clock())
    )


class EndedOverrides(BaseModel):
    """The ids of those that a return has ended."""

    ended: list[str] = Field(examples=[["ovr_01JDSX7Z3W8Q4M5N6P7R8S9T0V"]])


@router.get("/overrides", tags=["overrides"])
async def list_overrides(
    act: Acting,
    plane: ThePlane,
    place: Paging,
    backend: Annotated[str | None, Query(max_length=2048)] = None,
    active: Annotated[bool | None, Query(description="those that hold now, or the others")] = None,
) -> Page[dict[str, Any]]:
    """Overrides, the newest first."""
    before = place.key(str)
    rows = await overrides.listed(plane, place.limit + 1, before and before[0], backend, active)
    return page(rows, place, lambda one: [one["id"]], lambda one: one)


@router.get("/overrides/{id}", tags=["overrides"])
async def read_override(id: str, act: Acting, plane: ThePlane, response: Response) -> dict[str, Any]:
    found = await overrides.get(plane, id)
    response.headers["ETag"] = etag_of(overrides.version(found))
    return found


@router.post("/overrides", tags=["overrides"], status_code=201, responses=shows(EndedOverrides))
async def create_override(body: NewOverride, act: Acting, plane: ThePlane, response: Response) -> dict[str, Any]:
    """Drain a backend, take it out, reset its circuit (201), or return it to use (200 with the ids that ended)."""
    if body.action == "return":
        response.status_code = 200
        return {"ended": await overrides.end_all(plane, act, body.backend, body.model, body.reason)}
    found = await overrides.create(plane, act, body.wanted())
    response.headers["ETag"] = etag_of(overrides.version(found))
    response.headers["Location"] = f"/api/v1/overrides/{found['id']}"
    return found


@router.delete("/overrides/{id}", tags=["overrides"], status_code=204)
async def delete_override(id: str, act: Acting, plane: ThePlane, request: Request) -> None:
    """End an override: the backend returns to use."""
    found = await overrides.get(plane, id)
    require(request, etag_of(overrides.version(found)))
    await overrides.end(plane, act, id)


def _shown_backend(act: Act, one: MergedBackend) -> dict[str, Any]:
    if not act.principal.may("backends.see"):
        # Addresses and reasons are the operators'.
        return {"model": one.model, "backend": None, "state": one.state, "agree": one.agree}
    rows = one.by_router.values()
    return {
        "model": one.model,
        "backend": one.backend,
        "state": one.state,
        "agree": one.agree,
        "in_flight": one.in_flight,
        "waiting": one.waiting,
        "kv_usage": one.kv_usage,
        "override": next((row["override"] for row in rows if row.get("override")), None),
        "routers": [
            {"router": instance, **{name: value for name, value in row.items() if name not in ("model", "backend")}}
            for instance, row in one.by_router.items()
        ],
    }


def _shown_router(act: Act, one: Reported, now: int) -> dict[str, Any]:
    lost = one.lost(now)
    if not act.principal.may("backends.see"):
        return {"instance": one.instance, "lost": lost, "draining": one.report["draining"]}
    return {"instance": one.instance, "lost": lost, "received_at": one.at, **one.report}
