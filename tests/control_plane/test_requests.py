"""Requests: newest first, by filters and by ids, with their attempts and what belongs to them."""

import random
from typing import Any

import httpx
import pytest
from sqlalchemy import insert

from control_plane.data.tables import keys, memberships, organisations
from control_plane.services import requests
from control_plane.services.requests import Histogram, Wanted
from control_plane.services.rollup import roll_up
from tests.control_plane.acts import act_of
from tests.control_plane.conftest import NOON, Running, management_token
from tests.control_plane.test_usage import random_record
from tests.control_plane.usage import DAY, HOUR, record, taken

pytestmark = pytest.mark.anyio


async def listed(client: httpx.AsyncClient, **query: Any) -> list[dict[str, Any]]:
    answer = await client.get("/api/v1/requests", params=query)
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["data"]
    return found


async def team(plane: Running) -> None:
    """The organisations team-a and team-b; a key `batch` of ana's."""
    async with plane.plane.database.main.write() as connection:
        for name in ("team-a", "team-b"):
            await connection.execute(insert(organisations).values(name=name, limits=[], created_at=NOON))
        await connection.execute(
            insert(keys).values(
                id="A" * 12, name="batch", digest="d", organisation="team-a", user="ana", limits=[], created_at=NOON
            )
        )


async def member(plane: Running, name: str, role: str) -> dict[str, str]:
    """Headers of a member of team-a."""
    token = await management_token(plane.plane.database, name, None)
    async with plane.plane.database.main.write() as connection:
        await connection.execute(
            insert(memberships).values(organisation="team-a", user=name, role=role, created_at=NOON)
        )
    return {"authorization": f"Bearer {token}"}


async def test_a_request_has_its_attempts_and_those_that_belong_to_it(plane: Running) -> None:
    await team(plane)
    tried = [{"backend": "b:1", "outcome": "reset", "status": 0, "start_ms": 0.5, "duration_ms": 1.0}]
    one = record(request_id="r-1", key_id="A" * 12, attempt_details=tried)
    other, foreign = record(request_id="r-1", kind="vote"), record(request_id="r-1", at=NOON - DAY)
    await taken(plane, one, other, foreign)

    by_id = (await plane.admin.get(f"/api/v1/requests/{one['id']}")).json()
    by_request_id = (await plane.admin.get("/api/v1/requests/r-1")).json()
    unknown = await plane.admin.get("/api/v1/requests/r-")

    extra = {"key_name": "batch", "received_at": "2026-11-28T12:00:00Z", "related": [other["id"]]}
    assert by_id == by_request_id == {**one, **extra}
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "not_found")


async def test_what_belongs_to_a_request_is_shown_as_far_as_the_caller_may_see_it(plane: Running) -> None:
    mine, leg = (record(organisation="team-a", user="max", request_id="r-1", kind=kind) for kind in ("request", "race"))
    colleague = record(organisation="team-a", user="ana", request_id="r-1", kind="race")
    foreign = record(organisation="team-b", user="max", request_id="r-1")
    await taken(plane, mine, leg, colleague, foreign)

    async def related(**roles: str) -> set[str]:
        found = await requests.one(plane.plane, act_of(plane, "max", **roles), mine["id"])
        return set(found["related"])

    assert await related(team_a="member") == {leg["id"]}
    assert await related(team_a="owner") == {leg["id"], colleague["id"]}
    assert await related(platform_role="admin") == {leg["id"], colleague["id"], foreign["id"]}


async def test_requests_are_found_by_the_beginning_of_their_id_among_all(plane: Running) -> None:
    old = record(request_id="4bf92f35-x", at=NOON - 6 * DAY)
    await taken(plane, old, *(record(request_id=f"4BF9{number}") for number in range(60)), record(request_id="4bf93"))

    assert [one["id"] for one in await listed(plane.admin, id="4bf92f")] == [old["id"]]
    assert [one["id"] for one in await listed(plane.admin, id="4bf92f35-x")] == [old["id"]]
    assert await listed(plane.admin, id="4bf92%") == []
    assert len(await listed(plane.admin, id="4bf9")) == 2


