"""The page of the routers: who is lost, who is behind, and what became of their records."""

import pytest

from control_plane.pure.figures import DASH
from tests.control_plane.conftest import NOON, Running
from tests.control_plane.pages import figures_of, links_of, page, rows_of, states_of, text_of
from tests.control_plane.people import log_in, make_organisation, make_user
from tests.control_plane.test_console_overview import as_admin, in_step
from tests.control_plane.test_fleet import backend, report, reports
from tests.control_plane.test_overview import catalogue, of

pytestmark = pytest.mark.anyio
ROUTERS = "/console/routers"


async def test_without_one_the_page_says_what_to_set(sqlite_plane: Running) -> None:
    await as_admin(sqlite_plane, "viewer")

    html = await page(sqlite_plane, ROUTERS)

    assert "No router has reported." in html
    assert f"INFERENCE_API_REGISTRY_URL={sqlite_plane.plane.settings.origin}" in html
    assert states_of(html) == []


async def test_a_lost_one_is_never_green_and_comes_first(sqlite_plane: Running) -> None:
    plane = sqlite_plane
    await in_step(plane, backend(), names=("r1", "r2"))
    await as_admin(plane)
    before = await page(plane, ROUTERS)
    plane.clock.advance(16)
    await in_step(plane, backend(), names=("r2",))
    usage = {"made": 1_234, "delivered": 1_000, "queued": 30, "spooled": 4, "dropped": 200}
    await reports(plane, r3=report(backend(), draining=True, usage=usage, version="0.8.0"))

    html = await page(plane, ROUTERS)

    assert states_of(before) == [("ok", "in step")] * 2
    lost, draining, fine = rows_of(html)
    assert lost[:5] == ["r1 0.9.0", "lost", "not known", DASH, DASH]
    assert lost[-1] == "16 s ago"
    assert draining[0].startswith("r3 0.8.0")
    assert draining[5:9] == ["1,234", "1,000", "34 4 on disk", "200"]
    assert (fine[0].split()[0], fine[1:3]) == ("r2", ["in step", "in step"])
    assert [kind for kind, _ in states_of(html)] == ["bad", "warn", "ok"]
    found = figures_of(html)
    assert found["In step"].startswith("1 / 3")
    assert [found[name].split()[0] for name in ("Lost", "Draining", "Records waiting", "Records dropped")] == [
        "1",
        "1",
        "35",
        "200",
    ]
    assert "Versions 0.9.0 (1), 0.8.0 (1)" in text_of(html)


async def test_one_that_is_behind_says_by_what_and_since_when(sqlite_plane: Running) -> None:
    plane = sqlite_plane
    await in_step(plane)
    plane.clock.advance(5)
    await catalogue(plane, m=of("10.0.0.1"))
    plane.clock.advance(7)
    await as_admin(plane)

    html = await page(plane, ROUTERS)

    assert states_of(html) == [("warn", "behind")]
    assert rows_of(html)[0][2] == "catalogue old changed 7 s ago"


async def test_of_many_there_are_pages(sqlite_plane: Running) -> None:
    await reports(sqlite_plane, **{f"r-{n:03}": report(at=NOON) for n in range(51)})
    await as_admin(sqlite_plane)

    first = await page(sqlite_plane, ROUTERS)
    after = next(link for link in links_of(first) if "after=" in link)
    second = await page(sqlite_plane, after)

    assert len(rows_of(first)) == 50
    assert [row[0].split()[0] for row in rows_of(second)] == ["r-050"]


async def test_people_of_an_organisation_do_not_see_them(sqlite_plane: Running) -> None:
    await make_user(sqlite_plane, "eve")
    await make_organisation(sqlite_plane, "team-a", eve="owner")
    await log_in(sqlite_plane, "eve")

    await page(sqlite_plane, ROUTERS, 403)
