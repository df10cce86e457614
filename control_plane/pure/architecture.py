"""What of a model's architecture its memory depends on."""

from typing import NamedTuple


class Cache(NamedTuple):
    """Layers that keep the same of each token. `numbers`: of one layer and token. `window`: tokens; None: all."""

    layers: int
    numbers: int
    window: int | None = None


class Architecture(NamedTuple):
    """`name`: `LlamaForCausalLM`; of GGUF `llama`. `layers`: all. `caches`: empty: it keeps nothing, as an encoder.

    `kv_heads`: over which engines divide the cache of one model; 1 where it is the same for all heads. `latent`: what
    MLA keeps of a token, compressed and position. `context`: tokens. `dtype`: of its numbers, as safetensors has it.
    `bits`: of a quantised weight, where known. `notes`: what the figures leave out.
    """

    name: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int | None
    context: int | None
    caches: tuple[Cache, ...]
    latent: tuple[int, int] | None = None
    dtype: str | None = None
    quantization: str | None = None
    bits: int | None = None
    experts: int | None = None
    notes: tuple[str, ...] = ()


def windowed(layers: int, sliding: int, numbers: int, window: int | None, context: int | None) -> tuple[Cache, ...]:
    """Caches of layers, of which so many look at a window only. A window as large as the context is none."""
    if window is None or (context is not None and window >= context):
        sliding = 0
    parts = (Cache(layers - sliding, numbers), Cache(sliding, numbers, window if sliding else None))
    return tuple(part for part in parts if part.layers)
