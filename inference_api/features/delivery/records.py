"""The usage record of a request: its Record as JSON text, as docs/schemas/usage-record.json describes it.

It has names, numbers and times; no prompt, no answer, no key, and of the end user only a digest. The text is put
together of parts that requests share, since a dictionary of all fields costs three times as much.
"""

import time
from collections.abc import Callable, Mapping
from hashlib import sha256
from time import perf_counter
from typing import Any, Generic, TypeVar

from orjson import dumps

from inference_api.http.routes import INFERENCE_ROUTES, REALTIME
from inference_api.models import CLIENT_GONE, OK, Caller
from inference_api.observe.account import Record
from inference_api.observe.legs import KIND
from inference_api.policy.snapshot import KeyCaller

# Only requests on these have a usage record: the others never reached an engine, or have no caller yet (401).
ROUTES = frozenset(route.label for route in (*INFERENCE_ROUTES, REALTIME))
# Fields of a body that name the client's own user, for `Feature.fields`; the first of them counts.
END_USER = ("user", "safety_identifier")
# The field of the access line with the record's id
USAGE_ID = "usage_id"
# In the state of a request: bytes of the body that went to the backend, if a feature has made another one of it
SENT_SIZE = "sent_size"
# Keys in the state of a request: the tokens that were metered; when the second and later attempts began; what failed.
METERED, STARTED, FAILED = "metered", "usage_started", "usage_failed"

# (input, cached input, output, reasoning, source); the source is reported, counted, cache or none.
Metered = tuple[int | None, int | None, int | None, int | None, str]
# Asked model, model, backend, route, stream, status, outcome, code, attempts
End = tuple[str, str, str | None, str, bool, int, str, str | None, int]
# One attempt: backend, outcome, status, begin (None: of the first one) and end.
Try = tuple[str, str, int, float | None, float]

# No engine answered with 2xx.
NOTHING: Metered = (0, 0, 0, 0, "none")
# An engine did, and nobody knows the tokens.
UNKNOWN: Metered = (None, None, None, None, "none")
_FREE = frozenset({"none", "cache"})
_MOST_TRIES = 16
_ID_LENGTH = 12
_CLIENT_GONE = CLIENT_GONE.value
# What features note of a request beside its cost
_NOTHING_NOTED = '"fallback":false,"variant":null,"cache":null,"prompt":null,"votes":null,"queued_ms":0'
_NOBODY = '"key_id":null,"organisation":null,"user":null'
_SHARED = 4096

K = TypeVar("K")


