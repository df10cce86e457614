"""Usage in the console: the numbers of GET /api/v1/usage, as figures, a chart, rows and a file."""

import csv
import io
import random
import re
from html import unescape
from typing import Any
from urllib.parse import urlsplit

import pytest

from control_plane.data.tables import memberships
from control_plane.pure import figures
from tests.control_plane.conftest import NOON, Running
from tests.control_plane.pages import figures_of, links_of, page, rows_of, text_of
from tests.control_plane.people import log_in, make_organisation, make_user
from tests.control_plane.teams import changed
from tests.control_plane.test_console_requests import counts
from tests.control_plane.test_fleet import report, reports
from tests.control_plane.test_requests import team
from tests.control_plane.test_usage import random_record
from tests.control_plane.usage import DAY, HOUR, record, taken

pytestmark = pytest.mark.anyio
PATH = "/console/usage"


async def as_admin(running: Running) -> None:
    await make_user(running, "boss", "admin")
    await log_in(running, "boss")


async def api(running: Running, **query: Any) -> dict[str, Any]:
    answer = await running.client.get("/api/v1/usage", params=query)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def usage_rows(html: str) -> list[list[str]]:
    return rows_of(html[html.index('<table class="cards usage">') :])


def numbers_of(html: str) -> list[list[str]]:
    """The chart's own table."""
    return rows_of(html[html.index('<table class="numbers">') :])


def written(row: dict[str, Any]) -> list[str]:
    """The cells of a row of the API, after its names."""
    share = row["errors"] / row["requests"] if row["requests"] else None
    cost = figures.money(row["cost_nanos"], "USD").removesuffix(" USD")
    return [
        figures.count(row["requests"]),
        figures.count(row["errors"]),
        figures.share(share),
        *(figures.count(row[name]) for name in ("input_tokens", "cached_input_tokens", "output_tokens")),
        f"≥ {cost}" if row["unpriced"] else cost,
        *(figures.ms(value) for value in (row["latency_ms"]["p50"], row["latency_ms"]["p95"], row["ttft_ms"]["p95"])),
    ]


@pytest.mark.parametrize(
    ("query", "same"),
    [
        ("", {"bucket": "1h", "group_by": "model"}),
        ("?range=7d&group_by=key,outcome", {"start": "2026-11-21T12:00:00Z", "group_by": "key,outcome"}),
        (
            "?start=2026-11-25&end=2026-11-28T06:30&group_by=user&then=organisation&model=a",
            {
                "start": "2026-11-25T00:00:00Z",
                "end": "2026-11-28T06:30:00Z",
                "group_by": "user,organisation",
                "model": "a",
            },
        ),
        ("?range=30d&group_by=none&organisation=-", {"start": "2026-10-29T12:00:00Z", "organisation": ""}),
    ],
)
async def test_the_numbers_are_those_of_the_api(sqlite_plane: Running, query: str, same: dict[str, str]) -> None:
    chance = random.Random(7)
    await taken(sqlite_plane, *(random_record(chance) for _ in range(400)))
    await as_admin(sqlite_plane)

    html = await page(sqlite_plane, PATH + query)
    answer = await api(sqlite_plane, **same)

    totals = answer["totals"]
    assert totals["requests"] > 10
    shown = figures_of(html)
    assert shown["Requests"] == figures.count(totals["requests"])
    assert shown["Errors"] == f"{figures.share(totals['errors'] / totals['requests'])} {totals['errors']} of them"
    assert shown["Tokens in"].startswith(f"{figures.short(totals['input_tokens'])} ")
    assert shown["Latency, p95"].startswith(figures.ms(totals["latency_ms"]["p95"]))
    assert [row[len(answer["group_by"]) :] for row in usage_rows(html)] == [written(row) for row in answer["rows"]]
    # Each column of the chart
    by_time = [sum(one["requests"] for one in each) for each in _by_time(answer)]
    drawn = [sum(int(cell.replace(",", "")) for cell in row[1:]) for row in numbers_of(html)]
    assert [one for one in drawn if one] == by_time
    assert sum(drawn) == totals["requests"]


