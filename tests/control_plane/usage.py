"""Usage records as routers make them, and what a database has of them."""

from itertools import count
from typing import Any

import httpx
from sqlalchemy import select

from control_plane.data.usage_tables import usage
from tests.control_plane.conftest import NOON, Running

_numbers = count(1)
HOUR, DAY = 3_600_000, 86_400_000


def record(**changes: Any) -> dict[str, Any]:
    """A good one, of noon less a minute."""
    return {
        "id": f"9f3c5a1e77b04d21-{next(_numbers)}",
        "kind": "request",
        "at": NOON - 60_000,
        "router": "router-7f9c-8000",
        "request_id": "4bf92f3577b34da6",
        "key_id": None,
        "organisation": None,
        "user": None,
        "end_user": None,
        "asked_model": "llama-3-8b",
        "model": "llama-3-8b",
        "backend": "10.0.0.12:8000",
        "route": "chat_completions",
        "stream": True,
        "status": 200,
        "outcome": "ok",
        "code": None,
        "attempts": 1,
        "fallback": False,
        "variant": None,
        "cache": None,
        "prompt": None,
        "votes": None,
        "input_tokens": 812,
        "cached_input_tokens": 512,
        "output_tokens": 120,
        "reasoning_tokens": None,
        "usage_source": "reported",
        "latency_ms": 2312.0,
        "ttft_ms": 181.5,
        "queued_ms": 0,
        "bytes": 31044,
        "cost_nanos": 142240,
        **changes,
    }


async def send(plane: Running, *records: Any) -> httpx.Response:
    return await plane.router.post("/usage", json={"records": list(records)})


async def taken(plane: Running, *records: Any) -> Any:
    """What became of them."""
    answer = await send(plane, *records)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def rows(plane: Running) -> list[Any]:
    """All rows, by id."""
    async with plane.plane.database.usage.read() as connection:
        return list((await connection.execute(select(usage).order_by(usage.c.id))).all())
