"""The one rewrite: `model` changes, and nothing else."""

import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference_api.upstream.rewrite import rewrite_json, size_of

spaces = st.text(" \t\r\n", max_size=2)
keys = st.sampled_from(["model", "models", "stream", 'a"b', "\\", "mod\\u0065l"]) | st.text(max_size=5)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just('{"model": "x"}')
documents = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3))
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


def dump_plainly(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1)


encoders: st.SearchStrategy[Callable[[Any], str]] = st.sampled_from([json.dumps, dump_plainly])


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, str, str]:
    """A JSON object in three pieces: what is before the value of its last top-level `model`, that value, the rest."""
    dumps = draw(encoders)
    pairs = [(key, dumps(value)) for key, value in draw(st.dictionaries(keys, documents, max_size=4)).items()]
    model = draw(st.sampled_from(['"model"', '"m\\u006fdel"', '"\\u006dodel"']))
    at = draw(st.integers(min_value=0, max_value=len(pairs)))
    before = "".join(f"{dumps(key)}{draw(spaces)}:{draw(spaces)}{value}," for key, value in pairs[:at])
    after = "".join(f",{draw(spaces)}{dumps(key)}:{value}" for key, value in pairs[at:] if key != "model")
    head = f"{draw(spaces)}{{{draw(spaces)}{before}{model}{draw(spaces)}:{draw(spaces)}"
    return head, dumps(draw(names)), f"{draw(spaces)}{after}{draw(spaces)}}}{draw(spaces)}"


@settings(max_examples=20, deadline=None)
@given(bodies(), names)
def test_only_the_value_of_the_models_name_changes(body: tuple[str, str, str], name: str) -> None:
    before, value, after = (part.encode("utf-8", "surrogatepass") for part in body)

    rewritten = rewrite_json(before + value + after, name)

    assert rewritten == before + orjson.dumps(name) + after
    old, new = json.loads(before + value + after), json.loads(rewritten)
    assert new["model"] == name
    assert json.dumps(new | {"model": 0}) == json.dumps(old | {"model": 0})


@pytest.mark.parametrize(
    ("body", "rewritten"),
    [
        (b'{"model":"m"}', b'{"model":"new"}'),
        (b'\n{ "model" :\t"m" , "a":1}\n', b'\n{ "model" :\t"new" , "a":1}\n'),
        (b'{"m\\u006fdel":"m"}', b'{"m\\u006fdel":"new"}'),
        (b'{"model":"a","model":"m"}', b'{"model":"a","model":"new"}'),
        (b'{"model":"a","mode\\u006c":"m","x":2}', b'{"model":"a","mode\\u006c":"new","x":2}'),
        (b'{"x":{"model":"a"},"model":"m"}', b'{"x":{"model":"a"},"model":"new"}'),
        (b'{"model":"m","x":[{"model":"a"}]}', b'{"model":"new","x":[{"model":"a"}]}'),
        (b'{"model":"m","x":{"a":1,"model":"a"}}', b'{"model":"new","x":{"a":1,"model":"a"}}'),
        (b'{"model":"m","x":[{"a":[],"model":"a"},"model"]}', b'{"model":"new","x":[{"a":[],"model":"a"},"model"]}'),
        (b'{"x":"model","model":"m"}', b'{"x":"model","model":"new"}'),
        (b'{"x":["model","b"],"model":"m"}', b'{"x":["model","b"],"model":"new"}'),
        (b'{"x":"\\"model\\":\\"a\\"","model":"m"}', b'{"x":"\\"model\\":\\"a\\"","model":"new"}'),
        (b'{"x":"}","model":"m"}', b'{"x":"}","model":"new"}'),
        (b'{"model":"a\\"b,}"}', b'{"model":"new"}'),
        ('{"é":"ü","model":"ö"}'.encode(), '{"é":"ü","model":"new"}'.encode()),
    ],
)
def test_where_the_model_is_found(body: bytes, rewritten: bytes) -> None:
    assert rewrite_json(body, "new") == rewritten


@pytest.mark.parametrize("body", [b"{}", b'{"models":"m"}', b'{"x":{"model":"m"}}', b'[{"model":"m"}]', b'{"model":1}'])
def test_a_body_without_a_models_name_stays(body: bytes) -> None:
    assert rewrite_json(body, "new") == body


def test_the_new_name_is_written_as_json() -> None:
    assert rewrite_json(b'{"model":"m"}', 'a"\\b\n') == b'{"model":"a\\"\\\\b\\n"}'


@pytest.mark.parametrize("text", [b"A", b"\\n", b"\\\\A"])
def test_a_large_string_costs_no_memory(text: bytes) -> None:
    body = b'{"image":"' + text * (2**21 // len(text)) + b'","model":"m"}'
    tracemalloc.start()
    try:
        rewritten = rewrite_json(body, "new")
        assert isinstance(rewritten, tuple)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert b"".join(rewritten) == body.replace(b'"m"', b'"new"')
    assert size_of(rewritten) == len(body) + 2
    assert peak < len(body) / 4