class UsageRecords:
    """Makes the records of a router, and gives each to `take`. `boot`: of the process, for the ids.

    `now` is Unix seconds, `clock` the account's.
    """

    def __init__(
        self,
        boot: str,
        instance: str,
        take: Callable[[str], None],
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self._prefix = boot + "-"
        self._take = take
        self._now = now
        self._clock = clock
        self._router = text_of(instance)
        # Parts of the text that many requests have in common
        self._owners: _Parts[KeyCaller] = _Parts(_owner)
        self._ends: _Parts[End] = _Parts(_end)
        self.made = 0

    def annotate(self, record: Record, extra: dict[str, Any]) -> None:
        """Name the record that there will be in the access line."""
        if record[1] in ROUTES:
            self.made = number = self.made + 1
            extra[USAGE_ID] = f"{self._prefix}{number}"

    def record(self, record: Record) -> None:
        # Unpacked at once: reading a field by name costs ten times as much.
        (
            request_id, route, model_name, _, backend, status, outcome, attempts, stream, code, took, first, _,
            _, _, size, caller, model, _, _, extra, state, _, fields, _, _,
        ) = record  # fmt: skip
        usage_id = extra.get(USAGE_ID)
        if usage_id is None:
            return
        owner, kind = _NOBODY, extra.get(KIND, "request")
        if caller is not None:
            owner = self._owners[caller] if type(caller) is KeyCaller else _owner(caller)
        # `value` goes through a descriptor, and the hash of an Outcome is computed in Python.
        asked, outcome_value = model_name if model is None else model.name, outcome._value_
        end = self._ends[asked, model_name, backend, route, stream, status, outcome_value, code, attempts]
        prompt, cached, completion, reasoning, source = state.get(METERED, NOTHING)
        cost = 0 if prompt == 0 and source in _FREE else extra.get("cost_nanos")
        user = end_user(fields) if "user" in fields or "safety_identifier" in fields else "null"
        tries = "" if outcome is OK and attempts < 2 else self._tries(record)
        self._take(
            f'{{"id":"{usage_id}","kind":"{kind}","at":{int((self._now() - took) * 1000)},"router":{self._router},'
            f'"request_id":"{request_id}",{owner},"end_user":{user},{end},{tries}{_noted(extra)},'
            f'"input_tokens":{"null" if prompt is None else prompt},'
            f'"cached_input_tokens":{"null" if cached is None else cached},'
            f'"output_tokens":{"null" if completion is None else completion},'
            f'"reasoning_tokens":{"null" if reasoning is None else reasoning},"usage_source":"{source}",'
            f'"latency_ms":{took * 1e3:.2f},"ttft_ms":{"null" if first is None else f"{first * 1e3:.2f}"},'
            f'"bytes":{size},"cost_nanos":{"null" if cost is None else cost}}}'
        )

    def leg(self, record: Record, extra: dict[str, Any]) -> None:
        """The record of a run that no client got an answer of, if it reached a backend."""
        if not record.attempts:
            return
        self.annotate(record, extra)
        self.record(record)

    def _tries(self, record: Record) -> str:
        state, clock = record.state, self._clock()
        tries: list[Try] = [*state.get(FAILED, ())]
        if record.backend is not None and len(tries) < record.attempts:
            # The last one did not fail before its answer began: it ended with the request.
            tries.append((record.backend, record.outcome._value_, record.answered, state.get(STARTED), clock))
        if not tries:
            return ""
        queued: float = record.extra.get("queued_ms", 0)
        first = (record.accepted or 0.0) + queued / 1000
        return f'"attempt_details":{text_of(details(tries, clock - record.took, first))},'


class _Parts(dict[K, str], Generic[K]):
    """Makes the text of a key once."""

    def __init__(self, make: Callable[[K], str]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, key: K) -> str:
        if len(self) >= _SHARED:
            self.clear()
        text = self[key] = self._make(key)
        return text


def text_of(value: Any) -> str:
    return dumps(value).decode()


def members(values: Mapping[str, Any]) -> str:
    """As a part of an object."""
    return text_of(values)[1:-1]


def end_user(fields: Mapping[str, Any]) -> str:
    """The digest of the client's own name for its user, as JSON."""
    for name in END_USER:
        value = fields.get(name)
        if value and isinstance(value, str):
            return f'"{sha256(value.encode("utf-8", "surrogatepass")).hexdigest()[:16]}"'
    return "null"


def details(tries: list[Try], began: float, first: float = 0.0) -> list[dict[str, Any]]:
    """The attempts, by milliseconds after the request head; `first`: seconds until the first one."""
    found = []
    for backend, outcome, status, start, end in tries[-_MOST_TRIES:]:
        start = began + first if start is None else start
        times = {"start_ms": _milliseconds(start - began), "duration_ms": _milliseconds(end - start)}
        found.append({"backend": backend, "outcome": outcome, "status": status, **times})
    return found


def _owner(caller: Caller) -> str:
    # A Caller of another feature than `keys` has no key that the schema knows.
    id: str | None = caller.id
    key = id if id is not None and len(id) == _ID_LENGTH and id.isascii() and id.isalnum() else None
    organisation, user = getattr(caller, "organisation", None), getattr(caller, "user", None)
    return members({"key_id": key, "organisation": organisation, "user": user})


def _end(key: End) -> str:
    asked, model, backend, route, stream, status, outcome, code, attempts = key
    return members(
        {
            "asked_model": asked,
            "model": model,
            "backend": backend,
            "route": route,
            "stream": stream,
            "status": status or (499 if outcome == _CLIENT_GONE else 0),
            "outcome": outcome,
            "code": code,
            "attempts": attempts,
        }
    )


def _noted(extra: Mapping[str, Any]) -> str:
    if not (
        "cache" in extra
        or "queued_ms" in extra
        or "fallback" in extra
        or "variant" in extra
        or "prompt" in extra
        or "votes" in extra
    ):
        return _NOTHING_NOTED
    get = extra.get
    return members(
        {
            "fallback": bool(get("fallback")),
            "variant": get("variant"),
            "cache": get("cache"),
            "prompt": get("prompt"),
            "votes": get("votes"),
            "queued_ms": get("queued_ms", 0),
        }
    )


def _milliseconds(seconds: float) -> float:
    return max(int(seconds * 1e5) / 100, 0)
