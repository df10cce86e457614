"""The OpenAI SDK, synchronous and asynchronous: what it can do with vLLM it can do with the router in between."""

import json
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.e2e.conftest import BaseURL, Engines
from tests.e2e.processes import Process, until

pytestmark = pytest.mark.e2e

HELLO: Any = [{"role": "user", "content": "Hello, who are you?"}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Oslo", "Paris"]}},
    "required": ["city"],
    "additionalProperties": False,
}
FORECAST: Any = {"type": "function", "function": {"name": "forecast", "strict": True, "parameters": PARAMETERS}}
CHOICE: Any = {"type": "function", "function": {"name": "forecast"}}


def sdk(url: str) -> OpenAI:
    return OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=60)


def async_sdk(url: str) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=60)


def test_chat(base_url: BaseURL) -> None:
    with sdk(base_url("llama-3-8b")) as api:
        answer = api.chat.completions.create(model="llama-3-8b", messages=HELLO, max_tokens=20)
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 20


def test_streamed_chat_ends_with_its_usage(base_url: BaseURL) -> None:
    with sdk(base_url("llama-3-8b")) as api:
        chunks = list(
            api.chat.completions.create(
                model="llama-3-8b", messages=HELLO, max_tokens=20, stream=True, stream_options={"include_usage": True}
            )
        )
    *deltas, last = chunks
    assert sum(bool(chunk.choices[0].delta.content) for chunk in deltas) > 1
    assert deltas[-1].choices[0].finish_reason == "length"
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 20


@pytest.mark.anyio
async def test_chat_of_the_asynchronous_sdk(base_url: BaseURL) -> None:
    async with async_sdk(base_url("llama-3-8b")) as api:
        whole = await api.chat.completions.create(
            model="llama-3-8b", messages=HELLO, max_tokens=20, temperature=0, seed=1
        )
        stream = await api.chat.completions.create(
            model="llama-3-8b", messages=HELLO, max_tokens=20, temperature=0, seed=1, stream=True
        )
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(pieces) == whole.choices[0].message.content


def test_a_tool_is_called(base_url: BaseURL) -> None:
    with sdk(base_url("llama-3-8b")) as api:
        answer = api.chat.completions.create(
            model="llama-3-8b", messages=HELLO, max_tokens=200, tools=[FORECAST], tool_choice=CHOICE
        )
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "forecast"
    assert json.loads(call.function.arguments)["city"] in ("Oslo", "Paris")


def test_a_tool_is_called_in_a_stream(base_url: BaseURL) -> None:
    with (
        sdk(base_url("llama-3-8b")) as api,
        api.chat.completions.stream(
            model="llama-3-8b", messages=HELLO, max_tokens=200, tools=[FORECAST], tool_choice=CHOICE
        ) as stream,
    ):
        answer = stream.get_final_completion()
    (call,) = answer.choices[0].message.tool_calls or []
    assert json.loads(call.function.arguments)["city"] in ("Oslo", "Paris")


def test_fields_that_only_the_engine_knows_reach_it(base_url: BaseURL) -> None:
    with sdk(base_url("llama-3-8b")) as api:
        answer = api.chat.completions.create(
            model="llama-3-8b",
            messages=HELLO,
            max_tokens=5,
            extra_body={"return_token_ids": True, "top_k": 1, "nobody": {"knows": ["this"]}},
        )
    assert len(answer.choices[0].to_dict()["token_ids"]) == 5  # type: ignore[arg-type]


def test_an_error_of_the_engine_is_passed_on(engines: Engines, router: Process) -> None:
    errors = []
    for url in (engines["llama-3-8b"][0].url, router.url):
        with sdk(url) as api, pytest.raises(openai.BadRequestError) as caught:
            api.chat.completions.create(model="llama-3-8b", messages=HELLO, max_tokens=5000)
        errors.append(caught.value.body)
    assert errors[0] == errors[1]
    assert "5000" in str(errors[1])


