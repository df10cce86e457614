"""Tokens: of people for programs, which act for their maker, and of routers. No kind is good for another's purpose."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from inference_api.policy.keys import KEY, MANAGEMENT, SERVICE, digest, is_well_formed, new_key
from tests.conftest import Served
from tests.control_plane.conftest import Running
from tests.control_plane.people import acting_as, changed, error, log_in, make_organisation, make_user

pytestmark = pytest.mark.anyio
PATH = "/api/v1/tokens"


def with_token(token: str) -> dict[str, Any]:
    return {"headers": {"authorization": f"Bearer {token}"}}


async def me(running: Running, token: str) -> httpx.Response:
    return await running.client.get("/api/v1/me", **with_token(token))


async def test_a_token_is_made_rotated_and_ended(plane: Running) -> None:
    made = await plane.admin.post(PATH, json={"name": "ci", "kind": "management", "expires": "2027-01-31T00:00:00Z"})
    token = made.json()["token"]
    id = made.json()["id"]
    plane.clock.advance(61)
    used = await me(plane, token)
    rotated = await plane.admin.post(f"{PATH}/{id}/rotate", json={"overlap": 60})
    both = [(await me(plane, one)).status_code for one in (token, rotated.json()["token"])]
    plane.clock.advance(60)
    new = [(await me(plane, one)).status_code for one in (token, rotated.json()["token"])]
    at_once = await plane.admin.post(f"{PATH}/{id}/rotate", json={"overlap": 0})
    newest = [(await me(plane, one.json()["token"])).status_code for one in (rotated, at_once)]
    ended = await changed(plane.admin, "DELETE", f"{PATH}/{id}")

    assert made.status_code == 201
    assert is_well_formed(token.encode(), MANAGEMENT.encode())
    assert made.json() == {
        "id": token[6:18],
        "name": "ci",
        "kind": "management",
        "scopes": None,
        "organisation": None,
        "role": None,
        "user": "ana",
        "expires": "2027-01-31T00:00:00Z",
        "disabled": False,
        "state": "ok",
        "previous_until": None,
        "created_at": "2026-11-28T12:00:00Z",
        "created_by": "ana",
        "last_used_at": None,
        "token": token,
    }
    assert used.json()["name"] == "ana"
    assert rotated.json()["last_used_at"] == "2026-11-28T12:01:01Z"
    assert rotated.json()["token"][:18] == token[:18]
    assert (both, new, newest) == ([200, 200], [401, 200], [401, 200])
    assert ended.status_code == 204
    assert (await me(plane, at_once.json()["token"])).status_code == 401
    shown = (await plane.admin.get(f"{PATH}/{id}")).json()
    assert (shown["state"], "token" in shown) == ("ended", False)
    assert error(await plane.admin.post(f"{PATH}/{id}/rotate"))[:2] == (422, "validation_error")


async def test_a_token_ends_by_its_time_and_while_disabled(sqlite_plane: Running) -> None:
    made = await sqlite_plane.admin.post(PATH, json={"name": "ci", "expires": "2026-11-28T13:00:00Z"})
    token, path = made.json()["token"], f"{PATH}/{made.json()['id']}"
    states = []
    for change in ({"disabled": True}, {"disabled": None}):
        states.append((await changed(sqlite_plane.admin, "PATCH", path, json=change)).json()["state"])
        states.append(str((await me(sqlite_plane, token)).status_code))
    sqlite_plane.clock.advance(3600)
    states += [(await sqlite_plane.admin.get(path)).json()["state"], str((await me(sqlite_plane, token)).status_code)]

    assert states == ["disabled", "401", "ok", "200", "expired", "401"]


async def test_a_service_token_is_obeyed_on_the_machine_side_alone(plane: Running) -> None:
    made = await plane.admin.post(PATH, json={"name": "routers", "kind": "service", "scopes": ["snapshots"]})
    token, path = made.json()["token"], f"{PATH}/{made.json()['id']}"
    read = await plane.client.get("/policy", **with_token(token))
    lacking = await plane.client.put("/routers/r-1", json={}, **with_token(token))
    managing = await me(plane, token)
    writing = await plane.client.put("/models/x", json={"name": "x"}, **with_token(token))
    rotated = (await plane.admin.post(f"{path}/rotate")).json()["token"]
    both = [(await plane.client.get("/policy", **with_token(one))).status_code for one in (token, rotated)]
    await changed(plane.admin, "DELETE", path)
    after = [(await plane.client.get("/policy", **with_token(one))).status_code for one in (token, rotated)]

    assert is_well_formed(token.encode(), SERVICE.encode())
    assert (made.json()["user"], made.json()["scopes"]) == (None, ["snapshots"])
    assert read.status_code == 200
    assert error(lacking)[:2] == (403, "insufficient_scope")
    assert error(managing)[:2] == (401, "not_authenticated")
    assert error(writing)[:2] == (401, "invalid_api_key")
    assert (both, after) == ([200, 200], [401, 401])


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"kind": "service"}, (422, "validation_error", "scopes")),
        ({"kind": "service", "scopes": ["everything"]}, (422, "validation_error", "scopes.0")),
        ({"kind": "service", "scopes": ["ingest"], "role": "admin"}, (422, "validation_error", "role")),
        ({"scopes": ["ingest"]}, (422, "validation_error", "scopes")),
        ({"organisation": "team-b"}, (422, "validation_error", "organisation")),
        ({"organisation": "team-a", "role": "operator"}, (422, "validation_error", "role")),
        ({"role": "member"}, (422, "validation_error", "role")),
        ({"kind": "inference"}, (422, "validation_error", "kind")),
        ({"expires": "tomorrow"}, (422, "validation_error", "expires")),
    ],
)
async def test_an_invalid_token_is_refused(
    sqlite_plane: Running, body: Mapping[str, Any], expected: tuple[int, str, str]
) -> None:
    await make_organisation(sqlite_plane, "team-a")

    assert error(await sqlite_plane.admin.post(PATH, json={"name": "x", **body})) == expected


async def test_a_token_has_at_most_the_rights_of_its_maker(plane: Running) -> None:
    await make_user(plane, "bob", password=None)
    for name, role in (("team-a", "admin"), ("team-b", "member")):
        await make_organisation(plane, name, bob=role)

    async def make(client: httpx.AsyncClient, **body: str) -> httpx.Response:
        return await client.post(PATH, json={"name": "x", **body})

    async with acting_as(plane, "bob") as bob:
        refused = [
            await make(bob, organisation="team-a", role="owner"),
            await make(bob, organisation="team-c"),
            await make(bob, role="viewer"),
        ]
        limited = (await make(bob, organisation="team-a", role="member")).json()["token"]
        whole = (await make(bob, organisation="team-a")).json()["token"]
    rights = [(await me(plane, token)).json()["memberships"] for token in (limited, whole)]
    await changed(plane.admin, "PUT", "/api/v1/organisations/team-a/members/bob", json={"role": "viewer"})
    lowered = [(await me(plane, token)).json()["memberships"] for token in (limited, whole)]
    await changed(plane.admin, "DELETE", "/api/v1/organisations/team-a/members/bob")
    none = [(await me(plane, token)).json()["memberships"] for token in (limited, whole)]

    assert [error(answer)[::2] for answer in refused] == [(422, "role"), (422, "organisation"), (422, "role")]
    assert rights == [[{"organisation": "team-a", "role": role}] for role in ("member", "admin")]
    assert lowered == [[{"organisation": "team-a", "role": "viewer"}]] * 2
    assert none == [[], []]


async def test_a_token_of_an_admin_may_be_less(sqlite_plane: Running) -> None:
    await make_organisation(sqlite_plane, "team-a")
    for body, role, memberships in (
        ({"role": "viewer"}, "viewer", []),
        ({"organisation": "team-a"}, None, [{"organisation": "team-a", "role": "owner"}]),
        ({}, "admin", []),
    ):
        made = await sqlite_plane.admin.post(PATH, json={"name": "x", **body})
        found = (await me(sqlite_plane, made.json()["token"])).json()

        assert (found["platform_role"], found["memberships"]) == (role, memberships)


async def test_a_token_makes_and_changes_no_token_that_may_more(sqlite_plane: Running) -> None:
    await make_organisation(sqlite_plane, "team-a")
    whole = (await sqlite_plane.admin.post(PATH, json={"name": "whole"})).json()
    for restricted in ({"role": "viewer"}, {"organisation": "team-a", "role": "admin"}):
        token = (await sqlite_plane.admin.post(PATH, json={"name": "little", **restricted})).json()
        options = with_token(token["token"])
        answers = [
            await sqlite_plane.client.post(PATH, json={"name": "x", **body}, **options)
            for body in ({}, {"role": "operator"}, {"organisation": "team-a"})
        ]
        answers.append(await sqlite_plane.client.post(f"{PATH}/{whole['id']}/rotate", **options))
        grown = await sqlite_plane.client.patch(
            f"{PATH}/{token['id']}",
            json={"role": None, "organisation": None},
            headers={**options["headers"], "if-match": "*"},
        )
        same = await sqlite_plane.client.post(PATH, json={"name": "x", **restricted}, **options)

        assert [error(answer)[:2] for answer in (*answers, grown)] == [(403, "forbidden")] * 5
        assert same.status_code == 201


async def test_a_token_ends_nothing_that_may_more(sqlite_plane: Running) -> None:
    await make_user(sqlite_plane, "bob", "admin")
    async with acting_as(sqlite_plane, "bob") as bob:
        whole = (await bob.post(PATH, json={"name": "all"})).json()
        less = (await bob.post(PATH, json={"name": "less", "role": "viewer"})).json()
        session = (await log_in(sqlite_plane, "bob")).cookies["ia_session"]
        sqlite_plane.client.cookies.clear()
        ids = [one["id"] for one in (await bob.get("/api/v1/me/sessions")).json()["data"]]
        headers = {"authorization": f"Bearer {less['token']}"}
        async with httpx.AsyncClient(base_url=sqlite_plane.url, headers=headers, trust_env=False) as program:
            refused = [
                await changed(program, "DELETE", f"{PATH}/{whole['id']}"),
                await changed(program, "DELETE", f"/api/v1/me/sessions/{ids[0]}"),
                await program.delete("/api/v1/me/sessions"),
            ]
            itself = await changed(program, "DELETE", f"{PATH}/{less['id']}")
        by_whole = await sqlite_plane.client.delete("/api/v1/me/sessions", **with_token(whole["token"]))

    assert [error(answer)[:2] for answer in refused] == [(403, "forbidden")] * 3
    assert [itself.status_code, by_whole.status_code] == [204, 204]
    answer = await sqlite_plane.client.get("/api/v1/me", headers={"cookie": f"ia_session={session}"})
    assert answer.status_code == 401


async def test_tokens_of_others_look_like_none(sqlite_plane: Running) -> None:
    await make_user(sqlite_plane, "bob", password=None)
    service = {"name": "routers", "kind": "service", "scopes": ["ingest"]}
    ids = [(await sqlite_plane.admin.post(PATH, json=body)).json()["id"] for body in ({"name": "ci"}, service)]
    async with acting_as(sqlite_plane, "bob") as bob:
        own = (await bob.post(PATH, json={"name": "mine"})).json()["id"]
        for id in ids:
            for method, path in (("GET", ""), ("PATCH", ""), ("DELETE", ""), ("POST", "/rotate")):
                body: dict[str, Any] = {"json": {}} if method in ("PATCH", "POST") else {}
                answer = await bob.request(method, f"{PATH}/{id}{path}", headers={"if-match": "*"}, **body)
                assert error(answer)[:2] == (404, "not_found")
        listed = [one["id"] for one in (await bob.get(PATH)).json()["data"] if one["name"] != "tests"]
        denied = await bob.post(PATH, json=service)

    assert listed == [own]
    assert error(denied)[:2] == (403, "forbidden")
    assert (await sqlite_plane.admin.get(f"{PATH}/{own}")).status_code == 404


async def test_tokens_are_listed_page_by_page(sqlite_plane: Running) -> None:
    for place in range(3):
        sqlite_plane.clock.advance(1)
        await sqlite_plane.admin.post(PATH, json={"name": f"t{place}"})
    first = (await sqlite_plane.admin.get(f"{PATH}?limit=2")).json()
    second = (await sqlite_plane.admin.get(f"{PATH}?limit=2&after={first['next']}")).json()

    assert [one["name"] for one in first["data"] + second["data"]] == ["t2", "t1", "t0", "tests"]
    assert (await sqlite_plane.admin.get(f"{PATH}?state=ended")).json()["data"] == []
    assert error(await sqlite_plane.admin.get(f"{PATH}?after=WyJhIiwiYiJd")) == (422, "validation_error", "after")


async def test_a_replayed_token_is_null_and_no_secret_is_stored(sqlite_plane: Running) -> None:
    key = {"idempotency-key": "once"}
    first = await sqlite_plane.admin.post(PATH, json={"name": "ci"}, headers=key)
    again = await sqlite_plane.admin.post(PATH, json={"name": "ci"}, headers=key)

    assert again.json() == {**first.json(), "token": None}
    assert again.headers["idempotency-replayed"] == "true"


async def test_a_key_of_inference_manages_nothing(sqlite_plane: Running) -> None:
    key = new_key(prefix=KEY).key
    for path in ("/api/v1/me", "/api/v1/keys", "/policy"):
        answer = await sqlite_plane.client.get(path, **with_token(key))
        assert answer.status_code == 401


async def test_a_router_takes_no_token_for_a_key(
    sqlite_plane: Running, tmp_path: Path, start_engine: Callable[..., Any], start_router: Callable[..., Any]
) -> None:
    """Even where its policy has the digest of one."""
    service = {"name": "x", "kind": "service", "scopes": ["ingest"]}
    made = [await sqlite_plane.admin.post(PATH, json=body) for body in ({"name": "x"}, service)]
    tokens = [one.json()["token"] for one in made]
    good = new_key()
    rows = [{"id": good.id, "name": "good", "digest": good.digest}]
    rows += [{"id": token[6:18], "name": "bad", "digest": digest(token.encode(), None)} for token in tokens]
    file = tmp_path / "policy.json"
    file.write_text(json.dumps({"keys": rows}))
    router: Served = await start_router(await start_engine(), auth="keys", policy=str(file))

    answers = [await router.client.get("/v1/models", **with_token(one)) for one in (good.key, *tokens)]

    assert [answer.status_code for answer in answers] == [200, 401, 401]
