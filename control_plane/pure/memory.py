"""How much memory a model takes on GPUs, and how many tokens of cache are left: estimates, each with its formula.

Weights are known; the cache of a token follows from the architecture; what an engine needs beside them is not known
before it runs, so each sum is a range.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple

from control_plane.pure.architecture import Architecture
from control_plane.pure.safetensors import BITS

GIB = 1024**3
# The part of a GPU's memory that vLLM uses unless it is told otherwise, in percent
UTILIZATION = 92
# Beside the weights: 1 GiB at least; by experience with large batches, a fifth of the weights and 2 GiB
_LOW, _FIFTH, _HIGH = GIB, 5, 2 * GIB
# GPUs that one model is divided among
DEGREES: Final = (1, 2, 4, 8)
# Shorter contexts are of no use.
_SHORTEST = 1024
Verdict = Literal["yes", "maybe", "shorter", "no"]


class Gpu(NamedTuple):
    """`mib`: memory as its driver shows it."""

    name: str
    mib: int


GPUS: Final[Sequence[Gpu]] = (
    Gpu("NVIDIA T4", 15_360),
    Gpu("NVIDIA L4", 23_034),
    Gpu("NVIDIA RTX 4090", 24_564),
    Gpu("NVIDIA L40S", 46_068),
    Gpu("NVIDIA A100 40GB", 40_960),
    Gpu("NVIDIA A100 80GB", 81_920),
    Gpu("NVIDIA H100 80GB", 81_559),
    Gpu("NVIDIA H200", 143_771),
    Gpu("NVIDIA B200", 183_359),
    Gpu("AMD MI300X", 196_592),
)


class Span(NamedTuple):
    """From the one that is certain to the one that is hoped for; of memory, from the least to the most."""

    low: int
    high: int


class Option(NamedTuple):
    """`tp`: GPUs of a kind that it is divided among. `tokens`: of cache. `requests`: at full context, in tenths.

    Both are None where the model keeps nothing, or nobody knows how much. `fits`: yes: a request at full context,
    whatever the engine needs beside it; maybe: if it needs little; shorter: with a shorter context.
    """

    tp: int
    fits: Verdict
    tokens: Span | None
    requests: Span | None


class Model(NamedTuple):
    """`weights`: bytes. `architecture`: None: not known; then only the weights are."""

    weights: int
    architecture: Architecture | None


def width(architecture: Architecture) -> int:
    """Bytes of a number in the cache: as of the model's own numbers, 2 where that is not known."""
    return BITS.get(architecture.dtype or "", 16) // 8


def per_token(architecture: Architecture) -> int:
    """Bytes of cache for a token, in all layers: while no window is full."""
    return sum(cache.layers * cache.numbers for cache in architecture.caches) * width(architecture)


def of_request(architecture: Architecture, tokens: int) -> int:
    """Bytes of cache for a request of so many tokens; layers with a window keep no more than that."""
    kept = (cache.layers * cache.numbers * min(tokens, cache.window or tokens) for cache in architecture.caches)
    return sum(kept) * width(architecture)


