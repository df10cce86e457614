"""The catalogue of the control plane: on the machine side as registry_stub's, under /api/v1 with preconditions."""

import asyncio

import pytest

from tests.control_plane.conftest import Running

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


async def test_the_api_wants_a_precondition(plane: Running) -> None:
    missing = await plane.admin.put("/api/v1/models/gpt2", json=GPT2)
    made = await plane.admin.put("/api/v1/models/gpt2", json=GPT2, headers={"if-none-match": "*"})
    again = await plane.admin.put("/api/v1/models/gpt2", json=GPT2, headers={"if-none-match": "*"})

    assert [missing.status_code, made.status_code, again.status_code] == [428, 201, 412]
    assert missing.json()["error"]["code"] == "precondition_required"
