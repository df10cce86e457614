"""What vLLM says of models that it has loaded, as JSON by path: parameters, blocks of its cache, memory.

Run by the Python that has vLLM: `python loaded_models.py MODEL...`; one process for each model, as vLLM keeps what a
process has loaded.
"""

import json
import resource
import subprocess
import sys
from typing import Any


def loaded(path: str) -> dict[str, Any]:
    from vllm import LLM
    from vllm.model_executor.model_loader import base_loader

    counts = []
    pack = base_loader.process_weights_after_loading

    def counted(model: Any, *others: Any) -> Any:
        # Now, as the CPU build packs weights into what is no parameter.
        counts.append(count(model))
        return pack(model, *others)

    base_loader.process_weights_after_loading = counted
    engine = LLM(path, dtype="float32", max_model_len=1024, enforce_eager=True)
    engine.generate(["The router picks"], use_tqdm=False)
    config = engine.llm_engine.vllm_config
    return {
        "parameters": counts[0],
        "blocks": config.cache_config.num_gpu_blocks,
        "block_size": config.cache_config.block_size,
        "context": config.model_config.max_model_len,
        # KiB in Linux
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def count(model: Any) -> int:
    """Each once: a head may be the embedding. Without the rows that vLLM adds to vocabularies."""
    each = {id(one): one.numel() for one in model.parameters()}
    added = {
        id(one.weight): (one.num_embeddings_padded - one.org_vocab_size) * one.embedding_dim
        for one in model.modules()
        if hasattr(one, "num_embeddings_padded")
    }
    return int(sum(each.values()) - sum(added.values()))


def main(paths: list[str]) -> None:
    if len(paths) == 1:
        print("\n" + json.dumps({paths[0]: loaded(paths[0])}))
        return
    found: dict[str, Any] = {}
    for path in paths:
        lines = subprocess.run([sys.executable, __file__, path], check=True, stdout=subprocess.PIPE, text=True).stdout
        found |= json.loads(lines.splitlines()[-1])
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
