"""The list of models: the worst first, filters in the URL, figures as in the API, and what is not served."""

import pytest
from sqlalchemy import insert

from control_plane.data.tables import models as models_table
from control_plane.data.tables import organisations
from control_plane.pure.times import shown
from tests.control_plane.conftest import NOON, Running
from tests.control_plane.pages import links_of, page, part, rows_of, text_of
from tests.control_plane.people import log_in, make_organisation, make_user
from tests.control_plane.test_console_overview import as_admin, in_step, many
from tests.control_plane.test_fleet import backend, report, reports
from tests.control_plane.test_overview import catalogue, loads, of
from tests.control_plane.usage import HOUR, record, taken

pytestmark = pytest.mark.anyio
MODELS = "/console/models"
LONG = "Qwen/Qwen2.5:32B@awq-" + "x" * 107


async def seeded(plane: Running) -> None:
    price = {"input": 0.2, "output": 0.6}
    await catalogue(
        plane,
        good=of("10.0.0.1", aliases=["fine", "nice"], owner="Forschung Süd", price=price),
        dead=of("10.0.0.4", fallbacks=["good"]),
        both={"split": {"variants": {"good": 90, "dead": 10}}},
    )
    await catalogue(plane, **{LONG: of("10.0.0.2")})
    rows = backend("10.0.0.1:8000", model="good"), backend("10.0.0.4:8000", "open", "dead")
    await in_step(plane, *rows)


async def test_the_worst_are_first_with_kind_owner_and_price(sqlite_plane: Running) -> None:
    await seeded(sqlite_plane)
    await as_admin(sqlite_plane)

    html = await page(sqlite_plane, MODELS)

    rows = rows_of(html)
    assert [row[:3] for row in rows] == [
        ["dead fallback", "failing", "0 / 1"],
        ["both split", "degraded", "1 / 2"],
        [LONG, "unknown", "0 / 1"],
        ["good fine, nice", "ok", "1 / 1"],
    ]
    assert rows[3][-2:] == ["0.20 / 0.60", "Forschung Süd"]
    assert f"/console/models/{LONG.replace(':', '%3A').replace('@', '%40')}" in links_of(html)


async def test_figures_are_those_of_the_api(sqlite_plane: Running) -> None:
    plane = sqlite_plane
    await seeded(plane)
    failed = {"status": 502, "outcome": "connect_failed", "cost_nanos": 0}
    await taken(
        plane,
        *(record(at=NOON - n * 60_000, model="good", asked_model="both", latency_ms=100.0 * n) for n in range(1, 20)),
        *(record(at=NOON - n * 60_000, model="good", asked_model="good", **failed) for n in range(1, 4)),
        record(at=NOON - 2 * HOUR, model="good", asked_model="good", cost_nanos=5_000_000_000),
        record(at=NOON - 25 * HOUR, model="good", asked_model="good", cost_nanos=5_000_000_000),
        record(at=NOON - 1, model="dead", asked_model="dead", cost_nanos=None),
    )
    await as_admin(plane)

    found = {row[0].split()[0]: row for row in rows_of(await page(plane, MODELS))}

    async def usage(span: int, **filters: str) -> dict[str, object]:
        times = {"start": shown(NOON - span), "end": shown(NOON)}
        answer = await plane.admin.get("/api/v1/usage", params={**times, "bucket": "1h", **filters})
        totals: dict[str, object] = answer.json()["totals"]
        return totals

    hour, day = await usage(HOUR, model="good"), await usage(24 * HOUR, model="good")
    assert (hour["requests"], hour["errors"], day["cost_nanos"]) == (22, 3, 19 * 142_240 + 5_000_000_000)
    assert found["good"][3:5] == ["22", "14 %"]
    assert found["good"][6] == "5.00 USD"
    assert found["both"][3] == str((await usage(HOUR, asked_model="both"))["requests"]) == "19"
    assert found["dead"][6] == "no price"


async def test_filters_are_in_the_url(sqlite_plane: Running) -> None:
    await seeded(sqlite_plane)
    await as_admin(sqlite_plane)

    async def names(query: str) -> list[str]:
        return [row[0].split()[0] for row in rows_of(await page(sqlite_plane, f"{MODELS}?{query}"))]

    assert await names("state=failing") == ["dead"]
    assert await names("state=bad") == ["dead", "both"]
    assert await names("name=NICE") == ["good"]
    assert await names("name=süd") == ["good"]
    assert await names("state=ok&name=dead") == []
    assert "No model matches." in await page(sqlite_plane, f"{MODELS}?name=none")
    await page(sqlite_plane, f"{MODELS}?state=odd", 422)


@pytest.mark.parametrize("count", [0, 1, 2_000])
async def test_any_number_of_models(sqlite_plane: Running, count: int) -> None:
    if count:
        await many(sqlite_plane, count)
    await as_admin(sqlite_plane)

    html = await page(sqlite_plane, MODELS)

    assert len(html) < 150_000
    assert len(rows_of(html)) == min(count, 50)
    assert ("There is no model yet." in html) is (count == 0)
    if count == 2_000:
        after = next(link for link in links_of(html) if "after=" in link)
        assert rows_of(await page(sqlite_plane, after))[0][0] == "m-0050"


async def test_what_is_not_served_is_shown_with_its_reason(sqlite_plane: Running) -> None:
    async with sqlite_plane.plane.change("models") as connection:
        entry = '{"name": "old", "gone": 1}'
        await connection.execute(insert(models_table).values(name="old", entry=entry, updated_at=NOON))
    await as_admin(sqlite_plane, "viewer")

    html = await page(sqlite_plane, MODELS)

    assert rows_of(part(html, "problems")) == [["old", "unknown key 'gone'"]]


async def test_people_of_an_organisation_see_their_models_and_their_use(sqlite_plane: Running) -> None:
    plane = sqlite_plane
    await seeded(plane)
    await taken(plane, record(model="good", organisation="team-a"), record(model="good", organisation="team-b"))
    await make_user(plane, "eve")
    await make_organisation(plane, "team-a", eve="owner")
    async with plane.plane.database.main.write() as connection:
        await connection.execute(organisations.update().values(models=["good", "dead"]))
    await reports(plane, r2=report(models=loads("good")))
    await log_in(plane, "eve")

    html = await page(plane, MODELS)

    assert [row[0] for row in rows_of(html)] == ["dead", "good fine, nice"]
    assert rows_of(html)[1][3] == "1"
    assert "2 models" in text_of(html)
    assert "10.0.0." not in html
    assert "/console/new-model" not in html


async def test_a_model_with_few_requests_has_them_beside_many_with_more(sqlite_plane: Running) -> None:
    plane = sqlite_plane
    await catalogue(plane, quiet=of("10.0.0.1"))
    await taken(plane, *(record(model=f"other-{n % 60}") for n in range(120)), record(model="quiet"))
    await as_admin(plane)

    assert rows_of(await page(plane, MODELS))[0][3] == "1"
