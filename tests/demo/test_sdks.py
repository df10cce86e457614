"""The engine behind a real router, as the OpenAI and Anthropic SDKs see it."""

import base64
import io
import json
import wave
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Literal

import anthropic
import httpx
import openai
import pytest
from anthropic import AsyncAnthropic
from langchain_openai import ChatOpenAI
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, SecretStr

pytestmark = pytest.mark.anyio

MODEL = "llama3"
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
WEATHER: list[Any] = [{"role": "user", "content": "How is the weather?"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
    "required": ["city", "days"],
}
ARGUMENTS = {"city": "demo", "days": 1}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "send_mail", "parameters": {"type": "object", "properties": {}}}},
    {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}},
]
FLAT_TOOLS: list[Any] = [{"type": "function", "strict": False, **tool["function"]} for tool in TOOLS]
CLAUDE_TOOLS: list[Any] = [{"name": "get_weather", "input_schema": SCHEMA}]


class City(BaseModel):
    name: str
    kind: Literal["capital", "town"]
    twin: "City | None"
    streets: list[str]


@pytest.fixture
async def url(engine: httpx.Client, start_router: Callable[..., Any]) -> str:
    """A router whose one model is the engine, under an alias."""
    backends = [{"url": str(engine.base_url).rstrip("/")}]
    served = await start_router(models=[{"name": "llama-3-8b", "aliases": [MODEL], "backends": backends}])
    return str(served.url)


@pytest.fixture
async def sdk(url: str) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        yield client


@pytest.fixture
async def claude(url: str) -> AsyncIterator[AsyncAnthropic]:
    async with AsyncAnthropic(base_url=url, api_key="unused", max_retries=0) as client:
        yield client


@pytest.fixture
def direct(engine: httpx.Client) -> Iterator[OpenAI]:
    """Past the router, which does not have all of the engine's routes."""
    with OpenAI(base_url=f"{engine.base_url}/v1", api_key="unused", max_retries=0) as client:
        yield client


# Chat


async def test_a_chat(sdk: AsyncOpenAI) -> None:
    answer = await sdk.chat.completions.create(model=MODEL, messages=HELLO)
    assert (answer.choices[0].message.content or "").endswith("You said: Hello")
    assert answer.usage is not None
    assert answer.usage.total_tokens > 40


async def test_a_streamed_chat(sdk: AsyncOpenAI) -> None:
    stream = await sdk.chat.completions.create(
        model=MODEL, messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks).endswith("You said: Hello")
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert last.usage is not None
    assert last.usage.completion_tokens == len(chunks) - 2


@pytest.mark.parametrize(
    ("messages", "choice", "name"),
    [
        (WEATHER, "auto", "get_weather"),
        (WEATHER, "required", "get_weather"),
        (HELLO, "required", "send_mail"),
        (HELLO, {"type": "function", "function": {"name": "get_weather"}}, "get_weather"),
    ],
)
async def test_a_tool_is_called(sdk: AsyncOpenAI, messages: Any, choice: Any, name: str) -> None:
    answer = await sdk.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS, tool_choice=choice)
    (call,) = answer.choices[0].message.tool_calls or []
    assert (answer.choices[0].finish_reason, call.type) == ("tool_calls", "function")
    assert call.type == "function"
    assert call.function.name == name
    assert json.loads(call.function.arguments) == (ARGUMENTS if name == "get_weather" else {})


@pytest.mark.parametrize(
    ("messages", "choice"),
    [
        (HELLO, "auto"),
        (WEATHER, "none"),
        ([*WEATHER, {"role": "tool", "tool_call_id": "1", "content": "weather: rain"}], "auto"),
    ],
)
async def test_no_tool_is_called(sdk: AsyncOpenAI, messages: Any, choice: Any) -> None:
    answer = await sdk.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS, tool_choice=choice)
    assert not answer.choices[0].message.tool_calls
    assert (answer.choices[0].message.content or "").endswith(f"You said: {messages[-1]['content']}")


async def test_a_streamed_tool_call_comes_in_pieces(sdk: AsyncOpenAI) -> None:
    stream = await sdk.chat.completions.create(model=MODEL, messages=WEATHER, tools=TOOLS, stream=True)
    chunks = [chunk async for chunk in stream]
    first, *pieces = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert first.function is not None
    assert (first.index, first.type, first.function.name) == (0, "function", "get_weather")
    assert first.id
    assert len(pieces) > 1
    assert all((piece.index, piece.id) == (0, None) for piece in pieces)
    assert json.loads("".join(piece.function.arguments or "" for piece in pieces if piece.function)) == ARGUMENTS
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


