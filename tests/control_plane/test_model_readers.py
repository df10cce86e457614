"""Readers of safetensors and GGUF: what files say, hostile ones, and anything at all: only clear errors, few reads."""

import json
import struct
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from control_plane.pure import gguf, gguf_config, memory, safetensors
from control_plane.pure.architecture import Cache
from control_plane.pure.reading import MOST_TENSORS, Unreadable
from tests.control_plane.model_writers import (
    GGUF_SHAPES,
    LLAMA_GGUF,
    LLAMA_SHAPES,
    Content,
    pair,
    text,
    with_header,
)
from tests.control_plane.model_writers import gguf as gguf_file
from tests.control_plane.model_writers import safetensors as safetensors_file

pytestmark = pytest.mark.anyio
GIB, MIB = 1024**3, 1024**2
U64 = 2**64 - 1


async def test_a_safetensors_file_has_its_tensors() -> None:
    reader = Content(safetensors_file(LLAMA_SHAPES))
    found = await safetensors.read(reader)

    assert [(one.name, one.dtype, one.numbers) for one in found] == [
        (name, dtype, shape[0] * shape[1]) for name, (dtype, shape) in LLAMA_SHAPES.items()
    ]
    assert sum(one.size for one in found) == 2 * (128 * 64 + 2 * 64 * 64)
    assert len(reader.reads) == 2


