"""/api/v1/keys, and what of it is in GET /policy."""

from typing import Any

import httpx
import pytest

from inference_api.policy.keys import digest, is_well_formed
from inference_api.policy.reading import read, run
from inference_api.policy.snapshot import Policy
from tests.control_plane.conftest import Running, starting
from tests.control_plane.teams import changed, organisation, somebody

pytestmark = pytest.mark.anyio
KEYS = "/api/v1/keys"


async def made(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    answer = await client.post(KEYS, json={"name": "batch", **fields})
    assert answer.status_code == 201, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def policy_of(running: Running) -> dict[str, Any]:
    """GET /policy, which a router would accept."""
    answer = await running.router.get("/policy")
    assert answer.status_code == 200
    found: dict[str, Any] = answer.json()
    compiled(found)
    return found


def compiled(document: dict[str, Any]) -> Policy:
    return run(read(document, peppered=True))


async def patched(client: httpx.AsyncClient, id: str, **fields: Any) -> httpx.Response:
    etag = (await client.get(f"{KEYS}/{id}")).headers["etag"]
    return await client.patch(f"{KEYS}/{id}", json=fields, headers={"if-match": etag})


async def ended(client: httpx.AsyncClient, id: str) -> httpx.Response:
    etag = (await client.get(f"{KEYS}/{id}")).headers["etag"]
    return await client.delete(f"{KEYS}/{id}", headers={"if-match": etag})


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


async def test_a_key_is_shown_once_and_its_digest_is_in_the_policy(plane: Running) -> None:
    await organisation(plane, "team-a")
    fields = {
        "organisation": "team-a",
        "user": "ana",
        "models": ["llama-*"],
        "limits": [{"requests": 60, "per": 60}],
        "budget": {"cost": 0.5, "per": "month"},
        "priority": 10,
        "weight": 2.5,
        "expires": "2027-01-31T00:00:00Z",
    }
    key = await made(plane.admin, **fields)

    assert is_well_formed(key["key"].encode())
    assert {name: key[name] for name in fields} == fields
    said = {"state": "ok", "disabled": False, "created_by": "ana", "created_at": "2026-11-28T12:00:00Z"}
    assert {name: key[name] for name in (*said, "previous_until", "last_used_at")} == {
        **said,
        "previous_until": None,
        "last_used_at": None,
    }
    read_again = (await plane.admin.get(f"{KEYS}/{key['id']}")).json()
    assert read_again == {name: value for name, value in key.items() if name != "key"}
    [item] = (await policy_of(plane))["keys"]
    assert item == {"id": key["id"], "name": "batch", "digest": digest(key["key"].encode()), **fields}


async def test_a_pepper_makes_hmac_digests(sqlite_url: str) -> None:
    async with starting(sqlite_url) as start:
        plane = await start(key_pepper="a" * 32 + "," + "b" * 32)
        key = await made(plane.admin)

        assert (await policy_of(plane))["keys"][0]["digest"] == digest(key["key"].encode(), "a" * 32)


async def test_a_key_has_the_state_that_routers_give_it(plane: Running) -> None:
    await organisation(plane, "team-a")
    ids = {}
    for name in ("ok", "expired", "disabled", "ended"):
        ids[name] = (await made(plane.admin, name=name, organisation="team-a"))["id"]
    await patched(plane.admin, ids["expired"], expires="2026-11-28T12:00:01Z")
    await patched(plane.admin, ids["disabled"], disabled=True)
    assert (await ended(plane.admin, ids["ended"])).status_code == 204
    plane.clock.advance(1)

    for state, id in ids.items():
        assert (await plane.admin.get(f"{KEYS}/{id}")).json()["state"] == state
        listed = (await plane.admin.get(KEYS, params={"state": state})).json()["data"]
        assert [key["name"] for key in listed] == [state]
    assert {key["name"] for key in (await policy_of(plane))["keys"]} == {"ok", "expired", "disabled"}
    await changed(plane, "team-a", disabled=True)
    assert (await plane.admin.get(f"{KEYS}/{ids['ok']}")).json()["state"] == "disabled"
    await changed(plane, "team-a", ended_at=plane.clock.now)
    assert (await plane.admin.get(f"{KEYS}/{ids['ok']}")).json()["state"] == "ended"
    assert await policy_of(plane) == {"organisations": [], "keys": [], "limits": [], "budgets": [], "prompts": []}


async def test_a_rotated_key_keeps_its_id_and_for_a_while_its_old_secret(plane: Running) -> None:
    key = await made(plane.admin)
    answer = await plane.admin.post(f"{KEYS}/{key['id']}/rotate", json={"overlap": 60})
    new = answer.json()

    assert (answer.status_code, new["id"], new["previous_until"]) == (200, key["id"], "2026-11-28T12:01:00Z")
    [item] = (await policy_of(plane))["keys"]
    assert item["digest"] == digest(new["key"].encode())
    assert item["previous"] == {"digest": digest(key["key"].encode()), "until": "2026-11-28T12:01:00Z"}
    last = (await plane.admin.post(f"{KEYS}/{key['id']}/rotate", json={"overlap": 0})).json()
    assert last["previous_until"] is None
    assert "previous" not in (await policy_of(plane))["keys"][0]
    assert (await plane.admin.post(f"{KEYS}/{key['id']}/rotate")).json()["previous_until"] == "2026-11-29T12:00:00Z"


async def test_an_overlap_is_at_most_a_week(sqlite_plane: Running) -> None:
    key = await made(sqlite_plane.admin)
    for overlap in (-1, 604_801, "1", None, 1.5):
        answer = await sqlite_plane.admin.post(f"{KEYS}/{key['id']}/rotate", json={"overlap": overlap})

        assert (code(answer), answer.json()["error"]["param"]) == ((422, "validation_error"), "overlap")


async def test_a_change_names_the_version_that_it_changes(sqlite_plane: Running) -> None:
    key = await made(sqlite_plane.admin, budget={"cost": 5, "per": "month"})
    url = f"{KEYS}/{key['id']}"
    etag = (await sqlite_plane.admin.get(url)).headers["etag"]
    assert code(await sqlite_plane.admin.patch(url, json={"disabled": True})) == (428, "precondition_required")
    assert code(await sqlite_plane.admin.delete(url)) == (428, "precondition_required")
    first = await sqlite_plane.admin.patch(url, json={"budget": {"soft": 0.5}}, headers={"if-match": etag})
    second = await sqlite_plane.admin.patch(url, json={"budget": None}, headers={"if-match": etag})

    assert (first.status_code, first.json()["budget"]) == (200, {"cost": 5, "per": "month", "soft": 0.5})
    assert code(second) == (412, "precondition_failed")
    third = await sqlite_plane.admin.patch(url, json={"budget": None}, headers={"if-match": first.headers["etag"]})
    assert third.json()["budget"] is None


async def test_neither_time_nor_use_changes_the_etag(sqlite_plane: Running) -> None:
    key = await made(sqlite_plane.admin, expires="2026-11-28T12:00:01Z")
    url = f"{KEYS}/{key['id']}"
    before = await sqlite_plane.admin.get(url)
    sqlite_plane.clock.advance(1)
    after = await sqlite_plane.admin.get(url)

    assert [before.json()["state"], after.json()["state"]] == ["ok", "expired"]
    assert before.headers["etag"] == after.headers["etag"]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"name": ""}, "name"),
    ({"name": "x" * 129}, "name"),
    ({"name": None}, "name"),
    ({"user": "no name"}, "user"),
    ({"models": ["no model"]}, "models.0"),
    ({"limits": [{"requests": 1}]}, "limits.0"),
    ({"limits": [{"requests": 1, "per": 60, "tokens": 1}]}, "limits.0"),
    ({"budget": {"cost": 1e-10, "per": "day"}}, "budget"),
    ({"priority": 101}, "priority"),
    ({"weight": 0}, "weight"),
    ({"expires": "tomorrow"}, "expires"),
    ({"expires": "9999-12-31T23:59:59.999999Z"}, "expires"),
]