async def test_parse_fills_a_pydantic_model(sdk: AsyncOpenAI) -> None:
    answer = await sdk.chat.completions.parse(model=MODEL, messages=HELLO, response_format=City)
    city = answer.choices[0].message.parsed
    assert city is not None
    assert (city.name, city.kind, city.streets) == ("demo", "capital", ["demo"])
    assert city.twin is not None


async def test_a_json_object(sdk: AsyncOpenAI) -> None:
    answer = await sdk.chat.completions.create(model=MODEL, messages=HELLO, response_format={"type": "json_object"})
    assert json.loads(answer.choices[0].message.content or "") == {"answer": "This is JSON."}
    told: list[Any] = [{"role": "system", "content": f"{{Answer}} with JSON: {json.dumps(SCHEMA)}"}, *HELLO]
    answer = await sdk.chat.completions.create(model=MODEL, messages=told, response_format={"type": "json_object"})
    assert json.loads(answer.choices[0].message.content or "") == ARGUMENTS


@pytest.mark.parametrize("stream", [False, True])
async def test_log_probabilities_of_a_chat(sdk: AsyncOpenAI, stream: bool) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": HELLO, "logprobs": True, "top_logprobs": 3, "max_tokens": 4}
    if stream:
        choices = [chunk.choices[0] async for chunk in await sdk.chat.completions.create(**asked, stream=True)]
    else:
        choices = (await sdk.chat.completions.create(**asked)).choices
    content = [one for choice in choices if choice.logprobs for one in choice.logprobs.content or []]
    assert [one.token for one in content] == ["I", " am", " a", " demo"]
    assert [bytes(one.bytes or []).decode() for one in content] == ["I", " am", " a", " demo"]
    assert [len(one.top_logprobs) for one in content] == [3] * 4
    assert all(one.top_logprobs[0].token == one.token for one in content)
    assert all(0 >= one.top_logprobs[0].logprob > one.top_logprobs[1].logprob for one in content)


@pytest.mark.parametrize("stream", [False, True])
async def test_log_probabilities_of_a_completion(sdk: AsyncOpenAI, stream: bool) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": "Hello", "logprobs": 2, "max_tokens": 3}
    if stream:
        choices = [chunk.choices[0] async for chunk in await sdk.completions.create(**asked, stream=True)]
    else:
        choices = (await sdk.completions.create(**asked)).choices
    found = [choice.logprobs for choice in choices if choice.logprobs]
    assert [token for one in found for token in one.tokens or []] == ["I", " am", " a"]
    assert [offset for one in found for offset in one.text_offset or []] == [0, 1, 4]
    assert [len(top) for one in found for top in one.top_logprobs or []] == [2, 2, 2]


async def test_langchain_calls_a_tool_and_fills_a_schema(url: str) -> None:
    async with openai.DefaultAsyncHttpxClient() as client:
        chat = ChatOpenAI(model=MODEL, base_url=f"{url}/v1", api_key=SecretStr("unused"), http_async_client=client)
        called = await chat.bind_tools(TOOLS).ainvoke("How is the weather?")
        filled = await chat.with_structured_output(City).ainvoke("A city")
    assert [(call["name"], call["args"]) for call in called.tool_calls] == [("get_weather", ARGUMENTS)]
    assert isinstance(filled, City)


# Responses


async def test_a_response(sdk: AsyncOpenAI) -> None:
    answer = await sdk.responses.create(model=MODEL, input="Hello", instructions="Be kind.")
    assert answer.output_text.endswith("You said: Hello")
    assert (answer.status, answer.instructions) == ("completed", "Be kind.")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens


async def test_a_streamed_response_has_its_events_in_their_order(sdk: AsyncOpenAI) -> None:
    events = [event async for event in await sdk.responses.create(model=MODEL, input="Hello", stream=True)]
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert [event.sequence_number for event in events] == list(range(len(events)))
    said = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert events[-1].type == "response.completed"
    assert events[-1].response.output_text == said


async def test_a_response_that_is_cut_is_incomplete(sdk: AsyncOpenAI) -> None:
    answer = await sdk.responses.create(model=MODEL, input=HELLO, max_output_tokens=3)
    assert (answer.status, answer.output_text) == ("incomplete", "I am a")
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    async with sdk.responses.stream(model=MODEL, input="Hello", max_output_tokens=3) as stream:
        assert (await stream.get_final_response()).status == "incomplete"


