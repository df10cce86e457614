"""The usage record of a request: its Record as an object of docs/schemas/usage-record.json. Pure.

It has names, numbers and times; no prompt, no answer, no key, and of the end user only a digest.
"""

from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import orjson

from inference_api.http.routes import INFERENCE_ROUTES
from inference_api.models import CLIENT_GONE, OK, Caller
from inference_api.observe.account import Record

# Only requests on these have a usage record: the others never reached an engine, or have no caller yet (401).
ROUTES = frozenset(route.label for route in INFERENCE_ROUTES)
# Fields of a body that name the client's own user, for `Feature.fields`; the first of them counts.
END_USER = ("user", "safety_identifier")
# Keys in the state of a request: the tokens that were metered, and the attempts.
METERED = "metered"
TRIES = "usage"

# (input, cached input, output, reasoning, source); the source is reported, counted, cache or none.
Metered = tuple[int | None, int | None, int | None, int | None, str]
# One attempt: backend, time of its start, and of one that failed: outcome, status, time of its end.
Try = tuple[str, float, str | None, int, float]

# No engine answered with 2xx.
NOTHING: Metered = (0, 0, 0, 0, "none")
# An engine did, and nobody knows the tokens.
UNKNOWN: Metered = (None, None, None, None, "none")
_MOST_TRIES = 16
_ID_LENGTH = 12


def usage_record(record: Record, usage_id: str, router: str, now: float, clock: float) -> dict[str, Any]:
    """`now` is Unix seconds, `clock` the account's, both at the end of the answer."""
    # Unpacked at once: reading a field by name costs ten times as much.
    (
        request_id, route, model_name, _, backend, status, outcome, attempts, stream, code, took, first, _,
        _, _, size, caller, model, _, _, extra, state, _, fields, _,
    ) = record  # fmt: skip
    key_id, organisation, user = _NOBODY if caller is None else owner(caller)
    tokens: Metered = state.get(METERED, NOTHING)
    get = extra.get
    made = {
        "id": usage_id,
        "kind": "request",
        "at": int((now - took) * 1000),
        "router": router,
        "request_id": request_id,
        "key_id": key_id,
        "organisation": organisation,
        "user": user,
        "end_user": end_user(fields) if fields else None,
        "asked_model": model_name if model is None else model.name,
        "model": model_name,
        "backend": backend,
        "route": route,
        "stream": stream,
        "status": status or (499 if outcome is CLIENT_GONE else 0),
        # `value` goes through a descriptor.
        "outcome": outcome._value_,
        "code": code,
        "attempts": attempts,
        "fallback": bool(get("fallback")),
        "variant": get("variant"),
        "cache": get("cache"),
        "prompt": get("prompt"),
        "votes": get("votes"),
        "input_tokens": tokens[0],
        "cached_input_tokens": tokens[1],
        "output_tokens": tokens[2],
        "reasoning_tokens": tokens[3],
        "usage_source": tokens[4],
        "latency_ms": int(took * 1e5) / 100,
        "ttft_ms": None if first is None else int(first * 1e5) / 100,
        "queued_ms": get("queued_ms", 0),
        "bytes": size,
        # Tokens that are 0 without a report: no engine answered, or the answer was a stored one.
        "cost_nanos": 0 if tokens[0] == 0 and tokens[4] in _FREE else get("cost_nanos"),
    }
    if (attempts > 1 or outcome is not OK) and (tries := state.get(TRIES)):
        made["attempt_details"] = details(tries, outcome._value_, clock - took, clock)
    return made


_FREE = ("none", "cache")
_NOBODY = (None, None, None)


def encode(record: Mapping[str, Any]) -> bytes:
    return orjson.dumps(record)


def end_user(fields: Mapping[str, Any]) -> str | None:
    """The digest of the client's own name for its user."""
    for name in END_USER:
        value = fields.get(name)
        if value and isinstance(value, str):
            return sha256(value.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return None


def owner(caller: Caller) -> tuple[str | None, str | None, str | None]:
    """Key, organisation and user. A Caller of another feature than `keys` has no key that the schema knows."""
    key: str | None = caller.id
    if key is not None and not (len(key) == _ID_LENGTH and key.isascii() and key.isalnum()):
        key = None
    return key, getattr(caller, "organisation", None), getattr(caller, "user", None)


def details(tries: list[Try], outcome: str, began: float, ended: float) -> list[dict[str, Any]]:
    """The attempts, by milliseconds after the request head. `outcome`: of one whose answer the client got."""
    return [
        {
            "backend": backend,
            "outcome": failed or outcome,
            "status": status,
            "start_ms": _milliseconds(start - began),
            "duration_ms": _milliseconds((end if failed else ended) - start),
        }
        for backend, start, failed, status, end in tries[-_MOST_TRIES:]
    ]


def _milliseconds(seconds: float) -> float:
    return max(int(seconds * 1e5) / 100, 0)
