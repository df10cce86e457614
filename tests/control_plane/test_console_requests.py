"""Requests in the console: found by id in one step, narrowed by the URL, and explained one by one."""

import re
from collections.abc import Callable
from html import unescape
from typing import Any

import httpx
import pytest

from control_plane.pure import figures
from inference_api.policy.document import NANOS
from tests.control_plane.conftest import NOON, Running
from tests.control_plane.people import log_in, make_organisation, make_user
from tests.control_plane.test_fleet import report, reports
from tests.control_plane.usage import DAY, HOUR, record, taken

pytestmark = pytest.mark.anyio
PATH = "/console/requests"
TRIED = [
    {"backend": "10.0.0.11:8000", "outcome": "first_byte_timeout", "status": 0, "start_ms": 1, "duration_ms": 120_000},
    {"backend": "10.0.0.12:8000", "outcome": "reset", "status": 0, "start_ms": 120_001, "duration_ms": 9},
]


def failed(**changes: Any) -> dict[str, Any]:
    """Two backends were tried."""
    own = {"status": 504, "outcome": "first_byte_timeout", "code": "upstream_timeout", "attempts": 2}
    return record(**{**own, "attempt_details": TRIED, "backend": "10.0.0.12:8000", "latency_ms": 120_010.0, **changes})


async def as_ana(running: Running) -> httpx.AsyncClient:
    """The platform's admin."""
    await make_user(running, "boss", "admin")
    await log_in(running, "boss")
    return running.client


async def page(client: httpx.AsyncClient, path: str = PATH, expected: int = 200, **query: Any) -> str:
    answer = await client.get(path, params=query or None)
    assert answer.status_code == expected, answer.text
    return unescape(answer.text)


def shown(text: str) -> list[str]:
    """Ids of the records in a list."""
    return re.findall(r'<tr id="r-([^"]+)"', text)


def counts(text: str) -> tuple[int, int]:
    """Requests and failed ones, of the sentence on top."""
    found = re.search(r'class="subtitle">([\d,]+) requests?(?:, ([\d,]+) failed)?', text)
    assert found is not None, text
    requests, errors = (int((one or "0").replace(",", "")) for one in found.groups())
    return requests, errors


def columns(text: str) -> list[str]:
    """Where the columns of the histogram lead."""
    found = re.search(r'<figure class="chart histogram">.*?</figure>', text, re.S)
    return re.findall(r'<a href="([^"]+)"', found[0]) if found else []


async def test_an_id_that_one_request_has_leads_there(sqlite_plane: Running) -> None:
    one, old = failed(request_id="4bf92f3577b34da6"), record(request_id="4bf9-old", at=NOON - 6 * DAY)
    leg = record(request_id="4bf92f3577b34da6", kind="race")
    await taken(sqlite_plane, one, old, leg, record(request_id="5a"), record(request_id="5b"))
    client = await as_ana(sqlite_plane)

    async def leads(id: str) -> str | None:
        found: str | None = (await client.get(PATH, params={"id": id})).headers.get("location")
        return found

    # By the whole id, its beginning, as pasted with what was around it, among all rows, and by the id of a record
    assert {await leads(id) for id in ("4bf92f3577b34da6", "4bf92", ' "4bf92f3577b34da6", ')} == {f"{PATH}/{one['id']}"}
    assert await leads("4bf9-") == f"{PATH}/{old['id']}"
    assert await leads(leg["id"]) == f"{PATH}/{leg['id']}"
    assert await leads("5") is None
    assert set(shown(await page(client, id="4bf9"))) == {one["id"], old["id"]}
    assert counts(await page(client, id="4bf9")) == (2, 1)
    nothing = await page(client, id="no<b>x")
    assert "begins with no<b>x" in nothing
    assert "no<b>x" not in (await client.get(PATH, params={"id": "no<b>x"})).text
    assert shown(nothing) == []


async def test_every_page_of_requests_has_the_field_for_an_id(sqlite_plane: Running) -> None:
    await taken(sqlite_plane, one := record())
    client = await as_ana(sqlite_plane)

    queries: tuple[dict[str, Any], ...] = ({}, {"id": "x"}, {"range": "7d", "model": "m"})
    for query in queries:
        text = await page(client, **query)
        assert re.search(r'<form method="get" action="/console/requests"[^>]*>\s*<label[^>]*>Request id', text)
        assert 'name="id" type="search"' in text
    assert one["request_id"] in await page(client, f"{PATH}/{one['id']}")


