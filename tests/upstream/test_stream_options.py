"""`stream_options.include_usage` becomes true in any valid body, and no other byte of it changes."""

import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_api.upstream.rewrite import edited
from inference_api.upstream.stream_options import NAME, add, asks, override

ABSENT = object()


def finish(body: bytes) -> Any:
    work = override(body)
    while True:
        try:
            next(work)
        except StopIteration as stop:
            return stop.value


def asked(body: bytes, is_there: bool) -> bytes:
    edit = finish(body) if is_there else add(body)
    assert edit is not None
    content = edited(body, [edit])
    return content if isinstance(content, bytes) else b"".join(content)


# Bodies up to 4 KB are read token by token, larger ones by a search or a scan.
PADDING = [b"", b"x" * 5000, b"x" * 5000 + b"\\u00e9", b"x" * 300_000, b"\\u00e9" * 50_000]


SO, IU = b'"stream_options"', b'"include_usage"'
TALK = b'"a":"\\"stream_options\\":{}",'
CHANGES = [
    (SO + b": null,", SO + b": {" + IU + b":true},"),
    (SO + b":{},", SO + b":{" + IU + b":true},"),
    (SO + b" : { } ,", SO + b" : {" + IU + b":true } ,"),
    (SO + b":{" + IU + b": false},", SO + b":{" + IU + b": true},"),
    (SO + b":{" + IU + b':null , "a":1},', SO + b":{" + IU + b':true , "a":1},'),
    (SO + b':{"a":[{' + IU + b":0}]},", SO + b":{" + IU + b':true,"a":[{' + IU + b":0}]},"),
    # The last of several counts, there and within.
    (SO + b":{" + IU + b":0," + IU + b":false},", SO + b":{" + IU + b":0," + IU + b":true},"),
    (SO + b":{" + IU + b":true}," + SO + b":null,", SO + b":{" + IU + b":true}," + SO + b":{" + IU + b":true},"),
    # Not at the top level, or no key
    (SO + b':null,"x":' + SO + b",", SO + b":{" + IU + b':true},"x":' + SO + b","),
    (b'"x":{' + SO + b":null}," + SO + b":{},", b'"x":{' + SO + b":null}," + SO + b":{" + IU + b":true},"),
    (b'"stream\\u005foptions":{},', b'"stream\\u005foptions":{' + IU + b":true},"),
    (
        b'"a":"\\"stream_options\\":{}",' + SO + b":null,",
        b'"a":"\\"stream_options\\":{}",' + SO + b":{" + IU + b":true},",
    ),
]


@pytest.mark.parametrize("padding", PADDING, ids=["small", "plain", "escaped", "large", "large, escaped"])
@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_only_the_value_changes(before: bytes, after: bytes, padding: bytes) -> None:
    prompt = b'"prompt":"%b",' % padding
    for start, end in ((b"{", b'"model":"m"}'), (b'\xef\xbb\xbf \n{"model":"m",', b'"x":1} \n')):
        assert asked(start + before + prompt + end, True) == start + after + prompt + end
        assert asked(start + prompt + before + end, True) == start + prompt + after + end


def test_it_is_added_where_it_is_not() -> None:
    added = b'{"stream_options":{"include_usage":true},"model":"{"}'
    for start in (b"", b"\xef\xbb\xbf", b" \n"):
        assert asked(start + b'{"model":"{"}', False) == start + added


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.text(max_size=5)
    | st.sampled_from(["stream_options", "{", '"']),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
OPTIONS = st.one_of(
    st.just(ABSENT),
    st.none(),
    st.dictionaries(st.sampled_from(["a", "include_usage", "stream_options", "}"]), JSON, max_size=4),
)


@given(
    st.dictionaries(st.text(max_size=6), JSON, max_size=4), OPTIONS, st.booleans(), st.sampled_from([0, 5000, 40_000])
)
def test_any_body_asks_and_says_the_rest_as_before(
    rest: dict[str, Any], options: Any, ascii_only: bool, size: int
) -> None:
    document = {**rest, "prompt": "é" * size, **({} if options is ABSENT else {NAME: options}), "model": "m"}
    body = json.dumps(document, ensure_ascii=ascii_only, indent=1 if size else None).encode()

    found = json.loads(asked(body, options is not ABSENT))

    given_options = {} if options is ABSENT or options is None else options
    assert found == {**document, NAME: {**given_options, "include_usage": True}}


@pytest.mark.parametrize("options", [b"3", b'"x"', b"[]", b"true", b'{"a":"' + b"x" * 5000 + b'"}'])
def test_what_no_engine_accepts_stays(options: bytes) -> None:
    for padding in (b"", b"x" * 300_000):
        assert finish(b'{"model":"m","prompt":"%b","stream_options":%b}' % (padding, options)) is None


def test_what_cannot_be_scanned_stays() -> None:
    deep = b"[" * 20_000 + b"]" * 20_000
    assert finish(b'{"x":%b,"y":"\\u00e9","stream_options":null}' % deep) is None


@pytest.mark.parametrize("value", [True, 1, "true", "True", "on", "yes", "1"])
def test_a_client_asks_as_the_engines_read_it(value: Any) -> None:
    assert asks({"include_usage": value})


@pytest.mark.parametrize(
    "options",
    [
        None,
        {},
        [],
        "x",
        {"include_usage": None},
        {"include_usage": False},
        {"include_usage": "no"},
        {"include_usage": 2},
    ],
)
def test_and_otherwise_does_not(options: Any) -> None:
    assert not asks(options)


def test_the_quick_way_does_not_read_a_large_body() -> None:
    body = orjson.dumps({"prompt": "x" * 5_000_000, NAME: {"include_usage": False}})
    work = override(body)
    with pytest.raises(StopIteration) as stop:
        next(work)

    assert stop.value.value == ((body.rfind(b"false"), body.rfind(b"false") + 5), b"true")
