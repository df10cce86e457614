"""T61: the wall clock jumps, and nothing but what is shown to people goes by it."""

import ast
import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse_text

from tests.fakes import (
    DONE,
    LAST_CHUNK,
    SSE_HEAD,
    STREAM,
    Line,
    Received,
    ScriptedServer,
    chunk,
    event,
    hang,
    json_response,
    until,
)
from tests.test_architecture import CORE, TREES

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]


def wall_clock_uses(name: str) -> set[str]:
    """What a module reads the wall clock with."""
    wall = {"time", "time_ns", "localtime", "ctime", "now", "utcnow", "today", "gmtime"}
    return {
        ast.unparse(node)
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in ("time", "datetime", "date")
        and node.attr in wall
    }


def test_t61_only_what_is_shown_is_told_by_the_wall_clock() -> None:
    """Log lines, moments of the last success that metrics show, and what ends at a moment that people name: the expiry
    of a key or an override, the period of a budget. Whoever adds a use says here that it is one.
    """
    uses = {name: found for name in CORE if (found := wall_clock_uses(name))}

    assert uses == {
        "inference_api.observe.log": {"time.time", "time.gmtime"},
        "inference_api.observe.families": {"time.time"},
        "inference_api.observe.console": {"time.gmtime"},
        "inference_api.discovery.engine_metrics": {"time.time"},
        "inference_api.routing.registry": {"time.time"},
        "inference_api.http.backends": {"time.time"},
        "inference_api.commands.status": {"time.time"},
        "inference_api.commands.keys": {"time.time"},
        "inference_api.policy.source": {"time.time"},
        "inference_api.features.budgets": {"time.time"},
        "inference_api.features.overrides": {"time.time"},
        "inference_api.features.reports": {"time.time"},
        "inference_api.features.delivery.records": {"time.time"},
    }


@pytest.mark.parametrize("jump", [-3600.0, 3600.0])
async def test_t61_a_jump_ends_no_stream_and_no_wait_and_makes_no_time_negative(
    start_engine: Start, start_router: Start, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    jumped = asyncio.Event()

    async def script(request: Received, line: Line) -> None:
        if b'"stream":true' not in request.body.replace(b" ", b""):
            await hang(request, line)
        await line.send(SSE_HEAD, chunk(event("one")))
        await jumped.wait()
        await asyncio.sleep(0.05)
        await line.send(chunk(event("two") + DONE) + LAST_CHUNK)

    engine = await start_engine(script)
    served = await start_router(engine, first_byte_timeout=1.2, idle_timeout=5, keepalive_timeout=60, header_timeout=5)
    real = time.time
    async with served.client.stream("POST", "/v1/chat/completions", json=STREAM) as response:
        body = response.aiter_raw()
        seen = await anext(body)
        monkeypatch.setattr(time, "time", lambda: real() + jump)
        jumped.set()
        seen += b"".join([data async for data in body])
    assert seen == event("one") + event("two") + DONE

    # A timeout is neither early nor late by an hour, and nothing that is said about waiting is negative.
    began = time.monotonic()
    refused = await served.chat()
    assert refused.status_code == 504
    assert 1.1 < time.monotonic() - began < 10
    assert int(refused.headers.get("retry-after", "1")) >= 1
    assert (await served.client.get("/readyz")).status_code == 200

    page = (await served.client.get("/metrics")).text
    sums = [s for family in parse_text(page) for s in family.samples if s.name.endswith(("_sum", "_seconds_bucket"))]
    assert len(sums) > 20
    assert all(0 <= sample.value < 60 for sample in sums)
    await until(lambda: len(served.lines) == 2)
    assert all(0 <= line["latency_ms"] < 60_000 for line in served.lines)


@pytest.mark.parametrize("jump", [-3600.0, 3600.0])
async def test_t61_a_jump_makes_neither_the_catalogue_nor_the_load_old(
    start_engine: Start, start_router: Start, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    text = b"vllm:num_requests_running 3\nvllm:num_requests_waiting 0\n"
    looks: list[str] = []

    async def script(request: Received, line: Line) -> None:
        looks.append(request.target)
        if request.target == "/models":
            backends = [{"url": server.url}]
            await line.send(json_response({"models": [{"name": "m", "backends": backends}]}))
        else:
            await line.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(text) + text)

    async with ScriptedServer(script) as server:
        served = await start_router(registry_url=server.url, registry_refresh=1, load_signal_interval=1)
        [backend] = served.router.core.fleet.models["m"].backends
        await until(lambda: backend.origin.reported == 3)
        real = time.time
        monkeypatch.setattr(time, "time", lambda: real() + jump)
        looks.clear()
        await until(lambda: looks.count("/models") >= 2 and looks.count("/metrics") >= 2)

        assert served.router.core.registry.source == "registry"
        assert backend.origin.reported == 3
        # Shown as what the clock says, which is all that a wall clock is good for.
        shown = await served.metric("inference_api_registry_last_success_timestamp_seconds")
        assert abs(shown - (real() + jump)) < 60
