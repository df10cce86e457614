"""Single events, first bytes and JSON texts, in the spellings of engines."""

from typing import Any

import orjson
import pytest

from inference_api.relay.dialects import Body, Event, body_kind, is_aborted, is_json

BOM = b"\xef\xbb\xbf"


def data(**document: Any) -> bytes:
    return b"data: " + orjson.dumps(document)


def choice(**more: Any) -> bytes:
    return data(choices=[{"index": 0, **more}])


TOKENS = {
    "content": choice(delta={"content": "x"}),
    "no space": choice(delta={"content": "x"}).replace(b"data: ", b"data:"),
    "reasoning": choice(delta={"role": "assistant", "content": "", "reasoning": "x"}),
    "a tool call": choice(delta={"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": ""}}]}),
    "a completion": choice(text="x"),
    "the second choice": data(choices=[{"delta": {}}, {"delta": {"content": "x"}}]),
    "the token that ends it": choice(delta={}, finish_reason="stop"),
    "a logprob of NaN": b'data: {"choices":[{"delta":{"content":"x"},"logprobs":NaN}]}',
    "a response": b"event: response.output_text.delta\ndata: {}",
    "a response without a name": data(type="response.reasoning_text.delta", delta="x"),
    "a message": b"event: content_block_delta\ndata: {}",
    "a transcription": data(type="transcript.text.delta", delta="x"),
    "named message": b"event: message\n" + choice(delta={"content": "x"}),
    "another shape": data(token={"id": 1, "text": "x"}),
    "no JSON": b"data: hello",
}
NO_TOKENS = {
    "a role": choice(delta={"role": "assistant", "content": ""}),
    "an empty delta": choice(delta={}),
    "nulls": choice(delta={"content": None, "tool_calls": None}, finish_reason=None),
    "an empty completion": choice(text=""),
    "no choices": data(choices=[], usage={"prompt_tokens": 1}),
    "a usage": data(usage={"prompt_tokens": 1}),
    "odd choices": data(choices=[1, None, {"delta": 3}]),
    "response.created": data(type="response.created", response={}),
    "response.completed": b"event: response.completed\ndata: {}",
    "message_start": b"event: message_start\n" + data(type="message_start", message={}),
    "content_block_start": data(type="content_block_start", index=0),
    "message_delta": data(type="message_delta", delta={"stop_reason": "end_turn"}),
}
PINGS = (
    b": keep-alive",
    b":",
    b"",
    b"\n\r\n",
    b"retry: 1000",
    b"id: 5",
    b"data:",
    b"event: ping",
    b'event: ping\ndata: {"type": "ping"}',
    b'data: {"type":"ping"}',
    BOM + b": x",
)
ERRORS = (
    b"event: error\ndata: {}",
    b"event:error\ndata: x",
    data(error={"message": "x"}),
    data(error="x"),
    b'data: { "error" : {"message": "x"} }',
    b'data: {\n  "error": {\n    "message": "x"\n  }\n}',
    b'data: {"error": {"score": NaN}}',
    data(type="error", message="x"),
    data(object="error", message="x"),
    data(error={"code": 500}, choices=[{"delta": {"content": ""}, "finish_reason": "error"}]),
    choice(delta={}, finish_reason="error"),
    data(type="response.failed", response={"error": None}),
    b"event: response.failed\ndata: {}",
    BOM + data(error="x"),
)
NO_ERRORS = (
    choice(delta={"content": '"error": {}'}),
    data(error=None, choices=[]),
    data(error="", choices=[]),
    data(type="response.completed", response={"error": None}),
    b': "error": 1',
    b'data: {"error": {"mess',
    b"data: error",
)


@pytest.mark.parametrize("what", TOKENS)
def test_an_event_that_carries_a_token(what: str) -> None:
    assert Event(TOKENS[what]).has_token


@pytest.mark.parametrize("what", NO_TOKENS)
def test_an_event_that_carries_none(what: str) -> None:
    assert not Event(NO_TOKENS[what]).has_token