async def test_what_no_router_would_take_is_refused(sqlite_plane: Running) -> None:
    key = await made(sqlite_plane.admin)
    for fields, param in REFUSED:
        answer = await sqlite_plane.admin.post(KEYS, json={"name": "batch", **fields})

        assert code(answer) == (422, "validation_error")
        assert [one["param"] for one in answer.json()["error"]["errors"]] == [param]
        assert answer.json()["error"]["param"] == param
        if fields != {"name": None}:
            assert code(await patched(sqlite_plane.admin, key["id"], **fields)) == (422, "validation_error")


BODIES = [
    (b'{"name": NaN}', (400, "invalid_json")),
    (b'{"name": "\\ud800"}', (400, "invalid_json")),
    (b'{"name": "a\\u0000"}', (422, "validation_error")),
    (b'{"name": "x", "weight": 1e999}', (400, "invalid_json")),
    (b'{"name": "x", "priority": 9223372036854775808}', (422, "validation_error")),
    (b'{"name": "x", "y": ' + b"[" * 64 + b"]" * 64 + b"}", (422, "validation_error")),
    (b'{"name": "x", "y": ' + b"[" * 9999 + b"]" * 9999 + b"}", (400, "invalid_json")),
    (b"{", (400, "invalid_json")),
    (b"[]", (422, "validation_error")),
    (b"", (422, "validation_error")),
]


async def test_a_body_is_strict_json(plane: Running) -> None:
    for content, expected in BODIES:
        answer = await plane.admin.post(KEYS, content=content, headers={"content-type": "application/json"})

        assert code(answer) == expected, content


async def test_another_content_type_is_refused(sqlite_plane: Running) -> None:
    assert code(await sqlite_plane.admin.post(KEYS, data={"name": "x"})) == (415, "unsupported_media_type")


async def test_what_has_ended_changes_no_more(sqlite_plane: Running) -> None:
    key = await made(sqlite_plane.admin)
    await ended(sqlite_plane.admin, key["id"])

    assert code(await patched(sqlite_plane.admin, key["id"], disabled=False)) == (422, "validation_error")
    assert code(await sqlite_plane.admin.post(f"{KEYS}/{key['id']}/rotate")) == (422, "validation_error")
    assert (await ended(sqlite_plane.admin, key["id"])).status_code == 204