def needed(weights: int) -> Span:
    """Bytes on one GPU without any cache."""
    return Span(weights + _LOW, weights + weights // _FIFTH + _HIGH)


def option(model: Model, gpu: Gpu, tp: int) -> Option:
    """What so many of these GPUs hold, each its part of the weights and of the cache."""
    usable = gpu.mib * 1024**2 * UTILIZATION // 100
    need = needed(-(-model.weights // tp))
    left = Span(usable - need.high, usable - need.low)
    architecture = model.architecture
    if architecture is None or not architecture.caches or architecture.context is None:
        return Option(tp, "yes" if left.low >= 0 else "maybe" if left.high >= 0 else "no", None, None)
    context = architecture.context
    request = -(-of_request(architecture, context) // min(tp, architecture.kv_heads))
    requests = Span(*(max(0, one) * 10 // request for one in left))
    tokens = Span(*(max(0, one) * context // request for one in left))
    if requests.low >= 10:
        return Option(tp, "yes", tokens, requests)
    if requests.high >= 10:
        return Option(tp, "maybe", tokens, requests)
    return Option(tp, "shorter" if tokens.high >= min(_SHORTEST, context) else "no", tokens, requests)


def options(model: Model, gpu: Gpu) -> list[Option]:
    """Only degrees that divide the heads: engines refuse others."""
    heads = 0 if model.architecture is None else model.architecture.heads
    return [option(model, gpu, tp) for tp in DEGREES if heads % tp == 0]


def suggested(model: Model) -> tuple[Gpu, Option] | None:
    """The least memory in all that holds it; None: none of the table does."""
    every = [(gpu, one) for gpu in GPUS for one in options(model, gpu)]
    for verdict in ("yes", "maybe"):
        fitting = [(gpu, one) for gpu, one in every if one.fits == verdict]
        if fitting:
            return min(fitting, key=lambda pair: (pair[0].mib * pair[1].tp, pair[1].tp))
    shorter = [(gpu, one) for gpu, one in every if one.fits == "shorter"]
    return max(shorter, key=lambda pair: pair[1].tokens or (0, 0), default=None)


def context_for(model: Model, chosen: Option | None) -> int | None:
    """Tokens of the longest request there: the model's context, or what is left for it, in steps of 256."""
    context = None if model.architecture is None else model.architecture.context
    if context is None or chosen is None or chosen.fits != "shorter" or chosen.tokens is None:
        return context
    left = chosen.tokens.low or chosen.tokens.high
    return min(context, max(256, left // 256 * 256))


def formulas(model: Model, numbers: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    """How each figure comes about, as text with its numbers, and its bytes. `numbers`: in the tensors, by dtype."""
    parts = " + ".join(f"{count:,} x {dtype}" for dtype, count in numbers.items())
    yield _line("weights", f"{parts or 'all tensors'} = {gib(model.weights)}", model.weights)
    architecture = model.architecture
    if architecture is not None and architecture.caches:
        yield _line("cache per token", _cache_text(architecture), per_token(architecture))
        if architecture.context is not None:
            whole = of_request(architecture, architecture.context)
            text = f"a request of {architecture.context:,} tokens{_window_text(architecture)} = {gib(whole)}"
            yield _line("cache of a request", text, whole)
    low, high = needed(model.weights)
    yield _line("memory, least", f"weights + 1 GiB = {gib(low)}", low)
    yield _line("memory, most", f"weights x 1.2 + 2 GiB = {gib(high)}", high)


FITS: Final = (
    "a GPU fits if 0.92 x its memory >= weights / tp + what the engine needs beside them "
    "+ cache of a request / min(tp, KV heads), with tp the number of GPUs"
)


def gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB // 10 else f"{size:,} bytes"


def _line(name: str, text: str, size: int) -> dict[str, Any]:
    return {"name": name, "text": text, "bytes": size}


def _cache_text(architecture: Architecture) -> str:
    each, total = width(architecture), per_token(architecture)
    if architecture.latent is not None:
        rank, rope = architecture.latent
        layers = sum(cache.layers for cache in architecture.caches)
        return f"{layers} layers x ({rank} compressed + {rope} of position) x {each} bytes = {total:,} bytes"
    same = {cache.numbers for cache in architecture.caches}
    layers = sum(cache.layers for cache in architecture.caches)
    if same == {2 * architecture.kv_heads * (architecture.head_dim or 0)}:
        shape = f"2 x {layers} layers x {architecture.kv_heads} KV heads x {architecture.head_dim}"
    else:
        shape = "(" + " + ".join(f"{cache.layers} layers x {cache.numbers}" for cache in architecture.caches) + ")"
    return f"{shape} x {each} bytes = {total:,} bytes"


def _window_text(architecture: Architecture) -> str:
    parts = [f"{cache.layers} layers keep {cache.window:,}" for cache in architecture.caches if cache.window]
    return f" ({', '.join(parts)})" if parts else ""
