"""The architecture that the key-value pairs of a GGUF file describe."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Final

from control_plane.pure.architecture import Architecture, Cache, windowed
from control_plane.pure.reading import Tensor, Unreadable

_MOST_LAYERS, _MOST, _LONGEST = 10_000, 2**24, 2**31
# Every one of so many layers looks at all tokens, where a file does not say so.
_PATTERNS: Final[Mapping[str, int]] = {"gemma2": 2, "gemma3": 6, "cohere2": 4, "gpt-oss": 2}
_ENCODERS: Final = frozenset({"bert", "nomic-bert", "jina-bert-v2", "modern-bert"})


def of(metadata: Mapping[str, Any], tensors: Iterable[Tensor]) -> Architecture:
    """Raises Unreadable."""
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or not name:
        raise Unreadable("general.architecture: missing in the GGUF file; it is no language model")
    values = _Values(metadata, name)
    layers, context = values.count("block_count", _MOST_LAYERS), values.optional("context_length", _LONGEST)
    heads, per_layer = values.heads(layers)
    latent = None
    if (rank := values.optional("attention.kv_lora_rank", _MOST)) is not None:
        latent = rank, values.count("rope.dimension_count", _MOST)
    head_dim = None
    if latent is None:
        head_dim = values.optional("attention.key_length", _MOST)
        head_dim = head_dim or values.count("embedding_length", _MOST) // heads or 1
    each = 0 if head_dim is None else head_dim + (values.optional("attention.value_length", _MOST) or head_dim)
    numbers = [sum(latent) if latent else one * each for one in per_layer]
    return Architecture(
        name=name,
        layers=layers,
        heads=heads,
        kv_heads=1 if latent else max(1, *per_layer),
        head_dim=head_dim,
        context=context,
        caches=() if name in _ENCODERS else _caches(values, name, numbers, context),
        latent=latent,
        # Engines of GGUF keep the cache in 16 bits.
        dtype="F16",
        quantization=quantization(tensors),
        experts=values.optional("expert_count", _MOST),
    )


def quantization(tensors: Iterable[Tensor]) -> str | None:
    """The type of most bytes of the tensors: that of the file's name is a hint."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.dtype] += tensor.size
    return max(sizes, key=sizes.__getitem__, default=None)


class _Values:
    def __init__(self, metadata: Mapping[str, Any], architecture: str) -> None:
        self._metadata = metadata
        self._architecture = architecture

    def get(self, name: str) -> Any:
        return self._metadata.get(f"{self._architecture}.{name}")

    def count(self, name: str, most: int) -> int:
        found = self.optional(name, most)
        if found is None:
            raise Unreadable(f"{self._architecture[:40]}.{name}: missing in the GGUF file")
        return found

    def optional(self, name: str, most: int) -> int | None:
        """None: missing, or 0, which stands for it. Raises Unreadable."""
        found = self.get(name)
        return self._checked(name, found, most) or None if found is not None else None

    def heads(self, layers: int) -> tuple[int, list[int]]:
        """Heads, and KV heads of each layer. Raises Unreadable."""
        name = "attention.head_count"
        heads = self.get(name)
        if isinstance(heads, tuple):
            heads = max(heads, default=0)
        heads = self._checked(name, heads or 1, _MOST)
        given = self.get("attention.head_count_kv")
        if given is None:
            return heads, [heads] * layers
        found = list(given) if isinstance(given, tuple) else [given] * layers
        if len(found) != layers:
            raise Unreadable(f"{self._architecture[:40]}.attention.head_count_kv: must be one for each of the layers")
        return heads, [self._checked("attention.head_count_kv", one, _MOST) for one in found]

    def _checked(self, name: str, value: Any, most: int) -> int:
        if type(value) is not int or not 0 <= value <= most:
            shown = f"{self._architecture[:40]}.{name}"
            raise Unreadable(f"{shown}: must be a whole number up to {most:,}, not {str(value)[:40]!r}")
        return value


def _caches(values: _Values, name: str, numbers: list[int], context: int | None) -> tuple[Cache, ...]:
    """Layers together that keep the same."""
    window = values.optional("attention.sliding_window", _LONGEST)
    pattern = values.get("attention.sliding_window_pattern")
    if isinstance(pattern, tuple) and len(pattern) == len(numbers):
        slides = [one is True or one == 1 for one in pattern]
    else:
        every = pattern if type(pattern) is int and pattern > 0 else _PATTERNS.get(name)
        slides = [every is None or (place + 1) % every != 0 for place in range(len(numbers))]
    found: list[Cache] = []
    for each in sorted(set(numbers)):
        if each:
            of_these = [slide for slide, one in zip(slides, numbers, strict=True) if one == each]
            found += windowed(len(of_these), sum(of_these), each, window, context)
    return tuple(found)