async def test_a_member_has_own_keys_only(plane: Running) -> None:
    await organisation(plane, "team-a")
    await organisation(plane, "team-b")
    other = await made(plane.admin, organisation="team-a", user="bo")
    async with somebody(plane, "cy", team_a="member") as cy:
        own = await made(cy, organisation="team-a")
        assert own["user"] == "cy"
        assert [key["id"] for key in (await cy.get(KEYS)).json()["data"]] == [own["id"]]
        assert code(await cy.get(f"{KEYS}/{other['id']}")) == (404, "not_found")
        assert code(await cy.post(f"{KEYS}/{other['id']}/rotate")) == (404, "not_found")
        for fields, expected in (
            ({"organisation": "team-a", "user": "bo"}, (403, "forbidden")),
            ({"organisation": "team-b"}, (404, "not_found")),
            ({"organisation": "nowhere"}, (404, "not_found")),
            ({}, (422, "validation_error")),
            ({"organisation": "team-a", "priority": -100}, (403, "forbidden")),
        ):
            assert code(await cy.post(KEYS, json={"name": "x", **fields})) == expected
        assert code(await patched(cy, own["id"], user="bo")) == (403, "forbidden")
        assert code(await patched(cy, own["id"], organisation="team-b")) == (404, "not_found")
        assert (await patched(cy, own["id"], disabled=True)).json()["disabled"] is True
        assert (await ended(cy, own["id"])).status_code == 204


async def test_owners_and_admins_of_an_organisation_have_its_keys(sqlite_plane: Running) -> None:
    plane = sqlite_plane
    await organisation(plane, "team-a")
    await organisation(plane, "team-b")
    foreign = await made(plane.admin, organisation="team-b")
    of_nobody = await made(plane.admin)
    for role in ("owner", "admin"):
        async with somebody(plane, role, team_a=role) as client:
            key = await made(client, organisation="team-a", user="bo", priority=-1)
            assert (await patched(client, key["id"], user="cy")).status_code == 200
            assert {one["organisation"] for one in (await client.get(KEYS)).json()["data"]} == {"team-a"}
            for hidden in (foreign, of_nobody):
                assert code(await client.get(f"{KEYS}/{hidden['id']}")) == (404, "not_found")


async def test_viewers_see_ids_of_the_platform_and_nothing_of_an_organisation(sqlite_plane: Running) -> None:
    await organisation(sqlite_plane, "team-a")
    key = await made(sqlite_plane.admin, organisation="team-a")
    async with somebody(sqlite_plane, "vi", "viewer") as viewer:
        assert (await viewer.get(KEYS)).json()["data"] == [{"id": key["id"]}]
        assert (await viewer.get(f"{KEYS}/{key['id']}")).json() == {"id": key["id"]}
        assert code(await viewer.post(KEYS, json={"name": "x"})) == (403, "forbidden")
    async with somebody(sqlite_plane, "vo", team_a="viewer") as viewer:
        assert code(await viewer.get(KEYS)) == (403, "forbidden")
    async with somebody(sqlite_plane, "op", "operator") as operator:
        assert code(await operator.get(KEYS)) == (403, "forbidden")


async def test_lists_go_page_by_page_and_can_be_narrowed(plane: Running) -> None:
    await organisation(plane, "team-a")
    names = []
    for number in range(5):
        names.append(f"key-{number}")
        await made(plane.admin, name=names[-1], user="bo" if number % 2 else None)
        plane.clock.advance(number % 2)
    await made(plane.admin, name="of-team-a", organisation="team-a")
    found: list[str] = []
    after: dict[str, str] = {}
    while True:
        page = (await plane.admin.get(KEYS, params={"limit": 2, **after})).json()
        found += [key["name"] for key in page["data"]]
        if page["next"] is None:
            break
        after = {"after": page["next"]}

    assert sorted(found) == sorted([*names, "of-team-a"])
    assert found[0] == "of-team-a" or found[1] == "of-team-a"
    assert {key["user"] for key in (await plane.admin.get(KEYS, params={"user": "bo"})).json()["data"]} == {"bo"}
    of_team = (await plane.admin.get(KEYS, params={"organisation": "team-a"})).json()["data"]
    assert [key["name"] for key in of_team] == ["of-team-a"]
    assert code(await plane.admin.get(KEYS, params={"after": "WzFd"})) == (422, "validation_error")


async def test_no_secret_is_stored_or_logged(plane: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    key = await made(plane.admin)
    rotated = (await plane.admin.post(f"{KEYS}/{key['id']}/rotate")).json()
    async with plane.plane.database.main.read() as connection:
        rows = []
        for table in ("keys", "audit"):
            rows += list(await connection.exec_driver_sql(f"SELECT * FROM {table}"))

    assert [row for row in rows if key["key"] in str(row) or rotated["key"] in str(row)] == []
    assert "key.rotate" in str(rows)
    assert key["key"][20:] not in caplog.text
