"""The first page of the console: the worst first, and nothing green that nobody knows."""

import json
from typing import Any

import pytest
from sqlalchemy import insert

from control_plane.data.tables import models as models_table
from control_plane.pure.times import shown
from tests.control_plane.conftest import NOON, Running
from tests.control_plane.pages import figures_of, links_of, page, part, rows_of, states_of, text_of
from tests.control_plane.people import log_in, make_organisation, make_user
from tests.control_plane.test_fleet import backend, report, reports
from tests.control_plane.test_overview import catalogue, loads, of
from tests.control_plane.usage import record, taken

pytestmark = pytest.mark.anyio
HOME = "/console/"


async def as_admin(plane: Running, role: str | None = "admin") -> None:
    await make_user(plane, "bob", role)
    await log_in(plane, "bob")


async def many(plane: Running, count: int) -> None:
    """Models by rows: by requests so many would take a minute."""
    entries = [
        {"name": f"m-{n:04}", "backends": [{"url": f"http://10.0.{n // 250}.{n % 250}:8000"}]} for n in range(count)
    ]
    rows = [{"name": one["name"], "entry": json.dumps(one), "updated_at": NOON} for one in entries]
    async with plane.plane.change("models") as connection:
        await connection.execute(insert(models_table), rows)


async def in_step(plane: Running, *rows: dict[str, Any], names: tuple[str, ...] = ("r1",)) -> None:
    first = await plane.router.put(f"/routers/{names[0]}", json=report(*rows))
    etags = {**first.json()["etags"], "spend": None}
    await reports(plane, **{name: report(*rows, etags=etags) for name in names})


async def test_models_that_are_not_well_come_first_with_since_when_and_why(sqlite_plane: Running) -> None:
    plane = sqlite_plane
    await catalogue(
        plane, good=of("10.0.0.1"), weak=of("10.0.0.2", "10.0.0.3"), dead=of("10.0.0.4", fallbacks=["good"])
    )
    error = {"outcome": "connect_failed", "request_id": "4bf9-12", "at": NOON - 5_000}
    await in_step(
        plane,
        backend("10.0.0.1:8000", model="good"),
        backend("10.0.0.2:8000", model="weak"),
        backend("10.0.0.3:8000", "unhealthy", "weak", since=NOON - 60_000),
        backend("10.0.0.4:8000", "open", "dead", since=NOON - 90_000, last_error=error, retry_at=NOON + 9_000),
    )
    await as_admin(plane)

    html = await page(plane, HOME)

    dead, weak = rows_of(part(html, "bad"))
    assert dead[:3] == ["dead", "failing", "0 / 1"]
    assert dead[3] == "11:58:30 1 min 30 s"
    assert "Its only backend takes no requests. good answers in its place." in dead[4]
    assert "10.0.0.4:8000 has an open circuit (connect_failed). Tried again in 9 s." in dead[4]
    assert weak[:2] == ["weak", "degraded"]
    assert {
        "/console/models/dead",
        "/console/backends?model=dead",
        "/console/requests?model=dead&outcome=failed",
        "/console/requests?id=4bf9-12",
    } <= set(links_of(html))
    found = figures_of(html)
    assert [found[name].split()[0] for name in ("Failing", "Degraded", "Ready")] == ["1", "1", "1"]
    assert found["Routers in step"] == "1 / 1"
    assert states_of(part(html, "rest")) == [("ok", "ok")]
    assert html.index('id="bad"') < html.index('id="rest"')
    # Others answer for a virtual model.
    await catalogue(plane, v={"split": {"variants": {"good": 1, "dead": 1}}})
    assert "/console/requests?asked_model=v&outcome=failed" in links_of(await page(plane, HOME))


async def test_a_lost_router_is_never_green(sqlite_plane: Running) -> None:
    plane = sqlite_plane
    await catalogue(plane, m=of("10.0.0.1"))
    await in_step(plane, backend("10.0.0.1:8000"), names=("r1", "r2"))
    await as_admin(plane)
    before = await page(plane, HOME)
    plane.clock.advance(16)
    await reports(plane, r2=report(backend("10.0.0.1:8000")))

    one = await page(plane, HOME)
    plane.clock.advance(16)
    both = await page(plane, HOME)

    assert ("ok", "in step") in states_of(before)
    assert ("bad", "lost") in states_of(one)
    assert rows_of(part(one, "routers"))[0][:2] == ["r1", "lost"]
    assert figures_of(one)["Routers in step"] == "0 / 2 1 lost, 1 behind"
    assert "All 2 routers are lost: nobody knows how models are now." in text_of(both)
    assert {kind for kind, _ in states_of(both)} == {"bad", "off"}
    assert figures_of(both)["Ready"] == "0 1 nobody reports"


async def test_without_a_router_the_page_says_what_to_set(sqlite_plane: Running) -> None:
    await catalogue(sqlite_plane, m=of("10.0.0.1"))
    await as_admin(sqlite_plane)

    html = await page(sqlite_plane, HOME)

    assert "No router has reported" in html
    assert "INFERENCE_API_REGISTRY_URL=" in html
    assert figures_of(html)["Routers in step"] == "0 / 0 none reports"
    assert [kind for kind, _ in states_of(html)] == ["off"]


