"""Sessions of people: logins, cookies, protection from other sites, and what ends them."""

import asyncio
import re
from typing import Any

import httpx
import pytest
from argon2 import PasswordHasher
from sqlalchemy import insert, select, update

from control_plane.data.tables import audit, memberships, organisations, sessions, users
from tests.control_plane.conftest import NOON, Running
from tests.control_plane.people import PASSWORD, SAME_ORIGIN, log_in, make_user

pytestmark = pytest.mark.anyio


async def test_a_login_answers_who_it_is_with_a_cookie(plane: Running) -> None:
    await make_user(plane, "bob", "viewer")

    answer = await log_in(plane, "bob")
    me = await plane.client.get("/api/v1/me")

    assert answer.status_code == 200
    assert answer.json() == {
        "name": "bob",
        "email": "bob@example.org",
        "title": None,
        "platform_role": "viewer",
        "memberships": [],
    }
    assert re.fullmatch(
        r"ia_session=[\w-]{43}; Path=/; Max-Age=604800; HttpOnly; SameSite=Lax", answer.headers["set-cookie"]
    )
    assert me.json() == answer.json()
    assert "set-cookie" not in me.headers


async def test_every_answer_of_the_api_is_private(sqlite_plane: Running) -> None:
    for path in ("/api/v1/me", "/api/v1/openapi.json", "/api/v1/nothing"):
        answer = await sqlite_plane.client.get(path)

        assert answer.headers["cache-control"] == "no-store", path
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["x-request-id"]


async def test_a_session_begins_anew_at_a_login(plane: Running) -> None:
    await make_user(plane, "bob")
    chosen = {**SAME_ORIGIN, "cookie": "ia_session=chosen-by-somebody-else"}

    first = await log_in(plane, "bob", headers=chosen)
    old = plane.client.cookies["ia_session"]
    second = await log_in(plane, "bob")

    assert first.status_code == second.status_code == 200
    assert "chosen-by-somebody-else" not in first.headers["set-cookie"]
    assert plane.client.cookies["ia_session"] != old
    assert (await get_me(plane, old)).status_code == 401


async def get_me(running: Running, secret: str) -> httpx.Response:
    async with httpx.AsyncClient(base_url=running.url, trust_env=False) as client:
        return await client.get("/api/v1/me", headers={"cookie": f"ia_session={secret}"})


