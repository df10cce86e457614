"""What an inspection says of a model: estimates with their formulas, GPUs that hold it, and what to fill in."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from control_plane.pure import memory
from control_plane.pure.architecture import Architecture
from control_plane.pure.model_files import Format
from control_plane.pure.reading import Tensor
from control_plane.pure.safetensors import BITS

# Types of a model's own numbers; those that hold several quantised ones
_PLAIN, _PACKED = ("BF16", "F16", "F32"), ("I32", "U8", "I8")
_FLOAT32: Final = (
    "its numbers are float32: vLLM loads such a model in 16 bits unless it has --dtype float32; weights and cache are "
    "then half of this"
)


class Measured(NamedTuple):
    """A model as its files are. `numbers`: in all tensors, by dtype. `weights`: bytes of the tensors."""

    format: Format
    files: int
    numbers: Mapping[str, int]
    weights: int
    architecture: Architecture | None
    notes: tuple[str, ...] = ()
    commit: str | None = None


def counted(tensors: Iterable[Tensor]) -> tuple[dict[str, int], int]:
    """Numbers by dtype, those with most first, and bytes."""
    numbers: dict[str, int] = {}
    size = 0
    for one in tensors:
        numbers[one.dtype] = numbers.get(one.dtype, 0) + one.numbers
        size += one.size
    return dict(sorted(numbers.items(), key=lambda pair: -pair[1])), size


def weighed(numbers: Mapping[str, int]) -> int | None:
    """Bytes of so many numbers by dtype of safetensors; None: a dtype is not known."""
    if not numbers.keys() <= BITS.keys():
        return None
    return sum(-(-count * BITS[dtype] // 8) for dtype, count in numbers.items())


def typed(architecture: Architecture, numbers: Mapping[str, int]) -> Architecture:
    """With the type of its numbers: where its config does not say so, of most of those in its tensors."""
    if architecture.dtype is not None:
        return architecture
    plain = {dtype: count for dtype, count in numbers.items() if dtype in _PLAIN}
    return architecture._replace(dtype=max(plain, key=plain.__getitem__, default=None))


def parameters(numbers: Mapping[str, int], bits: int | None) -> int:
    """Weights; those of a quantised model that are packed are counted one by one."""
    return sum(
        count * max(1, BITS[dtype] // bits) if bits is not None and dtype in _PACKED else count
        for dtype, count in numbers.items()
    )


def result(name: str, measured: Measured) -> dict[str, Any]:
    """As JSON."""
    architecture = measured.architecture
    model = memory.Model(measured.weights, architecture)
    bits = None if architecture is None else architecture.bits
    chosen = memory.suggested(model)
    context = None if architecture is None else architecture.context
    return {
        "estimate": True,
        "format": measured.format,
        "files": measured.files,
        "commit": measured.commit,
        "parameters": parameters(measured.numbers, bits),
        "numbers": dict(measured.numbers),
        "quantization": None if architecture is None else _seen(architecture.quantization),
        "architecture": None if architecture is None else _shown(architecture),
        "context": context,
        "weights_bytes": measured.weights,
        "cache_bytes_per_token": None if architecture is None else memory.per_token(architecture),
        "cache_bytes_at_context": None if not architecture or not context else memory.of_request(architecture, context),
        "memory_bytes": memory.needed(measured.weights)._asdict(),
        "formulas": [*memory.formulas(model, measured.numbers)],
        "fits": memory.FITS,
        "gpus": [_gpu(model, gpu) for gpu in memory.GPUS],
        "suggestion": _suggestion(name, model, chosen),
        "warnings": _warnings(measured, chosen is not None),
    }


def name_of(ref: str) -> str:
    """A name for the catalogue: the last part of a reference, without what no name has."""
    last = ref.rstrip("/").rpartition("/")[2].removesuffix(".gguf").removesuffix(".safetensors")
    kept = "".join(one if one.isascii() and (one.isalnum() or one in "._-") else "-" for one in last)
    return kept.lstrip("._-")[:128]


def _seen(text: str | None) -> str | None:
    """What a file says, without what nobody sees and no database takes."""
    return None if text is None else "".join(filter(str.isprintable, text))


def _shown(architecture: Architecture) -> dict[str, Any]:
    return {
        "name": _seen(architecture.name),
        "layers": architecture.layers,
        "heads": architecture.heads,
        "kv_heads": architecture.kv_heads,
        "head_dim": architecture.head_dim,
        "latent": None if architecture.latent is None else sum(architecture.latent),
        "experts": architecture.experts,
        "dtype": architecture.dtype,
        "caches": [cache._asdict() for cache in architecture.caches],
    }


def _gpu(model: memory.Model, gpu: memory.Gpu) -> dict[str, Any]:
    return {
        "gpu": gpu.name,
        "memory_gib": round(gpu.mib / 1024, 1),
        "options": [_option(one) for one in memory.options(model, gpu)],
    }


def _option(option: memory.Option) -> dict[str, Any]:
    requests = option.requests
    return {
        "tp": option.tp,
        "fits": option.fits,
        "cache_tokens": None if option.tokens is None else option.tokens._asdict(),
        "requests": None if requests is None else {"low": requests.low / 10, "high": requests.high / 10},
    }


def _suggestion(name: str, model: memory.Model, chosen: tuple[memory.Gpu, memory.Option] | None) -> dict[str, Any]:
    gpu, option = (None, None) if chosen is None else chosen
    hardware = None
    if gpu is not None and option is not None:
        hardware = {"gpu": gpu.name, "gpu_count": option.tp, "gpu_memory_gib": round(gpu.mib / 1024, 1)}
    return {"name": name, "hardware": hardware, "max_model_len": memory.context_for(model, option)}


def _warnings(measured: Measured, fits: bool) -> Sequence[str]:
    found = list(measured.notes)
    architecture = measured.architecture
    if architecture is not None:
        found += architecture.notes
        if architecture.dtype == "F32" and measured.format == "safetensors":
            found.append(_FLOAT32)
        if architecture.bits is not None and any(dtype in _PACKED for dtype in measured.numbers):
            found.append(f"weights of {architecture.bits} bits are packed in its tensors: parameters are an estimate")
        if not architecture.caches:
            found.append("it keeps no cache of tokens, as an encoder")
        elif architecture.context is None:
            found.append("its config does not say how long its context is: what is left for the cache is not known")
    if not fits:
        found.append("no GPU of the table holds it, up to eight of them")
    return found
