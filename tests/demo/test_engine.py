"""The engine on a real socket, seen by a plain HTTP client."""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from starlette.types import ASGIApp

from inference_api.demo.engine import create_engine, main
from inference_api.demo.serving import Faults
from tests.ports import free_port

HELLO: dict[str, Any] = {"model": "llama-3-8b", "messages": [{"role": "user", "content": "Hello"}]}


def events(response: httpx.Response) -> list[Any]:
    """The decoded events of a stream without [DONE], which must be the last."""
    *data, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in data]


def running(client: httpx.Client) -> float:
    lines = client.get("/metrics").text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running{"))


def until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_chat_answer_has_the_text_and_the_token_counts(engine: httpx.Client) -> None:
    answer = engine.post("/v1/chat/completions", json=HELLO).json()
    choice, usage = answer["choices"][0], answer["usage"]
    assert (answer["object"], answer["model"], answer["created"]) == ("chat.completion", "llama-3-8b", 1700000000)
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"].startswith("I am a demo model named llama-3-8b, not a language model.")
    assert choice["finish_reason"] == "stop"
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_the_same_request_gets_the_same_answer(engine: httpx.Client) -> None:
    first, second = (
        engine.post("/v1/chat/completions", json=HELLO, headers={"x-request-id": "a"}).json() for _ in range(2)
    )
    assert first == second


def test_a_stream_has_the_events_of_vllm_in_their_order(engine: httpx.Client) -> None:
    asked = {**HELLO, "stream": True, "stream_options": {"include_usage": True}}
    response = engine.post("/v1/chat/completions", json=asked)
    opening, *deltas, finish, usage = events(response)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert list(opening) == ["id", "object", "created", "model", "choices", "prompt_token_ids"]
    assert opening["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(delta["choices"][0]["finish_reason"] is None for delta in deltas)
    assert finish["choices"][0]["delta"] == {"content": ""}
    assert finish["choices"][0]["finish_reason"] == "stop"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == len(deltas)


def test_a_stream_says_the_same_as_the_document(engine: httpx.Client) -> None:
    document = engine.post("/v1/chat/completions", json=HELLO).json()
    streamed = events(engine.post("/v1/chat/completions", json={**HELLO, "stream": True}))
    text = "".join(event["choices"][0]["delta"]["content"] for event in streamed)
    assert text == document["choices"][0]["message"]["content"]


def test_usage_is_streamed_only_when_asked_for(engine: httpx.Client) -> None:
    streamed = events(engine.post("/v1/chat/completions", json={**HELLO, "stream": True}))
    assert all("usage" not in event and event["choices"] for event in streamed)


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_the_limit_of_tokens_is_kept(engine: httpx.Client, field: str) -> None:
    answer = engine.post("/v1/chat/completions", json={**HELLO, field: 3}).json()
    assert answer["choices"][0]["message"]["content"] == "I am a"
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("stop", [" demo", ["not in it", " demo"]])
def test_a_stop_string_ends_the_answer_before_it(engine: httpx.Client, stop: Any) -> None:
    choice = engine.post("/v1/chat/completions", json={**HELLO, "stop": stop}).json()["choices"][0]
    assert choice["message"]["content"] == "I am a"
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", " demo")


def test_n_choices_are_streamed_side_by_side(engine: httpx.Client) -> None:
    asked = {**HELLO, "n": 2, "stream": True, "max_tokens": 2, "stream_options": {"include_usage": True}}
    *streamed, usage = events(engine.post("/v1/chat/completions", json=asked))
    assert [event["choices"][0]["index"] for event in streamed] == [0, 1] * 4
    assert usage["usage"]["completion_tokens"] == 4


def test_only_the_last_words_of_the_user_are_repeated(engine: httpx.Client) -> None:
    parts = [{"type": "text", "text": "sec"}, {"type": "text", "text": "ond"}, {"type": "image_url", "image_url": {}}]
    turns = [("user", "first"), ("assistant", None), ("user", parts), ("assistant", "so")]
    asked = {"messages": [{"role": role, "content": content} for role, content in turns]}
    answer = engine.post("/v1/chat/completions", json=asked).json()
    assert answer["choices"][0]["message"]["content"].endswith("You said: second")


def test_a_chat_without_a_user_is_answered(engine: httpx.Client) -> None:
    answer = engine.post("/v1/chat/completions", json={"messages": [{"role": "system", "content": "Be good."}]}).json()
    assert answer["choices"][0]["message"]["content"].endswith("You said: ")


def test_the_request_id_becomes_the_id_of_the_answer(engine: httpx.Client) -> None:
    headers = {"x-request-id": "abc"}
    chat = engine.post("/v1/chat/completions", json={**HELLO, "stream": True}, headers=headers)
    assert {event["id"] for event in events(chat)} == {"chatcmpl-abc"}
    completion = engine.post("/v1/completions", json={"prompt": "Hello"}, headers=headers).json()
    assert completion["id"] == "cmpl-abc"


def test_without_a_request_id_every_answer_has_its_own(engine: httpx.Client) -> None:
    ids = {engine.post("/v1/chat/completions", json=HELLO).json()["id"] for _ in range(2)}
    assert len(ids) == 2


def test_a_completion_is_streamed_as_text(engine: httpx.Client) -> None:
    asked = {"prompt": "Hello", "stream": True, "max_tokens": 2}
    streamed = events(engine.post("/v1/completions", json=asked))
    assert {event["object"] for event in streamed} == {"text_completion"}
    assert [event["choices"][0]["text"] for event in streamed] == ["I", " am", ""]
    assert streamed[-1]["choices"][0]["finish_reason"] == "length"


def test_a_short_choice_ends_before_a_long_one(engine: httpx.Client) -> None:
    streamed = events(engine.post("/v1/completions", json={"prompt": ["", "a b"], "stream": True}))
    texts = ["".join(e["choices"][0]["text"] for e in streamed if e["choices"][0]["index"] == i) for i in (0, 1)]
    assert [text.partition("You said:")[2] for text in texts] == [" ", " a b"]


@pytest.mark.parametrize(
    ("prompt", "said", "count"),
    [
        ("a b", ["a b"], 2),
        (["a", "b c"], ["a", "b c"], 3),
        ([7, 8], ["<7><8>"], 2),
        ([[7], [8, 9]], ["<7>", "<8><9>"], 3),
    ],
)
def test_a_prompt_is_a_text_or_ids_or_several(engine: httpx.Client, prompt: Any, said: list[str], count: int) -> None:
    answer = engine.post("/v1/completions", json={"prompt": prompt}).json()
    assert [choice["text"].partition("You said: ")[2] for choice in answer["choices"]] == said
    assert answer["usage"]["prompt_tokens"] == count


def test_text_survives_tokenize_and_detokenize(engine: httpx.Client) -> None:
    counted = engine.post("/tokenize", json={"prompt": "Grüße, 世界! Unbelievable"}).json()
    assert (counted["count"], counted["max_model_len"]) == (len(counted["tokens"]), 200)
    text = engine.post("/detokenize", json={"tokens": counted["tokens"]}).json()
    assert text == {"prompt": "Grüße, 世界! Unbelievable"}


def test_tokenize_counts_messages_as_the_prompt_of_a_chat(engine: httpx.Client) -> None:
    counted = engine.post("/tokenize", json=HELLO).json()["count"]
    assert counted == engine.post("/v1/chat/completions", json=HELLO).json()["usage"]["prompt_tokens"]


def test_the_model_card_and_the_version_do_not_claim_a_real_model(engine: httpx.Client) -> None:
    (card,) = engine.get("/v1/models").json()["data"]
    assert (card["id"], card["max_model_len"], card["owned_by"]) == ("llama-3-8b", 200, "inference-api-demo")
    assert engine.get("/version").json()["version"].endswith("+demo")
    assert engine.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("change", "status", "type", "param"),
    [
        ({"model": "nope"}, 404, "NotFoundError", "model"),
        ({"messages": []}, 400, "Bad Request", "body.messages"),
        ({"messages": None}, 400, "Bad Request", "body.messages"),
        ({"n": 0}, 400, "Bad Request", "body.n"),
        ({"stream": False, "stream_options": {"include_usage": True}}, 400, "Bad Request", "body"),
        ({"max_tokens": 0}, 400, "BadRequestError", "max_tokens"),
        ({"max_tokens": 201}, 400, "BadRequestError", "max_tokens"),
        ({"max_tokens": 199}, 400, "BadRequestError", "input_text"),
        ({"messages": [{"role": "user", "content": "word " * 200}]}, 400, "BadRequestError", "input_text"),
    ],
)
def test_a_bad_request_is_refused_in_the_envelope_of_vllm(
    engine: httpx.Client, change: dict[str, Any], status: int, type: str, param: str
) -> None:
    response = engine.post("/v1/chat/completions", json={**HELLO, "stream": True, **change})
    error = response.json()["error"]
    assert response.status_code == status
    assert (error["type"], error["param"], error["code"]) == (type, param, status)
    assert error["message"]


@pytest.mark.parametrize("body", [b"{", b"", b"[]"])
def test_a_body_that_is_not_a_json_object_is_refused(engine: httpx.Client, body: bytes) -> None:
    response = engine.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["code"]) == (400, 400)