async def test_a_session_ends_by_idleness_and_by_age(sqlite_plane: Running) -> None:
    hours = 3600
    for name, role, lives in (("bob", None, 7 * 24), ("eve", "admin", 24)):
        await make_user(sqlite_plane, name, role)
        await log_in(sqlite_plane, name)
        for _ in range(lives // 4 - 1):
            sqlite_plane.clock.advance(4 * hours)
            assert (await sqlite_plane.client.get("/api/v1/me")).status_code == 200
        sqlite_plane.clock.advance(4 * hours)

        assert (await sqlite_plane.client.get("/api/v1/me")).status_code == 401

    await log_in(sqlite_plane, "bob")
    sqlite_plane.clock.advance(8 * hours)
    assert (await sqlite_plane.client.get("/api/v1/me")).status_code == 401


async def test_the_last_use_is_written_once_a_minute(sqlite_plane: Running) -> None:
    await make_user(sqlite_plane, "bob")
    await log_in(sqlite_plane, "bob")
    seen = []
    for _ in range(4):
        sqlite_plane.clock.advance(31)
        await sqlite_plane.client.get("/api/v1/me")
        async with sqlite_plane.plane.database.main.read() as connection:
            seen.append((await connection.execute(select(sessions.c.seen_at))).scalar_one() - NOON)

    assert seen == [0, 62_000, 62_000, 124_000]


async def test_a_change_of_rights_gives_the_session_another_secret(plane: Running) -> None:
    await make_user(plane, "bob")
    await log_in(plane, "bob")
    old = plane.client.cookies["ia_session"]
    async with plane.plane.database.main.write() as connection:
        await connection.execute(update(users).where(users.c.name == "bob").values(platform_role="operator"))

    renewed = await plane.client.get("/api/v1/me")
    under_way = await get_me(plane, old)
    plane.clock.advance(11)

    assert renewed.json()["platform_role"] == "operator"
    assert renewed.headers["set-cookie"].startswith("ia_session=")
    assert plane.client.cookies["ia_session"] != old
    assert under_way.status_code == 200
    assert "set-cookie" not in under_way.headers
    assert (await get_me(plane, old)).status_code == 401
    assert (await plane.client.get("/api/v1/me")).status_code == 200


async def test_who_becomes_an_admin_logs_in_anew_after_a_day(sqlite_plane: Running) -> None:
    await make_user(sqlite_plane, "bob")
    await log_in(sqlite_plane, "bob")
    for _ in range(4):
        sqlite_plane.clock.advance(7 * 3600)
        await sqlite_plane.client.get("/api/v1/me")
    async with sqlite_plane.plane.database.main.write() as connection:
        await connection.execute(update(users).where(users.c.name == "bob").values(platform_role="admin"))

    assert (await sqlite_plane.client.get("/api/v1/me")).status_code == 401


async def test_rights_that_are_lost_are_lost_at_the_next_request(plane: Running) -> None:
    await make_user(plane, "bob")
    async with plane.plane.database.main.write() as connection:
        await connection.execute(insert(organisations).values(name="team-a", limits=[], created_at=NOON))
        row = {"organisation": "team-a", "user": "bob", "role": "owner", "created_at": NOON}
        await connection.execute(insert(memberships).values(**row))
    mine = (await log_in(plane, "bob")).json()["memberships"]
    async with plane.plane.database.main.write() as connection:
        await connection.execute(update(organisations).values(ended_at=NOON))
    after = (await plane.client.get("/api/v1/me")).json()["memberships"]
    async with plane.plane.database.main.write() as connection:
        await connection.execute(update(users).where(users.c.name == "bob").values(disabled=True))

    assert mine == [{"organisation": "team-a", "role": "owner"}]
    assert after == []
    assert (await plane.client.get("/api/v1/me")).status_code == 401


async def test_a_session_is_ended_by_a_logout(plane: Running) -> None:
    await make_user(plane, "bob")
    await log_in(plane, "bob")
    secret = plane.client.cookies["ia_session"]

    answer = await plane.client.delete("/api/v1/session", headers=SAME_ORIGIN)

    assert answer.status_code == 204
    assert "ia_session=;" in answer.headers["set-cookie"]
    assert "Max-Age=0" in answer.headers["set-cookie"]
    assert (await get_me(plane, secret)).status_code == 401


async def test_the_own_sessions_are_listed_and_ended(plane: Running) -> None:
    await make_user(plane, "bob")
    secrets = []
    for agent in ("phone", "desk", "laptop"):
        plane.client.cookies.clear()
        plane.clock.advance(1)
        await log_in(plane, "bob", headers={**SAME_ORIGIN, "user-agent": agent})
        secrets.append(plane.client.cookies["ia_session"])

    first = (await plane.client.get("/api/v1/me/sessions?limit=2")).json()
    second = (await plane.client.get(f"/api/v1/me/sessions?limit=2&after={first['next']}")).json()
    phone = second["data"][0]
    one = await plane.client.get(f"/api/v1/me/sessions/{phone['id']}")
    bare = await plane.client.delete(f"/api/v1/me/sessions/{phone['id']}", headers=SAME_ORIGIN)
    condition = {**SAME_ORIGIN, "if-match": one.headers["etag"]}
    ended = await plane.client.delete(f"/api/v1/me/sessions/{phone['id']}", headers=condition)

    assert [row["agent"] for row in first["data"]] == ["laptop", "desk"]
    assert [row["current"] for row in first["data"]] == [True, False]
    assert (phone["agent"], second["next"]) == ("phone", None)
    assert [bare.status_code, ended.status_code] == [428, 204]
    assert [(await get_me(plane, secret)).status_code for secret in secrets] == [401, 200, 200]
    await plane.client.delete("/api/v1/me/sessions", headers=SAME_ORIGIN)
    assert [(await get_me(plane, secret)).status_code for secret in secrets] == [401, 401, 200]


async def test_another_password_ends_all_other_sessions(plane: Running) -> None:
    await make_user(plane, "bob")
    await log_in(plane, "bob")
    other = plane.client.cookies["ia_session"]
    plane.client.cookies.clear()
    await log_in(plane, "bob")
    mine = plane.client.cookies["ia_session"]
    etag = (await plane.client.get("/api/v1/me")).headers["etag"]

    async def change(current: str, new: str) -> httpx.Response:
        headers = {**SAME_ORIGIN, "if-match": etag}
        body = {"password": {"current": current, "new": new}}
        return await plane.client.patch("/api/v1/me", json=body, headers=headers)

    wrong, short = await change("wrong", "another long password"), await change(PASSWORD, "short")
    common, name = await change(PASSWORD, "Password1234"), await change(PASSWORD, "bob@example.org")
    changed = await change(PASSWORD, "another long password")

    assert [answer.status_code for answer in (wrong, short, common, name, changed)] == [422, 422, 422, 422, 200]
    assert wrong.json()["error"]["param"] == "password.current"
    assert {answer.json()["error"]["param"] for answer in (short, common, name)} == {"password.new"}
    assert (await get_me(plane, other)).status_code == 401
    assert (await get_me(plane, mine)).status_code == 401
    assert (await plane.client.get("/api/v1/me")).status_code == 200
    assert (await log_in(plane, "bob")).status_code == 401
    assert (await log_in(plane, "bob", "another long password")).status_code == 200


@pytest.mark.parametrize(
    ("headers", "passes"),
    [
        ({"sec-fetch-site": "same-origin"}, True),
        ({"sec-fetch-site": "same-origin", "origin": "https://evil.example"}, True),
        ({"origin": "https://console.example"}, True),
        ({"sec-fetch-site": "same-site"}, False),
        ({"sec-fetch-site": "cross-site"}, False),
        ({"sec-fetch-site": "none"}, False),
        ({"sec-fetch-site": "cross-site", "origin": "https://console.example"}, False),
        ({"origin": "https://evil.example"}, False),
        ({"origin": "http://console.example"}, False),
        ({"origin": "https://console.example:444"}, False),
        ({"origin": "null"}, False),
        ({"host": "console.example"}, False),
        ({"referer": "https://console.example/"}, False),
        ({}, False),
    ],
)
async def test_other_sites_cannot_use_a_cookie(start_sqlite: Any, headers: dict[str, str], passes: bool) -> None:
    running = await start_sqlite(public_url="https://console.example/somewhere")
    await make_user(running, "bob")
    answer = await log_in(running, "bob", headers=headers)
    made = (await log_in(running, "bob")).headers["set-cookie"]
    cookie = {"cookie": made.partition(";")[0]}
    assert made.startswith("__Host-ia_session=")
    assert made.endswith("; HttpOnly; SameSite=Lax; Secure")

    changes = [
        await running.client.request(method, path, headers={**headers, **cookie})
        for method, path in (
            ("POST", "/api/v1/organisations"),
            ("PUT", "/api/v1/models/x"),
            ("PATCH", "/api/v1/me"),
            ("DELETE", "/api/v1/me/sessions"),
            ("OPTIONS", "/api/v1/me"),
        )
    ]
    read = await running.client.get("/api/v1/me", headers={**headers, **cookie})

    assert read.status_code == 200
    assert (answer.status_code == 200) is passes
    for refused in changes:
        assert (refused.status_code == 403 and refused.json()["error"]["code"] == "csrf") is not passes


async def test_a_token_needs_no_origin(sqlite_plane: Running) -> None:
    await make_user(sqlite_plane, "bob")
    await log_in(sqlite_plane, "bob")
    sqlite_plane.admin.cookies = sqlite_plane.client.cookies

    answer = await sqlite_plane.admin.delete("/api/v1/me/sessions")

    assert answer.status_code == 204
    assert (await sqlite_plane.client.get("/api/v1/me")).status_code == 200, "it was ana's token that acted"


async def test_a_wrong_token_is_not_saved_by_a_cookie(sqlite_plane: Running) -> None:
    await make_user(sqlite_plane, "bob")
    await log_in(sqlite_plane, "bob")

    for given in ("Bearer nonsense", "Basic Ym9iOmJvYg==", f"Bearer {sqlite_plane.url}"):
        answer = await sqlite_plane.client.get("/api/v1/me", headers={"authorization": given})

        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "not_authenticated"


async def test_all_wrong_logins_look_alike_and_cost_the_same(plane: Running) -> None:
    await make_user(plane, "bob")
    await make_user(plane, "eve")
    await make_user(plane, "oscar", password=None)
    async with plane.plane.database.main.write() as connection:
        await connection.execute(update(users).where(users.c.name == "eve").values(disabled=True))
    answers = []
    for name, password in (("nobody", PASSWORD), ("bob", "wrong"), ("eve", PASSWORD), ("oscar", PASSWORD)):
        before = await hashes(plane)
        answer = await log_in(plane, name, password)
        assert await hashes(plane) == before + 1
        body = answer.json()
        del body["request_id"]
        answers.append((answer.status_code, body))

    assert all(answer == answers[0] for answer in answers)
    assert answers[0][0] == 401
    assert answers[0][1]["error"]["code"] == "invalid_login"
    assert answers[0][1]["error"]["message"] == "E-mail or password is wrong."


async def hashes(running: Running) -> float:
    found = re.search(r"control_plane_password_hashes_total ([\d.]+)", (await running.client.get("/metrics")).text)
    assert found is not None
    return float(found[1])


async def test_logins_are_throttled_for_the_right_password_too(plane: Running) -> None:
    await make_user(plane, "bob")
    free = [(await log_in(plane, "bob", "wrong")).status_code for _ in range(5)]
    waits = []
    for _ in range(8):
        refused = await log_in(plane, "bob")
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "too_many_attempts"
        waits.append(int(refused.headers["retry-after"]))
        plane.clock.advance(waits[-1])
        assert (await log_in(plane, "bob", "wrong")).status_code == 401
    plane.clock.advance(60)

    assert free == [401] * 5
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]
    assert (await log_in(plane, "bob")).status_code == 200
    plane.clock.advance(15 * 60)
    assert [(await log_in(plane, "bob", "wrong")).status_code for _ in range(6)] == [401] * 5 + [429]


