"""/api/v1/limits, /budgets and /settings, and what of them is in GET /policy."""

from typing import Any

import httpx
import pytest
from sqlalchemy import insert, select

from control_plane.data.tables import config_kv
from tests.control_plane.conftest import NOON, Running, starting
from tests.control_plane.teams import changed, organisation, somebody
from tests.control_plane.test_keys import code, ended, made, patched, policy_of
from tests.control_plane.usage import record, taken

pytestmark = pytest.mark.anyio
LIMIT = {"scope": "user", "requests": 120, "per": 60}
BUDGET = {"scope": "user", "name": "ana", "tokens": 5_000_000, "per": "day"}
ITEMS = pytest.mark.parametrize(
    ("path", "item", "prefix"), [("/api/v1/limits", LIMIT, "lim_"), ("/api/v1/budgets", BUDGET, "bud_")]
)


def item_of(answer: httpx.Response) -> dict[str, Any]:
    return {name: value for name, value in answer.json().items() if name not in ("id", "spent", "resets_at")}


@ITEMS
async def test_it_is_made_read_replaced_and_deleted(plane: Running, path: str, item: Any, prefix: str) -> None:
    section = path.rpartition("/")[2]
    created = await plane.admin.post(path, json=item)
    url = f"{path}/{created.json()['id']}"
    assert (created.status_code, created.headers["location"], item_of(created)) == (201, url, item)
    assert created.json()["id"].startswith(prefix)
    assert (await policy_of(plane))[section] == [item]
    read = await plane.admin.get(url)
    assert (read.json(), read.headers["etag"]) == (created.json(), created.headers["etag"])
    new = {**item, "name": "bo"}
    assert code(await plane.admin.put(url, json=new)) == (428, "precondition_required")
    replaced = await plane.admin.put(url, json=new, headers={"if-match": read.headers["etag"]})
    assert (replaced.status_code, item_of(replaced)) == (200, new)
    assert code(await plane.admin.delete(url, headers={"if-match": read.headers["etag"]})) == (
        412,
        "precondition_failed",
    )
    # What was read can be sent back.
    again = await plane.admin.put(url, json=replaced.json(), headers={"if-match": replaced.headers["etag"]})
    assert again.headers["etag"] == replaced.headers["etag"]
    assert [one["id"] for one in (await plane.admin.get(path)).json()["data"]] == [created.json()["id"]]
    assert (await plane.admin.delete(url, headers={"if-match": replaced.headers["etag"]})).status_code == 204
    assert code(await plane.admin.get(url)) == (404, "not_found")
    assert (await policy_of(plane))[section] == []


@pytest.mark.parametrize("scope", ["organisation", "key"])
@ITEMS
async def test_a_name_must_be_there_and_what_has_ended_is_left_out(
    sqlite_plane: Running, path: str, item: Any, prefix: str, scope: str
) -> None:
    plane, section = sqlite_plane, path.rpartition("/")[2]
    await organisation(plane, "team-a")
    key = await made(plane.admin)
    refused = await plane.admin.post(path, json={**item, "scope": scope, "name": "nowhere"})
    assert (code(refused), refused.json()["error"]["param"]) == ((422, "validation_error"), "name")
    name = "team-a" if scope == "organisation" else key["id"]
    assert (await plane.admin.post(path, json={**item, "scope": scope, "name": name})).status_code == 201
    assert [one["name"] for one in (await policy_of(plane))[section]] == [name]
    if scope == "organisation":
        await changed(plane, "team-a", ended_at=plane.clock.now)
    else:
        await ended(plane.admin, key["id"])

    assert (await policy_of(plane))[section] == []


async def test_a_second_budget_of_one_holder_is_a_conflict(plane: Running) -> None:
    first = await plane.admin.post("/api/v1/budgets", json=BUDGET)
    assert first.status_code == 201
    assert code(await plane.admin.post("/api/v1/budgets", json={**BUDGET, "tokens": 1})) == (409, "name_taken")
    for other in ({"per": "week"}, {"name": "bo"}, {"tokens": None, "requests": 1}):
        more = {name: value for name, value in {**BUDGET, **other}.items() if value is not None}
        assert (await plane.admin.post("/api/v1/budgets", json=more)).status_code == 201
    nobody = {"scope": "user", "tokens": 1, "per": "day"}
    assert (await plane.admin.post("/api/v1/budgets", json=nobody)).status_code == 201
    assert code(await plane.admin.post("/api/v1/budgets", json=nobody)) == (409, "name_taken")
    await policy_of(plane)


async def test_an_own_budget_and_one_of_the_platform_are_two(sqlite_plane: Running) -> None:
    plane = sqlite_plane
    own = {"cost": 5, "per": "month"}
    await organisation(plane, "team-a", budget=own)
    key = await made(plane.admin, budget=own)
    for scope, name in (("organisation", "team-a"), ("key", key["id"])):
        budget = {"scope": scope, "name": name, "cost": 1, "per": "month"}
        assert code(await plane.admin.post("/api/v1/budgets", json=budget)) == (409, "name_taken")
        assert (await plane.admin.post("/api/v1/budgets", json={**budget, "per": "day"})).status_code == 201
    assert code(await patched(plane.admin, key["id"], budget={"per": "day"})) == (409, "name_taken")
    await policy_of(plane)