@pytest.mark.parametrize("version", [2, 3])
async def test_a_gguf_file_has_its_tensors_and_no_vocabulary(version: int) -> None:
    found = await gguf.read(Content(gguf_file(LLAMA_GGUF, GGUF_SHAPES, version)))

    sizes = {"token_embd.weight": 64 * 128 * 34 // 32, "blk.0.attn_q.weight": 64 * 64 * 18 // 32}
    assert {one.name: one.size for one in found.tensors} == {**sizes, "output_norm.weight": 256}
    assert found.metadata == {key: value for key, value in LLAMA_GGUF.items() if not key.startswith("tokenizer.")}


async def test_a_large_vocabulary_is_a_few_reads() -> None:
    """150,000 tokens, their scores and their kinds."""
    words = [f"token-{number}" for number in range(150_000)]
    metadata = {
        **LLAMA_GGUF,
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.scores": [0.5] * len(words),
        "tokenizer.ggml.token_type": [1] * len(words),
        "llama.after": 7,
    }
    reader = Content(gguf_file(metadata, GGUF_SHAPES))
    found = await gguf.read(reader)

    assert found.metadata["llama.after"] == 7
    assert len(reader.reads) < 8
    assert sum(n for _, n in reader.reads) < reader.size


HEADER: dict[str, Any] = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def changed(**members: Any) -> bytes:
    return with_header({"a": {**HEADER["a"], **members}}, 8)


@pytest.mark.parametrize(
    ("content", "clause"),
    [
        (b"", "0 bytes"),
        (b"\x01\x02", "2 bytes"),
        (struct.pack("<Q", U64) + b"{}", f"a header of {U64:,} bytes"),
        (struct.pack("<Q", 100) + b"{}", "a header of 100 bytes"),
        (with_header(b"[]"), "no JSON object"),
        (with_header(b"{\xff}"), "no JSON object"),
        (with_header(b"[" * 100_000), "no JSON object"),
        (with_header(b"{" + b'"":[' + b"[]," * 600_000 + b"[]]}"), "more values"),
        (with_header({"a": 1}), "no object"),
        (changed(dtype="Q4"), "dtype 'Q4'"),
        (changed(dtype=["F32"]), "dtype"),
        (changed(shape=[2.5]), "shape"),
        (changed(shape=[-2]), "shape"),
        (changed(shape=[True]), "shape"),
        (changed(shape=[1] * 17 + [2]), "at most 16"),
        (changed(shape=[2**62, 2**62]), "another size"),
        (changed(shape=[3]), "another size"),
        (changed(data_offsets=[0]), "data_offsets"),
        (changed(data_offsets=[0, -8]), "data_offsets"),
        (changed(data_offsets=[8, 0]), "another size"),
        (changed(data_offsets=[4, 12]), "gap"),
        (with_header({**HEADER, "b": {**HEADER["a"], "data_offsets": [4, 12]}}, 12), "overlaps"),
        (with_header({**HEADER, "b": {**HEADER["a"], "data_offsets": [0, 8]}}, 16), "overlaps"),
        (with_header(HEADER, 7), "cut off"),
        (with_header(HEADER, 9), "damaged"),
    ],
)
async def test_a_hostile_safetensors_file_is_refused(content: bytes, clause: str) -> None:
    with pytest.raises(Unreadable, match=clause):
        await safetensors.read(Content(content))


async def test_a_safetensors_header_is_bounded_before_it_is_read() -> None:
    reader = Content(struct.pack("<Q", 65 * 1024**2), 200 * GIB)
    with pytest.raises(Unreadable, match="at most 64 MiB"):
        await safetensors.read(reader)
    tensors = {str(number): {**HEADER["a"], "shape": [0], "data_offsets": [0, 0]} for number in range(MOST_TENSORS + 1)}
    with pytest.raises(Unreadable, match="100,001 tensors"):
        await safetensors.read(Content(with_header(tensors)))

    assert reader.reads == [(0, 8)]


@pytest.mark.parametrize(
    ("index", "clause"),
    [
        (b"x", "no JSON object"),
        (b"{}", "weight_map: missing"),
        (b'{"weight_map": {}}', "weight_map: missing"),
        (b'{"weight_map": {"a": 1}}', "no name"),
        (b'{"weight_map": {"a": "../../etc/x.safetensors"}}', "no name"),
        (b'{"weight_map": {"a": "config.json"}}', "no name"),
        (json.dumps({"weight_map": dict.fromkeys(map(str, range(100_001)), "a.safetensors")}).encode(), "100,001"),
    ],
)
def test_a_hostile_index_is_refused(index: bytes, clause: str) -> None:
    with pytest.raises(Unreadable, match=clause):
        safetensors.read_index(index)


def head(version: int = 3, tensors: int = 0, pairs: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs)


def tensor(dimensions: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0, name: str = "a") -> bytes:
    shape = struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
    return text(name) + shape + struct.pack("<IQ", kind, offset)


def array(kind: int, count: int) -> bytes:
    return text("k") + struct.pack("<IIQ", 9, kind, count)


@pytest.mark.parametrize(
    ("content", "clause"),
    [
        (b"", "first bytes"),
        (b"GGUF", "first bytes"),
        (b"GGML" + bytes(20), "first bytes"),
        (head(1), "version 1"),
        (head(4), "version 4"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (head(tensors=100_001), "100,001 tensors"),
        (head(tensors=U64), "tensors"),
        (head(pairs=U64), "key-value pairs"),
        (head(pairs=1), "ends before"),
        (head(pairs=1) + struct.pack("<Q", U64), "a key of"),
        (head(pairs=1) + struct.pack("<Q", 64 * 1024 + 1), "a key of"),
        (head(pairs=1) + struct.pack("<Q", 100) + b"short", "ends before"),
        (head(pairs=1) + text("k") + struct.pack("<I", 77) + bytes(8), "type 77"),
        (head(pairs=1) + text("k") + struct.pack("<IQ", 8, 2**20 + 1), "at most 1,048,576"),
        (head(pairs=1) + array(9, 1) + bytes(40), "array of arrays"),
        (head(pairs=1) + array(77, 1) + bytes(40), "type 77"),
        (head(pairs=1) + array(12, U64) + bytes(40), "ends before"),
        (head(pairs=1) + array(8, U64) + bytes(40), "ends before"),
        (head(pairs=1) + array(8, 2) + struct.pack("<Q", U64) + bytes(40), "a text of"),
        (head(pairs=2) + pair("k", 1) + pair("k", 2), "given twice"),
        (head(pairs=1) + pair("general.alignment", 0), "alignment"),
        (head(pairs=1) + pair("general.alignment", "x"), "alignment"),
        (head(pairs=1) + pair("general.alignment", 2**31), "alignment"),
        (head(tensors=1), "ends before"),
        (head(tensors=1) + struct.pack("<Q", U64), "name of a tensor"),
        (head(tensors=1) + tensor((1,) * 9) + bytes(99), "9 dimensions"),
        (head(tensors=1) + tensor(kind=4) + bytes(999), "type 4"),
        (head(tensors=1) + tensor((33,), kind=2) + bytes(999), "no multiple of 32"),
        (head(tensors=1) + tensor((2**63, 2**63, 2**63)) + bytes(999), "cut off"),
        (head(tensors=1) + tensor(offset=U64) + bytes(999), "cut off"),
        (head(tensors=1) + tensor() + bytes(64), "cut off"),
        (head(tensors=2) + tensor() + tensor(offset=32) + bytes(999), "overlaps"),
    ],
)
async def test_a_hostile_gguf_file_is_refused(content: bytes, clause: str) -> None:
    with pytest.raises(Unreadable, match=clause):
        await gguf.read(Content(content))


@pytest.mark.parametrize(
    "content",
    [
        # Texts without a character, for ever; many arrays, each of which is jumped over; many keys
        head(pairs=1) + array(8, 2**40),
        head(pairs=60_000) + b"".join(text(str(one)) + struct.pack("<IIQ", 9, 0, 2**20) for one in range(3)),
        head(tensors=10_000),
    ],
)
async def test_a_hostile_file_costs_few_reads_and_little_memory(content: bytes) -> None:
    """Of 500 GB, all zeros after its first bytes."""
    reader = Content(content, 500 * GIB)
    tracemalloc.start()
    try:
        with pytest.raises(Unreadable):
            await gguf.read(reader, 4 * MIB)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert len(reader.reads) <= 16
    assert sum(n for _, n in reader.reads) <= 4 * MIB
    assert peak < 12 * MIB


async def never_worse_than_clear(read: Callable[[Content], Any], content: bytes, size: int) -> None:
    reader = Content(content, max(size, len(content)))
    with suppress(Unreadable):
        await read(reader)
    assert len(reader.reads) <= 256
    assert sum(n for _, n in reader.reads) <= 64 * 1024**2


# Whole files, of which some bytes are changed
SAFETENSORS, GGUF = safetensors_file(LLAMA_SHAPES), gguf_file(LLAMA_GGUF, GGUF_SHAPES)
CHANGES = st.lists(
    st.tuples(st.integers(0, 2000), st.binary(min_size=1, max_size=9) | st.just(b"\xff" * 8)), max_size=6
)
SIZES = st.sampled_from([0, 5000, 2**40])


def altered(content: bytes, changes: list[tuple[int, bytes]], cut: int | None) -> bytes:
    for at, part in changes:
        content = content[:at] + part + content[at + len(part) :]
    return content[:cut]


@settings(max_examples=60, deadline=None)
@given(CHANGES, st.none() | st.integers(0, 4000), SIZES)
@example([], 100, 2**40)
async def test_any_safetensors_file_is_read_or_refused(
    changes: list[tuple[int, bytes]], cut: int | None, size: int
) -> None:
    await never_worse_than_clear(safetensors.read, altered(SAFETENSORS, changes, cut), size)


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=9),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
        max_leaves=12,
    ),
    st.sampled_from(["dtype", "shape", "data_offsets", "whole", "index"]),
)
async def test_any_json_in_a_header_is_read_or_refused(value: Any, place: str) -> None:
    if place == "index":
        try:
            safetensors.read_index(json.dumps({"weight_map": value}).encode())
        except Unreadable:
            return
    header = value if place == "whole" else {"a": {**HEADER["a"], place: value}}
    await never_worse_than_clear(safetensors.read, with_header(header, 8), 0)


