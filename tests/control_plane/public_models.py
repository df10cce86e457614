"""Ten public models: what their `config.json` says of their shape, and the tensors that follow from it.

The configs have the members of the published files that shapes and caches depend on. Tensors are made by the rules of
each family; that they are those of the published files is shown by the totals, which are the published ones.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from tests.control_plane.model_writers import Shapes

Config = Mapping[str, Any]
Named = Iterator[tuple[str, tuple[int, ...]]]


class Public(NamedTuple):
    """`parameters`: as published. `per_token`: bytes of cache for a token: 2 x layers x KV heads x head size x width.

    Of MLA: layers x (rank + rope) x width.
    """

    config: Config
    make: Callable[[Config], Named]
    parameters: int
    per_token: int
    dtype: str = "BF16"

    def shapes(self) -> Shapes:
        return {name: (self.dtype, shape) for name, shape in self.make(self.config)}


def llama(config: Config) -> Named:
    """Llama, Mistral, TinyLlama; Qwen3 with norms of queries and keys; of experts where the config has some."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    size = config.get("head_dim", hidden // heads)
    kv = config["num_key_value_heads"] * size
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        yield f"{at}.self_attn.q_proj.weight", (heads * size, hidden)
        yield f"{at}.self_attn.k_proj.weight", (kv, hidden)
        yield f"{at}.self_attn.v_proj.weight", (kv, hidden)
        yield f"{at}.self_attn.o_proj.weight", (hidden, heads * size)
        if config["model_type"].startswith("qwen3"):
            yield f"{at}.self_attn.q_norm.weight", (size,)
            yield f"{at}.self_attn.k_norm.weight", (size,)
        yield f"{at}.input_layernorm.weight", (hidden,)
        yield f"{at}.post_attention_layernorm.weight", (hidden,)
        yield from _feed_forward(config, at, hidden)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config["vocab_size"], hidden)


def _feed_forward(config: Config, at: str, hidden: int) -> Named:
    experts = config.get("num_local_experts", config.get("num_experts"))
    if experts is None:
        yield from _gated(f"{at}.mlp", hidden, config["intermediate_size"])
        return
    yield f"{at}.mlp.gate.weight", (experts, hidden)
    for expert in range(experts):
        yield from _gated(
            f"{at}.mlp.experts.{expert}", hidden, config.get("moe_intermediate_size", config["intermediate_size"])
        )


def _gated(at: str, hidden: int, inner: int) -> Named:
    yield f"{at}.gate_proj.weight", (inner, hidden)
    yield f"{at}.up_proj.weight", (inner, hidden)
    yield f"{at}.down_proj.weight", (hidden, inner)


def gemma2(config: Config) -> Named:
    """Four norms a layer; the head is the embedding, which the file has once."""
    hidden, size = config["hidden_size"], config["head_dim"]
    query, kv = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        yield f"{at}.self_attn.q_proj.weight", (query, hidden)
        yield f"{at}.self_attn.k_proj.weight", (kv, hidden)
        yield f"{at}.self_attn.v_proj.weight", (kv, hidden)
        yield f"{at}.self_attn.o_proj.weight", (hidden, query)
        yield from _gated(f"{at}.mlp", hidden, config["intermediate_size"])
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            yield f"{at}.{norm}_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)


def gpt2(config: Config) -> Named:
    """The head is the embedding, which the file has once. Without the masks that the published file has beside them."""
    hidden = config["n_embd"]
    yield "wte.weight", (config["vocab_size"], hidden)
    yield "wpe.weight", (config["n_positions"], hidden)
    for layer in range(config["n_layer"]):
        at = f"h.{layer}"
        for name, rows, columns in (
            ("attn.c_attn", hidden, 3 * hidden),
            ("attn.c_proj", hidden, hidden),
            ("mlp.c_fc", hidden, 4 * hidden),
            ("mlp.c_proj", 4 * hidden, hidden),
        ):
            yield f"{at}.{name}.weight", (rows, columns)
            yield f"{at}.{name}.bias", (columns,)
        for name in ("ln_1", "ln_2"):
            yield f"{at}.{name}.weight", (hidden,)
            yield f"{at}.{name}.bias", (hidden,)
    yield "ln_f.weight", (hidden,)
    yield "ln_f.bias", (hidden,)


