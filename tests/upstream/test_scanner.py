"""The scanner says of every document what Python's json.loads says, wherever it is cut, and keeps next to nothing."""

import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from inference_api.upstream.json_text import NotJSON
from inference_api.upstream.scanner import KEPT, MAX_DEPTH, SLICE, Scan

NAMES = ("model", "stream", "messages", "é")
# Small enough to cut every string and container, large enough for a name in its longest spelling.
SMALL_KEPT = 60


def scan(body: bytes, **more: int) -> Scan:
    scanned = Scan(body, NAMES, **more)
    for _ in scanned.slices():
        pass
    return scanned


def loads(body: bytes) -> Any:
    """As vLLM reads a body; a number of any size is one."""
    text = body.decode("utf-8-sig", "surrogatepass")
    return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 4000 else float(digits))


def is_like(value: Any, scanned: Any) -> bool:
    """Equal, but for strings that were cut and integers that only Python has."""
    if type(value) is int and abs(value) >= 2**63:
        return float(value) == float(scanned)
    if type(value) is not type(scanned):
        return False
    if isinstance(value, str):
        return value == scanned or (len(value) > len(scanned) and value.startswith(scanned[:-1]))
    if isinstance(value, list):
        return len(value) == len(scanned) and all(map(is_like, value, scanned))
    if isinstance(value, dict):
        # Keys may be cut too, to the same.
        return len(value) >= len(scanned) >= min(len(value), 1)
    return bool(value == scanned or (value != value and scanned != scanned))


text = st.text(st.sampled_from('a\\"[]{},: \n\0é😀\ud83d\ude00'), max_size=100)
names = st.sampled_from([*NAMES, "model2", "", '"', "\\"]) | text
values: st.SearchStrategy[Any] = st.recursive(
    st.sampled_from([None, True, 0, -1.5e300, 10**25, float("nan"), float("-inf"), "", [], {}]) | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4),
    max_leaves=12,
)
spaces = st.sampled_from(["", " ", "\n\t", " " * 50])
dumps: st.SearchStrategy[Callable[[Any], str]] = st.sampled_from(
    [
        json.dumps,
        lambda value: json.dumps(value, indent=1, ensure_ascii=False),
        # Escapes for every character of every key of the top
        lambda value: json.dumps(value) if not isinstance(value, str) else json.dumps(value).replace("m", "\\u006d"),
    ]
)


@st.composite
def documents(draw: st.DrawFn) -> bytes:
    """An object with keys that repeat, and space wherever it may be."""
    pairs = draw(st.lists(st.tuples(names, values), max_size=6))
    write = draw(dumps)
    members = ",".join(
        f"{draw(spaces)}{write(name)}{draw(spaces)}:{draw(spaces)}{write(value)}{draw(spaces)}" for name, value in pairs
    )
    text = f"{draw(st.sampled_from(['', chr(0xFEFF)]))}{draw(spaces)}{{{members}{draw(spaces)}}}{draw(spaces)}"
    return text.encode("utf-8", "surrogatepass")


sizes = st.sampled_from([1, 2, 3, 5, 8, 13, 40, 1000])


@settings(deadline=None)
@given(documents(), sizes)
def test_the_members_are_those_that_python_reads(body: bytes, size: int) -> None:
    expected = loads(body)

    scanned = scan(body, size=size, kept=SMALL_KEPT)

    assert scanned.is_object
    assert scanned.members.keys() == expected.keys() & set(NAMES)
    for name, member in scanned.members.items():
        assert member.whole
        assert is_like(expected[name], member.value)


@settings(deadline=None)
@given(documents(), sizes)
def test_a_string_is_found_where_it_stands(body: bytes, size: int) -> None:
    expected = loads(body)

    for name, member in scan(body, size=size, kept=SMALL_KEPT).members.items():
        if isinstance(expected[name], str):
            span = member.string_span()
            assert span is not None
            assert loads(body[slice(*span)]) == expected[name]


bytes_of_note = st.sampled_from(list(b'[]{},:"\\ 01-+.eENanutlf\0\xff\xe9'))
changes_of_bytes = st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 2), bytes_of_note), max_size=3)


@settings(deadline=None)
@given(documents() | values.map(lambda value: json.dumps(value).encode()), changes_of_bytes, sizes)
@example(b"", [], 1)
@example(b"{", [], 1)
@example(b'{"a":1}]', [], 3)
@example(b"[[1}]", [], 40)
@example(b'["' + b"a" * 200, [], 8)
@example(b'["' + b"a" * 200 + b"\\u12", [], 8)
@example(b'["' + b"a" * 200 + b"\xff" + b"a" * 200 + b'"]', [], 8)
@example(b'["' + b"a" * 200 + b"\n" + b"a" * 200 + b'"]', [], 8)
def test_what_python_takes_is_taken_and_nothing_else(
    body: bytes, changes: list[tuple[int, int, int]], size: int
) -> None:
    changed = bytearray(body)
    for place, length, byte in changes:
        at = place % (len(changed) + 1)
        changed[at : at + length] = bytes([byte])
    try:
        expected = loads(bytes(changed))
    except ValueError:
        with pytest.raises(NotJSON):
            scan(bytes(changed), size=size, kept=SMALL_KEPT)
    else:
        assert scan(bytes(changed), size=size, kept=SMALL_KEPT).is_object is isinstance(expected, dict)


