"""The catalogue of the control plane: on the machine side as registry_stub's, under /api/v1 with preconditions."""

import asyncio

import pytest

from control_plane.services.visibility import visible_models
from tests.control_plane.acts import act_of
from tests.control_plane.conftest import NOON, Running
from tests.control_plane.teams import organisation

pytestmark = pytest.mark.anyio
GPT2 = {"name": "gpt2", "backends": [{"url": "http://10.0.0.1:8000"}]}


async def test_a_model_that_is_put_is_served_to_routers(plane: Running) -> None:
    made = await plane.admin.put("/models/gpt2", json=GPT2)
    listed = await plane.client.get("/models")

    assert made.status_code == 201
    assert listed.json() == {"models": [made.json()]}
    assert (await plane.client.get("/models/gpt2")).headers["etag"] == made.headers["etag"]


async def test_a_change_ends_a_long_poll(plane: Running) -> None:
    etag = (await plane.client.get("/models")).headers["etag"]

    async def poll() -> int:
        answer = await plane.client.get("/models", headers={"if-none-match": etag, "prefer": "wait=25"})
        assert answer.headers["preference-applied"] == "wait=25"
        return answer.status_code

    waiting = asyncio.create_task(poll())
    await asyncio.sleep(0)
    await plane.admin.put("/models/gpt2", json=GPT2)

    assert await waiting == 200


async def test_a_member_of_an_ended_organisation_sees_no_models_by_it(plane: Running) -> None:
    for name in ("gpt2", "other"):
        await plane.admin.put(f"/models/{name}", json={**GPT2, "name": name})
    await organisation(plane, "team-a", ended_at=NOON - 1)
    await organisation(plane, "team-b", models=["other"])

    async def seen(**roles: str) -> list[bool]:
        visible = await visible_models(plane.plane, act_of(plane, "max", **roles))
        return [visible(name) for name in ("gpt2", "other")]

    assert await seen(team_a="member") == [False, False]
    assert await seen(team_a="owner", team_b="member") == [False, True]


async def test_the_api_wants_a_precondition(plane: Running) -> None:
    missing = await plane.admin.put("/api/v1/models/gpt2", json=GPT2)
    made = await plane.admin.put("/api/v1/models/gpt2", json=GPT2, headers={"if-none-match": "*"})
    again = await plane.admin.put("/api/v1/models/gpt2", json=GPT2, headers={"if-none-match": "*"})

    assert [missing.status_code, made.status_code, again.status_code] == [428, 201, 412]
    assert missing.json()["error"]["code"] == "precondition_required"
