"""Makes the models that the end-to-end tests serve: three architectures, two layers each, random but always the same.

Run by the Python that has vLLM: `python tiny_models.py DIRECTORY`. A random model would say bytes that are no text and
stop whenever it liked; these say printable ASCII, one or more characters a token, until they are told to stop.
"""

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

SEED = 20260101
POSITIONS = 1024
# Large enough for a step to take longer than vLLM's front end takes to pass its tokens on. Below that the front end's
# event loop may see to nothing else before a generation ends: no departures, no metrics.
WIDTH = 512
SENTENCES = [
    "The router picks a healthy backend and relays the answer byte for byte.",
    "A client that leaves cancels the generation, in every phase of the request.",
    "The quick brown fox jumps over the lazy dog while the five boxing wizards jump quickly.",
    "Once upon a time there was a model with two layers and very little to say.",
    "How many tokens does it take to reach the end of a sentence? About twenty, more or less.",
]
END = "<|end|>"
# The tool parser of vLLM looks for its two marks in the vocabulary.
SPECIAL = [END, "<|system|>", "<|user|>", "<|assistant|>", "<tool_call>", "</tool_call>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role if message.role in ('system', 'assistant') else 'user' }}|>"
    "{{ message.content }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Far enough below every other logit that neither greedy nor sampled decoding comes across it.
NEVER = -1000.0


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=SPECIAL, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)
    fast.model_max_length = POSITIONS
    fast.chat_template = CHAT_TEMPLATE
    return fast


def unsayable(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Tokens that are special, or no printable ASCII text of their own; blanks too, or JSON would never end."""
    texts = {token: tokenizer.decode([token]) for token in range(len(tokenizer))}
    return [token for token, text in texts.items() if text in SPECIAL or not is_plain(text)]


def is_plain(text: str) -> bool:
    return text.isascii() and text.isprintable() and not text.isspace()


def make_llama(vocabulary: int, never: list[int]) -> PreTrainedModel:
    return steer(LlamaForCausalLM(LlamaConfig(**shape(vocabulary))), never)


def make_mistral(vocabulary: int, never: list[int]) -> PreTrainedModel:
    return steer(MistralForCausalLM(MistralConfig(**shape(vocabulary), sliding_window=None)), never)


def make_gpt2(vocabulary: int, never: list[int]) -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=POSITIONS,
        n_embd=WIDTH,
        n_layer=2,
        n_head=4,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        # The head is tied to the embedding, so the last norm's bias carries the constant that marks them.
        model.transformer.wte.weight[:, 0] = 0.0
        model.transformer.wte.weight[never, 0] = -1.0
        model.transformer.ln_f.weight[0] = 0.0
        model.transformer.ln_f.bias[0] = -NEVER
    return model


def shape(vocabulary: int) -> dict[str, object]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": POSITIONS,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def steer(model: PreTrainedModel, never: list[int]) -> PreTrainedModel:
    """Keep one hidden dimension constant through all layers, and let the head count it against `never`."""
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0, :] = 0.0
            layer.mlp.down_proj.weight[0, :] = 0.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[never, 0] = 100 * NEVER
    return model


MAKERS = {"llama-3-8b": make_llama, "mistral-7b": make_mistral, "gpt2": make_gpt2}


def main(directory: Path) -> None:
    tokenizer = make_tokenizer()
    never = unsayable(tokenizer)
    for number, (name, make) in enumerate(MAKERS.items()):
        torch.manual_seed(SEED + number)
        model = make(len(tokenizer), never).to(torch.float32).eval()
        model.save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
