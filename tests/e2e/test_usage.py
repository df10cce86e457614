"""Usage records beside the counts of real engines: JSON answers, streams that did not ask, streams that were left."""

import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml

from inference_api.policy.keys import digest, new_key
from tests.e2e.conftest import Engines, StartRouter, unfinished
from tests.e2e.processes import Process, until

pytestmark = pytest.mark.e2e

MODEL = "mistral-7b"
KEY = new_key()
BODY = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 8, "ignore_eos": True}


@pytest.fixture(scope="module")
def router(start_router: StartRouter, catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> Process:
    """With keys, a price for each model, and the usage in the log."""
    folder = tmp_path_factory.mktemp("policy")
    document = yaml.safe_load(catalogue.read_text())
    for entry in document["models"]:
        entry["price"] = {"input": 1, "output": 2}
    priced = folder / "catalogue.yaml"
    priced.write_text(yaml.safe_dump(document))
    entry = {"id": KEY.id, "name": "e2e", "digest": digest(KEY.key.encode())}
    policy = folder / "policy.yaml"
    policy.write_text(yaml.safe_dump({"keys": [entry]}))
    return start_router(priced, AUTH="keys", POLICY=str(policy), USAGE="log")


@pytest.fixture
def client(router: Process) -> Any:
    headers = {"authorization": f"Bearer {KEY.key}"}
    with httpx.Client(base_url=router.url, timeout=120, trust_env=False, headers=headers) as client:
        yield client


def counted(engine: Process) -> tuple[float, float]:
    return engine.sample("vllm:prompt_tokens_total"), engine.sample("vllm:generation_tokens_total")


def records(router: Process) -> list[dict[str, Any]]:
    lines = (line for line in router.log.read_text().splitlines() if '"event":"usage"' in line)
    return [json.loads(line) for line in lines]


def test_records_have_what_the_engine_counted(idle_engines: Engines, router: Process, client: httpx.Client) -> None:
    [engine] = idle_engines[MODEL]
    before, known = counted(engine), len(records(router))

    for number in range(6):
        answer = client.post("/v1/completions", json=BODY | {"stream": number % 2 == 0})
        assert answer.status_code == 200
        assert b'"usage":{' not in answer.content if number % 2 == 0 else answer.json()["usage"]

    assert until(lambda: len(records(router)) == known + 6, seconds=10)
    made = records(router)[known:]
    after = counted(engine)
    assert sum(one["input_tokens"] for one in made) == after[0] - before[0]
    assert sum(one["output_tokens"] for one in made) == after[1] - before[1] == 6 * 8
    assert {one["usage_source"] for one in made} == {"reported"}
    assert all(one["cost_nanos"] == one["input_tokens"] * 1000 + one["output_tokens"] * 2000 for one in made)
    assert {one["key_id"] for one in made} == {KEY.id}


def test_the_sdk_that_asks_gets_the_usage_and_the_others_no_event_without_choices(
    idle_engines: Engines, router: Process
) -> None:
    with openai.OpenAI(base_url=f"{router.url}/v1", api_key=KEY.key, max_retries=0) as sdk:
        messages: Any = [{"role": "user", "content": "Hello"}]
        asked = list(
            sdk.chat.completions.create(
                model=MODEL, messages=messages, max_tokens=4, stream=True, stream_options={"include_usage": True}
            )
        )
        silent = list(sdk.chat.completions.create(model=MODEL, messages=messages, max_tokens=4, stream=True))

    assert asked[-1].usage is not None
    assert asked[-1].choices == []
    assert all(event.choices for event in silent)
    assert all(event.usage is None for event in silent)


def test_a_stream_that_its_client_leaves_is_counted(
    idle_engines: Engines, router: Process, client: httpx.Client
) -> None:
    [engine] = idle_engines[MODEL]
    before, known = counted(engine), len(records(router))

    with client.stream("POST", "/v1/completions", json=BODY | {"max_tokens": 900, "stream": True}) as answer:
        lines = (line for line in answer.iter_lines() if line)
        for _ in range(30):
            next(lines)

    assert until(lambda: len(records(router)) == known + 1, seconds=10)
    assert until(lambda: not unfinished(engine), seconds=20)
    [made] = records(router)[known:]
    generated = counted(engine)[1] - before[1]
    assert (made["usage_source"], made["outcome"], made["status"]) == ("counted", "client_gone", 200)
    # The engine works ahead of what was relayed until it notices that the client has left, and does not count its last
    # step then.
    assert 30 <= made["output_tokens"] <= generated + 5
    assert generated < 900