async def test_tries_are_counted_by_account_and_by_address(start_plane: Any) -> None:
    running = await start_plane(trusted_proxies="127.0.0.0/8")
    await make_user(running, "bob")

    async def attempt(name: str, address: str, password: str = "wrong") -> int:
        return (await log_in(running, name, password, headers={**SAME_ORIGIN, "x-forwarded-for": address})).status_code

    assert [await attempt("bob", f"192.0.2.{place}") for place in range(6)] == [401] * 5 + [429]
    assert await attempt("bob", "192.0.2.99", PASSWORD) == 429
    assert [await attempt(f"user{place}", "198.51.100.1") for place in range(6)] == [401] * 5 + [429]
    assert [await attempt(f"other{place}", f"2001:db8::{place}") for place in range(6)] == [401] * 5 + [429]
    assert await attempt("carol", "2001:db8:0:1::1") == 401


@pytest.mark.parametrize("trusted", ["", "10.0.0.0/8"])
async def test_an_address_that_no_trusted_proxy_names_counts_for_nothing(start_sqlite: Any, trusted: str) -> None:
    """On loopback, too, which uvicorn believes by itself."""
    running = await start_sqlite(trusted_proxies=trusted)

    tries = [
        await log_in(running, f"user{place}", headers={**SAME_ORIGIN, "x-forwarded-for": f"192.0.2.{place}"})
        for place in range(6)
    ]

    assert [answer.status_code for answer in tries] == [401] * 5 + [429]
    rows = (await running.admin.get("/api/v1/audit?action=session.login_failed")).json()["data"]
    assert {row["address"] for row in rows} == {"127.0.0.1"}


