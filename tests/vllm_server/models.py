"""Makes tiny random models under the names that vLLM's own tests load, as a Hugging Face cache: no test needs the hub.

Run by the Python that has vLLM, with the root of the checkout in PYTHONPATH: `python models.py HF_HOME`.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
    XLMRobertaModel,
)

from tests.e2e import tiny_models

# The longest context that one of the tests asks for, and more.
POSITIONS = 16384
REVISION = "0" * 40
_WIDTH = 128

_GENERATE = (
    "Qwen/Qwen2-1.5B-Instruct",
    "Qwen/Qwen2.5-1.5B-Instruct",
    "Qwen/Qwen3-0.6B",
    "Qwen/Qwen3-1.7B",
    "Qwen/Qwen3-8B",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "hmellor/tiny-random-LlamaForCausalLM",
)


def make_llama(vocabulary: int, never: list[int]) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        initializer_range=0.2,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return tiny_models.steer(LlamaForCausalLM(config), never)


def make_opt(vocabulary: int, never: list[int]) -> PreTrainedModel:
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=vocabulary,
            hidden_size=_WIDTH,
            word_embed_proj_dim=_WIDTH,
            ffn_dim=2 * _WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=2048,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def _encoder(vocabulary: int) -> dict[str, object]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": _WIDTH,
        "intermediate_size": 2 * _WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 514,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def make_bert(vocabulary: int, never: list[int]) -> PreTrainedModel:
    return BertModel(BertConfig(**_encoder(vocabulary)))


def make_roberta(vocabulary: int, never: list[int]) -> PreTrainedModel:
    return XLMRobertaModel(XLMRobertaConfig(**_encoder(vocabulary)))


def make_cross_encoder(vocabulary: int, never: list[int]) -> PreTrainedModel:
    return XLMRobertaForSequenceClassification(XLMRobertaConfig(**_encoder(vocabulary), num_labels=1))


def make_classifier(vocabulary: int, never: list[int]) -> PreTrainedModel:
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        num_labels=2,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return Qwen2ForSequenceClassification(config)


MAKERS: dict[str, Callable[[int, list[int]], PreTrainedModel]] = {
    **dict.fromkeys(_GENERATE, make_llama),
    "facebook/opt-125m": make_opt,
    "intfloat/multilingual-e5-small": make_roberta,
    "BAAI/bge-base-en-v1.5": make_bert,
    "BAAI/bge-reranker-base": make_cross_encoder,
    "jason9693/Qwen2.5-1.5B-apeach": make_classifier,
}


def main(home: Path) -> None:
    tokenizer = tiny_models.make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    never = tiny_models.unsayable(tokenizer)
    for number, (name, make) in enumerate(MAKERS.items()):
        torch.manual_seed(number)
        model = make(len(tokenizer), never).to(torch.float32).eval()
        repository = home / "hub" / f"models--{name.replace('/', '--')}"
        snapshot = repository / "snapshots" / REVISION
        snapshot.mkdir(parents=True, exist_ok=True)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(REVISION)
        tokenizer.model_max_length = model.config.max_position_embeddings
        model.save_pretrained(snapshot)
        tokenizer.save_pretrained(snapshot)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
