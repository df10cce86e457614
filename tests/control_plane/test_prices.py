"""Prices: rows that are only added; the catalogue shows what holds now."""

from typing import Any

import pytest

from tests.control_plane.conftest import Running
from tests.fakes import until

pytestmark = pytest.mark.anyio
LISTED = {"input": 0.2, "cached_input": 0.02, "output": 0.6, "request": 0}
# A price of 0 per request is none.
ONLY_GIVEN = {name: price for name, price in LISTED.items() if price}
ENTRY = {"name": "gpt2", "backends": [{"url": "http://10.0.0.1:8000"}], "price": LISTED}


async def prices(plane: Running) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await plane.admin.get("/api/v1/prices")).json()["data"]
    return found


async def served(plane: Running) -> Any:
    return (await plane.client.get("/models")).json()["models"][0].get("price")


async def test_an_entry_with_a_price_adds_a_row_from_now(plane: Running) -> None:
    made = await plane.admin.put("/models/gpt2", json=ENTRY)

    assert made.json()["price"] == LISTED == await served(plane)
    (row,) = await prices(plane)
    assert row.items() >= {"model": "gpt2", "valid_from": "2026-11-28T12:00:00Z", "created_by": "ana", **LISTED}.items()


async def test_only_another_price_adds_a_row_and_none_keeps_what_holds(plane: Running) -> None:
    await plane.admin.put("/models/gpt2", json=ENTRY)
    plane.clock.advance(60)
    again = await plane.admin.put("/models/gpt2", json={**ENTRY, "owner": "team"})
    without = await plane.admin.put("/models/gpt2", json={"name": "gpt2", "owner": "b"})
    assert [len(await prices(plane)), again.json()["price"], without.json()["price"]] == [1, LISTED, ONLY_GIVEN]

    await plane.admin.put("/models/gpt2", json={**ENTRY, "price": {"input": 1, "output": 2}})

    assert await served(plane) == {"input": 1, "output": 2}
    assert [row["valid_from"] for row in await prices(plane)] == ["2026-11-28T12:00:00Z", "2026-11-28T12:01:00Z"]


async def test_a_price_of_the_future_is_shown_when_its_time_comes(plane: Running) -> None:
    await plane.admin.put("/models/gpt2", json=ENTRY)
    body = {"model": "gpt2", "valid_from": "2026-11-28T13:00:00Z", "input": 0.000000001, "output": 3}
    etag = (await plane.client.get("/models")).headers["etag"]

    made = await plane.admin.post("/api/v1/prices", json=body)

    assert made.status_code == 201
    assert made.json()["cached_input"] is None
    assert (await served(plane), (await plane.client.get("/models")).headers["etag"]) == (LISTED, etag)
    plane.clock.advance(3600)
    await until(lambda: plane.plane.documents.get("models").etag != etag)
    assert await served(plane) == {"input": 1e-9, "output": 3}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": 0.1234567891}, "input"),
        ({"input": -1}, "input"),
        ({"input": True}, "input"),
        ({"input": "1"}, "input"),
        ({"valid_from": "tomorrow"}, "valid_from"),
        ({"model": ""}, "model"),
    ],
)
async def test_what_is_no_price_is_refused(sqlite_plane: Running, change: dict[str, Any], param: str) -> None:
    body = {"model": "gpt2", "input": 1, "output": 2, **change}

    refused = await sqlite_plane.admin.post("/api/v1/prices", json=body)

    assert refused.status_code == 422
    error = refused.json()["error"]
    assert (error["code"], error["param"].split(".")[0]) == ("validation_error", param)


async def test_prices_are_listed_by_model_page_by_page(sqlite_plane: Running) -> None:
    for number in range(5):
        sqlite_plane.clock.advance(1)
        await sqlite_plane.admin.post("/api/v1/prices", json={"model": f"m{number % 2}", "input": number, "output": 1})
    first = (await sqlite_plane.admin.get("/api/v1/prices?limit=3")).json()
    second = (await sqlite_plane.admin.get("/api/v1/prices", params={"limit": 3, "after": first["next"]})).json()
    of_one = (await sqlite_plane.admin.get("/api/v1/prices?model=m1")).json()["data"]

    assert [row["input"] for row in first["data"] + second["data"]] == [0, 2, 4, 1, 3]
    assert second["next"] is None
    assert [row["input"] for row in of_one] == [1, 3]
