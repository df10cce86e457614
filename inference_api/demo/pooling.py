"""Answers that are numbers: embeddings, pooling, classification, moderation, scores and reranking."""

import base64
import struct
from typing import Any, NamedTuple

from inference_api.demo import model
from inference_api.demo.generation import usage
from inference_api.demo.requests import Pool, Prompt, Score

_DIMENSIONS = 64
_LABELS = ("LABEL_0", "LABEL_1")
_CATEGORIES = (
    "harassment", "harassment/threatening", "hate", "hate/threatening", "illicit", "illicit/violent", "self-harm",
    "self-harm/instructions", "self-harm/intent", "sexual", "sexual/minors", "violence", "violence/graphic",
)  # fmt: skip


class Card(NamedTuple):
    """What an answer says of itself; `id` has no prefix, `created` is in seconds."""

    id: str
    created: int
    model: str

    def listed(self, prefix: str, data: list[Any], prompts: list[Prompt]) -> dict[str, Any]:
        head = {"id": f"{prefix}-{self.id}", "object": "list", "created": self.created, "model": self.model}
        return {**head, "data": data, "usage": usage(sum(prompt.length for prompt in prompts))}


def embeddings(asked: Pool, card: Card) -> dict[str, Any]:
    data = [{"index": n, "object": "embedding", "embedding": vector} for n, vector in enumerate(_vectors(asked))]
    return card.listed("embd", data, asked.prompts)


def pooling(asked: Pool, card: Card) -> dict[str, Any]:
    data = [{"index": n, "object": "pooling", "data": vector} for n, vector in enumerate(_vectors(asked))]
    return card.listed("pool", data, asked.prompts)


def classify(asked: Pool, card: Card) -> dict[str, Any]:
    """The first number of the vector decides between two labels."""
    data: list[dict[str, Any]] = []
    for index, prompt in enumerate(asked.prompts):
        second = (1 + model.embed(prompt.text, 2)[0]) / 2
        probs = [1 - second, second]
        label = _LABELS[probs.index(max(probs))]
        data.append({"index": index, "label": label, "probs": probs, "num_classes": len(probs)})
    return card.listed("classify", data, asked.prompts)


def moderate(asked: Pool, card: Card) -> dict[str, Any]:
    """A text is in each category that it names."""
    results = []
    for prompt in asked.prompts:
        named = {category: category in prompt.text.lower() for category in _CATEGORIES}
        scores = {category: float(there) for category, there in named.items()}
        kinds = {category: ["text"] for category in _CATEGORIES}
        found = {"categories": named, "category_scores": scores, "category_applied_input_types": kinds}
        results.append({"flagged": any(named.values()), **found})
    return {"id": f"modr-{card.id}", "model": card.model, "results": results}


def score(asked: Score, card: Card) -> dict[str, Any]:
    """One text with each of many, or the first with the first and so on."""
    ones, many = _listed(asked.one), _listed(asked.many)
    pairs = zip(ones * len(many) if len(ones) == 1 else ones, many, strict=False)
    data = [{"index": index, "object": "score", "score": model.likeness(*pair)} for index, pair in enumerate(pairs)]
    return card.listed("score", data, [Prompt(text) for text in (*ones, *many)])


def rerank(asked: Score, card: Card) -> dict[str, Any]:
    """The documents with the words of the query first."""
    query, documents = _listed(asked.one)[0], _listed(asked.many)
    results = [
        {"index": index, "document": {"text": text}, "relevance_score": model.likeness(query, text)}
        for index, text in enumerate(documents)
    ]
    results.sort(key=lambda result: result["relevance_score"], reverse=True)  # type: ignore[arg-type, return-value]
    tokens = sum(Prompt(text).length for text in (query, *documents))
    used = {"prompt_tokens": tokens, "total_tokens": tokens}
    top = results[: asked.top_n or len(documents)]
    return {"id": f"rerank-{card.id}", "model": card.model, "usage": used, "results": top}


def _vectors(asked: Pool) -> list[list[float] | str]:
    vectors = [model.embed(prompt.text, asked.dimensions or _DIMENSIONS) for prompt in asked.prompts]
    if asked.encoding_format == "base64":
        return [base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode() for vector in vectors]
    return [*vectors]


def _listed(given: str | list[str]) -> list[str]:
    return [given] if isinstance(given, str) else given
