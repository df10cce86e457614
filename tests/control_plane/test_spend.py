"""GET /spend: what budgets have spent in their period, by the records."""

from pathlib import Path
from typing import Any

import jsonschema
import orjson
import pytest
from sqlalchemy import insert

from control_plane.data.tables import budgets, keys, organisations
from control_plane.services import spend
from tests.control_plane.conftest import NOON, Running
from tests.control_plane.test_usage import sum_up
from tests.control_plane.usage import DAY, record, taken

pytestmark = pytest.mark.anyio
SCHEMA = Path(__file__).parents[2] / "docs/schemas/spend.json"
KEY = "k3v9Qm2XbT7a"


async def budget(plane: Running, scope: str, name: str, unit: str, per: str) -> None:
    async with plane.plane.database.main.write() as connection:
        values = {"id": f"bud_{scope}{name}{unit}{per}", "scope": scope, "name": name, "unit": unit, "per": per}
        await connection.execute(insert(budgets).values(**values, body={unit: 1, "per": per}, created_at=NOON))


async def told(plane: Running) -> dict[str, Any]:
    plane.clock.advance(3)
    answer = await plane.router.get("/spend")
    assert answer.status_code == 200
    document: dict[str, Any] = answer.json()
    jsonschema.validate(document, orjson.loads(SCHEMA.read_bytes()))
    return document


async def amounts(plane: Running) -> dict[str, int]:
    return {one["id"]: one["spent"] for one in (await told(plane))["budgets"]}


async def test_budgets_of_organisations_keys_and_the_platform_are_told(plane: Running) -> None:
    async with plane.plane.database.main.write() as connection:
        for name, given in (("team-a", {"cost": 500, "per": "month"}), ("team-b", None)):
            await connection.execute(insert(organisations).values(name=name, limits=[], budget=given, created_at=NOON))
        await connection.execute(
            insert(keys).values(
                id=KEY, name="batch", digest="d", limits=[], budget={"tokens": 5, "per": "day"}, created_at=NOON
            )
        )
    await budget(plane, "user", "", "requests", "week")
    await budget(plane, "user", "idle", "requests", "week")
    await budget(plane, "all", "", "cost", "day")
    await taken(
        plane,
        record(organisation="team-a", key_id=KEY, user="ana"),
        record(organisation="team-a", kind="vote", user="ana"),
        record(organisation="team-a", kind="shadow", user="ana"),
        record(
            organisation="team-b", user="bob", code="rate_limit_exceeded", status=429, outcome="refused", attempts=0
        ),
    )

    document = await told(plane)

    assert (document["at"], document["currency"]) == ("2026-11-28T12:00:03Z", "USD")
    month = {"period_start": "2026-11-01T00:00:00Z", "resets_at": "2026-12-01T00:00:00Z"}
    week = {"period_start": "2026-11-23T00:00:00Z", "resets_at": "2026-11-30T00:00:00Z"}
    day = {"period_start": "2026-11-28T00:00:00Z", "resets_at": "2026-11-29T00:00:00Z"}
    assert document["budgets"] == [
        {"id": "all::cost:day", **day, "spent": 3 * 142240},
        {"id": f"key:{KEY}:tokens:day", **day, "spent": 932},
        {"id": "organisation:team-a:cost:month", **month, "spent": 2 * 142240},
        # A vote is no request of a client, and neither is what no backend was asked for.
        {"id": "user:ana:requests:week", **week, "spent": 1},
        {"id": "user:bob:requests:week", **week, "spent": 0},
        {"id": "user:idle:requests:week", **week, "spent": 0},
    ]


async def test_spend_is_that_of_the_period_from_sums_and_rows(plane: Running) -> None:
    for per in ("day", "week", "month"):
        await budget(plane, "all", "", "requests", per)
    # 28 November 2026 is a Saturday.
    await taken(plane, *(record(at=NOON - days * DAY) for days in range(8) if days < 7), record(at=NOON - 7 * DAY))
    wanted = {"all::requests:day": 1, "all::requests:week": 6, "all::requests:month": 8}
    before = await amounts(plane)
    await sum_up(plane)
    after = await amounts(plane)
    plane.clock.advance(12 * 3600)
    next_day = await amounts(plane)

    assert before == after == wanted
    assert next_day == {**wanted, "all::requests:day": 0}


async def test_spend_is_conditional_and_asked_by_routers_only(sqlite_plane: Running) -> None:
    first = await sqlite_plane.router.get("/spend")
    again = await sqlite_plane.router.get("/spend", headers={"if-none-match": first.headers["etag"]})
    nobody = await sqlite_plane.client.get("/spend")

    assert (again.status_code, again.content) == (304, b"")
    assert nobody.status_code == 401
    assert first.headers["cache-control"] == "no-cache"


async def test_what_budgets_have_spent_is_known_to_other_resources(sqlite_plane: Running) -> None:
    await budget(sqlite_plane, "all", "", "tokens", "day")
    await taken(sqlite_plane, record())

    found = await spend.spent(sqlite_plane.plane, ["all::tokens:day", "user:x:cost:day"])

    assert {id: one.amount for id, one in found.items()} == {"all::tokens:day": 932}
