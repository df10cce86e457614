"""What an answer votes for."""

import json
from collections.abc import Hashable
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_api.features.voting.ballots import Compare, Vote, read_vote
from inference_api.threads import at_once


def vote(body: bytes, compare: Compare = "text") -> Vote | None:
    return at_once(read_vote(body, compare))


def chat(content: Any, **more: Any) -> bytes:
    message = {"role": "assistant", "content": content, **more}
    return orjson.dumps({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})


def ballot(content: Any, compare: Compare = "text", **more: Any) -> Hashable:
    found = vote(chat(content, **more), compare)
    assert found is not None
    return found.ballot


def alike(one: Any, other: Any, compare: Compare) -> bool:
    first = ballot(one, compare)
    return first is not None and first == ballot(other, compare)


@pytest.mark.parametrize(
    ("compare", "one", "other"),
    [
        ("exact", "Yes.", "Yes."),
        ("text", " The\n Answer  is 4 ", "the answer is 4"),
        ("text", "STRASSE", "straße"),
        ("text", "ﬁne\u00a0", "fine"),
        ("text", "é", "e\u0301"),
        ("json", '{"a": 1, "b": [true, null]}', '{ "b":[true,null], "a":1.0 }'),
        ("json", '"x"', ' "\\u0078" '),
        ("json", "0.1", "0.10"),
        ("number", " 42\n", "42.0"),
        ("number", "1e3", "1000"),
        ("number", "+.5", "0.5"),
        ("number", "-0", "0"),
        ("exact", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab"),
    ],
)
def test_alike(compare: Compare, one: Any, other: Any) -> None:
    assert alike(one, other, compare)


@pytest.mark.parametrize(
    ("compare", "one", "other"),
    [
        ("exact", "Yes.", "Yes. "),
        ("exact", "é", "e\u0301"),
        ("text", "4", "4."),
        ("text", "a b", "ab"),
        ("json", "true", "1"),
        ("json", '"1"', "1"),
        ("json", "[1, 2]", "[2, 1]"),
        ("json", "0.1", "0.10000000000000001"),
        ("json", "[[]]", "[{}]"),
        ("json", "null", "false"),
        ("number", "1", "-1"),
        ("number", "0.1", "0.10000000000000000000001"),
    ],
)
def test_not_alike(compare: Compare, one: Any, other: Any) -> None:
    assert not alike(one, other, compare)


@pytest.mark.parametrize(
    ("compare", "content"),
    [
        ("json", "no json"),
        ("json", "NaN"),
        ("json", "[" * 100_000),
        ("json", "[" * 900 + "]" * 900),
        ("number", "four"),
        ("number", "NaN"),
        ("number", "1_000"),
        ("number", "٤٢"),
        ("number", "1e99999999999999999999999"),
        ("number", ""),
        ("text", None),
        ("text", 7),
        ("text", [{"type": "image"}]),
        ("text", [7]),
    ],
)
def test_what_cannot_be_read_is_like_nothing(compare: Compare, content: Any) -> None:
    assert ballot(content, compare) is None


def call(name: str, arguments: Any, id: str = "c") -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def test_tool_calls_are_names_and_arguments_in_order() -> None:
    def of(*calls: dict[str, Any], content: Any = None) -> Hashable:
        return ballot(content, tool_calls=list(calls))

    wanted = of(call("f", '{"a": 1, "b": 2}', "x"), call("g", ""))

    assert wanted is not None
    assert wanted == of(call("f", '{"b":2,"a":1}', "y"), call("g", "{}"), content="Let me see.")
    assert wanted == of(call("f", {"a": 1, "b": 2}), call("g", "{}"))
    assert wanted != of(call("g", "{}"), call("f", '{"a": 1, "b": 2}'))
    assert wanted != of(call("f", '{"a": 1, "b": 3}'), call("g", "{}"))
    assert wanted != of(call("h", '{"a": 1, "b": 2}'), call("g", "{}"))
    assert of(call("f", '{"a": ')) is None
    assert of({"function": None}) is None
    assert ballot(None, function_call={"name": "f", "arguments": "{}"}) == of(call("f", "{}"))


def test_a_text_is_no_tool_call() -> None:
    assert ballot("f") != ballot(None, tool_calls=[call("f", "{}")])


def test_a_refusal_is_an_answer() -> None:
    assert ballot(None, refusal="No.") == ballot("no.")


def test_a_completion_votes_by_its_texts() -> None:
    def completion(*texts: str) -> bytes:
        return orjson.dumps({"choices": [{"index": i, "text": text} for i, text in enumerate(texts)]})

    one, two = vote(completion("a ")), vote(completion("A"))
    several = vote(completion("a", "b"))

    assert one is not None
    assert two is not None
    assert several is not None
    assert one.ballot == two.ballot is not None
    assert several.ballot not in (None, one.ballot)


@pytest.mark.parametrize("body", [b"", b"no", b"[]", b"7", b'{"choices": '])
def test_what_is_no_json_object_is_no_vote(body: bytes) -> None:
    assert vote(body) is None


@pytest.mark.parametrize("choices", [None, [], {}, [7], [{"message": {}}], [{}]])
def test_an_answer_without_a_text_is_like_nothing(choices: Any) -> None:
    found = vote(orjson.dumps({"choices": choices}))

    assert found is not None
    assert found.ballot is None


def test_tokens_and_an_aborted_generation_are_seen() -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 5}
    found = vote(orjson.dumps({"choices": [{"text": "x", "finish_reason": "abort"}], "usage": usage}))

    assert found is not None
    assert (found.tokens[0], found.tokens[2], found.is_whole) == (3, 5, False)


def test_json_that_only_engines_write_is_read() -> None:
    found = vote(b'\xef\xbb\xbf{"choices": [{"text": "x", "logprobs": NaN}]}')

    assert found is not None
    assert found.ballot is not None


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(values)
def test_a_json_value_is_like_itself_however_it_is_written(value: Any) -> None:
    one, other = json.dumps(value), json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True)

    assert alike(one, other, "json")


@given(st.binary(max_size=200), st.sampled_from(["exact", "text", "json", "number"]))
def test_no_answer_raises(body: bytes, compare: Compare) -> None:
    vote(body, compare)


@given(values, st.sampled_from(["exact", "text", "json", "number"]))
def test_no_document_raises(value: Any, compare: Compare) -> None:
    vote(json.dumps({"choices": value}).encode(), compare)
    vote(json.dumps({"choices": [{"message": value}, {"message": {"tool_calls": value}}]}).encode(), compare)
