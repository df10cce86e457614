"""Organisations and their members."""

import asyncio
from typing import Any

import pytest
from sqlalchemy import insert, select

from control_plane.data.tables import budgets, keys, limits, revisions, tokens
from tests.control_plane.conftest import NOON, Running
from tests.control_plane.people import acting_as, changed, error, make_organisation, make_user

pytestmark = pytest.mark.anyio
TEAM = {
    "name": "team-a",
    "title": "Team A",
    "models": ["llama-*", "chat"],
    "limits": [{"requests": 600, "per": 60}, {"streams": 50}],
    "budget": {"cost": 500, "per": "month", "soft": 0.7},
}
PATH = "/api/v1/organisations/team-a"


async def revision(running: Running) -> int:
    async with running.plane.database.main.read() as connection:
        query = select(revisions.c.revision).where(revisions.c.document == "policy")
        found: int = (await connection.execute(query)).scalar_one()
    return found


async def test_an_organisation_is_made_changed_and_ended(plane: Running) -> None:
    before = await revision(plane)
    made = await plane.admin.post("/api/v1/organisations", json=TEAM)
    again = await plane.admin.post("/api/v1/organisations", json=TEAM)
    patch = {"title": None, "models": None, "budget": {"soft": None, "cost": 600}}
    patched = await changed(plane.admin, "PATCH", PATH, json=patch)
    renamed = await changed(plane.admin, "PATCH", PATH, json={"name": "team-b"})
    ended = await changed(plane.admin, "DELETE", PATH)
    reused = await plane.admin.post("/api/v1/organisations", json=TEAM)

    assert made.status_code == 201
    assert made.headers["location"] == PATH
    shown = {"disabled": False, "created_at": "2026-11-28T12:00:00Z", "created_by": "ana"}
    assert made.json() == {**TEAM, **shown}
    assert patched.json() == {
        **TEAM,
        **shown,
        "title": None,
        "models": None,
        "budget": {"cost": 600, "per": "month"},
    }
    assert [error(answer) for answer in (again, reused)] == [(409, "name_taken", "name")] * 2
    assert (renamed.status_code, renamed.json()["name"]) == (200, "team-a")
    assert ended.status_code == 204
    assert (await plane.admin.get(PATH)).status_code == 404
    assert await revision(plane) == before + 4


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"limits": [{"requests": 0, "per": 60}]}, "limits.0.requests"),
        ({"limits": [{"requests": 1}]}, "limits.0"),
        ({"budget": {"cost": 1, "per": "year"}}, "budget.per"),
        ({"models": ["a b"]}, "models.0"),
    ],
)
async def test_an_invalid_organisation_is_refused(sqlite_plane: Running, change: dict[str, Any], param: str) -> None:
    made = await sqlite_plane.admin.post("/api/v1/organisations", json={**TEAM, **change})
    await sqlite_plane.admin.post("/api/v1/organisations", json=TEAM)
    patched = await changed(sqlite_plane.admin, "PATCH", PATH, json=change)

    assert error(made) == error(patched) == (422, "validation_error", param)


async def test_what_an_organisation_has_ends_with_it(plane: Running) -> None:
    await make_user(plane, "bob", password=None)
    await make_organisation(plane, "team-a", bob="owner")
    async with plane.plane.database.main.write() as connection:
        row = {"name": "x", "disabled": False, "created_at": NOON, "organisation": "team-a"}
        values = {"limits": [], "priority": 0, "weight": 1.0, "revision": 0}
        await connection.execute(insert(keys).values(id="a" * 12, digest="sha256:a", **row, **values))
        await connection.execute(
            insert(tokens).values(id="b" * 12, digest="sha256:b", kind="management", user="bob", **row)
        )
    async with acting_as(plane, "bob") as bob:
        assert (await bob.get(PATH)).status_code == 200
        await changed(plane.admin, "DELETE", PATH)

        assert (await bob.get(PATH)).status_code in (403, 404)
        assert (await bob.get("/api/v1/me")).json()["memberships"] == []
    policy = (await plane.router.get("/policy")).json()
    assert (policy["organisations"], policy["keys"]) == ([], [])
    assert (await plane.admin.get(f"/api/v1/keys/{'a' * 12}")).json()["state"] == "ended"
    async with plane.plane.database.main.read() as connection:
        query = select(tokens.c.ended_at).where(tokens.c.organisation == "team-a")
        assert (await connection.execute(query)).scalar_one() == plane.clock()


async def test_an_owner_changes_title_limits_and_budget_below_the_platforms(plane: Running) -> None:
    await make_user(plane, "bob", password=None)
    await make_organisation(plane, "team-a", bob="owner")
    async with plane.plane.database.main.write() as connection:
        for place, body in enumerate(
            (
                {"scope": "organisation", "requests": 100, "per": 60},
                {"scope": "organisation", "name": "team-b", "streams": 1},
                {"scope": "key", "requests": 1, "per": 60},
            )
        ):
            await connection.execute(insert(limits).values(id=f"lim_{place}", body=body, created_at=NOON))
        body = {"scope": "all", "cost": 50, "per": "month"}
        row = {"scope": "all", "name": "", "unit": "cost", "per": "month", "body": body}
        await connection.execute(insert(budgets).values(id="bud_0", created_at=NOON, **row))

    async with acting_as(plane, "bob") as bob:
        fine = {"title": "A", "limits": [{"requests": 100, "per": 60}, {"streams": 9}], "budget": TEAM["budget"]}
        fine["budget"] = {"cost": 50, "per": "month"}
        done = await changed(bob, "PATCH", PATH, json=fine)
        more = await changed(bob, "PATCH", PATH, json={"limits": [{"streams": 1}, {"requests": 101, "per": 60}]})
        dear = await changed(bob, "PATCH", PATH, json={"budget": {"cost": 50.000000001, "per": "month"}})
        models = await changed(bob, "PATCH", PATH, json={"models": []})
        off = await changed(bob, "PATCH", PATH, json={"disabled": True})
    by_admin = await changed(plane.admin, "PATCH", PATH, json={"limits": [{"requests": 101, "per": 60}]})

    assert done.status_code == 200
    assert error(more) == (422, "validation_error", "limits.1.requests")
    assert error(dear) == (422, "validation_error", "budget.cost")
    assert [error(answer)[:2] for answer in (models, off)] == [(403, "forbidden")] * 2
    assert by_admin.status_code == 200


