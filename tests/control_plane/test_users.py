"""Users: made with a one-time URL, changed, ended; and the first admin."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import select

from control_plane.data.tables import audit, sessions, setups, users
from control_plane.plane import offline
from control_plane.services import bootstrap
from control_plane.settings import Settings
from tests.control_plane.conftest import Running
from tests.control_plane.people import (
    PASSWORD,
    SAME_ORIGIN,
    acting_as,
    changed,
    error,
    log_in,
    make_organisation,
    make_user,
)

pytestmark = pytest.mark.anyio
BOB = {"name": "bob", "email": "Bob@Example.org", "title": "Bob"}


async def choose(running: Running, url: str, password: str = PASSWORD, **fields: Any) -> httpx.Response:
    """Send the form behind a one-time URL."""
    options = {"headers": fields.pop("headers", {})}
    given = {"password": password, "password_confirm": password, **fields}
    path = url.partition("8081")[2]
    assert path.startswith("/console/setup?token="), url
    # With the cookie of a session the form would need its origin.
    running.client.cookies.clear()
    return await running.client.post(path, data=given, **options)


async def test_a_new_user_chooses_a_password_once(plane: Running) -> None:
    made = await plane.admin.post("/api/v1/users", json=BOB)
    url = made.json()["setup_url"]
    form = await plane.client.get(url.partition("8081")[2])
    short, other = await choose(plane, url, "short"), await choose(plane, url, password_confirm="another password")
    chosen = await choose(plane, url, name="mallory", email="mallory@example.org")
    again = await choose(plane, url)

    assert made.status_code == 201
    assert made.headers["location"] == "/api/v1/users/bob"
    assert made.json() == {
        "name": "bob",
        "email": "bob@example.org",
        "title": "Bob",
        "platform_role": None,
        "disabled": False,
        "memberships": [],
        "created_at": "2026-11-28T12:00:00Z",
        "created_by": "ana",
        "last_login_at": None,
        "setup_url": url,
    }
    assert 'value="bob"' in form.text
    assert form.headers["content-security-policy"].startswith("default-src 'none';")
    assert form.headers["cache-control"] == "no-store"
    assert [short.status_code, other.status_code, chosen.status_code, again.status_code] == [422, 422, 303, 404]
    assert chosen.headers["location"] == "/console/login"
    assert "set-cookie" not in chosen.headers
    assert (await log_in(plane, "bob")).json()["name"] == "bob"
    assert "setup_url" not in (await plane.admin.get("/api/v1/users/bob")).json()


async def test_a_one_time_url_holds_a_day_and_until_the_next(sqlite_plane: Running) -> None:
    urls = [(await sqlite_plane.admin.post("/api/v1/users", json=BOB)).json()["setup_url"]]
    for _ in range(2):
        urls.append((await sqlite_plane.admin.post("/api/v1/users/bob/setup")).json()["setup_url"])
    replaced = await choose(sqlite_plane, urls[0])
    sqlite_plane.clock.advance(86_400)

    assert [replaced.status_code, (await choose(sqlite_plane, urls[2])).status_code] == [404, 404]


async def test_two_at_the_same_moment_use_a_url_once(plane: Running) -> None:
    url = (await plane.admin.post("/api/v1/users", json=BOB)).json()["setup_url"]

    answers = await asyncio.gather(*(choose(plane, url, f"the password of {place}") for place in range(4)))

    assert sorted(answer.status_code for answer in answers) == [303, 404, 404, 404]


async def test_another_site_cannot_send_the_form(sqlite_plane: Running) -> None:
    url = (await sqlite_plane.admin.post("/api/v1/users", json=BOB)).json()["setup_url"]

    answers = [
        await choose(sqlite_plane, url, headers=headers)
        for headers in ({"sec-fetch-site": "cross-site"}, {"origin": "null"}, SAME_ORIGIN)
    ]

    assert [answer.status_code for answer in answers] == [403, 403, 303]


async def test_names_and_addresses_are_taken_once(plane: Running) -> None:
    await plane.admin.post("/api/v1/users", json=BOB)
    name = await plane.admin.post("/api/v1/users", json={**BOB, "email": "other@example.org"})
    email = await plane.admin.post("/api/v1/users", json={**BOB, "name": "other"})
    await plane.admin.post("/api/v1/users", json={"name": "eve", "email": "eve@example.org"})
    moved = await changed(plane.admin, "PATCH", "/api/v1/users/eve", json={"email": "bob@example.org"})
    await changed(plane.admin, "DELETE", "/api/v1/users/bob")
    ended = await plane.admin.post("/api/v1/users", json=BOB)
    free = await plane.admin.post("/api/v1/users", json={**BOB, "name": "other"})

    assert [error(answer) for answer in (name, ended)] == [(409, "name_taken", "name")] * 2
    assert [error(answer) for answer in (email, moved)] == [(409, "name_taken", "email")] * 2
    assert free.status_code == 201


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"email": "nobody"}, "email"),
        ({"name": "-bob"}, "name"),
        ({"name": "bob/eve"}, "name"),
        ({"platform_role": "owner"}, "platform_role"),
    ],
)
async def test_an_invalid_user_is_refused(sqlite_plane: Running, change: Mapping[str, str], param: str) -> None:
    answer = await sqlite_plane.admin.post("/api/v1/users", json={**BOB, **change})

    assert error(answer) == (422, "validation_error", param)
    assert "a long enough password" not in answer.text


async def test_a_user_is_changed_in_a_known_version(plane: Running) -> None:
    await make_user(plane, "bob")
    etag = (await plane.admin.get("/api/v1/users/bob")).headers["etag"]
    bare = await plane.admin.patch("/api/v1/users/bob", json={"title": "Robert"})
    first = await plane.admin.patch("/api/v1/users/bob", json={"title": "Robert"}, headers={"if-match": etag})
    late = await plane.admin.patch("/api/v1/users/bob", json={"title": "Bobby"}, headers={"if-match": etag})
    wrong = await changed(plane.admin, "PATCH", "/api/v1/users/bob", json={"disabled": "perhaps"})
    gone = await changed(plane.admin, "PATCH", "/api/v1/users/nobody", json={})

    assert [error(bare)[:2], error(late)[:2]] == [(428, "precondition_required"), (412, "precondition_failed")]
    assert (first.status_code, first.json()["title"]) == (200, "Robert")
    assert (await plane.admin.get("/api/v1/users/bob")).headers["etag"] == first.headers["etag"]
    assert error(wrong) == (422, "validation_error", "disabled")
    assert error(gone)[:2] == (404, "not_found")


async def test_who_is_disabled_or_ended_is_out_at_once(plane: Running) -> None:
    for change in ("PATCH", "DELETE"):
        name = f"bob-{change}"
        await make_user(plane, name)
        await make_organisation(plane, f"of-{name}", **{name: "owner"})
        await log_in(plane, name)
        async with acting_as(plane, name) as token:
            await changed(plane.admin, change, f"/api/v1/users/{name}", json={"disabled": True})

            assert (await plane.client.get("/api/v1/me")).status_code == 401
            assert (await token.get("/api/v1/me")).status_code == 401
        assert (await log_in(plane, name)).status_code == 401
    async with plane.plane.database.main.read() as connection:
        assert (await connection.execute(select(sessions))).all() == []
        row = (await connection.execute(select(users).where(users.c.name == "bob-DELETE"))).one()
    assert (row.email, row.title, row.password_hash, row.ended_at) == (None, None, None, plane.clock())
    assert (await plane.admin.get("/api/v1/users/bob-DELETE")).status_code == 404
    assert (await plane.admin.get("/api/v1/organisations/of-bob-DELETE/members")).json()["data"] == []


async def test_an_admin_ends_the_sessions_of_a_user(sqlite_plane: Running) -> None:
    await make_user(sqlite_plane, "bob")
    await log_in(sqlite_plane, "bob")

    answer = await sqlite_plane.admin.delete("/api/v1/users/bob/sessions")

    assert answer.status_code == 204
    assert (await sqlite_plane.client.get("/api/v1/me")).status_code == 401
    assert (await sqlite_plane.admin.delete("/api/v1/users/nobody/sessions")).status_code == 404


async def test_the_last_admin_stays(plane: Running) -> None:
    async def lose(method: str, **body: Any) -> httpx.Response:
        return await changed(plane.admin, method, "/api/v1/users/ana", **({"json": body} if body else {}))

    refused = [await lose("PATCH", platform_role="viewer"), await lose("PATCH", disabled=True), await lose("DELETE")]
    await make_user(plane, "bob", "admin")
    allowed = await lose("PATCH", platform_role=None)

    assert [error(answer)[:2] for answer in refused] == [(409, "last_admin")] * 3
    assert allowed.status_code == 200


async def test_two_admins_cannot_take_the_role_from_each_other(plane: Running) -> None:
    async with acting_as(plane, "bob", "admin") as bob:
        answers = await asyncio.gather(
            changed(plane.admin, "PATCH", "/api/v1/users/bob", json={"platform_role": None}),
            changed(bob, "PATCH", "/api/v1/users/ana", json={"platform_role": None}),
        )

    assert sorted(answer.status_code for answer in answers)[0] == 200
    assert sorted(answer.status_code for answer in answers)[1] in (401, 403, 409)


async def test_users_are_listed_page_by_page(sqlite_plane: Running) -> None:
    for name in ("bob", "carol", "dave"):
        await make_user(sqlite_plane, name)
    await make_organisation(sqlite_plane, "team-a", bob="owner")
    names, after = [], ""
    while after is not None:
        body = (await sqlite_plane.admin.get(f"/api/v1/users?limit=2{after and '&after='}{after}")).json()
        names += [(one["name"], one["memberships"]) for one in body["data"]]
        after = body["next"]

    assert [name for name, _ in names] == ["ana", "bob", "carol", "dave"]
    assert names[1][1] == [{"organisation": "team-a", "role": "owner"}]


async def test_no_address_is_in_the_audit_log(sqlite_plane: Running) -> None:
    await sqlite_plane.admin.post("/api/v1/users", json=BOB)
    await changed(sqlite_plane.admin, "PATCH", "/api/v1/users/bob", json={"email": "robert@example.org"})
    async with sqlite_plane.plane.database.main.read() as connection:
        rows = (await connection.execute(select(audit.c.before, audit.c.after))).all()

    assert [after for _, after in rows] == [
        {"title": "Bob", "platform_role": None, "disabled": False},
        {"email": "changed"},
    ]


# The first admin


async def without_admin(running: Running) -> None:
    async with running.plane.database.main.write() as connection:
        await connection.execute(users.update().values(platform_role=None))


async def test_without_an_admin_a_url_makes_one(plane: Running) -> None:
    await without_admin(plane)
    urls = [await bootstrap.prepare(plane.plane) for _ in range(2)]
    assert urls[0] is not None
    assert urls[1] is not None
    taken = await choose(plane, urls[0], name="ana", email="root@example.org")
    invalid = await choose(plane, urls[0], name="<b>", email="nobody")
    made = await choose(plane, urls[0], name="root", email="Root@Example.org")

    assert [taken.status_code, invalid.status_code, made.status_code] == [422, 422, 303]
    assert "&lt;b&gt;" in invalid.text
    assert "<b>" not in invalid.text
    assert (await log_in(plane, "root")).json()["platform_role"] == "admin"
    assert (await choose(plane, urls[1], name="eve", email="eve@example.org")).status_code == 404
    assert await bootstrap.prepare(plane.plane) is None


async def test_of_many_at_the_same_moment_one_is_the_first_admin(plane: Running) -> None:
    """Each pod has logged a URL of its own, and knows the settings of the first admin."""
    await without_admin(plane)
    urls = [str(await bootstrap.prepare(plane.plane)) for _ in range(3)]
    async with asyncio.TaskGroup() as group:
        tries = [
            group.create_task(choose(plane, urls[place % 3], name=f"eve{place}", email=f"eve{place}@example.org"))
            for place in range(9)
        ]
        starts = [
            group.create_task(bootstrap.make_admin(plane.plane, "root@example.org", None, PASSWORD, only_first=True))
            for _ in range(3)
        ]

    async with plane.plane.database.main.read() as connection:
        admins = (await connection.execute(select(users.c.name).where(users.c.platform_role == "admin"))).all()
    assert len(admins) == 1
    assert sorted({task.result().status_code for task in tries}) in ([303, 404], [404])
    assert [task.result() for task in starts] == [None] * 3


async def test_nobody_is_admin_by_being_first(sqlite_plane: Running) -> None:
    await without_admin(sqlite_plane)
    guess = await choose(sqlite_plane, "8081/console/setup?token=", name="eve", email="eve@example.org")
    await make_user(sqlite_plane, "bob")

    assert guess.status_code == 404
    assert (await log_in(sqlite_plane, "bob")).json()["platform_role"] is None


async def test_the_settings_name_the_first_admin_only(sqlite_url: str, tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text(f"{PASSWORD}\n")
    for email, admins in (("root@example.org", ["root"]), ("other@example.org", ["root"])):
        settings = Settings(database_url=sqlite_url, admin_email=email, admin_password_file=file)
        async with offline(settings) as plane:
            assert await bootstrap.prepare(plane) is None
            async with plane.database.main.read() as connection:
                query = select(users.c.name).where(users.c.platform_role == "admin")
                assert [row.name for row in await connection.execute(query)] == admins


async def test_a_weak_first_password_ends_the_start(sqlite_url: str, tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("short\n")
    settings = Settings(database_url=sqlite_url, admin_email="root@example.org", admin_password_file=file)
    async with offline(settings) as plane:
        with pytest.raises(bootstrap.BootstrapError, match="at least 12 characters"):
            await bootstrap.prepare(plane)


async def test_a_command_makes_an_admin_and_another_password(sqlite_plane: Running) -> None:
    plane = sqlite_plane.plane
    assert await bootstrap.make_admin(plane, "root@example.org", None, PASSWORD) is None
    assert (await log_in(sqlite_plane, "root")).json()["platform_role"] == "admin"
    with pytest.raises(bootstrap.BootstrapError, match="--reset"):
        await bootstrap.make_admin(plane, "root@example.org", None, PASSWORD)
    with pytest.raises(bootstrap.BootstrapError, match="leave out --reset"):
        await bootstrap.make_admin(plane, "nobody@example.org", None, PASSWORD, reset=True)
    await changed(sqlite_plane.admin, "PATCH", "/api/v1/users/root", json={"disabled": True})
    url = await bootstrap.make_admin(plane, "root@example.org", None, None, reset=True)
    assert url is not None

    assert (await choose(sqlite_plane, url, "another long password")).status_code == 303
    assert (await log_in(sqlite_plane, "root", "another long password")).status_code == 200


async def test_no_url_is_in_the_database(sqlite_plane: Running) -> None:
    url = (await sqlite_plane.admin.post("/api/v1/users", json=BOB)).json()["setup_url"]
    async with sqlite_plane.plane.database.main.read() as connection:
        row = (await connection.execute(select(setups))).one()

    assert url.partition("token=")[2] not in repr(row)