def test_another_content_type_is_refused(engine: httpx.Client) -> None:
    response = engine.post("/v1/chat/completions", content=b"{}", headers={"content-type": "text/plain"})
    assert response.status_code == 400
    assert "text/plain" in response.json()["error"]["message"]


def test_tokenize_refuses_to_count_nothing(engine: httpx.Client) -> None:
    assert (
        engine.post("/tokenize", json={}).json()["error"]["message"]
        == "body: `input`, `prompt` or `messages` is needed."
    )


@pytest.mark.parametrize(("path", "status"), [("/v1/nope", 404), ("/v1/chat/completions", 405)])
def test_an_unknown_route_or_method_is_answered_as_fastapi_does(engine: httpx.Client, path: str, status: int) -> None:
    response = engine.get(path)
    assert (response.status_code, list(response.json())) == (status, ["detail"])


@pytest.mark.parametrize("schema", [{"$ref": 5}, {"enum": 5}, {"type": "string", "minLength": "long"}])
def test_a_schema_that_is_none_is_refused(engine: httpx.Client, schema: Any) -> None:
    asked = {**HELLO, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}
    answer = engine.post("/v1/chat/completions", json=asked)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "response_format")


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
def test_what_has_one_answer_only_refuses_more(engine: httpx.Client, path: str) -> None:
    answer = engine.post(path, json={**HELLO, "input": "Hello", "max_tokens": 5, "n": 2})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "body.n")