async def test_filters_of_the_url_narrow_rows_and_histogram(sqlite_plane: Running) -> None:
    slow = record(latency_ms=5000.0, model="slow")
    retried = record(attempts=2, backend="b:1", user="ana", organisation="team-a", key_id="A" * 12)
    broken, refused = failed(), record(status=429, outcome="refused", code="rate_limit_exceeded", attempts=0)
    late, shadow = record(at=NOON - 2 * HOUR), record(kind="shadow", outcome="reset", status=500)
    await taken(sqlite_plane, slow, retried, broken, refused, late, shadow)
    names = {one["id"]: name for name, one in locals().items() if isinstance(one, dict) and "id" in one}
    client = await as_ana(sqlite_plane)

    async def found(**query: Any) -> set[str]:
        text = await page(client, **query)
        rows = shown(text)
        if rows:
            assert counts(text)[0] == len(rows)
        return {names[id] for id in rows}

    assert await found() == {"slow", "retried", "broken", "refused"}
    assert await found(range="24h") == {"slow", "retried", "broken", "refused", "late"}
    assert await found(model="slow") == await found(slower="5", outcome="fine") == {"slow"}
    assert await found(tries="more") == {"retried", "broken"}
    assert await found(outcome="failed") == await found(status="5") == await found(outcome="first_byte_timeout")
    assert await found(outcome="failed") == {"broken"}
    assert await found(outcome="fine", status="4") == {"refused"}
    for query in ({"backend": "b:1"}, {"user": "ana"}, {"organisation": "team-a"}, {"key": "A" * 12}):
        assert await found(**query) == {"retried"}
    assert await found(key="-", model="slow") == {"slow"}
    assert await found(kind="shadow") == {"shadow"}
    assert await found(start="2026-11-28 09:00", end="2026-11-28T11:00") == {"late"}


async def test_a_column_of_the_histogram_leads_to_its_requests(sqlite_plane: Running) -> None:
    await taken(
        sqlite_plane,
        *(record(at=NOON - minutes * 60_000) for minutes in range(1, 40, 3)),
        *(failed(at=NOON - minutes * 60_000 - 1) for minutes in (5, 5, 30)),
    )
    client = await as_ana(sqlite_plane)

    whole = await page(client, model="llama-3-8b")
    narrowed = [await page(client, link) for link in columns(whole)]
    numbers = [counts(one) for one in narrowed]

    assert counts(whole) == (16, 3)
    assert len(narrowed) == 16 - 2
    assert (sum(one for one, _ in numbers), sum(one for _, one in numbers)) == (16, 3)
    assert sorted(id for one in narrowed for id in shown(one)) == sorted(shown(whole))
    assert all('value="llama-3-8b"' in one for one in narrowed)


async def test_the_numbers_are_those_of_usage(sqlite_plane: Running) -> None:
    others = [record(outcome="client_gone", status=499), record(status=400, outcome="upstream_4xx")]
    await taken(sqlite_plane, *(record() for _ in range(5)), *others, failed(), failed(at=NOON - 3 * HOUR))
    client = await as_ana(sqlite_plane)

    queries: tuple[dict[str, Any], ...] = ({"model": "llama-3-8b"}, {"outcome": "client_gone"}, {})
    for query in queries:
        span = {"start": "2026-11-28T08:00:00Z", "end": "2026-11-28T12:00:00Z"}
        totals = (await client.get("/api/v1/usage", params={**span, **query})).json()["totals"]
        assert counts(await page(client, PATH, 200, **span, **query)) == (totals["requests"], totals["errors"])


async def test_pages_have_each_request_once(sqlite_plane: Running) -> None:
    sent = [record(at=NOON - 60_000 - number // 3 * 1000) for number in range(120)]
    await taken(sqlite_plane, *sent)
    client = await as_ana(sqlite_plane)

    texts, link = [], f"{PATH}?range=24h"
    while link:
        texts.append(await page(client, link))
        following = re.search(r'href="([^"]+)" rel="next"', texts[-1])
        link = following[1] if following else ""

    rows = [id for text in texts for id in shown(text)]
    assert [len(shown(text)) for text in texts] == [50, 50, 20]
    assert len(rows) == len({*rows}) == 120
    assert {counts(text) for text in texts} == {(120, 0)}


async def test_a_request_is_explained(sqlite_plane: Running) -> None:
    one = failed(request_id="r-1", key_id="A" * 12, organisation="team-a", user="ana", cost_nanos=None)
    leg, other = record(request_id="r-1", kind="race", model="other"), record(backend="10.0.0.11:8000")
    await taken(sqlite_plane, one, leg, other)
    client = await as_ana(sqlite_plane)

    text = await page(client, f"{PATH}/r-1")
    words = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text))

    told = re.search(r'<p class="says">(.*?)</p>', text, re.S)
    assert told is not None
    assert all(one["backend"] in told[1] for one in TRIED)
    assert "504 upstream_timeout" in words
    bars = re.search(r'<ol class="waterfall">.*?</ol>', text, re.S)
    assert bars is not None
    assert bars[0].index("10.0.0.11:8000") < bars[0].index("10.0.0.12:8000")
    assert figures.ms(120_000) in bars[0]
    assert "/console/help/troubleshooting#504" in text
    # The key, what it cost, what else ran, and what the backend did then
    assert f'href="/console/keys/{"A" * 12}"' in text
    assert "unknown no price" in words
    assert f'href="{PATH}/{leg["id"]}"' in text
    assert f'href="{PATH}/{other["id"]}"' in text
    assert "1 answered" in words