async def test_an_empty_catalogue_says_how_to_fill_it(sqlite_plane: Running) -> None:
    await as_admin(sqlite_plane)
    admin = await page(sqlite_plane, HOME)
    await make_user(sqlite_plane, "eve", None)
    await make_organisation(sqlite_plane, "team-a", eve="member")
    await log_in(sqlite_plane, "eve")
    member = await page(sqlite_plane, HOME)

    assert "There is no model yet." in admin
    assert "/console/new-model" in admin
    assert "/api/v1/models/" in admin
    assert "There is no model that you may use." in member
    assert "/console/new-model" not in member


async def test_people_of_an_organisation_see_states_and_their_own_usage(sqlite_plane: Running) -> None:
    plane = sqlite_plane
    await catalogue(plane, m=of("10.0.0.1"), other=of("10.0.0.2"))
    await reports(plane, secretive=report(backend("10.0.0.1:8000", "open"), models=loads("m", "other")))
    await taken(plane, record(organisation="team-a"), record(organisation="team-a"), record(organisation="team-b"))
    await make_user(plane, "eve")
    await make_organisation(plane, "team-a", eve="owner")
    await log_in(plane, "eve")

    html = await page(plane, HOME)

    assert "10.0.0." not in html
    assert "connect_failed" not in html
    assert rows_of(part(html, "bad"))[0][:3] == ["m", "failing", "0 / 1"]
    assert "/console/routers" not in html
    assert "/console/backends" not in html
    assert figures_of(html)["Your requests now"].endswith("2 in 1 h")


async def test_figures_are_those_of_the_api(sqlite_plane: Running) -> None:
    plane = sqlite_plane
    await catalogue(plane, m=of("10.0.0.1"))
    failed = {"status": 502, "outcome": "connect_failed", "ttft_ms": None}
    ages = [1, 30_000, 14 * 60_000, 16 * 60_000, 61 * 60_000, 5 * 3_600_000]
    await taken(plane, *(record(at=NOON - age, model="m", **(failed if age == 30_000 else {})) for age in ages))
    await as_admin(plane)

    for length, minutes, expected in (("15m", 15, 3), ("1h", 60, 4), ("6h", 360, 6)):
        html = await page(plane, f"{HOME}?range={length}")
        span = {"start": shown(NOON - minutes * 60_000), "end": shown(NOON)}
        totals = (await plane.admin.get("/api/v1/usage", params={**span, "bucket": "1h"})).json()["totals"]
        found = figures_of(html)
        assert totals["requests"] == expected
        assert f"{totals['requests']} in" in found["Requests now"]
        assert found["Errors now"].startswith("50 %")
        assert f"{totals['errors']} in" in found["Errors now"]
        assert html.count("<figure") == 3
        numbers = rows_of(part(await page(plane, f"{HOME}?range={length}&numbers=yes"), "numbers"))
        assert sum(int(row[1]) for row in numbers) == totals["requests"]
        assert sum(int(row[2]) for row in numbers) == totals["errors"]


async def test_without_requests_it_says_how_to_record_them(sqlite_plane: Running) -> None:
    await catalogue(sqlite_plane, m=of("10.0.0.1"))
    await as_admin(sqlite_plane)

    html = await page(sqlite_plane, HOME)
    wrong = await page(sqlite_plane, f"{HOME}?range=2h", 422)

    assert "No request in the last 1 h" in html
    assert "INFERENCE_API_USAGE=registry" in html
    assert "range=6h" in html
    assert "must be one of" in wrong


async def test_two_thousand_models_are_a_small_page(sqlite_plane: Running) -> None:
    plane = sqlite_plane
    await many(plane, 2_000)
    await in_step(
        plane,
        *(backend(f"10.0.{n // 250}.{n % 250}:8000", "open" if n < 30 else "ready", f"m-{n:04}") for n in range(2_000)),
    )
    await as_admin(plane)

    html = await page(plane, HOME)

    assert len(html) < 150_000
    assert len(rows_of(part(html, "bad"))) == 20
    assert "10 more degraded or failing" in text_of(html)
    assert part(html, "rest").count("<li") == 20
    assert "1,950 more" in text_of(html)


async def test_an_entry_that_is_not_served_is_named(sqlite_plane: Running) -> None:
    async with sqlite_plane.plane.change("models") as connection:
        await connection.execute(
            insert(models_table).values(name="old", entry='{"name": "old", "gone": 1}', updated_at=NOON)
        )
    await as_admin(sqlite_plane)

    html = await page(sqlite_plane, HOME)

    assert "1 entry of the catalogue cannot be read" in text_of(html)


async def test_changes_are_the_latest_without_logins(sqlite_plane: Running) -> None:
    await catalogue(sqlite_plane, **{"a": of("10.0.0.1")})
    await as_admin(sqlite_plane)

    html = await page(sqlite_plane, HOME)

    assert [row[1:] for row in rows_of(part(html, "changes"))] == [["ana", "model.create", "a"]]
    assert "/console/audit" in links_of(html)
