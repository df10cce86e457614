"""Headers of safetensors files, and the index of a model in several of them.

A file is 8 bytes, the length of its header, little-endian; the header, JSON; and the tensors, without gaps.
"""

import struct
from collections.abc import Mapping, Sequence
from typing import Any, Final

import orjson

from control_plane.pure.reading import LARGEST_HEADER, MIB, MOST_TENSORS, Reader, Tensor, Unreadable

# Bits of one number
BITS: Final[Mapping[str, int]] = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
# Bytes of an index; dimensions of a tensor; what JSON may have of `{`, `[` and `,` each, so that reading it is bounded
LARGEST_INDEX = 16 * 1024 * 1024
_DIMENSIONS, _MARKS = 16, {b"{": 500_000, b"[": 500_000, b",": 2_000_000}
_LENGTH = struct.Struct("<Q")
_METADATA: Final = "__metadata__"


async def read(reader: Reader, most: int = LARGEST_HEADER) -> list[Tensor]:
    """The tensors of a file. `most`: bytes of its header. Raises Unreadable."""
    if reader.size < _LENGTH.size:
        raise Unreadable(f"{reader.size} bytes: too small for a safetensors file")
    (length,) = _LENGTH.unpack(await reader.read(0, _LENGTH.size))
    if length > min(most, reader.size - _LENGTH.size):
        raise Unreadable(
            f"a header of {length:,} bytes in a file of {reader.size:,}: at most {most // MIB} MiB, within the file; "
            "it is no safetensors file, or was cut off: download it again"
        )
    header = _object(await reader.read(_LENGTH.size, length), "the header")
    header.pop(_METADATA, None)
    if len(header) > MOST_TENSORS:
        raise Unreadable(f"{len(header):,} tensors: at most {MOST_TENSORS:,}")
    places = sorted(_place(name, value) for name, value in header.items())
    _check_gaps(places, reader.size - _LENGTH.size - length)
    return [tensor for _, _, tensor in places]


def read_index(content: bytes) -> dict[str, set[str]]:
    """The names of tensors by the file that has them. Raises Unreadable."""
    weights = _object(content, "the index").get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise Unreadable("weight_map: missing in the index of the model's files")
    if len(weights) > MOST_TENSORS:
        raise Unreadable(f"weight_map: {len(weights):,} tensors, at most {MOST_TENSORS:,}")
    found: dict[str, set[str]] = {}
    for name, file in weights.items():
        if not isinstance(file, str) or "/" in file or "\\" in file or not file.endswith(".safetensors"):
            raise Unreadable(f"weight_map: {str(file)[:80]!r} is no name of a safetensors file beside the index")
        found.setdefault(file, set()).add(name)
    return found


def _object(content: bytes, what: str) -> dict[str, Any]:
    if any(content.count(mark) > most for mark, most in _MARKS.items()):
        raise Unreadable(f"{what}: more values than {MOST_TENSORS:,} tensors have")
    try:
        found = orjson.loads(content)
    except orjson.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise Unreadable(f"{what}: no JSON object; it is no safetensors file, or was changed on its way")
    return found


def _place(name: str, value: Any) -> tuple[int, int, Tensor]:
    """Where it begins and ends after the header. Raises Unreadable."""
    shown = name[:80]
    if not isinstance(value, dict):
        raise Unreadable(f"tensor {shown!r}: no object")
    dtype, shape, offsets = value.get("dtype"), _counts(value.get("shape")), _counts(value.get("data_offsets"))
    if not isinstance(dtype, str) or dtype not in BITS:
        raise Unreadable(f"tensor {shown!r}: the dtype {str(dtype)[:40]!r} is not known")
    if shape is None or len(shape) > _DIMENSIONS:
        raise Unreadable(f"tensor {shown!r}: the shape must be a list of at most {_DIMENSIONS} counts")
    if offsets is None or len(offsets) != 2:
        raise Unreadable(f"tensor {shown!r}: data_offsets must be two counts")
    numbers = 1
    for one in shape:
        numbers *= one
    begin, end = offsets
    if (end - begin) * 8 != numbers * BITS[dtype]:
        raise Unreadable(f"tensor {shown!r}: its shape has another size than its data_offsets")
    return begin, end, Tensor(name, dtype, numbers, end - begin)


def _counts(value: Any) -> list[int] | None:
    return value if isinstance(value, list) and all(type(one) is int and one >= 0 for one in value) else None


def _check_gaps(places: Sequence[tuple[int, int, Tensor]], room: int) -> None:
    at = 0
    for begin, end, tensor in places:
        if begin != at:
            word = "overlaps the one before" if begin < at else "leaves a gap before it"
            raise Unreadable(f"tensor {tensor.name[:80]!r}: {word}")
        at = end
    if at != room:
        fix = "it was cut off: download it again" if at > room else "it is damaged"
        raise Unreadable(f"tensors of {at:,} bytes, and the file has {room:,} for them: {fix}")
