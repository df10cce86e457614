"""Architectures by their configs, memory by architecture, and ten public models with their published figures."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from control_plane.pure import inspected, memory, model_config, safetensors
from control_plane.pure.architecture import Architecture, Cache
from control_plane.pure.inspected import Measured
from control_plane.pure.model_files import Model, models_in, of_file
from control_plane.pure.reading import Unreadable
from tests.control_plane.model_writers import LLAMA_CONFIG, Content, safetensors_header
from tests.control_plane.public_models import MODELS

pytestmark = pytest.mark.anyio
GIB = 1024**3


@pytest.mark.parametrize("name", MODELS)
async def test_public_models_have_their_published_figures(name: str) -> None:
    """From a header of their tensors, read as any other, and their config."""
    public = MODELS[name]
    numbers, weights = inspected.counted(await safetensors.read(Content(*safetensors_header(public.shapes()))))
    architecture = inspected.typed(model_config.of(public.config), numbers)

    assert numbers == {public.dtype: public.parameters}
    assert weights == public.parameters * (4 if public.dtype == "F32" else 2)
    assert memory.per_token(architecture) == public.per_token


def llama(**changes: Any) -> Architecture:
    return model_config.of({**LLAMA_CONFIG, **changes})


# Gemma 3: the published files leave out what transformers has as defaults.
GEMMA3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152, "num_attention_heads": 16, "num_hidden_layers": 27},
    "torch_dtype": "bfloat16",
}


def test_windows_and_layers_without_a_cache() -> None:
    gemma = model_config.of(GEMMA3_4B)
    # Every sixth layer looks at all: 5 of 34.
    assert gemma.caches == (Cache(5, 2048), Cache(29, 2048, 1024))
    assert (gemma.context, gemma.dtype, gemma.kv_heads) == (131_072, "BF16", 4)
    assert memory.per_token(gemma) == 34 * 2048 * 2
    assert memory.of_request(gemma, 131_072) == (5 * 131_072 + 29 * 1024) * 2048 * 2

    each = 2 * 2 * 16
    assert llama(sliding_window=1024).caches == (Cache(2, each, 1024),)
    assert llama(sliding_window=2048).caches == (Cache(2, each),)
    # Of Qwen's, a window holds only where it is asked for.
    assert llama(model_type="qwen3", sliding_window=1024).caches == (Cache(2, each),)
    windowed = {"sliding_window": 1024, "use_sliding_window": True, "max_window_layers": 1}
    assert llama(model_type="qwen2", **windowed).caches == (Cache(1, each), Cache(1, each, 1024))
    typed = llama(layer_types=["full_attention", "sliding_attention"], sliding_window=512)
    assert typed.caches == (Cache(1, each), Cache(1, each, 512))
    hybrid = llama(layer_types=["full_attention", "linear_attention"])
    assert hybrid.caches == (Cache(1, each),)
    assert "not counted" in hybrid.notes[0]
    assert llama(model_type="bert").caches == ()


@pytest.mark.parametrize(
    ("value", "words", "bits"),
    [
        (None, None, None),
        ({"quant_method": "gptq", "bits": 4}, "gptq, 4 bits", 4),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}, "bitsandbytes, 4 bits", 4),
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 8}}}},
         "compressed-tensors, 8 bits", 8),
        ({"quant_method": "torchao"}, "torchao", None),
    ],
)  # fmt: skip
def test_quantisation_in_words(value: Any, words: str | None, bits: int | None) -> None:
    found = llama(quantization_config=value)

    assert (found.quantization, found.bits) == (words, bits)


@pytest.mark.parametrize(
    ("changes", "clause"),
    [
        ({"num_hidden_layers": None}, "num_hidden_layers: missing"),
        ({"num_attention_heads": None}, "num_attention_heads: missing"),
        ({"hidden_size": None}, "hidden_size: missing"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: must be"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers: must be"),
        ({"num_hidden_layers": True}, "num_hidden_layers: must be"),
        ({"num_hidden_layers": 10**9}, "at most|to 10,000"),
        ({"num_key_value_heads": "8"}, "num_key_value_heads: must be"),
        ({"head_dim": -1}, "head_dim: must be"),
        ({"hidden_size": 2}, "hidden_size: 2 for 4 heads"),
        ({"max_position_embeddings": 2**40}, "max_position_embeddings: must be"),
        ({"kv_lora_rank": 512}, "qk_rope_head_dim: missing"),
        ({"sliding_window": []}, "sliding_window: must be"),
        ({"layer_types": ["full_attention"]}, "layer_types: must be a list of 2"),
        ({"layer_types": ["full_attention", {}]}, "layer_types: '{}' is not known"),
        ({"text_config": 1}, "text_config"),
        ({"quantization_config": "gptq"}, "quantization_config"),
        ({"quantization_config": {"bits": 0}}, "quantization_config: bits"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
    ],
)
def test_odd_values_are_refused_by_name(changes: Any, clause: str) -> None:
    with pytest.raises(Unreadable, match=clause):
        llama(**changes)


@settings(max_examples=80, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([*LLAMA_CONFIG, "head_dim", "sliding_window", "layer_types", "text_config", "dtype",
                         "quantization_config", "kv_lora_rank", "qk_rope_head_dim", "use_sliding_window"]),
        st.none() | st.booleans() | st.integers(-3, 2**70) | st.text(max_size=4) | st.lists(st.text(max_size=2)),
        max_size=6,
    )
)  # fmt: skip
def test_any_config_is_an_architecture_or_refused(changes: Any) -> None:
    try:
        found = model_config.read(json.dumps({**LLAMA_CONFIG, **changes}).encode())
    except Unreadable:
        return
    assert memory.of_request(found, 1000) >= 0


def test_a_file_that_is_no_json_is_refused() -> None:
    with pytest.raises(Unreadable, match=r"config.json"):
        model_config.read(b"[1")


def test_memory_is_a_range_with_its_formula() -> None:
    public = MODELS["Llama 3.1 8B"]
    measured = Measured("safetensors", 4, {"BF16": public.parameters}, 2 * public.parameters, llama_8b())
    found = inspected.result("llama", measured)

    weights = 16_060_522_496
    assert found["parameters"] == public.parameters
    assert found["memory_bytes"] == {"low": weights + GIB, "high": weights + weights // 5 + 2 * GIB}
    assert found["cache_bytes_at_context"] == 131_072 * 131_072
    lines = {line["name"]: line["text"] for line in found["formulas"]}
    assert lines["weights"] == "8,030,261,248 x BF16 = 15.0 GiB"
    assert lines["cache per token"] == "2 x 32 layers x 8 KV heads x 128 x 2 bytes = 131,072 bytes"
    assert found["estimate"] is True


def llama_8b() -> Architecture:
    return model_config.of(MODELS["Llama 3.1 8B"].config)


def test_a_gpu_fits_by_the_formula() -> None:
    model = memory.Model(2 * 8_030_261_248, llama_8b())
    by_name = {gpu.name: {one.tp: one for one in memory.options(model, gpu)} for gpu in memory.GPUS}
    l4, l40s = by_name["NVIDIA L4"], by_name["NVIDIA L40S"]

    # 0.92 x 22.5 GiB: what the weights and the engine leave is not a whole context.
    assert (l4[1].fits, l4[2].fits) == ("shorter", "yes")
    usable = 23_034 * 1024**2 * 92 // 100
    assert l4[1].tokens is not None
    assert l4[1].tokens.high == (usable - model.weights - GIB) // 131_072
    assert l4[1].tokens.low == (usable - model.weights - model.weights // 5 - 2 * GIB) // 131_072
    assert l40s[1].fits == "yes"
    # The cache is divided by KV heads, of which it has eight.
    assert l40s[2].tokens is not None
    usable = 46_068 * 1024**2 * 92 // 100
    assert l40s[2].tokens.high == (usable - model.weights // 2 - GIB) * 2 // 131_072
    assert by_name["NVIDIA T4"][1].fits == "no"
    gpu, option = memory.suggested(model) or pytest.fail("nothing is suggested")
    assert (gpu.name, option.tp) == ("NVIDIA A100 40GB", 1)


def test_a_latent_cache_is_not_divided() -> None:
    architecture = model_config.of(MODELS["DeepSeek V3"].config)
    model = memory.Model(10 * GIB, architecture)
    gpu = memory.Gpu("any", 80 * 1024)
    one, two = memory.option(model, gpu, 1), memory.option(model, gpu, 2)

    # Two have room for more of it by what each holds less of the weights only.
    assert one.tokens is not None
    assert two.tokens is not None
    assert two.tokens.high - one.tokens.high <= 5 * GIB // 70_272 + 1


def test_what_is_too_large_is_said_and_a_shorter_context_is_suggested() -> None:
    huge = inspected.result("huge", Measured("safetensors", 1, {"BF16": 10**12}, 2 * 10**12, None))
    assert huge["suggestion"] == {"name": "huge", "hardware": None, "max_model_len": None}
    assert any("no GPU" in one for one in huge["warnings"])
    assert {option["fits"] for gpu in huge["gpus"] for option in gpu["options"]} == {"no"}

    long = llama_8b()._replace(context=2**27)
    chosen = memory.suggested(memory.Model(16 * 10**9, long))
    assert chosen is not None
    length = memory.context_for(memory.Model(16 * 10**9, long), chosen[1])
    assert chosen[1].fits == "shorter"
    assert length is not None
    assert length % 256 == 0
    assert 0 < length < 2**27


def test_packed_weights_are_counted_one_by_one() -> None:
    architecture = llama(quantization_config={"quant_method": "gptq", "bits": 4})
    found = inspected.result("q", Measured("safetensors", 1, {"I32": 100, "F16": 8}, 416, architecture))

    assert found["parameters"] == 808
    assert any("packed" in one for one in found["warnings"])


def test_shards_are_one_model_and_missing_ones_are_told() -> None:
    parts = [f"m-Q4-0000{one}-of-00003.gguf" for one in (1, 3)]
    plain = ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    beside = ["mmproj-F16.gguf", "adapter_model.safetensors", "consolidated.00.safetensors", "README.md"]
    found = models_in([*parts, *plain, *beside, "other.gguf"])

    assert found == [
        Model("gguf", "m-Q4", (parts[0], parts[1]), ("m-Q4-00002-of-00003.gguf",)),
        Model("safetensors", "model", (plain[1], plain[2])),
        Model("gguf", "other", ("other.gguf",)),
    ]
    index = "model.safetensors.index.json"
    assert models_in([*plain, index]) == [Model("safetensors", "model", (), (), index)]
    assert of_file(plain[2], [*plain, index]) == Model("safetensors", "model", (), (), index)
    assert of_file(parts[1], parts) == found[0]
    assert of_file("config.json", plain) is None
    many = models_in(["m-00001-of-99999.gguf"])[0]
    assert many.files == ()
    assert "99,999 files" in many.missing[0]


@pytest.mark.parametrize(
    ("ref", "name"),
    [
        ("meta-llama/Llama-3.1-8B", "Llama-3.1-8B"),
        ("/models/gemma 2/Q4.gguf", "Q4"),
        ("/models/späße/", "sp--e"),
        ("/models/.hidden", "hidden"),
    ],
)
def test_a_name_is_taken_from_the_reference(ref: str, name: str) -> None:
    assert inspected.name_of(ref) == name
