"""Keys of the cache: two bodies that an engine may read differently never have one key."""

import copy
import json
from collections.abc import Iterator
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference_api.features.caching import keys
from inference_api.http.routes import INFERENCE_ROUTES
from inference_api.models import Call, RawHeaders

CHAT = next(route for route in INFERENCE_ROUTES if route.label == "chat_completions")
TEXT = next(route for route in INFERENCE_ROUTES if route.label == "completions")
COMMON = keys.beginning(b"entry")
KEYS = ("model", "temperature", "a", "b", "ä", "a:b", '"', "")
plain_leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=6)
    | st.sampled_from(["1", "null", ":", "{", "\\u003a", "é", "\u2028", "0" * 20])
)


def documents(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    names = st.sampled_from(KEYS)
    values = st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3), max_leaves=8
    )
    return st.dictionaries(names, values, max_size=4)


bodies = documents(plain_leaves | st.integers(-(2**70), 2**70))


def key(body: bytes, scope: bytes = b"", headers: RawHeaders | None = None, **more: Any) -> bytes:
    return keys.small(COMMON, Call(CHAT, "m", False, body, headers or [], "1", [], **more), scope)


def meaning(body: bytes) -> Any:
    """What a careful engine reads: numbers by their digits, members with all of their repetitions."""

    def members(pairs: list[tuple[str, Any]]) -> Any:
        return "object", tuple(sorted(pairs, key=lambda pair: pair[0]))

    def deep(value: Any) -> Any:
        if isinstance(value, list):
            return "list", tuple(map(deep, value))
        if isinstance(value, tuple):
            return value[0], tuple((name, deep(one)) for name, one in value[1])
        return type(value), str(value)

    return deep(json.loads(body, object_pairs_hook=members))


@settings(max_examples=150)
@given(bodies, bodies)
def test_two_bodies_have_one_key_only_if_they_mean_the_same(one: Any, other: Any) -> None:
    first, second = json.dumps(one).encode(), json.dumps(other, ensure_ascii=False).encode()

    if meaning(first) != meaning(second):
        assert key(first) != key(second)