async def test_tries_at_the_same_moment_are_counted(plane: Running) -> None:
    await make_user(plane, "bob")

    async with asyncio.TaskGroup() as group:
        tries = [group.create_task(log_in(plane, "bob", "wrong")) for _ in range(12)]

    assert sorted(task.result().status_code for task in tries) == [401] * 5 + [429] * 7


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_pods_know_at_once_what_the_others_know(start_plane: Any) -> None:
    first, second = await start_plane(), await start_plane()
    await make_user(first, "bob")
    await log_in(first, "bob")
    secret = first.client.cookies["ia_session"]
    known = await get_me(second, secret)
    await first.client.delete("/api/v1/session", headers=SAME_ORIGIN)
    ended = await get_me(second, secret)
    wrong = [(await log_in((first, second)[place % 2], "bob", "wrong")).status_code for place in range(6)]

    assert [known.status_code, ended.status_code] == [200, 401]
    assert wrong == [401] * 5 + [429]


async def test_a_hash_of_another_cost_is_made_anew(sqlite_plane: Running) -> None:
    cheap = PasswordHasher(1, 8, 1).hash(PASSWORD)
    await make_user(sqlite_plane, "bob")
    async with sqlite_plane.plane.database.main.write() as connection:
        await connection.execute(update(users).where(users.c.name == "bob").values(password_hash=cheap))

    assert (await log_in(sqlite_plane, "bob")).status_code == 200
    async with sqlite_plane.plane.database.main.read() as connection:
        query = select(users.c.password_hash).where(users.c.name == "bob")
        assert "m=19456,t=2,p=1" in (await connection.execute(query)).scalar_one()
    assert (await log_in(sqlite_plane, "bob")).status_code == 200


