"""Models that stand for others, and features between client and model, in front of real engines."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import httpx
import openai
import pytest
import yaml

from tests.e2e.conftest import Engines, StartRouter, unfinished
from tests.e2e.processes import Process, until

pytestmark = pytest.mark.e2e

LLAMA, MISTRAL, GPT2 = "llama-3-8b", "mistral-7b", "gpt2"
MESSAGES = [{"role": "user", "content": "Once upon a time"}]
BODY = {"messages": MESSAGES, "max_tokens": 8, "temperature": 0, "seed": 1}
PROMPT = {"name": "story", "labels": {"production": 1}, "versions": [
    {"version": 1, "messages": [{"role": "user", "content": "Tell of {{hero}}."}],
     "variables": {"hero": {"type": "string", "required": True}}}]}  # fmt: skip


class Wide(BaseHTTPRequestHandler):
    """A model with a context of any length."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        body = json.dumps({"wide": True}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *args: Any) -> None: ...


@pytest.fixture(scope="module")
def wide() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Wide)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def router(engines: Engines, wide: str, start_router: StartRouter, tmp_path_factory: pytest.TempPathFactory) -> Process:
    def real(name: str, served: str, *backends: Process | str, **more: Any) -> dict[str, Any]:
        urls = [backend if isinstance(backend, str) else backend.url for backend in backends]
        return {"name": name, "served_model_name": served, "backends": urls, **more}

    [one, two], [mistral], [gpt2] = engines[LLAMA], engines[MISTRAL], engines[GPT2]
    models = [
        real("one", LLAMA, one),
        real("two", LLAMA, two),
        real("mistral", MISTRAL, mistral),
        real("gpt2", GPT2, gpt2),
        {"name": "chat", "split": {"variants": {"one": 50, "mistral": 50}}},
        {"name": "sure", "consensus": {"members": ["gpt2", "one", "two"], "quorum": 2, "compare": "exact"}},
        real("down", LLAMA, "http://127.0.0.1:9", fallbacks=["mistral"]),
        real("short", MISTRAL, mistral, context_fallbacks=["wide"]),
        real("wide", "wide", wide, engine="openai"),
        real("cached", MISTRAL, mistral, cache={"ttl": 60}),
        real("queued", MISTRAL, mistral, max_in_flight=1, queue={"timeout": 60, "size": 9, "per_caller": 9}),
    ]
    folder = tmp_path_factory.mktemp("many")
    (folder / "catalogue.yaml").write_text(yaml.safe_dump({"models": models}, sort_keys=False))
    (folder / "policy.yaml").write_text(yaml.safe_dump({"prompts": [PROMPT]}))
    return start_router(folder / "catalogue.yaml", POLICY=str(folder / "policy.yaml"), USAGE="log")


def chat(client: httpx.Client, model: str, **more: Any) -> httpx.Response:
    return client.post("/v1/chat/completions", json=BODY | {"model": model} | more)


def content(answer: httpx.Response) -> Any:
    return answer.json()["choices"][0]["message"]["content"]


def test_a_split_keeps_users_on_their_variant(client: httpx.Client) -> None:
    answers = [chat(client, "chat", user=user) for user in ("ana", "bob", "ana", "bob")]

    assert [answer.headers["x-inference-variant"] for answer in answers] == ["mistral", "one"] * 2
    assert [answer.json()["model"] for answer in answers] == [MISTRAL, LLAMA] * 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_fallback_answers_for_a_model_without_a_backend(client: httpx.Client, stream: bool) -> None:
    answer = chat(client, "down", stream=stream)

    assert (answer.status_code, answer.headers["x-inference-model"]) == (200, "mistral")
    assert answer.headers["x-inference-fallback"] == "1"
    assert (b"[DONE]" in answer.content) is stream


@pytest.mark.parametrize("stream", [False, True])
def test_a_longer_context_answers_what_vllm_says_is_too_long(client: httpx.Client, stream: bool) -> None:
    long = [{"role": "user", "content": "word " * 3000}]

    answer = chat(client, "short", messages=long, stream=stream)
    refused = chat(client, "mistral", messages=long, stream=stream)

    assert (answer.status_code, answer.json()) == (200, {"wide": True})
    assert refused.status_code == 400


def test_most_of_three_agree(client: httpx.Client) -> None:
    """Two engines with the same weights say the same, and the third, which is listed first, does not."""
    answer, alone = chat(client, "sure"), chat(client, "one")

    assert (answer.status_code, answer.headers["x-inference-votes"]) == (200, "2/3")
    assert answer.headers["x-inference-model"] == "one"
    assert content(answer) == content(alone)


@pytest.mark.parametrize("stream", [False, True])
def test_a_repeated_request_does_not_reach_the_engine(
    idle_engines: Engines, client: httpx.Client, stream: bool
) -> None:
    [engine] = idle_engines[MISTRAL]
    # It ends by itself: an answer that was cut is not stored.
    words = {"name": "word", "schema": {"type": "string", "enum": ["once", "upon"]}}
    asked = {"stream": stream, "max_tokens": 60, "response_format": {"type": "json_schema", "json_schema": words}}

    first = chat(client, "cached", **asked)
    before = engine.sample("vllm:prompt_tokens_total")
    again = chat(client, "cached", **asked)
    after = engine.sample("vllm:prompt_tokens_total")
    cut = [chat(client, "cached", stream=stream, ignore_eos=True).headers["x-inference-cache"] for _ in range(2)]

    assert first.status_code == 200
    assert again.content == first.content
    assert after == before
    assert [one.headers["x-inference-cache"] for one in (first, again)] == ["miss", "hit"]
    assert cut == ["miss", "miss"]


def test_one_runs_and_the_others_wait_for_its_place(
    idle_engines: Engines, client: httpx.Client, router: Process
) -> None:
    [engine] = idle_engines[MISTRAL]
    seen = []
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(chat, client, "queued", max_tokens=300, ignore_eos=True) for _ in range(4)]
        while not all(one.done() for one in asked):
            seen.append(unfinished(engine))
        answers = [one.result() for one in asked]

    assert [answer.status_code for answer in answers] == [200] * 4
    assert max(seen) == 1
    assert until(lambda: router.sample("inference_api_queue_depth") == 0, seconds=10)


def test_a_stored_prompt_by_the_sdk(router: Process) -> None:
    with openai.OpenAI(base_url=router.url + "/v1", api_key="none", max_retries=0) as sdk:
        prompt = {"prompt": {"id": "story", "variables": {"hero": "a router"}}}
        create = sdk.chat.completions.with_raw_response.create
        answer = create(model="one", messages=[], max_tokens=4, extra_body=prompt)
        plain = create(model="one", messages=[{"role": "user", "content": "Tell of a router."}], max_tokens=4)

    tokens = [json.loads(one.text)["usage"]["prompt_tokens"] for one in (answer, plain)]
    assert answer.headers["x-inference-prompt"] == "story@1"
    assert tokens[0] == tokens[1]


def test_the_records_tell_who_answered(client: httpx.Client, router: Process) -> None:
    def of(model: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in router.log.read_text().splitlines() if '"event":"usage"' in line]
        return [line for line in lines if line["asked_model"] == model]

    chat(client, "down"), chat(client, "sure")

    assert until(lambda: len(of("down")) > 0 and any(one["kind"] == "vote" for one in of("sure")), seconds=10)
    assert {(one["model"], one["fallback"], one["kind"]) for one in of("down")} == {("mistral", True, "request")}
    votes = {one["model"] for one in of("sure") if one["kind"] == "vote"}
    assert votes == {"gpt2", "two"}