def _by_time(answer: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The points of all series, time by time, where there were requests."""
    found: dict[str, list[dict[str, Any]]] = {}
    for series in answer["series"]:
        for point in series["points"]:
            found.setdefault(point["at"], []).append(point)
    return [found[at] for at in sorted(found) if any(one["requests"] for one in found[at])]


@pytest.mark.parametrize(("measure", "sum_of"), [("errors", 1), ("tokens", 1550 + 350), ("spend", None)])
async def test_the_chart_shows_what_is_chosen(sqlite_plane: Running, measure: str, sum_of: int | None) -> None:
    await taken(
        sqlite_plane,
        *(record(input_tokens=500, output_tokens=100, cost_nanos=10_000_000) for _ in range(3)),
        record(input_tokens=50, output_tokens=50, status=500, outcome="upstream_5xx", cost_nanos=0),
    )
    await as_admin(sqlite_plane)

    html = await page(sqlite_plane, f"{PATH}?measure={measure}&group_by=none")

    shown = re.search(r'<span class="chart-now">(.*?)</span>', html)
    assert shown is not None
    assert shown[1] == ("0.03 USD" if sum_of is None else f"{sum_of:,}")


async def test_a_row_leads_to_its_requests(sqlite_plane: Running) -> None:
    chance = random.Random(3)
    await taken(sqlite_plane, *(random_record(chance, days=1) for _ in range(80)))
    await as_admin(sqlite_plane)

    html = await page(sqlite_plane, f"{PATH}?group_by=key,outcome&model=a")
    table = html[html.index('<table class="cards usage">') :]
    followed = [await page(sqlite_plane, one) for one in links_of(table) if one.startswith("/console/requests")]

    rows = usage_rows(html)
    assert len(rows) > 6
    assert [counts(unescape(one)) for one in followed] == [(int(row[2]), int(row[3])) for row in rows]


async def test_rows_are_sorted_by_the_url(sqlite_plane: Running) -> None:
    await taken(
        sqlite_plane,
        *(record(model="many", cost_nanos=1, latency_ms=5.0) for _ in range(3)),
        record(model="dear", cost_nanos=10**9, latency_ms=50.0),
        *(record(model="slow", cost_nanos=0, ttft_ms=None, latency_ms=500.0) for _ in range(2)),
    )
    await as_admin(sqlite_plane)

    async def order(sort: str) -> list[str]:
        html = await page(sqlite_plane, f"{PATH}{sort}")
        # The link of a column that is sorted sorts it the other way round.
        again = [one for one in links_of(html) if "sort=" in one]
        assert len(again) >= 10
        return [row[0] for row in usage_rows(html)]

    assert await order("") == ["many", "slow", "dear"]
    assert await order("?sort=-spend") == ["dear", "many", "slow"]
    assert await order("?sort=spend") == ["slow", "many", "dear"]
    assert await order("?sort=-p95") == ["slow", "dear", "many"]
    assert (await order("?sort=ttft"))[-1] == (await order("?sort=-ttft"))[-1] == "slow"


@pytest.mark.parametrize("sort", ["requests", "-requests"])
async def test_of_many_groups_the_rest_is_last(sqlite_plane: Running, sort: str) -> None:
    await taken(sqlite_plane, *(record(model=f"m-{number:02}") for number in range(60)))
    await as_admin(sqlite_plane)

    html = await page(sqlite_plane, f"{PATH}?sort={sort}")

    rows = usage_rows(html)
    assert len(rows) == 51
    assert rows[-1][:2] == ["the rest", "10"]
    assert len(re.findall(r'<span class="swatch', html)) == 8
    assert sum(int(row[1]) for row in rows) == 60


async def test_the_file_is_that_of_the_api(sqlite_plane: Running) -> None:
    chance = random.Random(7)
    await taken(sqlite_plane, *(random_record(chance) for _ in range(50)), record(model="=1+1"))
    await as_admin(sqlite_plane)

    html = await page(sqlite_plane, f"{PATH}?range=7d&group_by=model,user&measure=spend")
    link = next(one for one in links_of(html) if "format=csv" in one)
    answer = await sqlite_plane.client.get(link)
    same = {"start": "2026-11-21T12:00:00Z", "group_by": "model,user"}
    other = await sqlite_plane.client.get("/api/v1/usage", params=same, headers={"accept": "text/csv"})

    assert answer.headers["content-type"].startswith("text/csv")
    assert answer.headers["content-disposition"] == 'attachment; filename="usage-2026-11-21-2026-11-28.csv"'
    assert answer.text == other.text
    assert len(list(csv.reader(io.StringIO(answer.text)))) > 5
    assert "'=1+1" in answer.text


async def test_what_is_not_known_is_named(sqlite_plane: Running) -> None:
    await taken(sqlite_plane, record(cost_nanos=None), record(usage_source="counted"), record(), record())
    usage = {"made": 10, "delivered": 9, "queued": 1, "spooled": 0, "dropped": 1}
    await reports(sqlite_plane, a=report(usage=usage))
    await as_admin(sqlite_plane)

    text = text_of(await page(sqlite_plane, PATH))
    answer = await api(sqlite_plane, bucket="1h")

    coverage, unpriced = answer["coverage"], answer["totals"]["unpriced"]
    assert (coverage["share"], coverage["dropped"], coverage["estimated"], unpriced) == (0.8, 1, 0.25, 1)
    for name, value in (
        ("received", figures.share(coverage["share"])),
        ("dropped", figures.count(coverage["dropped"])),
        ("estimated", figures.share(coverage["estimated"])),
        ("unpriced", figures.count(unpriced)),
        ("known cost", figures.count(unpriced)),
    ):
        assert re.search(rf"{value} [^,;]*\b{name}\b", text), name


async def test_each_role_sees_its_part(sqlite_plane: Running) -> None:
    await team(sqlite_plane)
    mine = record(organisation="team-a", user="bob", key_id="B" * 12)
    others = [record(organisation="team-a", user="ana", key_id="A" * 12), record(organisation="team-b"), record()]
    await taken(sqlite_plane, mine, *others)
    await changed(sqlite_plane, "team-a", budget={"cost": 0.001, "per": "month"})
    await make_user(sqlite_plane, "bob")
    await make_organisation(sqlite_plane, "team-c", bob="member")
    seen = {}
    for role in ("owner", "viewer", "member"):
        user = f"u-{role}" if role != "member" else "bob"
        if role != "member":
            await make_user(sqlite_plane, user)
        async with sqlite_plane.plane.database.main.write() as connection:
            row = {"organisation": "team-a", "user": user, "role": role, "created_at": NOON}
            await connection.execute(memberships.insert().values(**row))
        await log_in(sqlite_plane, user)
        seen[role] = await page(sqlite_plane, f"{PATH}?group_by=key&organisation=team-a")
        assert "No usage" in await page(sqlite_plane, f"{PATH}?organisation=team-b")

    assert [figures_of(seen[role])["Requests"] for role in ("owner", "viewer", "member")] == ["2", "2", "1"]
    # Names of keys for those who may see them, requests likewise
    assert "batch" in text_of(seen["owner"])
    assert "batch" not in text_of(seen["viewer"])
    assert "/console/requests?" in seen["owner"]
    assert "/console/requests?" not in seen["viewer"]
    # The budget is the organisation's: a member of it sees the own part of usage only.
    assert "0.001 USD a month" in text_of(seen["owner"])
    assert "0.00028 USD" in text_of(seen["viewer"])
    assert "Budgets" not in text_of(seen["member"])
    # An operator sees all usage, and no organisation.
    await make_user(sqlite_plane, "olga", "operator")
    await log_in(sqlite_plane, "olga")
    operated = await page(sqlite_plane, f"{PATH}?organisation=team-a")
    assert figures_of(operated)["Requests"] == "2"
    assert "Budgets" not in text_of(operated)


async def test_no_usage_says_what_to_do(sqlite_plane: Running) -> None:
    await as_admin(sqlite_plane)
    no_router = await page(sqlite_plane, PATH)
    await reports(sqlite_plane, a=report(usage=dict.fromkeys(("made", "delivered", "queued", "spooled", "dropped"), 0)))
    not_recorded = await page(sqlite_plane, PATH)
    await reports(sqlite_plane, a=report())
    none = await page(sqlite_plane, f"{PATH}?model=m")

    assert "INFERENCE_API_REGISTRY_URL=http://127.0.0.1:" in no_router
    assert "INFERENCE_API_USAGE=registry" in not_recorded
    assert "INFERENCE_API" not in none
    assert {f"{PATH}?model=m&range=30d", PATH} <= set(links_of(none))


async def test_links_keep_what_was_chosen(sqlite_plane: Running) -> None:
    await taken(sqlite_plane, record(at=NOON - 2 * HOUR), record(at=NOON - 2 * DAY))
    await as_admin(sqlite_plane)

    html = await page(sqlite_plane, f"{PATH}?range=7d&group_by=model,user&model=llama-3-8b&sort=-spend")
    here = [one for one in links_of(html) if urlsplit(one).path == PATH and "?" in one]
    custom = next(one for one in here if "range=custom" in one)

    assert len(here) > 15
    assert all("group_by=model%2Cuser" in one and "model=llama-3-8b" in one for one in here)
    assert figures_of(await page(sqlite_plane, custom)) == figures_of(html)


async def test_another_look_at_the_same_sums_asks_for_no_others(sqlite_plane: Running) -> None:
    """Another measure, order, or the file: they are of the same moment, and the page says of which."""
    await taken(sqlite_plane, record(), record(model="b"))
    await as_admin(sqlite_plane)
    sqlite_plane.clock.advance(5)
    first = await page(sqlite_plane, PATH)
    sqlite_plane.clock.advance(10)
    second = await page(sqlite_plane, f"{PATH}?measure=tokens&sort=-spend")
    sqlite_plane.clock.advance(6)
    third = await page(sqlite_plane, PATH)

    ends = [re.findall(r'class="asof" data-at="(\d+)"', html) for html in (first, second, third)]
    assert ends == [[str(NOON)], [str(NOON)], [str(NOON + 20_000)]]


HOSTILE = [
    ("?range=1h", 422),
    ("?range=%3Cscript%3Ealert(1)", 422),
    ("?start=2026-11-28T13:00&end=2026-11-28T12:00", 422),
    ("?start=2020-01-01", 422),
    ("?group_by=model,key,user", 422),
    ("?group_by=model&then=request_id", 422),
    ("?group_by=password", 422),
    ("?measure=x", 422),
    ("?sort=id;drop", 422),
    ("?format=xml", 422),
    ("?model=%22%3E%3Cscript%3Ealert(1)%3C/script%3E", 200),
    ("?organisation=..%2F..%2Fetc&key=%00&user='%20OR%201=1", 200),
    ("?group_by=,,&then=none", 200),
]


@pytest.mark.parametrize(("query", "status"), HOSTILE)
async def test_what_the_url_has_is_refused_or_harmless(sqlite_plane: Running, query: str, status: int) -> None:
    await taken(sqlite_plane, record(model='<script>alert("m")</script>'))
    await as_admin(sqlite_plane)

    html = await page(sqlite_plane, PATH + query, status)

    assert "<script>alert" not in html
    assert 'class="filters"' in html
    assert ('class="problem"' in html) is (status == 422)