async def test_logins_and_refusals_are_in_the_audit_log(sqlite_plane: Running) -> None:
    await make_user(sqlite_plane, "bob")
    await log_in(sqlite_plane, "bob", "wrong")
    await log_in(sqlite_plane, "nobody", "a-password-typed-as-name")
    await log_in(sqlite_plane, "bob")
    for _ in range(3):
        denied = await sqlite_plane.client.put("/api/v1/models/gpt2", json={}, headers=SAME_ORIGIN)
        assert denied.status_code == 403
    async with sqlite_plane.plane.database.main.read() as connection:
        rows = list(await connection.execute(select(audit).order_by(audit.c.id)))

    found = sorted([(row.action, row.actor, row.object_id) for row in rows], key=str)
    session = next(row.object_id for row in rows if row.action == "session.login")
    assert found == [
        ("model.denied", "bob", "gpt2"),
        ("session.login", "bob", session),
        ("session.login_failed", "bob", None),
        ("session.login_failed", None, None),
    ]
    assert all(row.address == "127.0.0.1" and row.request_id for row in rows)


async def test_without_passwords_nobody_logs_in_by_one(start_sqlite: Any) -> None:
    running = await start_sqlite(password_login="off", oidc_issuer="http://127.0.0.1:1", oidc_client_id="control-plane")
    await make_user(running, "bob")

    answer = await log_in(running, "bob")

    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")
