"""What a vote or a race cannot answer is an invalid request, whatever else would refuse it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Served
from tests.fakes import CHAT, FakeEngine
from tests.policies import write

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
VOTE = {"consensus": {"members": ["a", "b"]}, "cache": {"ttl": 60}}
RACE = {"race": {"members": ["a", "b"]}, "cache": {"ttl": 60}}
LIMITS = [{"requests": 1, "per": 3600}]


@pytest.mark.parametrize("name", ["m", "split"])
@pytest.mark.parametrize(
    ("virtual", "path", "more", "param"),
    [
        (VOTE, "/v1/chat/completions", {"stream": True}, "stream"),
        (VOTE, "/v1/chat/completions", {"n": 2}, "n"),
        (RACE, "/v1/responses", {"input": "x"}, "model"),
    ],
)
async def test_it_is_refused_before_the_limits(
    name: str, virtual: Any, path: str, more: Any, param: str, tmp_path: Path, start_engine: Start, start_router: Start
) -> None:
    engine: FakeEngine = await start_engine()
    models = [
        *({"name": name, "backends": [engine.url]} for name in ("a", "b")),
        {"name": "m", **virtual},
        {"name": "split", "split": {"variants": {"m": 1, "a": 0}}},
    ]
    policy = write(tmp_path / "policy.json", {"anonymous": {"limits": LIMITS}})
    served: Served = await start_router(models=models, policy=str(policy))
    assert [(await served.chat(model="a")).status_code for _ in range(2)] == [200, 429]

    answer = await served.client.post(path, json={**CHAT, "model": name, **more})

    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (422, "validation_error", param)
    assert not {"x-ratelimit-limit-requests", "x-inference-cache"} & answer.headers.keys()
    assert await served.metric("inference_api_cache_requests_total", model_name="m") == 0


async def test_it_is_refused_before_the_prompt(tmp_path: Path, start_engine: Start, start_router: Start) -> None:
    engine: FakeEngine = await start_engine()
    models = [*({"name": name, "backends": [engine.url]} for name in ("a", "b")), {"name": "m", **VOTE}]
    policy = write(tmp_path / "policy.json", {})
    served: Served = await start_router(models=models, policy=str(policy))

    refused = await served.chat(stream=True, prompt={"id": "unknown"})
    unknown = await served.chat(prompt={"id": "unknown"})

    assert (refused.status_code, unknown.status_code) == (422, 404)
