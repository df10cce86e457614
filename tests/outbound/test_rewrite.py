"""The one rewrite: `model` changes, and nothing else."""

import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference_api.outbound.rewrite import form_field, rewrite_json

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
    assert orjson.loads(rewrite_json(b'{"model":"m"}', 'a"\\b\n')) == {"model": 'a"\\b\n'}


@pytest.mark.parametrize("text", [b"A", b"\\n", b"\\\\A"])
def test_a_large_string_costs_no_memory(text: bytes) -> None:
    body = b'{"image":"' + text * (2**21 // len(text)) + b'","model":"m"}'
    tracemalloc.start()
    try:
        rewritten = rewrite_json(body, "new")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert rewritten.endswith(b',"model":"new"}')
    assert peak < 4 * len(body)


def part(name: str, value: bytes, more: str = "") -> bytes:
    return f'Content-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + value


def form(*parts: bytes, boundary: bytes = b"xYz", end: bytes = b"--\r\n") -> bytes:
    return b"".join(b"--" + boundary + b"\r\n" + data + b"\r\n" for data in parts) + b"--" + boundary + end


KIND = b"multipart/form-data; boundary=xYz"
MODEL = part("model", b"whisper-1")
FILE = part("file", bytes(range(256)) * 9, '; filename="a.wav"\r\nContent-Type: audio/wav')


def value(body: bytes, kind: bytes = KIND, field: str = "model") -> bytes | None:
    span = form_field(body, kind, field)
    return None if span is None else body[slice(*span)]


@pytest.mark.parametrize("parts", [(MODEL, FILE), (FILE, MODEL), (part("language", b"en"), MODEL, FILE)])
def test_a_form_field_is_found_wherever_it_is(parts: tuple[bytes, ...]) -> None:
    assert value(form(*parts)) == b"whisper-1"


@pytest.mark.parametrize(
    "disposition",
    [
        b'Content-Disposition: form-data; name="model"',
        b"content-disposition: form-data; name=model",
        b'CONTENT-DISPOSITION:form-data;  name="model"',
        b'Content-Type: text/plain\r\nContent-Disposition: form-data; name="model"',
        b'Content-Disposition: form-data; name="model"\r\nContent-Type: text/plain; charset=utf-8',
    ],
)
def test_a_form_field_may_be_named_in_many_ways(disposition: bytes) -> None:
    assert value(form(disposition + b"\r\n\r\nm", FILE)) == b"m"


def test_of_a_repeated_form_field_the_last_counts() -> None:
    assert value(form(part("model", b"a"), FILE, part("model", b"b"))) == b"b"


def test_a_file_is_no_field_even_if_it_is_called_model() -> None:
    assert value(form(part("model", b"weights", '; filename="model"'))) is None
    assert value(form(part("model", b"weights", '; filename="x"'), MODEL)) == b"whisper-1"
    assert value(form(MODEL, part("model", b"weights", '; filename="x"'))) == b"whisper-1"


def test_a_form_without_the_field_has_none() -> None:
    assert value(form(FILE)) is None
    assert value(form(part("models", b"a"), part("Model", b"b"))) is None


def test_an_empty_form_field_is_there() -> None:
    assert value(form(part("model", b""), FILE)) == b""


@pytest.mark.parametrize("kind", [KIND + b"; charset=utf-8", b'multipart/form-data; boundary="xYz"'])
def test_the_boundary_may_be_quoted(kind: bytes) -> None:
    assert value(form(FILE, MODEL), kind) == b"whisper-1"


@settings(deadline=None)
@given(st.lists(st.sampled_from([b"\r", b"\n", b"--", b"xYz", b"\r\n--", b"\r\n--xY", b"a", b"\0\xff"]), max_size=8))
def test_a_form_fields_bytes_are_its_own(pieces: list[bytes]) -> None:
    content = b"".join(pieces)
    if b"\r\n--xYz" in b"\r\n" + content:
        return
    assert value(form(FILE, part("model", content), FILE)) == content


@pytest.mark.parametrize(
    "kind",
    [
        b"",
        b"multipart/form-data",
        b"multipart/mixed; boundary=xYz",
        b"application/json",
        b'multipart/form-data; boundary=""',
    ],
)
def test_a_content_type_without_a_boundary_is_refused(kind: bytes) -> None:
    with pytest.raises(ValueError, match="must be multipart/form-data with a boundary"):
        form_field(form(MODEL), kind, "model")


@pytest.mark.parametrize(
    "body",
    [
        form(MODEL, FILE)[:-4],
        form(MODEL)[:-7],
        b"",
        b"--xYz",
        b"--xYz\r\nContent-Disp",
        form(MODEL, boundary=b"other"),
        b"{}",
    ],
)
def test_a_broken_form_is_refused_with_a_sentence(body: bytes) -> None:
    with pytest.raises(ValueError, match=r"the (multipart )?body (is not valid|ends before)"):
        form_field(body, KIND, "model")
