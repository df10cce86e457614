"""Headers of GGUF files, version 2 and 3, little-endian, also of models in several parts.

A file is a magic, a version, counts, key-value pairs, descriptions of tensors, and the tensors. Long arrays, such as
vocabularies, are skipped.
"""

import struct
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from control_plane.pure.reading import LARGEST_HEADER, MOST_TENSORS, Reader, Tensor, Unreadable, Window

MAGIC = b"GGUF"
# Tensors: name, numbers in one block, bytes of one block
TYPES: Final[Mapping[int, tuple[str, int, int]]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
}
# Values: how they are read
_SCALARS: Final[Mapping[int, struct.Struct]] = {
    number: struct.Struct(f"<{form}") for number, form in enumerate("BbHhIif?")
} | {10: struct.Struct("<Q"), 11: struct.Struct("<q"), 12: struct.Struct("<d")}
_STRING, _ARRAY = 8, 9
_U32, _U64 = _SCALARS[4], _SCALARS[10]
# Bytes of a key, of a text, of a tensor's name
_KEY, _TEXT, _NAME = 64 * 1024, 1024 * 1024, 4096
# Pairs; dimensions; values of an array that is built; characters of a text that is kept
_PAIRS, _DIMENSIONS, _SHORT, _KEPT = 65_536, 8, 4096, 4096
_ALIGNMENT, _LARGEST_ALIGNMENT = 32, 1024 * 1024
# A vocabulary, and what belongs to it
_SKIPPED: Final = "tokenizer."


class Part(NamedTuple):
    """One file. `metadata`: single values and short arrays of numbers."""

    metadata: Mapping[str, Any]
    tensors: Sequence[Tensor]


async def read(reader: Reader, most: int = LARGEST_HEADER) -> Part:
    """`most`: bytes before the tensors. Raises Unreadable."""
    window = Window(reader, most)
    if reader.size < 24 or await window.take(4) != MAGIC:
        raise Unreadable("its first bytes: not those of a GGUF file")
    version = await window.number(_U32)
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        why = "it is big-endian, which engines here do not load" if swapped in (1, 2, 3) else "2 and 3 are known"
        raise Unreadable(f"GGUF version {version}: {why}")
    tensors, pairs = await window.number(_U64), await window.number(_U64)
    if tensors > MOST_TENSORS:
        raise Unreadable(f"{tensors:,} tensors: at most {MOST_TENSORS:,}")
    if pairs > _PAIRS:
        raise Unreadable(f"{pairs:,} key-value pairs: at most {_PAIRS:,}")
    metadata: dict[str, Any] = {}
    for _ in range(pairs):
        key = await _text(window, _KEY, "a key")
        value = await _value(window, key)
        if key in metadata:
            raise Unreadable(f"the key {key[:80]!r}: given twice")
        if value is not None and not key.startswith(_SKIPPED):
            metadata[key] = value
    places = [await _place(window) for _ in range(tensors)]
    _check_room(places, _after(window.offset, metadata), reader.size)
    return Part(metadata, [tensor for _, tensor in places])


async def _text(window: Window, longest: int, what: str) -> str:
    length = await window.number(_U64)
    if length > longest:
        raise Unreadable(f"{what} of {length:,} bytes: at most {longest:,} are read")
    return (await window.take(length)).decode("utf-8", "replace")


async def _value(window: Window, key: str) -> Any:
    """None: it is too long to be kept, or an array of texts. Raises Unreadable."""
    kind = await window.number(_U32)
    if kind == _STRING:
        text = await _text(window, _TEXT, f"the text of {key[:80]!r}")
        return text if len(text) <= _KEPT else None
    if kind == _ARRAY:
        return await _array(window, key)
    form = _SCALARS.get(kind)
    if form is None:
        raise Unreadable(f"the key {key[:80]!r}: values of type {kind} are not known")
    return form.unpack(await window.take(form.size))[0]


async def _array(window: Window, key: str) -> tuple[Any, ...] | None:
    kind, count = await window.number(_U32), await window.number(_U64)
    if kind == _ARRAY:
        raise Unreadable(f"the key {key[:80]!r}: an array of arrays, which no model needs")
    if kind == _STRING:
        await window.skip_prefixed(count, _U64, _TEXT)
        return None
    form = _SCALARS.get(kind)
    if form is None:
        raise Unreadable(f"the key {key[:80]!r}: arrays of type {kind} are not known")
    if count > _SHORT or key.startswith(_SKIPPED):
        window.skip(count * form.size)
        return None
    return tuple(one for (one,) in form.iter_unpack(await window.take(count * form.size)))


async def _place(window: Window) -> tuple[int, Tensor]:
    """Where a tensor begins after the header. Raises Unreadable."""
    name = await _text(window, _NAME, "the name of a tensor")
    dimensions = await window.number(_U32)
    if dimensions > _DIMENSIONS:
        raise Unreadable(f"tensor {name[:80]!r}: {dimensions} dimensions, at most {_DIMENSIONS}")
    shape = [await window.number(_U64) for _ in range(dimensions)]
    kind, offset = await window.number(_U32), await window.number(_U64)
    if kind not in TYPES:
        raise Unreadable(f"tensor {name[:80]!r}: the type {kind} is not known")
    dtype, block, size = TYPES[kind]
    if shape and shape[0] % block:
        raise Unreadable(f"tensor {name[:80]!r}: rows of {shape[0]:,} numbers are no multiple of {block} ({dtype})")
    numbers = 1
    for one in shape:
        numbers *= one
    return offset, Tensor(name, dtype, numbers, -(-numbers // block) * size)


def _after(offset: int, metadata: Mapping[str, Any]) -> int:
    """Where tensors begin, after a header that ends here. Raises Unreadable."""
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= _LARGEST_ALIGNMENT:
        raise Unreadable(f"general.alignment: must be 1 to {_LARGEST_ALIGNMENT:,}, not {str(alignment)[:40]}")
    return -(-offset // alignment) * alignment


def _check_room(places: Sequence[tuple[int, Tensor]], start: int, size: int) -> None:
    at = 0
    for offset, tensor in sorted(places):
        if offset < at:
            raise Unreadable(f"tensor {tensor.name[:80]!r}: overlaps the one before")
        at = offset + tensor.size
        if start + at > size:
            raise Unreadable(
                f"tensor {tensor.name[:80]!r}: ends at byte {start + at:,}, and the file has {size:,}: "
                "it was cut off: download it again"
            )