async def test_members_are_made_changed_and_ended(plane: Running) -> None:
    await make_user(plane, "bob", password=None)
    await make_organisation(plane, "team-a")
    path = f"{PATH}/members/bob"
    bare = await plane.admin.put(path, json={"role": "member"})
    made = await plane.admin.put(path, json={"role": "member"}, headers={"if-none-match": "*"})
    again = await plane.admin.put(path, json={"role": "viewer"}, headers={"if-none-match": "*"})
    moved = await changed(plane.admin, "PUT", path, json={"role": "viewer"})
    listed = (await plane.admin.get(f"{PATH}/members")).json()
    ended = await changed(plane.admin, "DELETE", path)

    assert [answer.status_code for answer in (bare, made, again, moved, ended)] == [428, 201, 412, 200, 204]
    shown = {"user": "bob", "title": None, "role": "viewer", "created_at": "2026-11-28T12:00:00Z"}
    assert listed == {"data": [shown], "next": None}
    assert (await plane.admin.get(path)).status_code == 404
    for place in (f"{PATH}/members/nobody", "/api/v1/organisations/team-b/members/bob"):
        answer = await plane.admin.put(place, json={"role": "member"}, headers={"if-none-match": "*"})
        assert error(answer)[:2] == (404, "not_found")


async def test_an_admin_of_an_organisation_changes_no_owner(sqlite_plane: Running) -> None:
    for name in ("olga", "adam", "mia"):
        await make_user(sqlite_plane, name, password=None)
    await make_organisation(sqlite_plane, "team-a", olga="owner", adam="admin", mia="member")

    async with acting_as(sqlite_plane, "adam") as adam:
        refused = [
            await changed(adam, "PUT", f"{PATH}/members/olga", json={"role": "member"}),
            await changed(adam, "DELETE", f"{PATH}/members/olga"),
            await changed(adam, "PUT", f"{PATH}/members/mia", json={"role": "owner"}),
            await changed(adam, "PUT", f"{PATH}/members/adam", json={"role": "owner"}),
        ]
        allowed = await changed(adam, "PUT", f"{PATH}/members/mia", json={"role": "admin"})

    assert [error(answer)[:2] for answer in refused] == [(403, "forbidden")] * 4
    assert allowed.status_code == 200


async def test_the_last_owner_stays_unless_an_admin_of_the_platform_decides(sqlite_plane: Running) -> None:
    await make_user(sqlite_plane, "olga", password=None)
    await make_organisation(sqlite_plane, "team-a", olga="owner")
    path = f"{PATH}/members/olga"

    async with acting_as(sqlite_plane, "olga") as olga:
        lower = await changed(olga, "PUT", path, json={"role": "admin"})
        leave = await changed(olga, "DELETE", path)

    assert [error(answer)[:2] for answer in (lower, leave)] == [(409, "last_admin")] * 2
    assert (await changed(sqlite_plane.admin, "DELETE", path)).status_code == 204


async def test_two_owners_cannot_leave_at_the_same_moment(plane: Running) -> None:
    for name in ("olga", "otto"):
        await make_user(plane, name, password=None)
    await make_organisation(plane, "team-a", olga="owner", otto="owner")

    async with acting_as(plane, "olga") as olga, acting_as(plane, "otto") as otto:
        answers = await asyncio.gather(
            changed(olga, "DELETE", f"{PATH}/members/olga"), changed(otto, "DELETE", f"{PATH}/members/otto")
        )

    assert sorted(answer.status_code for answer in answers) == [204, 409]


async def test_other_organisations_look_like_none(sqlite_plane: Running) -> None:
    await make_user(sqlite_plane, "olga", password=None)
    await make_organisation(sqlite_plane, "team-a", olga="owner")
    await make_organisation(sqlite_plane, "team-b")

    async with acting_as(sqlite_plane, "olga") as olga:
        listed = (await olga.get("/api/v1/organisations")).json()["data"]
        for path in ("team-b", "team-b/members", "team-b/members/ana", "team-c", "team-c/members"):
            answer = await olga.get(f"/api/v1/organisations/{path}")
            other = answer.json()
            assert error(answer)[:2] == (404, "not_found"), path
            assert path.partition("/")[0] in other["error"]["message"]
        for method, path in (("PATCH", "team-b"), ("PUT", "team-b/members/ana"), ("DELETE", "team-b/members/ana")):
            body = {"title": "x"} if method == "PATCH" else {"role": "member"}
            answer = await olga.request(method, f"/api/v1/organisations/{path}", json=body, headers={"if-match": "*"})
            assert error(answer)[:2] == (404, "not_found"), path

    assert [one["name"] for one in listed] == ["team-a"]