def mutations(value: Any) -> Iterator[Any]:
    """The value with one change, at each of its places."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield {other: one for other, one in value.items() if other != name}
            yield {(other + "x" if other == name else other): one for other, one in value.items()}
            for changed in mutations(inner):
                yield {**value, name: changed}
        yield {**value, "new": None}
    elif isinstance(value, list):
        for at, inner in enumerate(value):
            yield value[:at] + value[at + 1 :]
            for changed in mutations(inner):
                yield [*value[:at], changed, *value[at + 1 :]]
        yield [*value, None]
    elif isinstance(value, str):
        yield from (value + " ", value.upper() + "x", [value])
    elif isinstance(value, bool) or value is None:
        yield from (not value, 0, "")
    else:
        yield from (value + 1, str(value), float(value) if isinstance(value, int) else int(value), -value - 1)


REQUEST = {
    "model": "m",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]},
    ],
    "temperature": 0,
    "seed": 9007199254740993,
    "stop": ["\n"],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "required": []}}}],
    "logit_bias": {"50256": -100},
    "response_format": {"type": "json_schema", "json_schema": {"strict": True}},
    "user": None,
    "stream_options": {"include_usage": False},
    "top_p": 0.1,
}


def test_a_change_of_any_field_is_another_key() -> None:
    found = [key(json.dumps(one).encode()) for one in (REQUEST, *mutations(REQUEST))]

    assert len(found) > 100
    assert len(set(found)) == len(found)


@given(documents(plain_leaves), st.randoms(use_true_random=False))
def test_spelling_does_not_count(body: dict[str, Any], random: Any) -> None:
    shuffled = list(body.items())
    random.shuffle(shuffled)
    spaced = json.dumps(dict(shuffled), indent=1, ensure_ascii=True).encode()

    first = key(json.dumps(body, ensure_ascii=False).encode())

    assert key(spaced) == first


DIFFERENT = [
    (b'{"a":1}', b'{"a":1.0}'),
    (b'{"a":1}', b'{"a":true}'),
    (b'{"a":null}', b"{}"),
    (b'{"a":NaN}', b'{"a":null}'),
    (b'{"a":NaN}', b'{"a":Infinity}'),
    (b'{"a":"NaN"}', b'{"a":NaN}'),
    (b'{"a":18446744073709551617}', b'{"a":18446744073709551618}'),
    (b'{"a":18446744073709551616}', b'{"a":1.8446744073709552e19}'),
    (b'{"a":0.1}', b'{"a":0.1000000000000000055511151231257827}'),
    # Of repeated members some engines take the first, others the last.
    (b'{"a":1,"a":2}', b'{"a":2}'),
    (b'{"a":1,"a":2}', b'{"a":2,"a":1}'),
    (b'{"a":{"b":1,"b":2}}', b'{"a":{"b":2}}'),
    (rb'{"x":"\u003a","a":1,"a":2}', rb'{"x":":","a":2}'),
    (rb'{"\u0061":1,"a":2}', rb'{"a":2}'),
    (rb'{"a":"\ud800"}', rb'{"a":"\ud801"}'),
    (b'{"a":[[1],2]}', b'{"a":[1,[2]]}'),
    (b'{"a":["{",[]]}', b'{"a":{}}'),
    (b'{"a":' + b"[" * 400 + b"]" * 400 + b"}", b'{"a":' + b"[" * 401 + b"]" * 401 + b"}"),
    (b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}", b'{"a":' + b"[" * 5001 + b"]" * 5001 + b"}"),
]


@pytest.mark.parametrize(("one", "other"), DIFFERENT, ids=[str(one[:40]) for one, _ in DIFFERENT])
def test_what_parsers_lose_counts(one: bytes, other: bytes) -> None:
    assert key(one) != key(other)


def test_the_canonical_form() -> None:
    body = {"b": [1, 2.5, "ä"], "a": {"d": None, "c": True}}
    spellings = [
        orjson.dumps(body),
        json.dumps(body, indent=2).encode(),
        json.dumps(body, ensure_ascii=False).encode(),
        rb'{"a":{"c":true,"d":null},"b":[1,25e-1,"\u00e4"]}',
        rb' {"\u0061":{"c":true,"d":null},"b":[1,2.50,"\u00E4"]}' + b"\n",
    ]

    assert len({key(one) for one in spellings}) == 1


def test_route_query_scope_headers_and_entry_count() -> None:
    body = orjson.dumps(REQUEST)
    plain = Call(CHAT, "m", False, body, [], "1", [])
    found = [
        key(body),
        key(body, scope=b"org a"),
        key(body, suffix=b"?api-version=1"),
        key(body, headers=[(b"openai-beta", b"a")]),
        key(body, headers=[(b"openai-beta", b"b")]),
        keys.small(COMMON, plain._replace(route=TEXT), b""),
        keys.small(keys.beginning(b"other"), plain, b""),
    ]
    alike = key(body, headers=[(b"user-agent", b"x"), (b"traceparent", b"y"), (b"x-session-id", b"z")])

    assert len(set(found)) == len(found)
    assert alike == found[0]


def test_edits_of_other_layers_count() -> None:
    body = b'{"model":"m","a":1}'

    assert key(body, edits=(((17, 18), b"2"),)) == key(b'{"model":"m","a":2}') != key(body)


def test_a_large_body_counts_byte_for_byte_in_slices() -> None:
    large = json.dumps({"model": "m", "input": "x" * 3_000_000}).encode()

    def steps(body: bytes) -> tuple[bytes, int]:
        work, count = keys.large(COMMON, Call(CHAT, "m", False, body, [], "1", []), b""), 0
        while True:
            try:
                next(work)
                count += 1
            except StopIteration as done:
                return done.value, count

    first, count = steps(large)
    assert count > 10
    assert steps(copy.copy(large))[0] == first != steps(large[:-3] + b'y"}')[0]
    # Never that of a small one, and edits count here, too.
    assert steps(b"{}")[0] != key(b"{}")
