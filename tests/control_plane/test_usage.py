"""GET /usage: sums, groups, percentiles, whom they are shown to; and that sums of hours and days equal their rows."""

import asyncio
import csv
import math
import random
from collections.abc import Iterable
from typing import Any

import pytest

from control_plane.plane import Act
from control_plane.pure.records import FINE
from control_plane.pure.roles import SYSTEM
from control_plane.services.rollup import roll_up, unsummed
from control_plane.services.usage import Question, report
from tests.control_plane.acts import act_of
from tests.control_plane.conftest import NOON, Running
from tests.control_plane.test_fleet import report as router_report
from tests.control_plane.test_fleet import reports
from tests.control_plane.usage import DAY, HOUR, record, taken

pytestmark = pytest.mark.anyio
WEEK = {"start": "2026-11-21T12:00:00Z", "end": "2026-11-28T13:00:00Z"}
TODAY = {"start": "2026-11-28T00:00:00Z", "end": "2026-11-29T00:00:00Z"}
SUMS = ("requests", "errors", "input_tokens", "cached_input_tokens", "output_tokens", "cost_nanos", "unpriced")


async def asked(plane: Running, **query: Any) -> Any:
    # What is asked again is answered from memory otherwise.
    plane.plane.kept.clear()
    answer = await plane.admin.get("/api/v1/usage", params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


def summed(records: Iterable[dict[str, Any]]) -> dict[str, int]:
    """By the contract's words."""
    found = dict.fromkeys(SUMS, 0)
    for one in records:
        if one["kind"] not in ("request", "race", "vote"):
            continue
        if one["kind"] == "request":
            found["requests"] += 1
            found["errors"] += one["status"] >= 500 or one["outcome"] not in FINE
        for name in ("input_tokens", "cached_input_tokens", "output_tokens", "cost_nanos"):
            found[name] += one[name] or 0
        found["unpriced"] += one["cost_nanos"] is None
    return found


def grouped(records: list[dict[str, Any]], *names: str) -> dict[Any, dict[str, int]]:
    groups: dict[Any, list[dict[str, Any]]] = {}
    for one in records:
        if one["kind"] in ("request", "race", "vote"):
            groups.setdefault(tuple(one[name] for name in names), []).append(one)
    return {group: summed(of) for group, of in groups.items()}


def random_record(chance: random.Random, days: int = 7) -> dict[str, Any]:
    status, outcome = chance.choice([(200, "ok"), (200, "client_gone"), (500, "upstream_5xx"), (404, "upstream_4xx")])
    source, tokens = chance.choice([("reported", 5), ("counted", 7), ("none", None)])
    return record(
        kind=chance.choice(["request", "request", "request", "race", "vote", "hedge", "shadow"]),
        at=NOON - chance.randrange(days * DAY),
        model=chance.choice("abc"),
        key_id=chance.choice([None, "A" * 12, "B" * 12]),
        organisation=chance.choice([None, "team-a", "team-b"]),
        user=chance.choice([None, "ana", "bob"]),
        status=status,
        outcome=outcome,
        usage_source=source,
        input_tokens=tokens,
        output_tokens=tokens,
        cached_input_tokens=chance.choice([None, 1]),
        cost_nanos=chance.choice([None, 10, 1000]),
        latency_ms=chance.lognormvariate(6, 1),
        ttft_ms=chance.choice([None, chance.lognormvariate(4, 1)]),
    )


async def test_the_answer_has_the_shape_of_the_contract(plane: Running) -> None:
    await taken(plane, record(), record(usage_source="counted", cost_nanos=None), record(status=503, outcome="shed"))

    answer = await asked(plane, **TODAY, bucket="1d", group_by="model")

    sums = {"input_tokens": 2436, "cached_input_tokens": 1536, "output_tokens": 360, "cost_nanos": 284480}
    sums = {"requests": 3, "errors": 1, **sums, "unpriced": 1}
    latency = {"p50": 2334, "p95": 2334, "p99": 2334}
    total = {**sums, "latency_ms": latency, "ttft_ms": answer["totals"]["ttft_ms"]}
    point = {name: sums[name] for name in ("requests", "errors", "input_tokens", "output_tokens", "cost_nanos")}
    group = {"group": {"model": "llama-3-8b"}}
    assert answer == {
        **TODAY,
        "bucket": "1d",
        "currency": "USD",
        "group_by": ["model"],
        "totals": total,
        "series": [{**group, "points": [{"at": TODAY["start"], **point}]}],
        "rows": [{**group, **total}],
        "coverage": {"received": 3, "dropped": 0, "share": 1.0, "estimated": 0.3333},
    }


async def sum_up(plane: Running) -> None:
    """Until no closed hour lacks rows; the control plane's own keeper may be the one that does it."""
    async with asyncio.timeout(30):
        await roll_up(plane.plane)
        while await unsummed(plane.plane):
            await roll_up(plane.plane)


async def test_sums_are_the_same_from_rows_hours_and_days(plane: Running) -> None:
    chance = random.Random(7)
    sent: list[dict[str, Any]] = []

    async def check() -> None:
        for query, names in (
            ({}, ()),
            ({"group_by": "model"}, ("model",)),
            ({"group_by": ["organisation", "outcome"]}, ("organisation", "outcome")),
            ({"bucket": "1h", "group_by": "key,user"}, ("key_id", "user")),
        ):
            answer = await asked(plane, **WEEK, **query)
            rows = {tuple(row["group"].values()): {name: row[name] for name in SUMS} for row in answer["rows"]}
            assert rows == grouped(sent, *names)
            assert {name: answer["totals"][name] for name in SUMS} == summed(sent)
            for name in ("requests", "errors", "input_tokens", "output_tokens", "cost_nanos"):
                assert sum(p[name] for one in answer["series"] for p in one["points"]) == summed(sent)[name]

    for _ in range(3):
        batch = [random_record(chance) for _ in range(60)]
        sent += batch
        await taken(plane, *batch)
        await check()
        # The open hour has no sums yet, and days none while an hour of theirs is changed.
        await sum_up(plane)
        await check()


async def test_rolled_up_percentiles_are_those_of_rows(plane: Running) -> None:
    chance = random.Random(8)
    sent = [random_record(chance) for _ in range(300)]
    await taken(plane, *sent)
    before = await asked(plane, **WEEK, group_by="model")
    await sum_up(plane)
    after = await asked(plane, **WEEK, group_by="model")

    latencies = sorted(one["latency_ms"] for one in sent if one["kind"] == "request")
    exact = latencies[math.floor(0.95 * (len(latencies) - 1))]
    assert before == after
    assert before["totals"]["latency_ms"]["p95"] == pytest.approx(exact, rel=0.051)


async def test_a_late_record_changes_the_sums_of_its_hour(plane: Running) -> None:
    await taken(plane, record(at=NOON - 3 * DAY))
    await sum_up(plane)
    await taken(plane, record(at=NOON - 3 * DAY + 1))
    before = (await asked(plane, **WEEK))["totals"]["requests"]
    await sum_up(plane)

    assert (before, (await asked(plane, **WEEK))["totals"]["requests"]) == (2, 2)


async def test_what_is_kept_of_sums_is_not_shown_to_a_colleague(sqlite_plane: Running) -> None:
    plane = sqlite_plane
    at = NOON - 3 * DAY
    await taken(plane, *(record(at=at, organisation="team-a", user=user) for user in ("max", "max", "ana")))
    await sum_up(plane)
    question = Question(at - at % DAY, at - at % DAY + DAY)

    async def seen(name: str, role: str) -> int:
        found = await report(plane.plane, act_of(plane, name, team_a=role), question)
        requests: int = found["totals"]["requests"]
        return requests

    assert [await seen("max", "member"), await seen("ana", "member"), await seen("eve", "member")] == [2, 1, 0]
    assert [await seen("eve", "owner"), await seen("max", "viewer")] == [3, 3]


async def test_records_that_routers_dropped_are_told_to_those_who_see_all_usage(sqlite_plane: Running) -> None:
    plane, start = sqlite_plane, NOON + HOUR
    await taken(plane, record(organisation="team-a", at=NOON))
    usage = dict.fromkeys(("made", "delivered", "queued", "spooled"), 9)
    await reports(plane, before=router_report(usage={**usage, "dropped": 3}))
    plane.clock.advance(2 * 3600)
    await reports(plane, after=router_report(usage={**usage, "dropped": 4}))

    async def dropped(act: Act, start: int) -> int:
        found: int = (await report(plane.plane, act, Question(start, NOON + 3 * HOUR)))["coverage"]["dropped"]
        return found

    admin, owner = act_of(plane, platform_role="admin"), act_of(plane, "max", team_a="owner")
    assert [await dropped(admin, NOON), await dropped(admin, start)] == [3 + 4, 4]
    assert [await dropped(owner, NOON), await dropped(owner, start)] == [0, 0]


async def test_a_part_of_an_hour_is_asked_of_rows(sqlite_plane: Running) -> None:
    await taken(sqlite_plane, *(record(at=NOON - minute * 60_000) for minute in range(1, 121)))
    await sum_up(sqlite_plane)

    answer = await asked(sqlite_plane, start="2026-11-28T10:30:00Z", end="2026-11-28T11:15:00Z", bucket="1h")

    assert [(point["at"], point["requests"]) for point in answer["series"][0]["points"]] == [
        ("2026-11-28T10:00:00Z", 30),
        ("2026-11-28T11:00:00Z", 15),
    ]


async def test_of_many_groups_the_rest_is_one(plane: Running) -> None:
    sent = [record(model=f"m{number:02}") for number in range(60) for _ in range(1 + (number < 7))]
    await taken(plane, *sent)

    answer = await asked(plane, **TODAY, group_by="model")

    rows, series = answer["rows"], answer["series"]
    assert (len(rows), rows[-1]["group"], rows[-1]["other"], rows[-1]["requests"]) == (51, None, True, 10)
    assert rows[0]["group"] == {"model": "m00"}
    assert (len(series), series[-1]["group"], series[-1]["other"]) == (8, None, True)
    assert series[-1]["points"][0]["requests"] == 53
    assert rows[-1]["latency_ms"]["p50"] == rows[0]["latency_ms"]["p50"]


async def test_of_very_many_groups_the_database_finds_the_largest(plane: Running) -> None:
    chance = random.Random(9)
    sent = [random_record(chance) for _ in range(200)]
    await taken(plane, *sent, *(record(model=f"m{number:02}") for number in range(60)))
    act = Act(SYSTEM, NOON)

    for group_by, bucket in ((("model",), "1d"), (("model", "organisation"), "1h")):
        question = Question(NOON - 7 * DAY, NOON + HOUR, bucket, group_by)
        answers = []
        for most in (20_000, 3):
            plane.plane.kept.clear()
            answers.append(await report(plane.plane, act, question, most))
        assert answers[0]["totals"] == answers[1]["totals"]
        assert answers[0]["rows"][:3] == answers[1]["rows"][:3]
        assert [one["points"] for one in answers[0]["series"][:3]] == [
            one["points"] for one in answers[1]["series"][:3]
        ]
        for name in SUMS:
            assert sum(row[name] for row in answers[1]["rows"]) == answers[1]["totals"][name]


async def test_filters_narrow(plane: Running) -> None:
    await taken(plane, record(model="a", organisation="o"), record(model="a"), record(model="b", kind="hedge"))

    async def requests(**query: str) -> tuple[int, int]:
        answer = await asked(plane, **TODAY, **query)
        return answer["totals"]["requests"], answer["coverage"]["received"]

    assert await requests(model="a") == (2, 2)
    assert await requests(model="a", organisation="o") == (1, 1)
    assert await requests(organisation="") == (1, 1)
    assert await requests(model="b") == (0, 0)
    assert await requests(kind="hedge") == (0, 1)
    assert await requests(kind="hedge,request") == (2, 3)


async def test_csv_has_the_rows(sqlite_plane: Running) -> None:
    await taken(sqlite_plane, record(model="=1+1"), *(record(model=f"m{number:02}") for number in range(51)))

    answer = await sqlite_plane.admin.get(
        "/api/v1/usage", params={**TODAY, "group_by": "model"}, headers={"accept": "text/csv"}
    )

    assert answer.headers["content-type"].startswith("text/csv")
    rows = list(csv.DictReader(answer.text.splitlines()))
    assert len(rows) == 51
    assert rows[0]["model"] == "'=1+1"
    assert (rows[1]["model"], rows[1]["requests"], rows[1]["cost_nanos"], rows[1]["latency_ms_p50"]) == (
        "m00", "1", "142240", "2334",
    )  # fmt: skip
    assert (rows[-1]["model"], rows[-1]["other"], rows[-1]["requests"]) == ("", "true", "2")


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"start": "yesterday"}, "start"),
        ({"start": "2026-11-28T00:00:00Z", "end": "2026-11-28T00:00:00Z"}, "end"),
        ({"start": "2025-10-01T00:00:00Z", "end": "2026-11-28T00:00:00Z"}, "start"),
        ({"bucket": "1m"}, "bucket"),
        ({"group_by": "colour"}, "group_by"),
        ({"group_by": "model,key,user"}, "group_by"),
        ({"kind": "other"}, "kind"),
    ],
)
async def test_what_cannot_be_asked_is_refused(sqlite_plane: Running, query: dict[str, str], param: str) -> None:
    answer = await sqlite_plane.admin.get("/api/v1/usage", params=query)

    assert (answer.status_code, answer.json()["error"]["param"]) == (422, param)


async def test_an_answer_is_shown_again_for_half_a_minute_at_most(sqlite_plane: Running) -> None:
    await taken(sqlite_plane, record())
    await asked(sqlite_plane, **TODAY)
    await taken(sqlite_plane, record())

    sqlite_plane.clock.now += 30_000
    answer = await sqlite_plane.admin.get("/api/v1/usage", params=TODAY)

    assert answer.json()["totals"]["requests"] == 2


async def test_400_days_are_answered(sqlite_plane: Running) -> None:
    await taken(sqlite_plane, record(at=NOON - HOUR))

    answer = await asked(sqlite_plane, start="2025-10-25T00:00:00Z", end="2026-11-29T00:00:00Z", bucket="1h")

    assert answer["totals"]["requests"] == 1