async def test_a_response_calls_a_tool(sdk: AsyncOpenAI) -> None:
    async with sdk.responses.stream(model=MODEL, input=WEATHER, tools=FLAT_TOOLS) as stream:
        deltas = [event.delta async for event in stream if event.type == "response.function_call_arguments.delta"]
        (call,) = (await stream.get_final_response()).output
    assert call.type == "function_call"
    assert (call.name, json.loads(call.arguments)) == ("get_weather", ARGUMENTS)
    assert "".join(deltas) == call.arguments
    after = [*WEATHER, call.to_dict(), {"type": "function_call_output", "call_id": call.call_id, "output": "Rain."}]
    answer = await sdk.responses.create(model=MODEL, input=after, tools=FLAT_TOOLS)
    assert answer.output_text.endswith("You said: Rain.")


async def test_a_response_fills_a_pydantic_model(sdk: AsyncOpenAI) -> None:
    answer = await sdk.responses.parse(model=MODEL, input="A city", text_format=City)
    assert answer.output_parsed is not None
    assert answer.output_parsed.name == "demo"


# Messages


async def test_a_message(claude: AsyncAnthropic) -> None:
    answer = await claude.messages.create(model=MODEL, max_tokens=100, messages=HELLO, system="Be kind.")
    assert answer.content[0].type == "text"
    assert answer.content[0].text.endswith("You said: Hello")
    assert (answer.stop_reason, answer.stop_sequence) == ("end_turn", None)
    counted = await claude.messages.count_tokens(model=MODEL, messages=HELLO, system="Be kind.")
    assert counted.input_tokens == answer.usage.input_tokens


@pytest.mark.parametrize(
    ("more", "reason", "text"),
    [({"max_tokens": 3}, "max_tokens", "I am a"), ({"stop_sequences": [" a"]}, "stop_sequence", "I")],
)
async def test_a_message_says_why_it_ended(claude: AsyncAnthropic, more: Any, reason: str, text: str) -> None:
    answer = await claude.messages.create(**{"model": MODEL, "max_tokens": 50, "messages": HELLO, **more})
    assert (answer.stop_reason, answer.content[0].text) == (reason, text)


async def test_a_streamed_message(claude: AsyncAnthropic) -> None:
    async with claude.messages.stream(model=MODEL, max_tokens=100, messages=HELLO) as stream:
        said = "".join([text async for text in stream.text_stream])
        message = await stream.get_final_message()
    assert said.endswith("You said: Hello")
    assert message.content[0].type == "text"
    assert (message.content[0].text, message.stop_reason) == (said, "end_turn")
    assert message.usage.output_tokens >= 40


@pytest.mark.parametrize("choice", [{"type": "auto"}, {"type": "any"}, {"type": "tool", "name": "get_weather"}])
async def test_a_message_uses_a_tool(claude: AsyncAnthropic, choice: Any) -> None:
    asked: dict[str, Any] = {"model": MODEL, "max_tokens": 50, "tools": CLAUDE_TOOLS, "tool_choice": choice}
    answer = await claude.messages.create(**asked, messages=WEATHER)
    async with claude.messages.stream(**asked, messages=WEATHER) as stream:
        streamed = await stream.get_final_message()
    message: Any
    for message in (answer, streamed):
        (block,) = message.content
        assert block.type == "tool_use"
        assert (message.stop_reason, block.name, block.input) == ("tool_use", "get_weather", ARGUMENTS)


