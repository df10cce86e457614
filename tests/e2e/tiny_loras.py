"""Makes LoRA adapters of a tiny model, random but always the same.

Run by the Python that has vLLM and peft: `python tiny_loras.py MODEL DIRECTORY NAME...`.
"""

import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

SEED = 20260102


def main(model: Path, directory: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        torch.manual_seed(SEED + number)
        config = LoraConfig(r=8, lora_alpha=64, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        get_peft_model(LlamaForCausalLM.from_pretrained(model), config).save_pretrained(directory / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
