"""Tests of models: what is asked for each kind, and the verdict on what comes. Pure."""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple, get_args
from zlib import crc32

Kind = Literal["chat", "completion", "embedding", "rerank"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Verdict = Literal["ok", "failed", "skipped"]
# Bytes of an answer that are read
MOST: Final = 256 * 1024
_PATHS: Mapping[Kind, str] = {
    "chat": "/v1/chat/completions",
    "completion": "/v1/completions",
    "embedding": "/v1/embeddings",
    "rerank": "/v1/rerank",
}
# Labels of the routes in an entry
_LABELS: Mapping[str, Kind] = {
    "chat_completions": "chat",
    "completions": "completion",
    "embeddings": "embedding",
    "rerank": "rerank",
}
_TEXT, _DOCUMENTS = "Say hello.", ("Hello and welcome.", "Bread is baked in an oven.")
_FEW: Mapping[str, Any] = {"max_tokens": 8, "temperature": 0}
# What engines say of a call that their model is not made for
_OTHER_KIND = re.compile(r"(not|n't) support|not supported|chat template|^not found$", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")


class Got(NamedTuple):
    """An answer; of a longer one than MOST the first bytes, and one more."""

    status: int
    content: bytes


class Said(NamedTuple):
    """`ends`: nothing answers, so that no further step is tried."""

    verdict: Verdict
    words: str
    ends: bool = False


class Step(NamedTuple):
    """`name`: health, listed, call. `took_ms`: None: it was not tried."""

    name: str
    verdict: Verdict
    words: str
    took_ms: float | None = None


def kinds(routes: Sequence[str] | None) -> tuple[Kind, ...]:
    """Those that a model may have, the likeliest first. `routes`: labels of its entry; None: it names none."""
    return tuple(kind for label, kind in _LABELS.items() if routes is None or label in routes)


def call(kind: Kind, model: str) -> tuple[str, dict[str, Any]]:
    """Path and body of one small request."""
    asked: Mapping[Kind, Mapping[str, Any]] = {
        "chat": {"messages": [{"role": "user", "content": _TEXT}], **_FEW},
        "completion": {"prompt": _TEXT, **_FEW},
        "embedding": {"input": _TEXT},
        "rerank": {"query": _TEXT, "documents": list(_DOCUMENTS)},
    }
    return _PATHS[kind], {"model": model, **asked[kind]}


def listed(got: Got, model: str) -> Said:
    """Whether /v1/models, or /v1/models/{model}, names it."""
    if got.status != 200:
        return _refused(got)
    body = _json(got)
    cards = body.get("data", [body]) if isinstance(body, dict) else None
    if not isinstance(cards, list):
        return Said("failed", "The answer is no list of models.")
    names = [str(card["id"]) for card in cards if isinstance(card, dict) and "id" in card]
    if model in names:
        return Said("ok", f"It names {model!r}.")
    others = ", ".join(map(repr, names[:3])) + (f", and {len(names) - 3} more" if len(names) > 3 else "")
    return Said("failed", _clean(f"It does not name {model!r}; it names {others or 'no model'}."))


def health(got: Got) -> Said:
    """Of a backend's /health."""
    if got.status in (404, 405):
        return Said("skipped", f"It has no /health: {got.status}.")
    return Said("ok", "200") if got.status == 200 else _refused(got)


def is_other_kind(got: Got) -> bool:
    """Whether the engine refuses the call because the model is not made for it."""
    return got.status in (400, 404, 405, 422, 501) and bool(_OTHER_KIND.search(_message(got) or ""))


def answered(kind: Kind, got: Got) -> Said:
    """The verdict on the answer to `call`."""
    if got.status != 200:
        return _refused(got)
    if len(got.content) > MOST:
        return Said("failed", f"The answer has more than {MOST // 1024} KiB.")
    body = _json(got)
    if body is None:
        return Said("failed", "The answer is no JSON.")
    try:
        return _JUDGES[kind](body)
    except (KeyError, IndexError, TypeError, AttributeError):
        return Said("failed", f"The answer has not the form of one to {_PATHS[kind]}.")


def refusal(got: Got) -> str:
    """`400: The model does not support Chat Completions API`."""
    return f"{got.status}: {_message(got) or f'{len(got.content)} bytes that are no error'}"


def due(models: Iterable[str], last: Mapping[str, int], now: int, every: int) -> list[str]:
    """Models whose turn has come since their last one. Turns are spread over the interval by name. Milliseconds."""
    return [name for name in models if last[name] < now - (now - crc32(name.encode()) * 1000) % every]


def _refused(got: Got) -> Said:
    return Said("failed", refusal(got))


def _chat(body: Any) -> Said:
    message = body["choices"][0]["message"]
    text = message.get("content") or message.get("reasoning_content") or message.get("reasoning") or ""
    return _of_text(str(text), body)


def _completion(body: Any) -> Said:
    return _of_text(str(body["choices"][0]["text"] or ""), body)


def _of_text(text: str, body: Any) -> Said:
    tokens = (body.get("usage") or {}).get("completion_tokens")
    if not text and not tokens:
        return Said("failed", "It ended without a token.")
    words = f"“{_clean(text)[:100]}”" if text else "no text"
    return Said("ok", f"{words}, {tokens} tokens" if isinstance(tokens, int) else words)


def _embedding(body: Any) -> Said:
    vector = body["data"][0]["embedding"]
    if not isinstance(vector, list) or not vector:
        return Said("failed", "The embedding is empty.")
    if not all(_is_finite(value) for value in vector):
        return Said("failed", f"Of {len(vector)} numbers some are none, such as NaN.")
    if not any(vector):
        return Said("failed", f"All {len(vector)} numbers are zero.")
    return Said("ok", f"{len(vector)} dimensions, of length {math.hypot(*vector):.3g}")


def _rerank(body: Any) -> Said:
    results = body["results"] if isinstance(body, dict) else body
    found = [(one["index"], one["relevance_score"] if "relevance_score" in one else one["score"]) for one in results]
    if sorted(index for index, _ in found) != list(range(len(_DOCUMENTS))):
        return Said("failed", f"It was asked for {len(_DOCUMENTS)} documents, and has ranked others.")
    if not all(_is_finite(score) for _, score in found):
        return Said("failed", "Some scores are no numbers.")
    return Said("ok", "scores " + ", ".join(f"{score:.3g}" for _, score in sorted(found)))


_JUDGES: Mapping[Kind, Callable[[Any], Said]] = {
    "chat": _chat,
    "completion": _completion,
    "embedding": _embedding,
    "rerank": _rerank,
}


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _json(got: Got) -> Any:
    """None: it is none."""
    try:
        # Unlike orjson it reads NaN, which engines send.
        return json.loads(got.content)
    except (ValueError, RecursionError):
        return None


def _message(got: Got) -> str | None:
    """What an error says, in the forms of OpenAI, vLLM, TGI and FastAPI."""
    body = _json(got)
    if not isinstance(body, dict):
        return None
    error = body.get("error", body)
    found = error if isinstance(error, str) else None
    if isinstance(error, dict):
        found = next((error[key] for key in ("message", "detail") if isinstance(error.get(key), str)), None)
    return None if found is None else _clean(found)[:300]


def _clean(text: str) -> str:
    return _CONTROL.sub(" ", text)
