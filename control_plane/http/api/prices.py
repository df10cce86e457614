"""/api/v1/prices: what holds, held and will hold."""

from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from control_plane.http.api.access import Acting, ThePlane
from control_plane.http.api.paging import Page, Paging, page
from control_plane.pure.times import Moment
from control_plane.services import prices
from control_plane.services.prices import NewPrice
from inference_api.policy.document import nanos

router = APIRouter(tags=["prices"])


def _exact(value: float) -> float:
    nanos(value)
    return value


Money = Annotated[float, Field(strict=True, ge=0, le=1_000_000, allow_inf_nan=False), AfterValidator(_exact)]


class PriceBody(BaseModel):
    """CURRENCY per million tokens, and per request; at most 9 digits after the point."""

    model_config = ConfigDict(
        extra="ignore",
        json_schema_extra={
            "examples": [
                {
                    "model": "llama-3-8b",
                    "valid_from": "2026-12-01T00:00:00Z",
                    "input": 0.2,
                    "cached_input": 0.02,
                    "output": 0.6,
                    "request": 0,
                }
            ]
        },
    )

    model: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@-]{0,127}$")]
    valid_from: Moment | None = None
    input: Money
    cached_input: Money | None = None
    output: Money
    request: Money = 0

    def wanted(self, now: int) -> NewPrice:
        """`now`: Unix milliseconds."""
        return NewPrice(
            self.model,
            now if self.valid_from is None else self.valid_from,
            nanos(self.input),
            None if self.cached_input is None else nanos(self.cached_input),
            nanos(self.output),
            nanos(self.request),
        )


@router.get("/prices")
async def list_prices(
    act: Acting, plane: ThePlane, place: Paging, model: Annotated[str | None, Query(max_length=128)] = None
) -> Page[dict[str, Any]]:
    rows = await prices.listing(plane, model, place.key(str, int, str), place.limit)
    return page(rows, place, lambda row: [row.model, row.valid_from, row.id], prices.view)


@router.post("/prices", status_code=201)
async def add_price(body: PriceBody, act: Acting, plane: ThePlane) -> dict[str, Any]:
    return await prices.add(plane, act, body.wanted(act.at))