@pytest.mark.parametrize("model", ["mistral-7b", "gpt2"])
def test_completions(base_url: BaseURL, model: str) -> None:
    with sdk(base_url(model)) as api:
        answer = api.completions.create(model=model, prompt=["Once upon a time", "The router"], max_tokens=20)
        stream = api.completions.create(model=model, prompt="Once upon a time", max_tokens=20, stream=True)
        text = "".join(chunk.choices[0].text for chunk in stream)
    assert answer.model == model
    assert [bool(choice.text) for choice in answer.choices] == [True, True]
    assert text


def test_an_alias_reaches_its_model(router: Process) -> None:
    with sdk(router.url) as api:
        answer = api.completions.create(model="mistral", prompt="Once upon a time", max_tokens=5)
    assert answer.model == "mistral-7b"


def test_responses(base_url: BaseURL) -> None:
    with sdk(base_url("llama-3-8b")) as api:
        answer = api.responses.create(model="llama-3-8b", input="Hello", max_output_tokens=20)
        events = list(api.responses.create(model="llama-3-8b", input="Hello", max_output_tokens=20, stream=True))
    assert answer.output_text
    assert events[0].type == "response.created"
    assert events[-1].type in ("response.completed", "response.incomplete")


def test_anthropic_messages(base_url: BaseURL) -> None:
    body = {"model": "llama-3-8b", "max_tokens": 20, "messages": HELLO}
    url = base_url("llama-3-8b") + "/v1/messages?beta=true"
    with httpx.Client(timeout=60, trust_env=False) as client:
        answer = client.post(url, json=body)
        stream = client.post(url, json=body | {"stream": True})
    assert answer.json()["content"][0]["text"]
    assert stream.text.rstrip().splitlines()[-1].startswith("data: ")
    assert "event: message_stop" in stream.text


def test_tokenize(base_url: BaseURL) -> None:
    answer = httpx.post(
        base_url("gpt2") + "/tokenize", json={"model": "gpt2", "prompt": "Hello"}, timeout=60, trust_env=False
    )
    assert answer.json()["count"] == len(answer.json()["tokens"]) > 0
    assert answer.json()["max_model_len"] == 1024


def test_models_are_listed_with_what_their_engines_say(router: Process) -> None:
    with sdk(router.url) as api:
        assert until(lambda: all("max_model_len" in model.to_dict() for model in api.models.list()), seconds=30)
        models, again = list(api.models.list()), list(api.models.list())
    assert {model.id for model in models} >= {"llama-3-8b", "mistral-7b", "gpt2"}
    assert {model.owned_by for model in models} == {"ml-platform"}
    assert {model.to_dict()["max_model_len"] for model in models} == {1024}
    assert [model.created for model in models] == [model.created for model in again]


def test_a_model_is_retrieved(router: Process) -> None:
    with sdk(router.url) as api:
        assert api.models.retrieve("gpt2").id == "gpt2"
        with pytest.raises(openai.NotFoundError) as caught:
            api.models.retrieve("no/such-model")
    assert caught.value.code == "model_not_found"


def test_an_unknown_model_is_not_found(base_url: BaseURL) -> None:
    with sdk(base_url("llama-3-8b")) as api, pytest.raises(openai.NotFoundError) as caught:
        api.chat.completions.create(model="nope", messages=HELLO)
    assert "nope" in caught.value.message


def test_an_unknown_model_has_a_code_and_the_request_its_id(router: Process) -> None:
    with sdk(router.url) as api, pytest.raises(openai.NotFoundError) as caught:
        api.embeddings.create(model="nope", input="Hello", extra_headers={"x-request-id": "mine-1"})
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    assert caught.value.request_id == "mine-1"


def test_embeddings_of_a_model_that_has_none_are_not_found(base_url: BaseURL) -> None:
    with sdk(base_url("llama-3-8b")) as api, pytest.raises(openai.NotFoundError):
        api.embeddings.create(model="llama-3-8b", input="Hello")
