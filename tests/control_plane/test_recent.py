"""The last minutes and hours: the same figures as GET /usage, in buckets, and one question for many who look."""

import asyncio
import random
from typing import Any

import pytest
from sqlalchemy import event

from control_plane.services import usage
from control_plane.services.recent import Asked, Length, recent
from control_plane.services.usage import Question
from tests.control_plane.acts import act_of
from tests.control_plane.conftest import NOON, Running
from tests.control_plane.test_usage import random_record
from tests.control_plane.usage import record, taken

pytestmark = pytest.mark.anyio
MINUTE = 60_000


async def sent(plane: Running, count: int = 400) -> None:
    chance = random.Random(3)
    records = [{**random_record(chance), "at": NOON - chance.randrange(7 * 60 * MINUTE)} for _ in range(count)]
    await taken(plane, *records)


@pytest.mark.parametrize("length", ["15m", "1h", "6h"])
@pytest.mark.parametrize("filters", [(), (("model", "a"),), (("key", "A" * 12),)])
async def test_figures_are_those_of_usage(plane: Running, length: Length, filters: Any) -> None:
    await sent(plane)
    act = act_of(plane, platform_role="admin")

    found = await recent(plane.plane, act, Asked(length, filters))

    question = Question(found.start, found.end, "1h", filters=filters)
    totals = (await usage.report(plane.plane, act, question))["totals"]
    assert totals["requests"] > 0
    for name in ("requests", "errors", "input_tokens", "output_tokens"):
        assert getattr(found.totals, name) == totals[name] == sum(getattr(point, name) for point in found.points)
    assert [found.totals.ttft_p50, found.totals.ttft_p95] == [
        pytest.approx(totals["ttft_ms"][name], rel=0.01) for name in ("p50", "p95")
    ]


async def test_buckets_are_those_of_the_clock_and_none_is_missing(plane: Running) -> None:
    plane.clock.advance(30)
    await taken(
        plane,
        record(at=NOON + 1, output_tokens=60, ttft_ms=100.0),
        record(at=NOON + 2, output_tokens=60, status=500, outcome="reset", ttft_ms=None),
        record(at=NOON - 59 * MINUTE, model="other"),
        record(at=NOON - 59 * MINUTE - 1),
        record(at=NOON + 3, kind="shadow"),
        record(at=NOON + 31_000),
    )

    found = await recent(plane.plane, act_of(plane, platform_role="viewer"), Asked(group_by="model"))

    assert [point.at for point in found.points] == [NOON - minutes * MINUTE for minutes in range(59, -1, -1)]
    last = found.points[-1]
    assert last[:6] == (NOON, 2, 1, 1624, 120, 4.0)
    assert [last.ttft_p50, last.ttft_p95] == [pytest.approx(100, rel=0.05)] * 2
    assert [point.requests for point in found.points[:2]] == [1, 0]
    assert [(group, sum(point.requests for point in points)) for group, points in found.groups] == [
        ("llama-3-8b", 2),
        ("other", 1),
    ]
    assert found.now == (2, 1, 2 / 60, 0.5, 2.0)


async def test_callers_see_what_their_roles_reach(plane: Running) -> None:
    mine = record(organisation="team-a", user="max")
    await taken(plane, mine, record(organisation="team-a", user="ana"), record(organisation="team-b", user="max"))

    async def seen(name: str = "max", **roles: str) -> int:
        return (await recent(plane.plane, act_of(plane, name, **roles))).totals.requests

    assert [await seen(team_a=role) for role in ("owner", "admin", "viewer", "member")] == [2, 2, 2, 1]
    # What is kept is not shown to a colleague with the same role.
    assert [await seen("eve", team_a="member"), await seen("ana", team_a="member")] == [0, 1]
    assert [await seen(team_b="owner"), await seen(team_c="owner"), await seen()] == [1, 0, 0]


async def test_many_who_look_cost_one_question(plane: Running) -> None:
    await taken(plane, record())
    statements: list[str] = []
    reader = plane.plane.database.usage._reader.sync_engine
    event.listen(
        reader,
        "before_cursor_execute",
        lambda connection, cursor, statement, *rest: (
            statements.append(statement) if "FROM usage" in statement else None
        ),
    )

    async def look() -> int:
        act = act_of(plane, platform_role="admin")
        return (await recent(plane.plane, act)).totals.requests

    assert await asyncio.gather(*(look() for _ in range(20))) == [1] * 20
    once = len([one for one in statements if "GROUP BY" in one])
    await taken(plane, record())
    plane.clock.advance(4)
    assert await look() == 1
    plane.clock.advance(2)
    assert await look() == 2
    assert once == 1
