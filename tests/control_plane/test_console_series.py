"""Series of Prometheus on pages of the console: charts with sources and gaps, and what is missing in words."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from control_plane.http.console import hosts, routers
from control_plane.http.console.tabs import metrics
from control_plane.panels import queries
from control_plane.pure.figures import DASH
from tests.control_plane.conftest import NOON, Running
from tests.control_plane.history import FEW, MODELS
from tests.control_plane.pages import links_of, page, part, text_of
from tests.control_plane.people import log_in, make_organisation, make_user
from tests.control_plane.test_console_overview import as_admin, in_step
from tests.control_plane.test_fleet import report, reports
from tests.control_plane.test_overview import catalogue, of
from tests.control_plane.usage import record, taken
from tests.ports import free_port

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
LLAMA, OTHER = "/console/models/llama?tab=metrics", "/console/models/other?tab=metrics"


def charts_of(html: str) -> list[str]:
    return re.findall(r'id="series-(\w+)"', html)


async def test_a_model_has_the_series_of_its_requests_engines_and_hosts(scraped: Running) -> None:
    await as_admin(scraped, "viewer")

    html = await page(scraped, LLAMA)

    assert charts_of(html) == list(metrics.QUERIES)
    for name in metrics.QUERIES:
        text = text_of(part(html, f"series-{name}"))
        assert f"Source: {queries()[name].source}" in text
        assert "No series" not in text
    assert "llama 10.0.0.11:8000: last 10 %" in text_of(part(html, "series-kv_cache"))
    assert "10.0.0.12" not in part(html, "series-host_cpu")
    assert "/console/hosts?model=llama" in links_of(html)
    # Where nothing was scraped, a line breaks off, and begins again.
    (line,) = re.findall(r'<path class="line s0" d="([^"]*)"', part(html, "series-in_flight"))
    assert line.count("M") == 2


async def test_the_numbers_have_dashes_where_there_are_gaps(scraped: Running) -> None:
    await as_admin(scraped)

    table = text_of(part(await page(scraped, f"{LLAMA}&numbers=yes"), "numbers-in_flight"))

    assert "Requests in flight, every 1 min" in table
    assert "11:37" in table
    assert len(re.findall(rf":\d\d {DASH}", table)) == 5


@pytest.mark.parametrize(("recorded", "differs"), [(72, False), (71, False), (60, True), (90, True)])
async def test_where_two_counts_differ_the_page_says_so(scraped: Running, recorded: int, differs: bool) -> None:
    """In twelve closed minutes Prometheus has counted 72 requests."""
    assert round(720 * FEW) == 72
    await as_admin(scraped)
    await reports(scraped, r1=report(usage={"made": 99, "delivered": 90, "queued": 0, "spooled": 0, "dropped": 9}))
    await taken(scraped, *(record(model="other", at=NOON - 300_000) for _ in range(recorded)))
    # These are too late for the time that both have counted.
    await taken(scraped, *(record(model="other", at=NOON - 30_000) for _ in range(20)))

    html = await page(scraped, f"{OTHER}&range=15m")

    assert ('id="counted"' in html) is differs
    if differs:
        said = text_of(part(html, "counted"))
        assert f"72 requests from 2026-11-28 11:46:00 to 2026-11-28 11:58:00 UTC, usage records {recorded}." in said
        assert "lost 9 records" in said


async def test_an_exporter_that_is_missing_is_named(scraped: Running) -> None:
    await as_admin(scraped)

    html = await page(scraped, OTHER)

    assert "DCGM exporter" in text_of(html)
    assert {"host_cpu", "engine_running"} < set(charts_of(html))
    assert "gpu_memory" not in charts_of(html)


async def test_without_a_prometheus_pages_say_which_setting_gives_it(sqlite_plane: Running) -> None:
    await catalogue(sqlite_plane, m=of("10.0.0.1"))
    await in_step(sqlite_plane)
    await as_admin(sqlite_plane)

    for path in ("/console/models/m?tab=metrics", "/console/hosts", "/console/routers"):
        html = await page(sqlite_plane, path)
        assert "CONTROL_PLANE_PROMETHEUS_URL" in text_of(html), path
        assert charts_of(html) == []


async def test_one_that_is_away_is_said_and_the_rest_is_there(start_sqlite: Start) -> None:
    plane = await start_sqlite(prometheus_url=f"http://127.0.0.1:{free_port()}")
    await catalogue(plane, m=of("10.0.0.1"))
    await in_step(plane)
    await as_admin(plane)

    for path in ("/console/models/m?tab=metrics", "/console/hosts", "/console/routers"):
        html = await page(plane, path)
        assert "Prometheus cannot be reached" in text_of(html), path
        assert "127.0.0.1" not in html.replace(plane.url, ""), path
    assert "Now, by router" in await page(plane, "/console/models/m?tab=metrics")


async def test_hosts_are_those_of_all_or_of_one_model(scraped: Running) -> None:
    await as_admin(scraped, "operator")

    html = await page(scraped, "/console/hosts")
    of_one = await page(scraped, "/console/hosts?model=other&range=6h")

    assert charts_of(html) == list(hosts.QUERIES)
    assert {"10.0.0.11:9100", "10.0.0.12:9100"} <= set(text_of(part(html, "series-host_cpu")).replace(",", " ").split())
    assert "10.0.0.11" not in part(of_one, "series-host_cpu")
    await page(scraped, "/console/hosts?model=none", 404)


async def test_routers_have_theirs(scraped: Running) -> None:
    await in_step(scraped)
    await as_admin(scraped)

    html = await page(scraped, "/console/routers")

    assert charts_of(html) == list(routers.QUERIES)
    assert "router-1:9090" in part(html, "series-router_cpu")


async def test_an_organisation_sees_no_series(scraped: Running) -> None:
    await make_user(scraped, "olga")
    await make_organisation(scraped, "team-a", olga="owner")
    await log_in(scraped, "olga")

    html = await page(scraped, LLAMA)

    assert charts_of(html) == []
    assert "Prometheus" not in html
    await page(scraped, "/console/hosts", 403)
    assert [one["name"] for one in MODELS] == ["llama", "other", "hostile"]