async def test_a_request_that_was_refused_has_no_attempt(sqlite_plane: Running) -> None:
    await taken(
        sqlite_plane,
        one := record(
            status=429,
            outcome="refused",
            code="rate_limit_exceeded",
            backend=None,
            attempts=0,
            ttft_ms=None,
            input_tokens=None,
            output_tokens=None,
            usage_source="none",
        ),
    )
    client = await as_ana(sqlite_plane)

    text = await page(client, f"{PATH}/{one['id']}")

    assert "429 rate_limit_exceeded" in text
    assert "/console/help/troubleshooting#429" in text
    assert '<ol class="waterfall">' not in text


async def test_a_member_sees_the_own_keys_only(sqlite_plane: Running) -> None:
    mine = record(organisation="team-a", user="bob", request_id="r-mine", key_id="B" * 12)
    foreign = failed(organisation="team-a", user="ana", request_id="r-ana", key_id="A" * 12)
    await taken(sqlite_plane, mine, foreign)
    await make_user(sqlite_plane, "bob")
    await make_organisation(sqlite_plane, "team-a", bob="member")
    await log_in(sqlite_plane, "bob")
    client = sqlite_plane.client

    text = await page(client)

    assert shown(text) == [mine["id"]]
    assert counts(text) == (1, 0)
    assert shown(await page(client, id="r-ana")) == []
    assert shown(await page(client, organisation="team-b")) == []
    own = await page(client, f"{PATH}/{mine['id']}")
    assert "10.0.0.12:8000 at that time" in own
    assert foreign["id"] not in own
    assert 'href="/console/backends' not in own
    missing = await page(client, f"{PATH}/{foreign['id']}", 404)
    assert foreign["request_id"] not in missing


async def test_prices_and_pages_of_operators_are_shown_to_those_who_may_see_them(sqlite_plane: Running) -> None:
    price = {"model": "llama-3-8b", "input": 7, "output": 13, "valid_from": "2026-11-01T00:00:00Z"}
    assert (await sqlite_plane.admin.post("/api/v1/prices", json=price)).status_code == 201
    mine = {"organisation": "team-a", "user": "bob"}
    failed = record(**mine, status=502, outcome="connect_failed")
    shed = record(**mine, status=503, outcome="shed", backend=None, attempts=0)
    await taken(sqlite_plane, failed, shed)
    await make_user(sqlite_plane, "bob")
    await make_user(sqlite_plane, "olga", "operator")
    await make_organisation(sqlite_plane, "team-a", bob="member")
    amounts = [figures.money(amount * NANOS, "USD") for amount in (7, 13)]

    async def seen(name: str) -> list[tuple[bool, set[str]]]:
        """Of each page whether it has the prices, and which pages of operators it leads to."""
        await log_in(sqlite_plane, name)
        texts = [await page(sqlite_plane.client, f"{PATH}/{one['id']}") for one in (failed, shed)]
        contents = [text.partition("<main")[2] for text in texts]
        assert all(contents)
        return [
            (
                any(amount in content for amount in amounts),
                set(re.findall(r'href="/console/(backends|routers)\b', content)),
            )
            for content in contents
        ]

    assert await seen("bob") == [(False, set())] * 2
    assert await seen("olga") == [(True, {"backends"}), (True, {"routers"})]


async def test_a_request_is_shown_without_those_whose_ids_only_begin_with_its_own(sqlite_plane: Running) -> None:
    one, leg, other = (
        record(request_id=id, kind=kind, backend=f"10.0.0.{place}:8000")
        for place, (id, kind) in enumerate([("r-1", "request"), ("r-1", "race"), ("r-10", "request")])
    )
    await taken(sqlite_plane, one, leg, other)
    client = await as_ana(sqlite_plane)

    text = await page(client, f"{PATH}/{one['id']}")

    assert f'href="{PATH}/{leg["id"]}"' in text
    assert f'href="{PATH}/{other["id"]}"' not in text


