"""How requests for an adapter end: the table of docs/adapters.md, a row each."""

import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from inference_api.routing.fleet import Adapter
from tests.command import command, log_of, ready
from tests.conftest import Served
from tests.fakes import (
    CHAT,
    COMPLETION,
    DONE,
    LAST_CHUNK,
    SSE_HEAD,
    STREAM,
    Line,
    Received,
    chunk,
    event,
    json_response,
    post,
    raw,
    raw_client,
    read_answer,
    sse,
    until,
)
from tests.faults.quiescence import quiet
from tests.listed import ListingEngine
from tests.policies import policy_of, write

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
URL = "/v1/chat/completions"
LORA = {"model": "lora"}


@pytest.fixture
async def engines() -> AsyncIterator[list[ListingEngine]]:
    """Two that have the adapter, and one that does not."""
    async with ListingEngine("lora") as one, ListingEngine("lora") as two, ListingEngine() as three:
        yield [one, two, three]


@pytest.fixture
async def served(engines: list[ListingEngine], start_router: Start) -> Served:
    return await routed(engines, start_router)


async def routed(engines: list[ListingEngine], start_router: Start, **settings: Any) -> Served:
    settings = {"health_interval": 30.0, "engine_interval": 300.0} | settings
    made: Served = await start_router(*engines, entry={"discover": True}, **settings)
    await until(lambda: len(getattr(made.router.core.fleet.by_name.get("lora"), "backends", ())) == 2)
    return made


def counts(served: Served) -> list[int]:
    fleet = served.router.core.fleet
    origins = [origin.in_flight for origin in fleet.origins.values()]
    return [model.in_flight for model in fleet.served.values()] + origins


async def test_json_and_streams_are_the_bytes_of_the_engine(engines: list[ListingEngine], served: Served) -> None:
    events = [event(f"wörd{number} ") for number in range(5)]
    for engine in engines[:2]:
        engine.script = raw(json_response(COMPLETION))
    body = orjson.dumps(CHAT | LORA | {"x": "wörd"})
    whole = await served.client.post(URL, content=body, headers={"content-type": "application/json"})
    for engine in engines[:2]:
        engine.script = raw(SSE_HEAD, *map(chunk, events), chunk(DONE) + LAST_CHUNK)
    stream = await served.chat(stream=True, model="lora")

    assert whole.content == orjson.dumps(COMPLETION)
    assert stream.content == b"".join(events) + DONE
    assert body in [request.body for engine in engines[:2] for request in engine.requests]
    assert not any(counts(served))


@pytest.mark.parametrize("begun", [False, True])
async def test_a_client_that_leaves_ends_it_at_the_engine(
    engines: list[ListingEngine], served: Served, begun: bool
) -> None:
    async def endless(request: Received, line: Line) -> None:
        if begun:
            await line.send(SSE_HEAD, chunk(event()))
        await line.gone()

    for engine in engines[:2]:
        engine.script = endless
    async with quiet(served):
        async with raw_client(served.port) as client:
            await client.send(post(URL, STREAM | LORA))
            await until(lambda: sum(engine.busy for engine in engines) == 1)
            if begun:
                await client.reader.readuntil(b"data: ")
            assert sum(counts(served)) == 3
        await until(lambda: not any(engine.busy for engine in engines) and not any(counts(served)))
    assert served.lines[-1]["outcome"] == "client_gone"


async def test_a_backend_that_dies_before_the_first_byte_has_another_holder_follow(
    engines: list[ListingEngine], served: Served
) -> None:
    await engines[0].stop()
    for _ in range(10):
        assert (await served.chat(model="lora")).status_code == 200

    assert engines[1].models == ["lora"] * 10
    assert engines[2].models == []
    assert not any(counts(served))


async def test_a_backend_that_dies_in_mid_stream_never_looks_complete(
    engines: list[ListingEngine], served: Served
) -> None:
    for engine in engines[:2]:
        engine.script = sse(event(), event(), then=Line.reset)
    async with raw_client(served.port) as client:
        await client.send(post(URL, STREAM | LORA))
        answer = await client.reader.read(-1)

    assert b"upstream_stream_interrupted" in answer
    assert not answer.endswith(LAST_CHUNK)
    assert served.lines[-1]["outcome"] == "reset"
    assert not any(counts(served))


async def test_a_limit_of_models_counts_an_adapter_as_itself(
    engines: list[ListingEngine], start_router: Start, tmp_path: Path
) -> None:
    limits = [{"scope": "model", "requests": 2, "per": 3600}]
    policy = write(tmp_path / "policy.json", policy_of(limits=limits))
    served = await routed(engines, start_router, policy=str(policy))
    answers = [await served.chat(model=name) for name in ("lora", "m", "lora", "m", "lora", "m")]

    assert [answer.status_code for answer in answers] == [200, 200, 200, 200, 429, 429]
    assert "model 'lora'" in answers[-2].json()["error"]["message"]
    assert not any(counts(served))


async def test_a_router_that_drains_finishes_it(tmp_path: Path) -> None:
    async def slow(request: Received, line: Line) -> None:
        await line.send(SSE_HEAD, chunk(event()))
        await until(lambda: engine.adapters == ["go"])
        await line.send(chunk(DONE) + LAST_CHUNK)

    async with ListingEngine("lora") as engine:
        engine.script = slow
        async with command(tmp_path, engine, entry={"discover": True}, drain_timeout=30) as router:
            await ready(router.client, "/readyz")
            async with raw_client(router.port) as client:
                await client.send(post(URL, STREAM | LORA))
                await until(lambda: engine.busy)
                router.tell(signal.SIGTERM)
                engine.adapters = ["go"]
                answer = await read_answer(client.reader)
            code, out, _ = await router.stop()

    assert (code, answer.status) == (0, 200)
    assert answer.body == event() + DONE
    [line] = [line for line in log_of(out) if line["event"] == "request"]
    assert (line["model"], line["parent"], line["outcome"]) == ("lora", "m", "ok")


async def test_an_adapter_whose_only_holder_is_out_is_still_asked_there(
    engines: list[ListingEngine], served: Served
) -> None:
    """As a model with one backend: there is no alternative, and the engine may be back."""
    engines[0].says()
    view = served.router.core.fleet.by_name["lora"]
    assert isinstance(view, Adapter)
    view.hold(frozenset({engines[1].url}), {})
    view.backends[0].origin.healthy = False
    served.router.core.fleet.models["m"].refresh()

    assert (await served.chat(model="lora")).status_code == 200
    assert engines[1].models == ["lora"]
