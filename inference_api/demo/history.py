"""The day before the demo, made up: usage records as routers would have sent them, with two bad hours."""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from inference_api.demo.policy import PRICES

_MINUTE, _HOUR = 60_000, 3_600_000
_HOURS = 24
# Requests of an hour in the middle of the day; of the last one, which charts show minute by minute
_BUSY, _LAST = 480, 1200
# Hours ago, and what failed in them
_BAD, _BAD_MODEL = range(2, 4), "mistral-7b"
_CALLERS = {"translate": 4, "chatbot": 5, "notebook": 2, "nightly": 1}

_ALIKE: Mapping[str, Any] = {
    "kind": "request",
    "end_user": None,
    "route": "chat_completions",
    "fallback": False,
    "variant": None,
    "cache": None,
    "prompt": None,
    "votes": None,
    "cached_input_tokens": 0,
    "reasoning_tokens": 0,
    "queued_ms": 0,
}


class IssuedKey(NamedTuple):
    """An API key that the control plane has made."""

    secret: str
    id: str
    organisation: str | None
    user: str | None


def history(
    now: int,
    keys: Mapping[str, IssuedKey],
    routers: Sequence[str],
    backends: Mapping[str, Sequence[str]],
    seed: int = 1,
) -> Iterator[dict[str, Any]]:
    """Records, the oldest first. `now`: Unix milliseconds; `routers`: their names; `backends`: by model."""
    drawn, number = random.Random(seed), 0
    for ago in range(_HOURS, 0, -1):
        day = 0.55 - 0.45 * math.cos(2 * math.pi * ((now // _HOUR - ago) % 24 - 3) / 24)
        count = _LAST if ago == 1 else round(_BUSY * day)
        moments = sorted(drawn.randrange(_HOUR) for _ in range(count))
        for moment in moments:
            number += 1
            at = now - _MINUTE - ago * _HOUR + moment
            yield _record(drawn, number, at, ago in _BAD, keys, drawn.choice(routers), backends)


def _record(
    drawn: random.Random,
    number: int,
    at: int,
    bad: bool,
    keys: Mapping[str, IssuedKey],
    router: str,
    backends: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    key = keys[drawn.choices(list(_CALLERS), list(_CALLERS.values()))[0]]
    model = drawn.choices(list(backends), (5, 3, 2)[: len(backends)])[0]
    fails = drawn.random() < (0.6 if bad and model == _BAD_MODEL else 0.003)
    given, made = drawn.randint(100, 1500), 0 if fails else drawn.randint(20, 160)
    first = drawn.lognormvariate(4.8, 0.5) * (4 if bad and model == _BAD_MODEL else 1)
    stream, price = drawn.random() < 0.6, PRICES[model]
    return {
        **_ALIKE,
        "id": f"{_hex(drawn)}-{number}",
        "at": at,
        "router": router,
        "request_id": _hex(drawn) + _hex(drawn),
        "key_id": key.id,
        "organisation": key.organisation,
        "user": key.user,
        "asked_model": model,
        "model": model,
        "backend": drawn.choice(backends[model]),
        "stream": stream,
        "status": 502 if fails else 200,
        "outcome": "upstream_5xx" if fails else "ok",
        "code": "upstream_error" if fails else None,
        "attempts": 2 if fails else 1,
        "input_tokens": 0 if fails else given,
        "output_tokens": made,
        "usage_source": "none" if fails else "reported",
        "latency_ms": round(first + made * 25, 1),
        "ttft_ms": round(first, 1) if stream and not fails else None,
        "bytes": 4 * made,
        # Prices are per million tokens, costs in 10^-9.
        "cost_nanos": 0 if fails else round(1000 * (given * price["input"] + made * price["output"])),
    }


def _hex(drawn: random.Random) -> str:
    return f"{drawn.getrandbits(64):016x}"