def test_a_batch_of_chats_gets_one_choice_for_each(engine: httpx.Client) -> None:
    asked = {"messages": [[{"role": "user", "content": word}] for word in ("one", "two")]}
    answer = engine.post("/v1/chat/completions/batch", json=asked).json()
    contents = [choice["message"]["content"].rpartition(" ")[2] for choice in answer["choices"]]
    assert (contents, [choice["index"] for choice in answer["choices"]]) == (["one", "two"], [0, 1])


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank"])
def test_the_document_with_the_words_of_the_query_is_first(engine: httpx.Client, path: str) -> None:
    asked = {"query": "red apples", "documents": ["blue sky", "apples are red", "red"], "top_n": 2}
    answer = engine.post(path, json=asked).json()
    assert [(result["index"], result["document"]["text"]) for result in answer["results"]] == [
        (1, "apples are red"),
        (2, "red"),
    ]
    assert answer["results"][0]["relevance_score"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
@pytest.mark.parametrize(
    ("one", "many", "scores"), [("a b", ["a b", "a c", "d"], [1, 1 / 3, 0]), (["a", "b"], ["a", "a"], [1, 0])]
)
def test_texts_are_scored_in_pairs(engine: httpx.Client, path: str, one: Any, many: Any, scores: list[float]) -> None:
    data = engine.post(path, json={"text_1": one, "text_2": many}).json()["data"]
    assert [item["score"] for item in data] == pytest.approx(scores)


def test_pooling_gives_the_vectors_of_embeddings(engine: httpx.Client) -> None:
    asked = {"input": ["a", "b"], "dimensions": 4}
    pooled = engine.post("/pooling", json=asked).json()["data"]
    embedded = engine.post("/v1/embeddings", json=asked).json()["data"]
    assert [item["data"] for item in pooled] == [item["embedding"] for item in embedded]
    chat = engine.post("/v1/embeddings", json=HELLO).json()
    assert chat["usage"]["prompt_tokens"] == 3


def test_a_text_is_in_its_likeliest_class(engine: httpx.Client) -> None:
    for item in engine.post("/classify", json={"input": ["a", "b", "c"]}).json()["data"]:
        assert sum(item["probs"]) == pytest.approx(1)
        assert item["label"] == f"LABEL_{item['probs'].index(max(item['probs']))}"


def test_an_upload_needs_a_file_in_a_form(engine: httpx.Client) -> None:
    for answer in (
        engine.post("/v1/audio/transcriptions", json={}),
        engine.post("/v1/audio/transcriptions", data={"model": "llama-3-8b"}, files={"other": b""}),
    ):
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "Bad Request")