@pytest.mark.parametrize(
    ("body", "at"),
    [
        (b'{"a":[1,2,"\xff"]}', 11),
        (b'{"a":[1,2,' + b" " * 100 + b"3 4]}", 112),
        (b'{"a":"' + b"x" * 300 + b'\n"}', 306),
        (b'{"a":1} x', 8),
    ],
)
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_what_is_wrong_is_told_with_its_place(body: bytes, at: int, size: int) -> None:
    with pytest.raises(NotJSON, match=f" at byte {at}$"):
        scan(body, size=size, kept=SMALL_KEPT)


@pytest.mark.parametrize("size", [64, 1000, SLICE])
@pytest.mark.parametrize(("opening", "closing", "levels"), [(b"[", b"]", 1), (b'{"":', b"}", 1), (b'[{"a":', b"}]", 2)])
def test_nesting_has_an_end_far_beyond_what_engines_are_asked(
    opening: bytes, closing: bytes, levels: int, size: int
) -> None:
    for depth in (500, MAX_DEPTH - 1500):
        count = depth // levels
        body = b'{"x":' + opening * count + b"1" + closing * count + b',"model":"m"}'
        assert scan(body, size=size).members["model"].value == "m"

    with pytest.raises(NotJSON, match="nested deeper"):
        scan(b'{"x":' + opening * 100_000 + b"1" + closing * 100_000 + b',"model":"m"}', size=size)


def wide(start: bytes, unit: bytes, end: bytes) -> bytes:
    return start + unit * (4_000_000 // len(unit)) + end


# What takes much memory, many steps, or steps without end, of a reader that is not made for it
HOSTILE = {
    "numbers": wide(b'{"model":"m","x":[', b"1,", b"1]}"),
    "lists": wide(b'{"model":"m","x":[', b"[],", b"[]]}"),
    "objects": wide(b'{"model":"m","x":[', b"{},", b"{}]}"),
    "strings": wide(b'{"model":"m","x":[', b'"",', b'""]}'),
    "members": wide(b'{"model":"m",', b'"a":1,', b'"b":1}'),
    "a string": wide(b'{"model":"m","x":"', b"a", b'"}'),
    "a name": wide(b'{"model":"m","', b"a", b'":1}'),
    "backslashes": wide(b'{"model":"m","x":"', b"\\\\", b'"}'),
    "quotes": wide(b'{"model":"m","x":"', b'\\"', b'"}'),
    "halves of pairs": wide(b'{"model":"m","x":"', b"\\ud83d", b'"}'),
    "characters of four bytes": wide(b'{"model":"m","x":"', "😀".encode(), b'"}'),
    "space": wide(b'{"model":"m","x":', b" ", b"1}"),
    "digits": wide(b'{"model":"m","x":', b"9", b"}"),
    "a fraction": wide(b'{"model":"m","x":0.', b"9", b"e5}"),
    "levels": wide(b'{"model":"m","x":[', b"[" * 400 + b"]" * 400 + b",", b"1]}"),
    "not a number": wide(b'{"model":"m","x":[', b"NaN,", b"1]}"),
    "the model, again and again": wide(b"{", b'"model":"no",', b'"model":"m"}'),
    "what looks like the model": wide(b'{"model":"m","x":[', b'{"model":"no"},', b"1]}"),
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE.keys())
def test_whatever_a_body_holds_takes_little_memory_and_small_steps(body: bytes) -> None:
    tracemalloc.start()
    try:
        scanned = scan(body)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    member = scanned.members["model"]
    assert member.value == "m"
    span = member.string_span()
    assert span is not None
    assert body[slice(*span)] == b'"m"'
    assert peak < len(body)


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_body_is_read_in_many_steps(body: bytes) -> None:
    steps = sum(1 for _ in Scan(body, NAMES).slices())

    assert steps >= len(body) // SLICE


def test_of_a_long_string_as_much_is_kept_as_is_asked_for() -> None:
    body = json.dumps({"messages": [{"content": "é" * 100_000}], "model": "é" * 3000}).encode()

    members = scan(body).members

    assert members["messages"].value == [{"content": "é" * (KEPT // 6)}]
    assert members["model"].value[:1024] == "é" * 1024


def test_of_a_large_container_the_beginning_is_kept() -> None:
    body = json.dumps({"messages": list(range(1_000_000)), "model": "m", "stream": {"a": 1}}).encode()

    members = scan(body).members

    messages = members["messages"]
    assert not messages.whole
    assert messages.value[:10_000] == list(range(10_000))
    assert len(messages.value) < 50_000
    assert (members["model"].value, members["stream"].value, members["stream"].whole) == ("m", {"a": 1}, True)
