"""The toy engine as the OpenAI SDK sees it."""

from collections.abc import Iterator

import httpx
import openai
import pytest
from openai import OpenAI


@pytest.fixture
def sdk(engine: httpx.Client) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{engine.base_url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def test_a_chat(sdk: OpenAI) -> None:
    answer = sdk.chat.completions.create(model="llama-3-8b", messages=[{"role": "user", "content": "Hello"}])
    assert (answer.choices[0].message.content or "").endswith("You said: Hello")
    assert answer.usage is not None
    assert answer.usage.total_tokens > 40


def test_a_streamed_chat(sdk: OpenAI) -> None:
    stream = sdk.chat.completions.create(
        model="llama-3-8b",
        messages=[{"role": "user", "content": "Hello"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = stream
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks).endswith("You said: Hello")
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert last.usage is not None
    assert last.usage.completion_tokens == len(chunks) - 2


def test_a_streamed_completion(sdk: OpenAI) -> None:
    stream = sdk.completions.create(model="llama-3-8b", prompt="Hello", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream).endswith("You said: Hello")


def test_embeddings_are_the_same_in_both_encodings(sdk: OpenAI) -> None:
    plain = sdk.embeddings.create(model="llama-3-8b", input=["a", "b"], encoding_format="float", dimensions=8)
    packed = sdk.embeddings.create(model="llama-3-8b", input=["a", "b"], dimensions=8)
    assert [one.embedding for one in plain.data] == [one.embedding for one in packed.data]
    assert [len(one.embedding) for one in plain.data] == [8, 8]


def test_the_list_of_models(sdk: OpenAI) -> None:
    assert [model.id for model in sdk.models.list()] == ["llama-3-8b"]


def test_an_unknown_model_is_not_found(sdk: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="`nope` does not exist"):
        sdk.chat.completions.create(model="nope", messages=[{"role": "user", "content": "Hello"}])