def test_tokens_come_at_the_given_pace(serve: Callable[[ASGIApp], str]) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    url = serve(create_engine("gpt2", tokens_per_second=40, sleep=sleep))
    for stream in (True, False):
        asked = {"prompt": "Hello", "max_tokens": 5, "stream": stream}
        httpx.post(f"{url}/v1/completions", json=asked, trust_env=False)
    assert slept == [1 / 40] * 10


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_the_generation(serve: Callable[[ASGIApp], str], stream: bool) -> None:
    """The whole answer would take a minute."""
    url = serve(create_engine("gpt2", tokens_per_second=10))
    body = json.dumps({"prompt": "word " * 500, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    with httpx.Client(base_url=url, trust_env=False) as client:
        with socket.create_connection((httpx.URL(url).host, httpx.URL(url).port or 0)) as caller:
            caller.sendall(head.encode() + b"\r\n\r\n" + body)
            until(lambda: running(client) == 1)
        until(lambda: running(client) == 0)


def test_a_slow_engine_waits_before_its_first_token(serve: Callable[[ASGIApp], str]) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    url = serve(create_engine("gpt2", tokens_per_second=40, sleep=sleep, faults=Faults(delay=1.5)))
    httpx.post(f"{url}/v1/completions", json={"prompt": "Hello", "max_tokens": 3}, trust_env=False)
    assert slept == [1.5 + 1 / 40, 1 / 40, 1 / 40]


def test_an_engine_fails_now_and_then(serve: Callable[[ASGIApp], str]) -> None:
    drawn = iter([0.3, 0.2, 0.9, 0.2, 0.1])
    faults = Faults(rate=0.25, status=503, random=lambda: next(drawn))
    url = serve(create_engine("gpt2", tokens_per_second=1e6, faults=faults))
    asked = {"prompt": "Hello", "max_tokens": 8, "stream": True}
    answered, refused = (httpx.post(f"{url}/v1/completions", json=asked, trust_env=False) for _ in range(2))
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.post(f"{url}/v1/completions", json=asked, trust_env=False)

    assert answered.text.endswith("data: [DONE]\n\n")
    assert (refused.status_code, refused.json()["error"]["type"]) == (503, "InternalServerError")


def test_a_pace_that_is_no_pace_is_refused() -> None:
    with pytest.raises(ValueError, match="more than 0, not 0"):
        create_engine("gpt2", tokens_per_second=0)


def test_the_command_serves_until_it_is_interrupted() -> None:
    port = free_port()
    answers: list[Any] = []

    def ask_and_interrupt() -> None:
        with httpx.Client(transport=httpx.HTTPTransport(retries=20), trust_env=False) as client:
            answers.append(client.get(f"http://127.0.0.1:{port}/v1/models").json())
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=ask_and_interrupt)
    thread.start()
    main(["--model", "gpt2", "--port", str(port), "--max-model-len", "77"])
    thread.join()
    assert answers[0]["data"][0]["max_model_len"] == 77