async def test_a_message_with_the_result_of_a_tool_is_answered(claude: AsyncAnthropic) -> None:
    result = {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "weather: rain"}]}
    use = {"type": "tool_use", "id": "1", "name": "get_weather", "input": {}}
    turns: list[Any] = [*WEATHER, {"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
    answer = await claude.messages.create(model=MODEL, max_tokens=50, messages=turns, tools=CLAUDE_TOOLS)
    assert answer.content[0].type == "text"
    assert answer.content[0].text.endswith("You said: weather: rain")


# Vectors, audio, and the rest


async def test_embeddings_are_the_same_in_both_encodings(sdk: AsyncOpenAI) -> None:
    """The SDK asks for base64 by itself."""
    plain = await sdk.embeddings.create(model=MODEL, input=["a", "b"], encoding_format="float", dimensions=8)
    packed = await sdk.embeddings.create(model=MODEL, input=["a", "b"], dimensions=8)
    assert [one.embedding for one in plain.data] == [one.embedding for one in packed.data]
    assert [len(one.embedding) for one in plain.data] == [8, 8]


async def test_a_transcription(sdk: AsyncOpenAI) -> None:
    sound = ("speech.wav", b"\0" * 64000, "audio/wav")
    answer = await sdk.audio.transcriptions.create(model=MODEL, file=sound)
    assert answer.text.endswith("You said: 64000 bytes of audio")
    text = await sdk.audio.transcriptions.create(model=MODEL, file=sound, response_format="text")
    assert text == answer.text
    verbose = await sdk.audio.transcriptions.create(model=MODEL, file=sound, response_format="verbose_json")
    assert (verbose.text, verbose.duration) == (answer.text, 2)


@pytest.mark.parametrize("kind", ["transcriptions", "translations"])
async def test_a_streamed_transcription(url: str, kind: str) -> None:
    async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
        asked = {"model": MODEL, "stream": "true"}
        answer = await client.post(f"/v1/audio/{kind}", data=asked, files={"file": ("a.wav", b"12345")})
    *events, done, rest = answer.text.split("\n\n")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert {chunk["object"] for chunk in chunks} == {"transcription.chunk"}
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks).endswith("You said: 5 bytes of audio")
    assert (done, rest) == ("data: [DONE]", "")


async def test_the_list_of_models(sdk: AsyncOpenAI) -> None:
    assert {model.id async for model in sdk.models.list()} >= {"llama-3-8b"}


def test_speech_is_a_wave_file(direct: OpenAI) -> None:
    sound = direct.audio.speech.create(model="llama-3-8b", input="one two", voice="alloy", response_format="wav")
    with wave.open(io.BytesIO(sound.content)) as file:
        assert file.getnframes() / file.getframerate() == 0.2
    pcm = direct.audio.speech.create(model="llama-3-8b", input="one two", voice="alloy", response_format="pcm")
    assert sound.content.endswith(pcm.content)


def test_images_are_png_files_of_the_size_asked_for(direct: OpenAI) -> None:
    answer = direct.images.generate(model="llama-3-8b", prompt="a cat", n=2, size="256x256")
    one, other = [base64.b64decode(image.b64_json or "") for image in answer.data or []]
    assert one != other
    assert one[:8] == b"\x89PNG\r\n\x1a\n"
    assert one[16:24] == bytes([0, 0, 1, 0] * 2)


def test_a_text_is_flagged_for_what_it_names(direct: OpenAI) -> None:
    mild, bad = direct.moderations.create(model="llama-3-8b", input=["peace", "violence"]).results
    assert (mild.flagged, bad.flagged, bad.categories.violence, bad.categories.hate) == (False, True, True, False)


# Errors


async def test_an_unknown_model_is_not_found(direct: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="`nope` does not exist"):
        direct.chat.completions.create(model="nope", messages=HELLO)


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", "hot"), ("top_p", 2), ("n", "many"), ("seed", 1.5), ("logprobs", "yes please"), ("tools", "all")],
)
async def test_a_value_of_the_wrong_type_is_named(sdk: AsyncOpenAI, field: str, value: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await sdk.chat.completions.create(model=MODEL, messages=HELLO, extra_body={field: value})
    assert (caught.value.param, caught.value.type) == (f"body.{field}", "Bad Request")


async def test_a_tool_that_is_not_there_cannot_be_chosen(sdk: AsyncOpenAI, claude: AsyncAnthropic) -> None:
    named: Any = {"type": "function", "function": {"name": "nope"}}
    with pytest.raises(openai.BadRequestError, match="`tool_choice` names 'nope'"):
        await sdk.chat.completions.create(model=MODEL, messages=HELLO, tools=TOOLS, tool_choice=named)
    with pytest.raises(openai.BadRequestError, match="`tools` must be set"):
        await sdk.chat.completions.create(model=MODEL, messages=HELLO, tool_choice="required")


async def test_the_messages_api_has_errors_of_its_own(claude: AsyncAnthropic) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        await claude.messages.create(model=MODEL, max_tokens=201, messages=HELLO)
    assert isinstance(caught.value.body, dict)
    assert (caught.value.body["type"], caught.value.body["error"]["type"]) == ("error", "BadRequestError")
