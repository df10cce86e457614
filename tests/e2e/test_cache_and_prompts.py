"""The answer cache and stored prompts before a real engine: the same bytes again; a prompt as if written out."""

import json
from typing import Any

import httpx
import pytest
import yaml

from tests.e2e.conftest import Engines, StartRouter
from tests.e2e.processes import Process

pytestmark = pytest.mark.e2e

MODEL = "llama-3-8b"
GREEDY = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 40, "temperature": 0}
HELLO = {"role": "user", "content": "Hello"}
SYSTEM = {"role": "system", "content": "You help with {{product}}."}
FILLED = {"role": "system", "content": 'You help with the "router".'}
POLICY = {
    "prompts": [
        {
            "name": "support",
            "labels": {"production": 1},
            "versions": [
                {"version": 1, "messages": [SYSTEM], "variables": {"product": {"trusted": True}}},
                {"version": 2, "text": "Once upon {{what}}", "variables": {"what": {}}},
            ],
        }
    ]
}
ASKED = {"id": "support", "variables": {"product": 'the "router"'}}


@pytest.fixture(scope="module")
def router(start_router: StartRouter, engines: Engines, tmp_path_factory: pytest.TempPathFactory) -> Process:
    folder = tmp_path_factory.mktemp("cached")
    entry = {"name": MODEL, "backends": [engines[MODEL][0].url], "cache": {"ttl": 3600}}
    (folder / "catalogue.yaml").write_text(yaml.safe_dump({"models": [entry]}))
    (folder / "policy.yaml").write_text(yaml.safe_dump(POLICY))
    return start_router(folder / "catalogue.yaml", POLICY=str(folder / "policy.yaml"))


def ask(at: Process, path: str, body: dict[str, Any], **headers: str) -> httpx.Response:
    found = httpx.post(at.url + path, json=body, headers=headers, timeout=120, trust_env=False)
    assert found.status_code == 200, found.text
    return found


def generated(engines: Engines) -> float:
    return sum(engine.sample("vllm:generation_tokens_total") for engine in engines[MODEL])


@pytest.fixture(scope="module")
def ending(router: Process) -> dict[str, Any]:
    """A request whose answer ends by itself: at a word that the model says on its way."""
    found = ask(router, "/v1/completions", GREEDY)
    [choice] = found.json()["choices"]
    # Cut at the limit: not stored.
    assert choice["finish_reason"] == "length"
    assert ask(router, "/v1/completions", GREEDY).headers["x-inference-cache"] == "miss"
    text = choice["text"]
    return {**GREEDY, "stop": [text[len(text) // 2 :][:8]]}


@pytest.mark.parametrize("stream", [False, True])
def test_a_repeated_request_is_answered_without_the_engine(
    stream: bool, ending: dict[str, Any], router: Process, idle_engines: Engines
) -> None:
    body = {**ending, "stream": stream}
    first = ask(router, "/v1/completions", body)
    before = generated(idle_engines)
    again = [ask(router, "/v1/completions", body) for _ in range(3)]
    after = generated(idle_engines)

    assert first.headers["x-inference-cache"] == "miss"
    assert [one.headers["x-inference-cache"] for one in again] == ["hit"] * 3
    assert {one.content for one in again} == {first.content}
    assert after == before
    assert ask(router, "/v1/completions", body, **{"cache-control": "no-cache"}).headers["x-inference-cache"] == "miss"


@pytest.mark.parametrize("stream", [False, True])
def test_a_stored_prompt_is_as_if_it_was_written_out(stream: bool, router: Process, engines: Engines) -> None:
    common = {"model": MODEL, "max_tokens": 12, "temperature": 0, "stream": stream}
    common |= {"stream_options": {"include_usage": True}} if stream else {}
    stored = ask(router, "/v1/chat/completions", {**common, "prompt": ASKED, "messages": [HELLO]})
    written = ask(engines[MODEL][0], "/v1/chat/completions", {**common, "messages": [FILLED, HELLO]})

    assert stored.headers["x-inference-prompt"] == "support@1"
    assert said(stored) == said(written)


def test_a_text_is_a_prompt_of_completions(router: Process, engines: Engines) -> None:
    prompt = {"id": "support", "version": 2, "variables": {"what": "a time"}}

    stored = ask(router, "/v1/completions", {**GREEDY, "prompt": prompt})

    assert said(stored) == said(ask(engines[MODEL][0], "/v1/completions", GREEDY))


def said(answer: httpx.Response) -> tuple[list[Any], Any]:
    """The choices, and the tokens of the prompt: equal for equal prompts."""
    if answer.headers["content-type"].startswith("application/json"):
        documents = [answer.json()]
    else:
        lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
        documents = [json.loads(line) for line in lines]
    usage = next(one["usage"] for one in reversed(documents) if one.get("usage"))
    text = "".join(
        choice.get("text") or (choice.get("delta") or choice.get("message") or {}).get("content") or ""
        for one in documents
        for choice in one["choices"]
    )
    return [text], usage["prompt_tokens"]
