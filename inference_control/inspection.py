"""An inspection as text: figures with their formulas, GPUs that hold the model, what is suggested. Pure."""

from collections.abc import Iterator, Mapping
from typing import Any

from inference_control.output import as_lines, as_table, cell

_GIB = 1024**3
_COLUMNS = ("gpu", "memory_gib", "gpus", "fits", "cache_tokens", "requests_at_full_context")


def source_of(ref: str) -> str:
    """`org/name` is a repository of a hub; a path is a file if its last part has the ending of one."""
    if not ref.startswith("/"):
        return "hub"
    return "file" if ref.endswith((".gguf", ".safetensors", ".safetensors.index.json")) else "folder"


def as_report(inspection: Mapping[str, Any]) -> str:
    result = inspection["result"]
    parts = [
        as_lines(dict(_figures(inspection, result))),
        "Estimates:\n" + as_lines({line["name"]: line["text"] for line in result["formulas"]}),
        as_table(_rows(result["gpus"]), _COLUMNS),
        result["fits"],
        "Suggested for the entry:\n" + as_lines({**_suggested(result["suggestion"])}),
        *(f"warning: {cell('warning', one)}" for one in result["warnings"]),
    ]
    return "\n\n".join(parts)


def _figures(inspection: Mapping[str, Any], result: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    architecture = result["architecture"] or {}
    yield "inspection", inspection["id"]
    yield "model", f"{inspection['ref']} ({inspection['source']})"
    yield "commit", result["commit"]
    yield "format", f"{result['format']}, {result['files']} file{'s' if result['files'] != 1 else ''}"
    yield "architecture", architecture.get("name")
    yield "parameters", f"{result['parameters']:,}"
    yield "quantisation", result["quantization"]
    yield "context", _tokens(result["context"])
    memory = result["memory_bytes"]
    yield "memory", f"{memory['low'] / _GIB:.1f} to {memory['high'] / _GIB:.1f} GiB without cache (estimate)"


def _rows(gpus: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Of each GPU the numbers of them that hold the model, up to one that holds a whole request for certain."""
    for gpu in gpus:
        for option in gpu["options"]:
            if option["fits"] != "no":
                yield {
                    "gpu": gpu["gpu"],
                    "memory_gib": gpu["memory_gib"],
                    "gpus": option["tp"],
                    "fits": {"shorter": "shorter context"}.get(option["fits"], option["fits"]),
                    "cache_tokens": _span(option["cache_tokens"]),
                    "requests_at_full_context": _span(option["requests"]),
                }
            if option["fits"] == "yes":
                break


def _suggested(suggestion: Mapping[str, Any]) -> Mapping[str, Any]:
    hardware = suggestion["hardware"] or {}
    return {
        "name": suggestion["name"],
        "hardware": f"{hardware['gpu_count']} x {hardware['gpu']}" if hardware else None,
        "max_model_len": suggestion["max_model_len"],
    }


def _span(span: Mapping[str, float] | None) -> str | None:
    if span is None:
        return None
    low, high = f"{span['low']:,}", f"{span['high']:,}"
    return low if low == high else f"{low} to {high}"


def _tokens(count: int | None) -> str | None:
    return None if count is None else f"{count:,} tokens"
