"""Places of members in a body: by the bytes, whatever is in strings, and in slices."""

import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_api.threads import at_once
from inference_api.upstream.places import MemberPlace, find_places

NAMES = {"prompt", "messages"}


def places(body: bytes) -> list[MemberPlace]:
    return at_once(find_places(body, NAMES))


texts = st.text(max_size=5) | st.sampled_from(
    ['"', "\\", '\\"', "prompt", '"prompt":{', "}", "]", ",", ":", "\\\\", "é"]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
spaces = st.sampled_from(["", " ", "\n", "\t \r\n"])


@st.composite
def objects(draw: st.DrawFn) -> tuple[bytes, list[tuple[str, Any]]]:
    """A body in any spelling, and its members."""
    members = draw(st.lists(st.tuples(st.sampled_from(["prompt", "messages", "model", "prompts"]) | texts, values)))
    text = draw(spaces) + "{"
    for number, (name, value) in enumerate(members):
        ascii_only = draw(st.booleans())
        text += "," * (number > 0) + draw(spaces) + json.dumps(name, ensure_ascii=ascii_only) + draw(spaces) + ":"
        text += draw(spaces) + json.dumps(value, ensure_ascii=ascii_only, indent=draw(st.sampled_from([None, 1])))
        text += draw(spaces)
    return (text + draw(spaces) + "}" + draw(spaces)).encode("utf-8", "surrogatepass"), members


@given(objects())
def test_the_places_are_where_a_parser_finds_them(made: tuple[bytes, list[tuple[str, Any]]]) -> None:
    body, members = made

    found = places(body)

    wanted = [(number, name, value) for number, (name, value) in enumerate(members) if name in NAMES]
    text = [body[place.start : place.end].decode("utf-8", "surrogatepass") for place in found]
    assert [(place.number, place.name, json.loads(one)) for place, one in zip(found, text, strict=True)] == wanted
    for place in found:
        key = body[place.key :].decode("utf-8", "surrogatepass")
        assert json.JSONDecoder().raw_decode(key)[0] == place.name
        assert (place.after < 0) == (place.number == len(members) - 1)
        assert (place.before < 0) == (place.number == 0)
        if place.after >= 0:
            assert body[place.end : place.after].strip() == b","
            assert body[place.after : place.after + 1] == b'"'
        if place.before >= 0:
            assert body[place.before : place.key].strip() == b","


def test_a_key_may_be_spelled_with_escapes() -> None:
    [place] = places(rb'{"\u0070rompt": 1}')

    assert (place.name, place.start, place.end) == ("prompt", 16, 17)


def test_only_the_top_level_counts() -> None:
    assert places(orjson.dumps({"a": {"prompt": 1}, "b": [{"messages": 2}], "c": '"prompt":1'})) == []
    assert places(b"{}") == places(b" { } ") == []


@pytest.mark.parametrize(
    "value", [["x"] * 20_000, "\\n" * 20_000, '"' * 20_000, "x" * 5_000_000, {str(n): n for n in range(9999)}]
)
def test_a_large_body_is_read_in_slices(value: Any) -> None:
    body = orjson.dumps({"a": value, "prompt": {"id": "x"}})
    steps = len(list(find_places(body, NAMES)))
    [place] = places(body)

    assert orjson.loads(body[place.start : place.end]) == {"id": "x"}
    # Text without escapes is searched at once.
    assert steps >= (0 if isinstance(value, str) and value[0] == "x" else 5)
