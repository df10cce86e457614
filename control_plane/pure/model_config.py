"""The architecture that a `config.json` describes, by the names of transformers.

What is missing, odd or beyond all models is refused by its name.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import orjson

from control_plane.pure.architecture import Architecture, windowed
from control_plane.pure.reading import Unreadable

# Bytes of the file
LARGEST = 1024 * 1024
# The names of older families
_NAMES: Final[Mapping[str, Sequence[str]]] = {
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("num_attention_heads", "n_head", "n_heads"),
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim"),
    "max_position_embeddings": (
        "max_position_embeddings",
        "n_positions",
        "n_ctx",
        "max_seq_len",
        "max_sequence_length",
    ),
    "num_key_value_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
}
# The most that is believed
_MOST: Final[Mapping[str, int]] = {
    "num_hidden_layers": 10_000,
    "num_attention_heads": 65_536,
    "num_key_value_heads": 65_536,
    "hidden_size": 2**24,
    "head_dim": 65_536,
    "max_position_embeddings": 2**31,
    "sliding_window": 2**31,
    "sliding_window_pattern": 10_000,
    "max_window_layers": 10_000,
    "kv_lora_rank": 65_536,
    "qk_rope_head_dim": 65_536,
    "experts": 65_536,
}
# What transformers takes where a file does not have it
_DEFAULTS: Final[Mapping[str, Mapping[str, int]]] = {
    "gemma2": {"sliding_window_pattern": 2},
    "gemma3_text": {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131_072,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
    },
    "cohere2": {"sliding_window_pattern": 4},
}
# Families whose window holds only where `use_sliding_window` says so
_ASKED: Final = ("qwen",)
_ENCODERS: Final = frozenset(
    {"bert", "roberta", "xlm-roberta", "distilbert", "electra", "mpnet", "deberta-v2", "modernbert", "nomic_bert"}
)
_DTYPES: Final[Mapping[str, str]] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
# Layers of `layer_types`: those that keep all tokens, a window of them, and none
_FULL, _WINDOW, _NONE = ("full_attention",), ("sliding_attention", "chunked_attention"), ("linear_attention", "conv")


def read(content: bytes) -> Architecture:
    """Raises Unreadable."""
    try:
        config = orjson.loads(content)
    except orjson.JSONDecodeError:
        config = None
    if not isinstance(config, dict):
        raise Unreadable("config.json: no JSON object")
    return of(config)


def of(config: Mapping[str, Any]) -> Architecture:
    """Raises Unreadable."""
    inner = config.get("text_config", {})
    if not isinstance(inner, dict):
        raise Unreadable("text_config: must be an object")
    if config.get("is_encoder_decoder") is True:
        raise Unreadable("is_encoder_decoder: models of an encoder and a decoder are not known here")
    values = _Values({**config, **inner})
    layers, heads = values.count("num_hidden_layers"), values.count("num_attention_heads")
    one_for_all = values.is_true("multi_query") and not values.is_true("new_decoder_architecture")
    kv_heads = 1 if one_for_all else values.count("num_key_value_heads", heads)
    context = values.optional("max_position_embeddings")
    quantization, bits = _quantization(config.get("quantization_config", inner.get("quantization_config")))
    latent = None
    if values.has("kv_lora_rank"):
        latent = values.count("kv_lora_rank"), values.count("qk_rope_head_dim")
    head_dim = None if latent else values.count("head_dim", values.divided("hidden_size", heads))
    numbers = sum(latent) if latent else 2 * kv_heads * (head_dim or 0)
    if values.family in _ENCODERS:
        numbers = 0
    keeping, sliding, notes = _layers(values, layers)
    window = values.optional("sliding_window") or values.optional("attention_chunk_size", "sliding_window")
    return Architecture(
        name=_name(config, values.family),
        layers=layers,
        heads=heads,
        kv_heads=1 if latent else kv_heads,
        head_dim=head_dim,
        context=context,
        caches=windowed(keeping, sliding, numbers, window, context) if numbers else (),
        latent=latent,
        dtype=_DTYPES.get(str(values.get("dtype") or values.get("torch_dtype")).removeprefix("torch.")),
        quantization=quantization,
        bits=bits,
        experts=values.optional("experts"),
        notes=notes,
    )


class _Values:
    """Values of a config by the names of today."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self.family = str(config.get("model_type"))[:80]
        self._defaults = _DEFAULTS.get(self.family, {})

    def get(self, name: str) -> Any:
        """None: it is missing, or null."""
        for known in _NAMES.get(name, (name,)):
            if self._config.get(known) is not None:
                return self._config[known]
        return self._defaults.get(name)

    def has(self, name: str) -> bool:
        return self.get(name) is not None

    def is_true(self, name: str) -> bool:
        return self._config.get(name) is True

    def count(self, name: str, default: int | None = None) -> int:
        """Raises Unreadable."""
        found = self.optional(name)
        if found is None and default is None:
            raise Unreadable(f"{name}: missing in config.json")
        return found or default or 0

    def optional(self, name: str, bound: str | None = None) -> int | None:
        """A count, or None. `bound`: whose bound holds. Raises Unreadable."""
        found, most = self.get(name), _MOST[bound or name]
        if found is None:
            return None
        if type(found) is not int or not 0 < found <= most:
            raise Unreadable(f"{name}: must be a whole number from 1 to {most:,}, not {str(found)[:40]!r}")
        return found

    def divided(self, name: str, parts: int) -> int | None:
        whole = None if self.has("head_dim") else self.count(name)
        if whole is not None and whole < parts:
            raise Unreadable(f"{name}: {whole:,} for {parts:,} heads")
        return None if whole is None else whole // parts