async def test_a_budget_is_read_with_what_is_spent(sqlite_plane: Running) -> None:
    made = (await sqlite_plane.admin.post("/api/v1/budgets", json=BUDGET)).json()
    assert (made["spent"], made["resets_at"]) == (0, "2026-11-29T00:00:00Z")
    each = (await sqlite_plane.admin.post("/api/v1/budgets", json={**BUDGET, "name": None})).json()
    assert each["spent"] is None
    await taken(sqlite_plane, record(user="ana", input_tokens=300, output_tokens=20))
    sqlite_plane.clock.advance(10)

    read = await sqlite_plane.admin.get(f"/api/v1/budgets/{made['id']}")
    assert read.json()["spent"] == 320


REFUSED: list[tuple[str, Any, str]] = [
    ("/api/v1/limits", {"scope": "nobody", "requests": 1, "per": 60}, "scope"),
    ("/api/v1/limits", {"scope": "all", "name": "x", "requests": 1, "per": 60}, "body"),
    ("/api/v1/limits", {"scope": "user", "requests": 2**53, "per": 60}, "requests"),
    ("/api/v1/budgets", {"scope": "address", "tokens": 1, "per": "day"}, "scope"),
    ("/api/v1/budgets", {"scope": "user", "cost": 1e-10, "per": "day"}, "body"),
    ("/api/v1/budgets", {"scope": "user", "tokens": 1, "per": "year"}, "per"),
]


async def test_what_no_router_would_take_is_refused(sqlite_plane: Running) -> None:
    for path, item, param in REFUSED:
        refused = await sqlite_plane.admin.post(path, json=item)

        assert code(refused) == (422, "validation_error")
        assert refused.json()["error"]["param"] == param


async def test_they_are_the_admins(sqlite_plane: Running) -> None:
    paths = ("/api/v1/limits", "/api/v1/budgets", "/api/v1/settings")
    for role in ("operator", "viewer"):
        async with somebody(sqlite_plane, role, role) as client:
            for path in paths:
                assert code(await client.get(path)) == (403, "forbidden")
    await organisation(sqlite_plane, "team-a")
    async with somebody(sqlite_plane, "ow", team_a="owner") as owner:
        for path in paths:
            assert code(await owner.get(path)) == (403, "forbidden")
        assert code(await owner.post("/api/v1/limits", json=LIMIT)) == (403, "forbidden")


async def test_a_setting_is_a_default_until_it_is_changed(plane: Running) -> None:
    url = "/api/v1/settings/usage.hourly_days"
    before = await plane.admin.get(url)
    assert before.json() == {"key": "usage.hourly_days", "value": 400, "source": "default"}
    assert code(await plane.admin.put(url, json={"value": 30})) == (428, "precondition_required")
    put = await plane.admin.put(url, json={"value": 30}, headers={"if-none-match": "*"})
    assert put.json() == {"key": "usage.hourly_days", "value": 30, "source": "database"}
    assert code(await plane.admin.put(url, json={"value": 31}, headers={"if-none-match": "*"})) == (
        412,
        "precondition_failed",
    )
    etag = put.headers["etag"]
    assert code(await plane.admin.put(url, json={"value": 0}, headers={"if-match": etag})) == (422, "validation_error")
    assert (await plane.admin.delete(url, headers={"if-match": etag})).status_code == 204
    assert (await plane.admin.get(url)).json() == before.json()
    assert code(await plane.admin.get("/api/v1/settings/nothing")) == (404, "not_found")
    keys = [one["key"] for one in (await plane.admin.get("/api/v1/settings")).json()["data"]]
    assert keys == ["anonymous.limits", "usage.hourly_days", "usage.record_days"]


async def test_limits_of_anonymous_callers_are_a_setting(plane: Running) -> None:
    url, limits = "/api/v1/settings/anonymous.limits", [{"requests": 10, "per": 60}]
    put = await plane.admin.put(url, json={"value": limits}, headers={"if-none-match": "*"})
    assert put.status_code == 200

    assert (await policy_of(plane))["anonymous"] == {"limits": limits}
    refused = await plane.admin.put(url, json={"value": [{"per": 1}]}, headers={"if-match": put.headers["etag"]})
    assert (code(refused), refused.json()["error"]["param"]) == ((422, "validation_error"), "value.0")


async def test_the_environment_stands_above_the_database(sqlite_url: str) -> None:
    async with starting(sqlite_url) as start:
        plane = await start(usage_days=3)
        read = await plane.admin.get("/api/v1/settings/usage.record_days")
        assert read.json() == {"key": "usage.record_days", "value": 3, "source": "environment"}
        refused = await plane.admin.put(
            "/api/v1/settings/usage.record_days", json={"value": 9}, headers={"if-match": read.headers["etag"]}
        )

        assert code(refused) == (422, "validation_error")
        assert "CONTROL_PLANE_USAGE_DAYS" in refused.json()["error"]["message"]


async def test_what_another_release_has_set_stays(sqlite_plane: Running) -> None:
    async with sqlite_plane.plane.database.main.write() as connection:
        for key, value in (("later.key", {"x": 1}), ("usage.hourly_days", "a lot")):
            await connection.execute(insert(config_kv).values(key=key, value=value, updated_at=NOON))
    assert (await sqlite_plane.admin.get("/api/v1/settings/later.key")).status_code == 404
    assert (await sqlite_plane.admin.get("/api/v1/settings/usage.hourly_days")).json()["value"] == 400

    async with sqlite_plane.plane.database.main.read() as connection:
        assert set((await connection.execute(select(config_kv.c.key))).scalars()) == {"later.key", "usage.hourly_days"}