def deepseek(config: Config) -> Named:
    """The main model: without the layer that predicts a second token, and without the scales of FP8."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    rope, nope, value = config["qk_rope_head_dim"], config["qk_nope_head_dim"], config["v_head_dim"]
    rank, query = config["kv_lora_rank"], config["q_lora_rank"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        yield f"{at}.self_attn.q_a_proj.weight", (query, hidden)
        yield f"{at}.self_attn.q_a_layernorm.weight", (query,)
        yield f"{at}.self_attn.q_b_proj.weight", (heads * (nope + rope), query)
        yield f"{at}.self_attn.kv_a_proj_with_mqa.weight", (rank + rope, hidden)
        yield f"{at}.self_attn.kv_a_layernorm.weight", (rank,)
        yield f"{at}.self_attn.kv_b_proj.weight", (heads * (nope + value), rank)
        yield f"{at}.self_attn.o_proj.weight", (hidden, heads * value)
        yield f"{at}.input_layernorm.weight", (hidden,)
        yield f"{at}.post_attention_layernorm.weight", (hidden,)
        if layer < config["first_k_dense_replace"]:
            yield from _gated(f"{at}.mlp", hidden, config["intermediate_size"])
            continue
        yield f"{at}.mlp.gate.weight", (config["n_routed_experts"], hidden)
        yield f"{at}.mlp.gate.e_score_correction_bias", (config["n_routed_experts"],)
        inner = config["moe_intermediate_size"]
        yield from _gated(f"{at}.mlp.shared_experts", hidden, config["n_shared_experts"] * inner)
        for expert in range(config["n_routed_experts"]):
            yield from _gated(f"{at}.mlp.experts.{expert}", hidden, inner)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config["vocab_size"], hidden)


def _config(family: str, name: str, **more: Any) -> Config:
    return {"model_type": family, "architectures": [name], "torch_dtype": "bfloat16", **more}


def _llama(shape: tuple[int, ...], family: str = "llama", name: str = "LlamaForCausalLM", **more: Any) -> Config:
    """`shape`: in the order of these members."""
    members = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    return _config(family, name, **dict(zip((*members, "vocab_size"), shape, strict=True)), **more)


_QWEN: Config = {
    "max_position_embeddings": 40960,
    "head_dim": 128,
    "sliding_window": None,
    "use_sliding_window": False,
    "max_window_layers": 36,
}
_EXPERTS: Config = {"num_experts": 128, "moe_intermediate_size": 768}
_LONG: Config = {"max_position_embeddings": 131072}
_MIDDLE: Config = {"max_position_embeddings": 32768}
_SHORT: Config = {"max_position_embeddings": 2048}
MODELS: Mapping[str, Public] = {
    "Llama 3.1 8B": Public(_llama((4096, 32, 32, 8, 14336, 128256), **_LONG), llama, 8_030_261_248, 131_072),
    "Llama 3.1 70B": Public(_llama((8192, 80, 64, 8, 28672, 128256), **_LONG), llama, 70_553_706_496, 327_680),
    "TinyLlama 1.1B": Public(_llama((2048, 22, 32, 4, 5632, 32000), **_SHORT), llama, 1_100_048_384, 22_528),
    "Mistral 7B v0.3": Public(
        _llama((4096, 32, 32, 8, 14336, 32768), "mistral", "MistralForCausalLM", sliding_window=None, **_MIDDLE),
        llama,
        7_248_023_552,
        131_072,
    ),
    "Mixtral 8x7B": Public(
        _llama((4096, 32, 32, 8, 14336, 32000), "mixtral", "MixtralForCausalLM", num_local_experts=8, **_MIDDLE),
        llama,
        46_702_792_704,
        131_072,
    ),
    "Qwen3 8B": Public(
        _llama((4096, 36, 32, 8, 12288, 151936), "qwen3", "Qwen3ForCausalLM", **_QWEN), llama, 8_190_735_360, 147_456
    ),
    "Qwen3 30B-A3B": Public(
        _llama((2048, 48, 32, 4, 6144, 151936), "qwen3_moe", "Qwen3MoeForCausalLM", **_QWEN, **_EXPERTS),
        llama,
        30_532_122_624,
        98_304,
    ),
    "Gemma 2 9B": Public(
        _config(
            *("gemma2", "Gemma2ForCausalLM"),
            hidden_size=3584,
            num_hidden_layers=42,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=256,
            intermediate_size=14336,
            vocab_size=256000,
            max_position_embeddings=8192,
            sliding_window=4096,
        ),
        gemma2,
        9_241_705_984,
        344_064,
    ),
    "GPT-2": Public(
        {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
            "n_positions": 1024,
            "n_ctx": 1024,
            "vocab_size": 50257,
        },
        gpt2,
        124_439_808,
        73_728,
        "F32",
    ),
    "DeepSeek V3": Public(
        _config(
            *("deepseek_v3", "DeepseekV3ForCausalLM"),
            hidden_size=7168,
            num_hidden_layers=61,
            num_attention_heads=128,
            num_key_value_heads=128,
            intermediate_size=18432,
            moe_intermediate_size=2048,
            vocab_size=129280,
            max_position_embeddings=163840,
            kv_lora_rank=512,
            q_lora_rank=1536,
            qk_rope_head_dim=64,
            qk_nope_head_dim=128,
            v_head_dim=128,
            n_routed_experts=256,
            n_shared_experts=1,
            first_k_dense_replace=3,
            num_nextn_predict_layers=1,
            quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]},
        ),
        deepseek,
        671_026_419_200,
        70_272,
    ),
}