def _layers(values: _Values, layers: int) -> tuple[int, int, tuple[str, ...]]:
    """How many keep tokens, how many of them a window, and what is not counted. Raises Unreadable."""
    types = values.get("layer_types")
    if types is not None:
        if not isinstance(types, list) or len(types) != layers:
            raise Unreadable(f"layer_types: must be a list of {layers:,}, one for each layer")
        odd = sorted({str(one)[:40] for one in types if one not in (*_FULL, *_WINDOW, *_NONE)})
        if odd:
            raise Unreadable(f"layer_types: {odd[0]!r} is not known")
        none = sum(one in _NONE for one in types)
        notes = (f"{none} layers without a cache of tokens have a state of their own, which is not counted",)
        return layers - none, sum(one in _WINDOW for one in types), notes if none else ()
    asked = values.family.startswith(_ASKED)
    if not values.has("sliding_window") or values.get("use_sliding_window") is (None if asked else False):
        return layers, 0, ()
    if asked:
        if not values.is_true("use_sliding_window"):
            return layers, 0, ()
        return layers, max(0, layers - values.count("max_window_layers", layers)), ()
    # Every one of so many layers looks at all tokens.
    pattern = values.optional("sliding_window_pattern")
    return layers, layers if pattern is None else layers - layers // pattern, ()


def _quantization(value: Any) -> tuple[str | None, int | None]:
    """In words, and bits of a weight. Raises Unreadable."""
    if value is None:
        return None, None
    if not isinstance(value, dict):
        raise Unreadable("quantization_config: must be an object")
    method = str(value.get("quant_method") or value.get("quant_algo") or "unknown")[:40]
    bits = value.get("bits", value.get("w_bit"))
    for flag, width in (("load_in_4bit", 4), ("load_in_8bit", 8)):
        bits = width if value.get(flag) is True else bits
    groups = value.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            bits = weights.get("num_bits")
    if bits is None:
        bits = {"fp8": 8, "mxfp4": 4}.get(method)
    if bits is not None and (type(bits) is not int or not 0 < bits <= 64):
        raise Unreadable(f"quantization_config: bits must be 1 to 64, not {str(bits)[:40]!r}")
    return (method if bits is None else f"{method}, {bits} bits"), bits


def _name(config: Mapping[str, Any], family: str) -> str:
    names = config.get("architectures")
    return str(names[0])[:80] if isinstance(names, list) and names else family
