"""/api/v1/prompts, and what of them is in GET /policy."""

from typing import Any

import httpx
import pytest

from tests.control_plane.conftest import Running
from tests.control_plane.teams import changed, organisation, somebody
from tests.control_plane.test_keys import code, policy_of

pytestmark = pytest.mark.anyio
PROMPTS = "/api/v1/prompts"
NEW = {"if-none-match": "*"}
MESSAGES = [
    {"role": "system", "content": "You help with {{product}}."},
    {"role": "user", "content": [{"text": "{{q}}"}]},
]
VARIABLES = {
    "product": {"type": "enum", "values": ["router", "console"], "required": True, "trusted": True},
    "q": {"default": "x"},
}


async def prompt(client: httpx.AsyncClient, name: str = "support", **fields: Any) -> httpx.Response:
    return await client.post(PROMPTS, json={"name": name, **fields})


async def version(client: httpx.AsyncClient, name: str = "support", **fields: Any) -> httpx.Response:
    return await client.post(f"{PROMPTS}/{name}/versions", json=fields or {"text": "Hello"})


async def test_a_prompt_is_used_by_its_versions_and_labels(plane: Running) -> None:
    await organisation(plane, "team-a")
    created = await prompt(plane.admin, organisation="team-a")
    assert (created.status_code, created.json()["latest"], created.json()["labels"]) == (201, None, {})
    assert (await policy_of(plane))["prompts"] == []
    first = await version(plane.admin, messages=MESSAGES, variables=VARIABLES, note="first")
    assert (first.status_code, first.json()["version"], first.headers["location"]) == (
        201,
        1,
        f"{PROMPTS}/support/versions/1",
    )
    assert (await version(plane.admin)).json()["version"] == 2
    label = f"{PROMPTS}/support/labels/production"
    assert code(await plane.admin.put(label, json={"version": 1})) == (428, "precondition_required")
    set_ = await plane.admin.put(label, json={"version": 1}, headers=NEW)
    assert (set_.status_code, set_.json()["version"]) == (201, 1)
    assert code(await plane.admin.put(label, json={"version": 2}, headers=NEW)) == (412, "precondition_failed")
    moved = await plane.admin.put(label, json={"version": 2}, headers={"if-match": set_.headers["etag"]})
    assert (moved.status_code, moved.json()["version"]) == (200, 2)

    assert (await policy_of(plane))["prompts"] == [
        {
            "name": "support",
            "organisation": "team-a",
            "labels": {"production": 2},
            "versions": [
                {"version": 1, "messages": MESSAGES, "variables": VARIABLES},
                {"version": 2, "text": "Hello"},
            ],
        }
    ]
    assert [one["version"] for one in (await plane.admin.get(f"{PROMPTS}/support/versions")).json()["data"]] == [2, 1]
    assert (await plane.admin.get(f"{PROMPTS}/support/versions/1")).json() == first.json()
    assert (await plane.admin.get(f"{PROMPTS}/support")).json()["labels"] == {"production": 2}
    assert (await plane.admin.delete(label, headers={"if-match": moved.headers["etag"]})).status_code == 204
    assert code(await plane.admin.get(label)) == (404, "not_found")
    assert (await policy_of(plane))["prompts"][0]["labels"] == {}


async def test_an_ended_prompt_is_gone_and_its_name_stays_taken(plane: Running) -> None:
    etag = (await prompt(plane.admin)).headers["etag"]
    await version(plane.admin)
    assert code(await plane.admin.delete(f"{PROMPTS}/support", headers={"if-match": etag})) == (
        412,
        "precondition_failed",
    )
    etag = (await plane.admin.get(f"{PROMPTS}/support")).headers["etag"]
    assert (await plane.admin.delete(f"{PROMPTS}/support", headers={"if-match": etag})).status_code == 204

    assert (await policy_of(plane))["prompts"] == []
    assert (await plane.admin.get(PROMPTS)).json()["data"] == []
    for path in ("", "/versions", "/versions/1", "/labels/x"):
        assert code(await plane.admin.get(f"{PROMPTS}/support{path}")) == (404, "not_found")
    assert code(await prompt(plane.admin)) == (409, "name_taken")


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"text": "{{x}}"}, "text"),
    ({"text": "x", "messages": MESSAGES}, "messages"),
    ({"variables": {}}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"role": "system", "content": "{{x}}"}], "variables": {"x": {}}}, "messages.0"),
    ({"text": "x", "variables": {"no name": {}}}, "variables.no name.[key]"),
    ({"text": "x", "variables": {"x": {"type": "enum"}}}, "variables.x"),
]


async def test_what_no_router_would_take_is_refused(sqlite_plane: Running) -> None:
    await prompt(sqlite_plane.admin)
    for fields, param in REFUSED:
        refused = await version(sqlite_plane.admin, **fields)

        assert (code(refused), refused.json()["error"]["param"]) == ((422, "validation_error"), param)


async def test_a_label_names_a_version_that_is_there(sqlite_plane: Running) -> None:
    await prompt(sqlite_plane.admin)
    await version(sqlite_plane.admin)
    for label, number in (("production", 2), ("No Label", 1), ("production", 0), ("production", 2**31)):
        refused = await sqlite_plane.admin.put(
            f"{PROMPTS}/support/labels/{label}", json={"version": number}, headers=NEW
        )
        assert code(refused) == (422, "validation_error")


async def test_prompts_are_of_their_organisation(sqlite_plane: Running) -> None:
    plane = sqlite_plane
    for name in ("team-a", "team-b"):
        await organisation(plane, name)
        await prompt(plane.admin, f"of-{name}", organisation=name)
    await prompt(plane.admin, "of-all")
    async with somebody(plane, "cy", team_a="member") as member:
        assert [one["name"] for one in (await member.get(PROMPTS)).json()["data"]] == ["of-all", "of-team-a"]
        assert code(await member.get(f"{PROMPTS}/of-team-b")) == (404, "not_found")
        assert code(await version(member, "of-team-b")) == (404, "not_found")
        assert code(await version(member, "of-all")) == (403, "forbidden")
        assert code(await prompt(member, "x", organisation="team-b")) == (404, "not_found")
        assert code(await prompt(member, "x")) == (403, "forbidden")
        assert (await version(member, "of-team-a")).status_code == 201
        label = f"{PROMPTS}/of-team-a/labels/production"
        assert code(await member.put(label, json={"version": 1}, headers=NEW)) == (403, "forbidden")
    async with somebody(plane, "ow", team_a="owner") as owner:
        assert (await owner.put(label, json={"version": 1}, headers=NEW)).status_code == 201
    async with somebody(plane, "vi", team_a="viewer") as viewer:
        assert (await viewer.get(f"{PROMPTS}/of-team-a")).status_code == 200
        assert code(await version(viewer, "of-team-a")) == (403, "forbidden")
    await changed(plane, "team-a", ended_at=plane.clock.now)
    assert (await policy_of(plane))["prompts"] == []
