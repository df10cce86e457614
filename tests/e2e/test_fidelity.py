"""The router adds nothing to an answer but its request id, and takes nothing away."""

import json
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import Engines
from tests.e2e.processes import Process, until

pytestmark = pytest.mark.e2e

CHAT = {"model": "llama-3-8b", "messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 60}
GREEDY = CHAT | {"temperature": 0, "seed": 7}
SAMPLED = CHAT | {"temperature": 1, "seed": 7, "logprobs": True}


@pytest.mark.parametrize("body", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_an_answer_is_the_one_of_the_engine(engines: Engines, client: httpx.Client, body: dict[str, Any]) -> None:
    direct = httpx.post(engines["llama-3-8b"][0].url + "/v1/chat/completions", json=body, timeout=60, trust_env=False)
    routed = client.post("/v1/chat/completions", json=body)
    assert routed.status_code == direct.status_code == 200
    assert routed.headers["content-type"] == direct.headers["content-type"]
    assert without_identity(routed.json()) == without_identity(direct.json())


def test_a_stream_has_the_text_of_the_engine(engines: Engines, client: httpx.Client) -> None:
    body = GREEDY | {"stream": True, "stream_options": {"include_usage": True}}
    direct = httpx.post(engines["llama-3-8b"][0].url + "/v1/chat/completions", json=body, timeout=60, trust_env=False)
    routed = client.post("/v1/chat/completions", json=body)
    assert text_of(routed.text) == text_of(direct.text) != ""
    assert routed.text.endswith("data: [DONE]\n\n")
    assert routed.headers["content-type"] == direct.headers["content-type"]
    assert routed.headers["x-accel-buffering"] == "no"


def test_a_stream_arrives_as_it_is_made(client: httpx.Client) -> None:
    body = GREEDY | {"stream": True, "max_tokens": 900}
    with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        pieces = list(answer.iter_raw())
    # On a busy machine the engine itself writes its tokens in bursts of dozens.
    assert len(pieces) > 10


@pytest.mark.parametrize("stream", [False, True])
def test_the_request_id_names_the_generation(client: httpx.Client, stream: bool) -> None:
    headers = {"x-request-id": f"named-{stream}"}
    answer = client.post("/v1/chat/completions", json=CHAT | {"stream": stream}, headers=headers)
    assert answer.headers["x-request-id"] == f"named-{stream}"
    first = json.loads(answer.text.splitlines()[0].removeprefix("data: ")) if stream else answer.json()
    assert first["id"].startswith(f"chatcmpl-named-{stream}")


def test_every_answer_has_a_request_id(client: httpx.Client) -> None:
    answers = [
        client.post("/v1/chat/completions", json=CHAT),
        client.post("/v1/chat/completions", json=CHAT | {"stream": True}),
        client.post("/v1/chat/completions", json=CHAT | {"max_tokens": 5000}),
        client.post("/v1/chat/completions", json=CHAT | {"model": "nope"}),
        client.post("/v1/chat/completions", content=b"{", headers={"content-type": "application/json"}),
        client.get("/v1/models"),
        client.get("/nowhere"),
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 400, 404, 400, 200, 404]
    ids = [answer.headers["x-request-id"] for answer in answers]
    assert all(ids)
    assert len(set(ids)) == len(ids)
    assert answers[0].json()["id"].startswith("chatcmpl-" + ids[0])


def test_a_request_is_logged_and_counted(router: Process, client: httpx.Client) -> None:
    labels = ('code="200"', 'model_name="gpt2"', 'route="completions"', 'stream="false"')
    asked = r"inference_api_requests_total\{" + "".join(f"(?=.*{label})" for label in labels) + r".*\}"
    before = router.sample(asked)
    body = {"model": "gpt2", "prompt": "a secret of mine", "max_tokens": 12}
    answer = client.post("/v1/completions", json=body, headers={"x-request-id": "logged-1"})
    assert until(lambda: "logged-1" in router.log.read_text(), seconds=5)
    line = next(json.loads(line) for line in router.log.read_text().splitlines() if "logged-1" in line)
    told = {name: line[name] for name in ("event", "model", "status", "outcome", "attempts", "completion_tokens")}
    assert told == {
        "event": "request",
        "model": "gpt2",
        "status": 200,
        "outcome": "ok",
        "attempts": 1,
        "completion_tokens": 12,
    }
    assert router.sample(asked) == before + 1
    assert "a secret of mine" not in router.log.read_text()
    assert answer.json()["choices"][0]["text"] not in router.log.read_text()


def without_identity(answer: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in answer.items() if name not in ("id", "created")}


def text_of(stream: str) -> str:
    events = [line.removeprefix("data: ") for line in stream.splitlines() if line.startswith("data: {")]
    choices = [choice for event in events for choice in json.loads(event)["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices)