@pytest.mark.parametrize("block", PINGS)
def test_a_sign_of_life_is_no_event(block: bytes) -> None:
    assert Event(block).is_ping


@pytest.mark.parametrize("block", [*TOKENS.values(), *NO_TOKENS.values(), *ERRORS])
def test_an_event_is_no_sign_of_life(block: bytes) -> None:
    assert not Event(block).is_ping


@pytest.mark.parametrize("block", ERRORS)
def test_an_error_in_any_spelling(block: bytes) -> None:
    assert Event(block).is_error


@pytest.mark.parametrize("block", [*TOKENS.values(), *NO_TOKENS.values(), *PINGS, *NO_ERRORS])
def test_what_is_no_error(block: bytes) -> None:
    assert not Event(block).is_error


@pytest.mark.parametrize(
    ("document", "aborted"),
    [
        ({"choices": [{"finish_reason": "stop"}, {"finish_reason": "abort"}]}, True),
        ({"choices": [{"finish_reason": "stop", "message": {"content": "abort"}}]}, False),
        ({"choices": [None, 5]}, False),
        ({"choices": "abort"}, False),
        ({"object": "response", "status": "cancelled"}, True),
        ({"object": "response", "status": "incomplete"}, False),
        ({"type": "message", "stop_reason": None}, True),
        ({"type": "message", "stop_reason": "max_tokens"}, False),
        ({"type": "message_delta", "delta": {"stop_reason": None}}, True),
        ({"type": "message_delta", "delta": {}}, False),
        ({"type": "message_delta", "delta": None}, False),
        ({"data": []}, False),
        ([], False),
        (None, False),
    ],
)
def test_an_answer_that_the_engine_ended_early(document: Any, aborted: bool) -> None:
    assert is_aborted(document) is aborted


@pytest.mark.parametrize(
    ("first", "kind"),
    [
        (b"data: x", Body.EVENTS),
        (b"event:x", Body.EVENTS),
        (b": keep-alive\n\n", Body.EVENTS),
        (b"id: 1", Body.EVENTS),
        (b"retry: 1\n", Body.EVENTS),
        (b"\n\ndata: x", Body.EVENTS),
        (BOM + b"data: x", Body.EVENTS),
        (b'{"a"', Body.JSON),
        (b" \n\t[", Body.JSON),
        (BOM + b"{", Body.JSON),
        (b"\n" * 5000, Body.JSON),
        (b"<html>", Body.OTHER),
        (b"dat:", Body.OTHER),
        (b"\x1f\x8b\x08", Body.OTHER),
        (b"", None),
        (b"da", None),
        (b"\n", None),
        (BOM[:2], None),
        (BOM + b"\nevent", None),
    ],
)
def test_the_first_bytes_tell_what_a_body_is(first: bytes, kind: Body | None) -> None:
    assert body_kind(first) is kind


DEEP = b'{"x":' + b"[" * 2000 + b"]" * 2000 + b"}"


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    "text",
    [
        DEEP,
        BOM + DEEP,
        b"\n\n" + DEEP + b" \n",
        b'{"a":NaN}',
        b'{"a":1}\n{"a":2}\n',
        b'\x1e{"a":1}\n\x1e[2]\n',
        b'{"a":"\\ud83d }]"}',
        b'{"a":"\\\\"}',
    ],
)
def test_json_that_parsers_refuse(text: bytes, whole: bool) -> None:
    assert is_json(text, whole)


@pytest.mark.parametrize(
    ("text", "by_its_ends"),
    [
        (b"", False),
        (b"busy", False),
        (b"<html></html>", False),
        (b'{"a":[1', False),
        (b'{"a":{"b":NaN}', True),
        (b'{"a":NaN}}', True),
        (b'{"a":NaN,"b":"}', True),
    ],
)
def test_what_is_no_json(text: bytes, by_its_ends: bool) -> None:
    assert not is_json(text, whole=True)
    assert is_json(text, whole=False) == by_its_ends
