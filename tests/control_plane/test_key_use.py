"""What keys were used for in a day, and what is spent of budgets: the figures of GET /usage and GET /spend."""

import random
from typing import Any

import pytest

from control_plane.services import key_use, spend
from control_plane.services.rollup import roll_up
from tests.control_plane.acts import act_of
from tests.control_plane.conftest import NOON, Running
from tests.control_plane.teams import organisation
from tests.control_plane.test_usage import asked, random_record
from tests.control_plane.usage import DAY, record, taken

pytestmark = pytest.mark.anyio
A, B, C = "A" * 12, "B" * 12, "C" * 12


@pytest.mark.parametrize("summed", [False, True])
async def test_the_use_of_a_day_is_that_of_usage(plane: Running, summed: bool) -> None:
    chance = random.Random(11)
    await taken(plane, *(random_record(chance, days=2) for _ in range(300)))
    if summed:
        await roll_up(plane.plane)

    found = await key_use.last_day(plane.plane, act_of(plane, platform_role="admin"), [A, B, C])

    answer = await asked(plane, start="2026-11-27T12:00:00Z", end="2026-11-28T12:00:00Z", group_by="key")
    rows = {row["group"]["key"]: row for row in answer["rows"]}
    assert {id: one._asdict() for id, one in found.items() if id != C} == {
        id: {name: rows[id][name] for name in found[id]._fields} for id in (A, B)
    }
    assert found[C] == key_use.KeyUse()


async def test_a_member_sees_the_use_of_own_keys(plane: Running) -> None:
    await taken(
        plane,
        record(key_id=A, organisation="team-a", user="max"),
        record(key_id=B, organisation="team-a", user="ana"),
        record(key_id=C, organisation="team-b", user="max"),
    )

    async def seen(name: str, role: str) -> list[int]:
        found = await key_use.last_day(plane.plane, act_of(plane, name, team_a=role), [A, B, C])
        return [found[id].requests for id in (A, B, C)]

    assert [await seen("max", "member"), await seen("ana", "member")] == [[1, 0, 0], [0, 1, 0]]
    assert await seen("max", "owner") == [1, 1, 0]


async def test_budgets_are_shown_with_what_is_spent_of_them(plane: Running) -> None:
    await organisation(plane, "team-a", budget={"tokens": 4000, "per": "day"})
    body: dict[str, Any] = {"name": "batch", "organisation": "team-a", "budget": {"cost": 0.001, "per": "month"}}
    key = (await plane.admin.post("/api/v1/keys", json=body)).json()
    other = (await plane.admin.post("/api/v1/keys", json={"name": "new", "organisation": "team-a"})).json()
    await taken(plane, record(key_id=key["id"], organisation="team-a"), record(organisation="team-a", at=NOON - DAY))

    of_keys = await key_use.budgets(plane.plane, [key, other])
    of_teams = await spend.uses(plane.plane, "organisation", {"team-a": {"tokens": 4000, "per": "day"}, "team-b": None})

    assert of_keys.keys() == {key["id"]}
    one = of_keys[key["id"]]
    assert (one.unit, one.amount, one.spent, one.share, one.soft) == ("cost", 1_000_000, 142_240, 0.14224, 0.8)
    assert (of_teams["team-a"].spent, of_teams["team-a"].resets_at) == (932, NOON + DAY // 2)