@settings(max_examples=100, deadline=None)
@given(CHANGES, st.none() | st.integers(0, 4000), SIZES)
async def test_any_gguf_file_is_read_or_refused(changes: list[tuple[int, bytes]], cut: int | None, size: int) -> None:
    async def read(reader: Content) -> None:
        found = await gguf.read(reader)
        memory.per_token(gguf_config.of(found.metadata, found.tensors))

    await never_worse_than_clear(read, altered(GGUF, changes, cut), size)


SHAPES = [key for key in LLAMA_GGUF if key.startswith("llama.")] + [
    "general.architecture",
    "llama.attention.key_length",
    "llama.attention.kv_lora_rank",
    "llama.attention.sliding_window",
    "llama.attention.sliding_window_pattern",
    "llama.rope.dimension_count",
]
ANYTHING = st.none() | st.integers(-5, 2**64) | st.text(max_size=5) | st.lists(st.integers(0, 9)).map(tuple)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(SHAPES), ANYTHING), max_size=5))
async def test_any_values_of_gguf_are_an_architecture_or_refused(values: list[tuple[str, Any]]) -> None:
    try:
        found = gguf_config.of({**LLAMA_GGUF, **dict(values)}, [])
    except Unreadable:
        return
    assert found.layers >= 1
    assert memory.per_token(found) >= 0


def test_gguf_says_which_layers_keep_what() -> None:
    def caches(**values: Any) -> tuple[Cache, ...]:
        metadata = {"general.architecture": "x", "x.block_count": 12, "x.context_length": 8192}
        shape = {"x.embedding_length": 512, "x.attention.head_count": 8, "x.attention.head_count_kv": 2}
        named = {f"x.{name.replace('__', '.')}": value for name, value in values.items()}
        return gguf_config.of({**metadata, **shape, **named}, []).caches

    assert caches() == (Cache(12, 256),)
    assert caches(attention__key_length=128, attention__value_length=96) == (Cache(12, 2 * (128 + 96)),)
    assert caches(attention__sliding_window=1024) == (Cache(12, 256, 1024),)
    assert caches(attention__sliding_window=1024, attention__sliding_window_pattern=6) == (
        Cache(2, 256),
        Cache(10, 256, 1024),
    )
    assert caches(attention__sliding_window=1024, attention__sliding_window_pattern=(True, False) * 6) == (
        Cache(6, 256),
        Cache(6, 256, 1024),
    )
    assert caches(attention__head_count_kv=(2, 0, 4, 0) * 3) == (Cache(3, 256), Cache(3, 512))
    assert caches(attention__kv_lora_rank=512, rope__dimension_count=64) == (Cache(12, 576),)