async def test_a_list_that_a_script_asks_for_again_stays_a_list(sqlite_plane: Running) -> None:
    await taken(sqlite_plane, one := record(request_id="r-1"))
    client = await as_ana(sqlite_plane)
    scripted = {"hx-request": "true", "hx-request-type": "partial"}

    whole = await client.get(PATH, params={"range": "1h", "id": "r-1"})
    part = await client.get(PATH, params={"range": "1h", "id": "r-1"}, headers=scripted)

    assert whole.headers["location"] == f"{PATH}/{one['id']}"
    assert part.status_code == 200
    assert shown(part.text) == [one["id"]]


async def test_only_the_first_page_shows_new_requests_as_they_come(sqlite_plane: Running) -> None:
    await taken(sqlite_plane, *(record() for _ in range(60)))
    client = await as_ana(sqlite_plane)

    first = await page(client, range="1h")
    following = re.search(r'href="([^"]+)" rel="next"', first)
    assert following is not None
    second = await page(client, following[1])
    long = await page(client, range="24h")

    assert [len(shown(text)) for text in (first, second, long)] == [50, 10, 50]
    assert ['hx-trigger="live"' in text for text in (first, second, long)] == [True, False, False]


async def test_a_request_that_says_it_took_for_ever_is_shown(start_sqlite: Callable[..., Any]) -> None:
    plane = await start_sqlite(
        log_url="https://logs.example.com/{backend}?to={end}", trace_url="https://t.example.com/{end_ms}"
    )
    tried = {"backend": "10.0.0.12:8000", "outcome": "of_a_later_router", "status": 599}
    attempts = [{**tried, "start_ms": 1.7e308, "duration_ms": 1.7e308}, {**tried, "start_ms": 1e17, "duration_ms": 0}]
    await taken(plane, record(latency_ms=1.7e308, ttft_ms=1e300, queued_ms=1e300, attempts=2, attempt_details=attempts))
    client = await as_ana(plane)

    answer = await client.get(f"{PATH}/4bf92f3577b34da6")

    assert answer.status_code == 200, answer.text
    assert "https://logs.example.com/10.0.0.12%3A8000?to=2026-11-29T" in answer.text


async def test_an_empty_list_says_what_to_do(sqlite_plane: Running) -> None:
    client = await as_ana(sqlite_plane)
    no_router = await page(client)
    await reports(sqlite_plane, a=report(usage=dict.fromkeys(("made", "delivered", "queued", "spooled", "dropped"), 0)))
    not_recorded = await page(client)
    await reports(sqlite_plane, a=report())
    none = await page(client)
    filtered = await page(client, model="m", range="24h")

    assert "INFERENCE_API_REGISTRY_URL=http://127.0.0.1:" in no_router
    assert "INFERENCE_API_USAGE=registry" in not_recorded
    assert "INFERENCE_API_REGISTRY_URL" not in not_recorded
    assert 'href="/console/requests?range=24h"' in none
    assert "INFERENCE_API" not in none
    assert 'href="/console/requests?model=m&range=7d"' in filtered
    assert 'href="/console/requests?range=24h">Without filters' in filtered


HOSTILE = [
    ({"range": "1y"}, 422),
    ({"start": "yesterday"}, 422),
    ({"start": "2026-11-28", "end": "2026-11-27"}, 422),
    ({"start": "0001-01-01", "end": "0001-01-02"}, 422),
    ({"start": "1999-01-01"}, 422),
    ({"end": "1970-01-01T00:00"}, 422),
    ({"slower": "nan"}, 422),
    ({"slower": "-1"}, 422),
    ({"slower": "9" * 400}, 422),
    ({"status": "9"}, 422),
    ({"tries": "2"}, 422),
    ({"kind": "x"}, 422),
    ({"after": "x"}, 422),
    ({"after": "WyJhIiwxXQ"}, 422),
    ({"model": "\"><script>alert(1)</script>' OR 1=1 --"}, 200),
    ({"outcome": "<i>"}, 200),
    ({"key": "\0a"}, 200),
    ({"id": "\ud7ff" * 600}, 200),
    ({"model": "%00", "organisation": "\ufffd"}, 200),
    ({"unknown": "1"}, 200),
]


@pytest.mark.parametrize(("query", "status"), HOSTILE, ids=str)
async def test_what_the_url_has_is_refused_or_harmless(
    sqlite_plane: Running, query: dict[str, str], status: int
) -> None:
    await taken(sqlite_plane, record())
    client = await as_ana(sqlite_plane)

    answer = await client.get(PATH, params=query)

    assert answer.status_code == status, answer.text
    assert "<script>alert" not in answer.text
    assert "<i>" not in answer.text
    assert 'class="find"' in answer.text
    if status == 422:
        assert re.search(r'<div class="problem" role="alert">\s*<p>\w+: must ', answer.text)