async def test_pages_have_each_request_once_newest_first(plane: Running) -> None:
    # Some at the same time
    sent = [record(at=NOON - number // 3 * 1000) for number in range(10)]
    await taken(plane, *sent)
    found, after = [], None
    while True:
        query = {"limit": 4, **({} if after is None else {"after": after})}
        answer = (await plane.admin.get("/api/v1/requests", params=query)).json()
        found += answer["data"]
        after = answer["next"]
        if after is None:
            break

    wanted = sorted(sent, key=lambda one: (one["at"], one["id"]), reverse=True)
    assert [one["id"] for one in found] == [one["id"] for one in wanted]


async def test_who_is_in_several_organisations_has_pages_over_all_of_them(plane: Running) -> None:
    act = act_of(plane, "max", team_a="owner", team_b="member", team_c="admin")
    sent = [
        record(
            at=NOON - number // 2 * 1000, organisation=f"team-{'abcd'[number % 4]}", user=("max", "ana")[number % 3 % 2]
        )
        for number in range(40)
    ]
    await taken(plane, *sent)
    found: list[dict[str, Any]] = []
    while True:
        after = [found[-1]["at"], found[-1]["id"]] if found else None
        rows = await requests.listing(plane.plane, act, Wanted(), after, 6)
        found += rows[:6]
        if len(rows) < 7:
            break

    seen = [one for one in sent if one["organisation"] in ("team-a", "team-c")]
    seen += [one for one in sent if one["organisation"] == "team-b" and one["user"] == "max"]
    wanted = sorted(seen, key=lambda one: (one["at"], one["id"]), reverse=True)
    assert 20 < len(wanted) < 30
    assert [one["id"] for one in found] == [one["id"] for one in wanted]


async def test_filters_are_in_the_query(plane: Running) -> None:
    first = record(model="a", outcome="reset", status=502, at=NOON - 1000)
    second = record(model="b", organisation="team-a", kind="shadow", at=NOON - 2000)
    await taken(plane, first, second)

    async def ids(**query: str) -> list[str]:
        return [one["id"] for one in await listed(plane.admin, **query)]

    assert await ids() == [first["id"], second["id"]]
    assert await ids(model="a") == await ids(outcome="reset") == await ids(kind="request") == [first["id"]]
    assert await ids(organisation="team-a") == [second["id"]]
    assert await ids(start="2026-11-28T11:59:59Z") == [first["id"]]
    assert await ids(end="2026-11-28T11:59:59Z") == [second["id"]]


async def test_callers_see_their_organisation_or_their_own_keys(plane: Running) -> None:
    await team(plane)
    headers = {role: await member(plane, f"u-{role}", role) for role in ("owner", "admin", "member", "viewer")}
    mine = record(organisation="team-a", user="u-member", request_id="r-mine")
    colleague = record(organisation="team-a", user="ana", request_id="r-ana")
    foreign = record(organisation="team-b", user="u-member", request_id="r-foreign")
    await taken(plane, mine, colleague, foreign, record())

    async def sees(role: str) -> set[str]:
        answer = await plane.client.get("/api/v1/requests", headers=headers[role])
        assert answer.status_code == 200
        return {one["id"] for one in answer.json()["data"]}

    async def sums(role: str) -> int:
        answer = await plane.client.get("/api/v1/usage", params={"group_by": "organisation"}, headers=headers[role])
        found: int = answer.json()["totals"]["requests"]
        return found

    both = {mine["id"], colleague["id"]}
    assert [await sees(role) for role in ("owner", "admin", "member")] == [both, both, {mine["id"]}]
    assert [await sums(role) for role in ("owner", "admin", "member", "viewer")] == [2, 2, 1, 2]
    # An organisation's viewer sees sums only.
    assert (await plane.client.get("/api/v1/requests", headers=headers["viewer"])).status_code == 403
    hidden = await plane.client.get("/api/v1/requests/r-ana", headers=headers["member"])
    assert hidden.status_code == 404
    assert (await plane.client.get("/api/v1/prices", headers=headers["owner"])).status_code == 403


async def test_rows_are_found_by_status_attempts_duration_and_failure(plane: Running) -> None:
    fine = record(latency_ms=10.0)
    late = record(latency_ms=5000.0, attempts=2)
    broken = record(status=502, outcome="reset")
    refused = record(status=429, outcome="refused")
    shadow = record(kind="shadow", status=500, outcome="reset")
    await taken(plane, fine, late, broken, refused, shadow)
    names = {one["id"]: name for name, one in locals().items() if isinstance(one, dict) and "id" in one}

    async def found(**wanted: Any) -> set[str]:
        rows = await requests.listing(plane.plane, act_of(plane, platform_role="admin"), Wanted(**wanted), None, 50)
        return {names[row["id"]] for row in rows}

    assert await found(failed=True) == {"broken"}
    assert await found(failed=False) == {"fine", "late", "refused", "shadow"}
    assert await found(status_class=4) == {"refused"}
    assert await found(status_class=5, kinds=("request",)) == {"broken"}
    assert await found(retried=True) == await found(longer=5000.0) == {"late"}


def counted(found: Histogram) -> tuple[int, int]:
    return sum(bar.ok for bar in found.bars), sum(bar.failed for bar in found.bars)


@pytest.mark.parametrize("summed", [False, True])
async def test_a_histogram_counts_what_the_listing_has(plane: Running, summed: bool) -> None:
    chance = random.Random(5)
    sent = [random_record(chance, days=3) for _ in range(300)]
    await taken(plane, *sent)
    if summed:
        await roll_up(plane.plane)
    act = act_of(plane, platform_role="admin")

    async def same(**given: Any) -> Histogram:
        wanted = Wanted(**given)
        rows = await requests.listing(plane.plane, act, wanted, None, 1000)
        found = await requests.histogram(plane.plane, act, wanted)
        failed = len(await requests.listing(plane.plane, act, wanted._replace(failed=True), None, 1000))
        if wanted.failed is False:
            failed = 0
        assert counted(found) == (len(rows) - failed, failed)
        assert [bar.at for bar in found.bars] == list(range(found.bars[0].at, found.end, found.bucket))
        assert found.bars[0].at <= found.start < found.bars[0].at + found.bucket
        return found

    days = {"start": NOON - 3 * DAY, "end": NOON}
    whole = await same(**days)
    assert (counted(whole)[0] + counted(whole)[1], whole.bucket, len(whole.bars)) == (300, 2 * HOUR, 36)
    for more in (
        {"filters": {"model": "a"}},
        {"filters": {"organisation": "team-a", "outcome": "upstream_5xx"}},
        {"kinds": ("request",)},
        {"failed": True},
        {"failed": False},
        {"status_class": 5},
        {"longer": 400.0},
        {"retried": True},
        {"id": "4bf9"},
    ):
        await same(**{**days, **more})
    # A start and an end within an hour
    await same(start=NOON - DAY - 100_000, end=NOON - 5 * HOUR + 1)
    assert (await same(start=NOON - HOUR)).bucket == 60_000
    assert counted(await requests.histogram(plane.plane, act, Wanted(id="4bf9"))) == counted(whole)


async def test_what_a_backend_did_around_a_request_has_the_attempts_that_others_mended(plane: Running) -> None:
    def attempts(*outcomes: tuple[str, str]) -> list[dict[str, Any]]:
        return [
            {"backend": backend, "outcome": outcome, "status": 0, "start_ms": 0.5, "duration_ms": 1.0}
            for backend, outcome in outcomes
        ]

    failed = record(
        request_id="r-1",
        backend="b:1",
        status=502,
        outcome="reset",
        attempts=2,
        attempt_details=attempts(("a:1", "connect_failed"), ("b:1", "reset")),
    )
    mended = record(backend="b:1", attempts=2, attempt_details=attempts(("a:1", "connect_failed"), ("b:1", "ok")))
    before = record(backend="b:1", at=NOON - 90_000)
    await taken(plane, failed, mended, before, record(backend="b:1", at=NOON - 200_000), record(backend="c:1"))
    act = act_of(plane, platform_role="operator")

    a, b = await requests.around(plane.plane, act, await requests.one(plane.plane, act, "r-1"))

    assert (a.backend, a.outcomes, a.neighbours) == ("a:1", (("connect_failed", 1),), ())
    assert (b.backend, b.outcomes) == ("b:1", (("ok", 2),))
    assert [one.id for one in b.neighbours] == [before["id"], mended["id"]]
    assert (b.start, b.end) == (NOON - 180_000, NOON + 60_000)


async def test_a_member_sees_nothing_of_others_in_histograms_and_around(plane: Running) -> None:
    mine = record(organisation="team-a", user="max", request_id="r-mine", at=NOON - HOUR // 2)
    others = [record(organisation="team-a", user="ana", at=NOON - HOUR // 2) for _ in range(3)]
    await taken(plane, mine, *others)

    async def seen(role: str) -> tuple[int, int, int]:
        act = act_of(plane, "max", team_a=role)
        hour = await requests.histogram(plane.plane, act, Wanted())
        days = await requests.histogram(plane.plane, act, Wanted(start=NOON - 5 * DAY))
        (around,) = await requests.around(plane.plane, act, await requests.one(plane.plane, act, "r-mine"))
        return counted(hour)[0], counted(days)[0], len(around.neighbours)

    assert await seen("owner") == (4, 4, 3)
    assert await seen("member") == (1, 1, 0)
