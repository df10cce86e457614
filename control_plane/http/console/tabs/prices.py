"""The tab Prices: all that it has had, and a new one."""

from typing import Any

from starlette.responses import Response

from control_plane.http.api.prices import PriceBody
from control_plane.http.console.forms import Form, body
from control_plane.http.console.tabs import Look, Tab, served
from control_plane.services import prices


async def _price(look: Look, form: Form) -> Response | None:
    fields = {
        name: value
        for name in ("input", "cached_input", "output", "request")
        if (value := form.decimal(name)) is not None
    }
    asked = body(PriceBody, {"model": look.name, "valid_from": form.optional("valid_from"), **fields})
    await prices.add(look.visit.plane, look.visit.act, asked.wanted(look.visit.act.at))
    return look.visit.back("priced", tab="prices")


async def _of_prices(look: Look) -> dict[str, Any]:
    plane, now = look.visit.plane, look.visit.act.at
    rows: list[Any] = []
    after: list[str | int] | None = None
    while True:
        some = await prices.listing(plane, look.name, after, 200)
        rows += some[:200]
        if len(some) <= 200:
            break
        after = [rows[-1].model, rows[-1].valid_from, rows[-1].id]
    past = [row for row in rows if row.valid_from <= now]
    return {"prices": rows[::-1], "holds": past[-1].id if past else None}


TAB = Tab("prices", "Prices", served("prices.write"), _of_prices, {"price": ("prices.write", _price)})
