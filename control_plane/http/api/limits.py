"""/api/v1/limits and /api/v1/budgets: those of the platform."""

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import ConfigDict, Field

from control_plane.http.api.access import Acting, ThePlane
from control_plane.http.api.documents import shows
from control_plane.http.api.paging import Page, Paging, page
from control_plane.http.api.preconditions import etag_of, require, tagged
from control_plane.plane import Plane
from control_plane.pure.times import shown
from control_plane.services import limits, spend
from inference_api.features.spending.ledger import period
from inference_api.policy.document import BUDGET_UNITS, ScopedBudget, ScopedLimit

router = APIRouter()


class LimitBody(ScopedLimit):
    """An item of `limits` of the policy."""

    model_config = ConfigDict(
        extra="ignore", json_schema_extra={"examples": [{"scope": "user", "requests": 120, "per": 60}]}
    )


class LimitShown(LimitBody):
    id: str = Field(examples=["lim_01JDSX7Z3W8Q4M5N6P7R8S9T0V"])


class BudgetBody(ScopedBudget):
    """An item of `budgets` of the policy."""

    model_config = ConfigDict(
        extra="ignore",
        json_schema_extra={"examples": [{"scope": "user", "name": "ana", "tokens": 5000000, "per": "day"}]},
    )


class BudgetShown(BudgetBody):
    """`spent`: nanos of a cost, else a count; null for a budget that each holder of the scope has."""

    id: str = Field(examples=["bud_01JDSX7Z3W8Q4M5N6P7R8S9T0V"])
    spent: int | None
    resets_at: str


@router.get("/limits", tags=["limits"], summary="List the limits of the platform", responses=shows(Page[LimitShown]))
async def list_limits(act: Acting, plane: ThePlane, place: Paging) -> Page[dict[str, Any]]:
    """Without a name each holder of the scope has a counter of its own."""
    after = place.key(str)
    found = await limits.listed(plane, "limit", place.limit, after and after[0])
    return page(found, place, lambda one: [one["id"]], lambda one: one)


@router.post("/limits", tags=["limits"], status_code=201, summary="Make a limit", responses=shows(LimitShown, 201))
async def create_limit(act: Acting, plane: ThePlane, response: Response, body: LimitBody) -> Any:
    """A name of an organisation or key must be there; one of a user or model need not."""
    made = await limits.create(plane, act, body)
    response.headers["Location"] = f"/api/v1/limits/{made['id']}"
    return tagged(response, made)


@router.get("/limits/{id}", tags=["limits"], summary="Read a limit", responses=shows(LimitShown))
async def read_limit(id: str, act: Acting, plane: ThePlane, response: Response) -> Any:
    return tagged(response, await limits.found(plane, "limit", id))


@router.put("/limits/{id}", tags=["limits"], summary="Replace a limit", responses=shows(LimitShown))
async def put_limit(
    id: str, act: Acting, plane: ThePlane, request: Request, response: Response, body: LimitBody
) -> Any:
    return tagged(response, await limits.replace(plane, act, id, body, lambda old: _require(request, old)))


@router.delete("/limits/{id}", tags=["limits"], status_code=204, summary="Delete a limit")
async def delete_limit(id: str, act: Acting, plane: ThePlane, request: Request) -> None:
    await limits.remove(plane, act, "limit", id, lambda old: _require(request, old))


@router.get(
    "/budgets", tags=["budgets"], summary="List the budgets of the platform", responses=shows(Page[BudgetShown])
)
async def list_budgets(act: Acting, plane: ThePlane, place: Paging) -> Page[dict[str, Any]]:
    """With what is spent in the present period."""
    after = place.key(str)
    found = await limits.listed(plane, "budget", place.limit, after and after[0])
    shown_budgets = await with_spent(plane, found)
    return page(shown_budgets, place, lambda one: [one["id"]], lambda one: one)


@router.post("/budgets", tags=["budgets"], status_code=201, summary="Make a budget", responses=shows(BudgetShown, 201))
async def create_budget(act: Acting, plane: ThePlane, response: Response, body: BudgetBody) -> Any:
    """One for each scope, name, unit and period."""
    made = await limits.create(plane, act, body)
    response.headers["Location"] = f"/api/v1/budgets/{made['id']}"
    tagged(response, made)
    return (await with_spent(plane, [made]))[0]


@router.get("/budgets/{id}", tags=["budgets"], summary="Read a budget", responses=shows(BudgetShown))
async def read_budget(id: str, act: Acting, plane: ThePlane, response: Response) -> Any:
    """Its ETag is that of the budget without what is spent."""
    found = tagged(response, await limits.found(plane, "budget", id))
    return (await with_spent(plane, [found]))[0]


@router.put("/budgets/{id}", tags=["budgets"], summary="Replace a budget", responses=shows(BudgetShown))
async def put_budget(
    id: str, act: Acting, plane: ThePlane, request: Request, response: Response, body: BudgetBody
) -> Any:
    new = tagged(response, await limits.replace(plane, act, id, body, lambda old: _require(request, old)))
    return (await with_spent(plane, [new]))[0]


@router.delete("/budgets/{id}", tags=["budgets"], status_code=204, summary="Delete a budget")
async def delete_budget(id: str, act: Acting, plane: ThePlane, request: Request) -> None:
    await limits.remove(plane, act, "budget", id, lambda old: _require(request, old))


def _require(request: Request, old: Mapping[str, Any]) -> None:
    require(request, etag_of(old))


async def with_spent(plane: Plane, budgets: list[dict[str, Any]]) -> list[dict[str, Any]]:
    ids = [_spending_id(one) for one in budgets]
    found = await spend.spent(plane, [id for id in ids if id is not None])
    shown_budgets = []
    for one, id in zip(budgets, ids, strict=True):
        known = None if id is None else found.get(id)
        # One that was just made has spent nothing that is known.
        amount = None if id is None else 0 if known is None else known.amount
        end = period(one["per"], plane.clock() / 1000)[1]
        shown_budgets.append({**one, "spent": amount, "resets_at": shown(round(end * 1000))})
    return shown_budgets


def _spending_id(budget: Mapping[str, Any]) -> str | None:
    """The id in GET /spend; None: each holder of the scope has a sum of its own."""
    name = budget.get("name")
    if name is None and budget["scope"] != "all":
        return None
    unit = next(unit for unit in BUDGET_UNITS if budget.get(unit) is not None)
    return f"{budget['scope']}:{name or ''}:{unit}:{budget['per']}"
