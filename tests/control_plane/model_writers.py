"""Files of models, made for tests: small ones byte by byte, and large ones of which only the header is there."""

import json
import struct
from collections.abc import Iterable, Mapping
from typing import Any

from control_plane.pure.gguf import TYPES
from control_plane.pure.safetensors import BITS

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]
_NUMBERS = {name: number for number, (name, _, _) in TYPES.items()}
# Python's types as GGUF has them
_KINDS = {bool: (7, "<?"), int: (4, "<I"), float: (6, "<f")}


class Content:
    """A reader of bytes; those after them, up to `size`, are zeros. `reads`: each as offset and length."""

    def __init__(self, content: bytes, size: int | None = None) -> None:
        self._content = content
        self.size = len(content) if size is None else size
        self.reads: list[tuple[int, int]] = []

    async def read(self, offset: int, n: int) -> bytes:
        assert 0 <= offset <= offset + n <= self.size, "beyond the file"
        self.reads.append((offset, n))
        return self._content[offset : offset + n].ljust(n, b"\0")


def numbers(shape: Iterable[int]) -> int:
    product = 1
    for one in shape:
        product *= one
    return product


def safetensors_header(shapes: Shapes, metadata: Mapping[str, str] | None = None) -> tuple[bytes, int]:
    """What stands before the tensors, and the size of the whole file."""
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    at = 0
    for name, (dtype, shape) in shapes.items():
        size = numbers(shape) * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return struct.pack("<Q", len(text)) + text, 8 + len(text) + at


def safetensors(shapes: Shapes) -> bytes:
    """The whole file."""
    head, size = safetensors_header(shapes)
    return head.ljust(size, b"\0")


def with_header(header: Any, data: int = 0) -> bytes:
    """A safetensors file with this header, whatever it says, and so many bytes of data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str, value: Any) -> bytes:
    """A key and its value; lists are arrays of what their first value is."""
    if isinstance(value, list):
        kind, items = _value(value[0])[0] if value else 4, b"".join(_value(one)[1] for one in value)
        return text(key) + struct.pack("<IIQ", 9, kind, len(value)) + items
    kind, raw = _value(value)
    return text(key) + struct.pack("<I", kind) + raw


def _value(value: Any) -> tuple[int, bytes]:
    if isinstance(value, str):
        return 8, text(value)
    kind, form = _KINDS[type(value)]
    return kind, struct.pack(form, value)


def gguf(metadata: Mapping[str, Any], shapes: Shapes, version: int = 3, data: bool = True) -> bytes:
    """A file; without `data` its header."""
    places, at = [], 0
    for name, (dtype, shape) in shapes.items():
        _, block, size = TYPES[_NUMBERS[dtype]]
        dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        places.append(text(name) + dimensions + struct.pack("<IQ", _NUMBERS[dtype], at))
        at += -(-numbers(shape) // block * size // 32) * 32
    head = b"GGUF" + struct.pack("<IQQ", version, len(shapes), len(metadata))
    head += b"".join(pair(key, value) for key, value in metadata.items()) + b"".join(places)
    return head.ljust(-(-len(head) // 32) * 32 + at, b"\0") if data else head


LLAMA_CONFIG: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "torch_dtype": "bfloat16",
}
# Numbers in all: 128 x 64 + 2 x 64 x 64
LLAMA_SHAPES: Shapes = {
    "model.embed_tokens.weight": ("BF16", (128, 64)),
    "model.layers.0.self_attn.q_proj.weight": ("BF16", (64, 64)),
    "model.layers.1.self_attn.q_proj.weight": ("BF16", (64, 64)),
}
LLAMA_GGUF: Mapping[str, Any] = {
    "general.architecture": "llama",
    "general.name": "tiny",
    "llama.block_count": 2,
    "llama.context_length": 2048,
    "llama.embedding_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "tokenizer.ggml.tokens": ["a", "b", "c"] * 100,
}
GGUF_SHAPES: Shapes = {
    "token_embd.weight": ("Q8_0", (64, 128)),
    "blk.0.attn_q.weight": ("Q4_0", (64, 64)),
    "output_norm.weight": ("F32", (64,)),
}
