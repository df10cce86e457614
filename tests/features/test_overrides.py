"""Overrides: what becomes of requests, streams and sessions of a backend that an operator drains or takes out."""

import argparse
import asyncio
import gc
import logging
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from jsonschema import Draft202012Validator
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosedError

from inference_api.app import ENTRY, GROUPS, build
from inference_api.commands import status
from inference_api.core import Outside
from inference_api.features.overrides import Overrides
from inference_api.features.overriding.orders import MOST, Order, Orders, read_orders
from inference_api.features.reports import ReportDocument
from inference_api.routing.backend import Backend
from inference_api.routing.catalogue import load_catalogue, parse_catalogue
from inference_api.settings import make_settings
from tests.conftest import Served, serving
from tests.fakes import (
    CHAT,
    COMPLETION,
    DONE,
    LAST_CHUNK,
    SSE_HEAD,
    FakeEngine,
    Line,
    Received,
    chunk,
    event,
    hang,
    json_response,
    post,
    raw_client,
    until,
)
from tests.faults.quiescence import active
from tests.features.control_plane import ControlPlane, at, override
from tests.features.test_realtime import RealtimeEngine
from tests.features.waiting import Paced
from tests.policies import policy_of
from tests.ports import free_port

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
URL = "/v1/chat/completions"
SCHEMAS = Path(__file__).parents[2] / "docs" / "schemas"
REPORT = Draft202012Validator(orjson.loads((SCHEMAS / "router-report.json").read_bytes()))


@pytest.fixture
async def plane() -> AsyncIterator[ControlPlane]:
    async with ControlPlane() as plane:
        plane.models = None
        yield plane


@pytest.fixture(autouse=True)
def _all_levels(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "inference_api")


def on(plane: ControlPlane, **more: Any) -> dict[str, Any]:
    return {"registry_url": plane.url, "report_interval": 0.05, "registry_refresh": 0.05, **more}


def label(engine: FakeEngine) -> str:
    return engine.url.partition("://")[2]


def backends(served: Served, model: str = "m") -> dict[str, Backend]:
    return {backend.label: backend for backend in served.router.core.fleet.models[model].backends}


def backend_of(served: Served, engine: FakeEngine, model: str = "m") -> Backend:
    return backends(served, model)[label(engine)]


async def ordered(served: Served, plane: ControlPlane, *orders: dict[str, Any]) -> None:
    """Give the overrides, and wait until the router says that it obeys them."""
    plane.order(*orders)
    wanted = [order["id"] for order in orders]
    count = len(plane.reports)
    await until(lambda: any(report["overrides"] == wanted for report in plane.reports[count:]))
    assert REPORT.is_valid(plane.reports[-1])


def asking(served: Served, **more: Any) -> "asyncio.Task[httpx.Response]":
    return asyncio.create_task(served.chat(**more))


async def states(served: Served) -> dict[str, str]:
    found = (await served.client.get("/backends")).json()["data"]
    return {row["backend"]: row["state"] for row in found}


@asynccontextmanager
async def quiet(served: Served) -> AsyncIterator[None]:
    """Afterwards nothing is left of any request."""
    yield
    core = served.router.core
    models = core.fleet.models.values()
    await until(lambda: not core.admission.in_flight and not any(model.in_flight for model in models))
    assert not any(backend.in_flight for backend in backends(served).values())
    assert not any(backend.origin.in_flight for backend in backends(served).values())
    assert active(served) == 0


class Two:
    """A router with two engines, `one` and `two`."""

    def __init__(self, served: Served, one: FakeEngine, two: FakeEngine) -> None:
        self.served, self.one, self.two = served, one, two


@pytest.fixture
async def two(plane: ControlPlane, start_engine: Start, start_router: Start) -> Two:
    one, two = await start_engine(), await start_engine()
    return Two(await start_router(one, two, **on(plane)), one, two)


# drain


async def test_a_drained_backend_gets_no_request(two: Two, plane: ControlPlane) -> None:
    served = two.served
    await ordered(served, plane, override(label(two.one)))

    for _ in range(30):
        assert (await served.chat()).status_code == 200

    assert (len(two.one.requests), len(two.two.requests)) == (0, 30)
    [row] = [row for row in (await served.client.get("/backends")).json()["data"] if row["backend"] == label(two.one)]
    assert (row["state"], row["reason"], row["circuit"]) == ("draining", "driver", "closed")
    assert row["override"] == plane.reports[-1]["overrides"][0]
    assert abs(row["since"] / 1000 - time.time()) < 60
    assert await served.metric("inference_api_overrides_active", action="drain") == 1
    assert await served.metric("inference_api_overrides_active", action="out") == 0
    assert await served.metric("inference_api_panic_mode", model_name="m") == 0


async def test_what_is_in_flight_on_a_drained_backend_runs_to_its_end(
    plane: ControlPlane, start_engine: Start, start_router: Start
) -> None:
    paced = Paced()
    one: FakeEngine = await start_engine(paced)
    served: Served = await start_router(one, **on(plane))
    whole, stream = asking(served), asking(served, stream=True)
    await paced.arrived(2)

    await ordered(served, plane, override(label(one)))
    paced.answer(0)
    paced.answer(1)

    assert (await whole).json() == COMPLETION
    assert (await stream).text.endswith(DONE.decode())
    assert len(one.requests) == 2


async def test_health_checks_of_a_drained_backend_go_on(
    plane: ControlPlane, start_engine: Start, start_router: Start
) -> None:
    one: FakeEngine = await start_engine()
    served: Served = await start_router(one, **on(plane, health_interval=0.05))
    await ordered(served, plane, override(label(one)))
    checks = one.asked.count("/health")

    await until(lambda: one.asked.count("/health") > checks + 2)


async def test_no_retry_goes_to_a_drained_backend(two: Two, plane: ControlPlane) -> None:
    async def dies(request: Received, line: Line) -> None:
        line.reset()

    two.one.script = two.two.script = dies
    await ordered(two.served, plane, override(label(two.one)))

    assert (await two.served.chat()).status_code == 502
    assert two.one.requests == []


async def test_panic_mode_does_not_use_a_drained_backend_and_does_not_count_it(
    plane: ControlPlane, start_engine: Start, start_router: Start
) -> None:
    engines = [await start_engine() for _ in range(4)]
    served: Served = await start_router(*engines, **on(plane, health_interval=600))
    model = served.router.core.fleet.models["m"]
    await ordered(served, plane, override(label(engines[0])))
    health = served.router.core.health

    def fails(engine: FakeEngine) -> None:
        for _ in range(3):
            health.checked(backend_of(served, engine).origin, False)

    # One of the three that count is out, then two: panic, without the drained one.
    fails(engines[1])
    assert not model.panic
    fails(engines[2])
    assert model.panic
    for _ in range(40):
        await served.chat()
    assert [bool(engine.requests) for engine in engines] == [False, True, True, True]


async def test_no_half_open_probe_goes_to_a_drained_backend(two: Two, plane: ControlPlane) -> None:
    origin = backend_of(two.served, two.one).origin
    await ordered(two.served, plane, override(label(two.one)))
    # Open, and due long ago
    origin.opened, origin.cooldown, origin.failures = asyncio.get_running_loop().time() - 100, 1.0, 5
    two.served.router.core.fleet.models["m"].refresh()

    for _ in range(20):
        await two.served.chat()

    assert two.one.requests == []
    assert (await states(two.served))[label(two.one)] == "draining"


# out


async def test_out_before_the_first_byte_the_request_gets_its_answer_elsewhere(two: Two, plane: ControlPlane) -> None:
    served = two.served
    two.one.script = hang
    async with quiet(served):
        tasks = [asking(served, stream=number % 2 == 0) for number in range(12)]
        await until(lambda: two.one.busy >= 1 and two.one.busy + len(two.two.requests) == 12)
        moved = two.one.busy

        await ordered(served, plane, override(label(two.one), "out"))
        answers = await asyncio.gather(*tasks)

    assert {answer.status_code for answer in answers} == {200}
    assert len(two.two.requests) == 12
    await until(lambda: not two.one.busy)
    assert await served.metric("inference_api_retries_total", model_name="m", reason="reset") == moved
    # The operator's order is no fault of the backend.
    assert backend_of(served, two.one).origin.failures == 0
    assert (await states(served)) == {label(two.one): "out", label(two.two): "ready"}


@pytest.mark.parametrize("settings", [{"max_attempts": 1}, {"retry_budget": 0}])
async def test_out_moves_a_request_that_may_not_be_repeated(
    settings: dict[str, Any], plane: ControlPlane, start_engine: Start, start_router: Start
) -> None:
    one, two = await start_engine(hang), await start_engine()
    served: Served = await start_router(one, **on(plane, **settings))
    body = {"model": "m", "input": "hello"}
    tasks = [asking(served) for _ in range(5)]
    tasks.append(asyncio.create_task(served.client.post("/v1/responses", json=body)))
    await until(lambda: one.busy == 6)
    add(served, one, two)

    await ordered(served, plane, override(label(one), "out"))

    assert [answer.status_code for answer in await asyncio.gather(*tasks)] == [200] * 6
    assert len(two.requests) == 6


def add(served: Served, *engines: FakeEngine, **more: Any) -> None:
    """Another catalogue: the model with these engines."""
    model = {"name": "m", "backends": [engine.url for engine in engines], **more}
    served.router.core.registry.replace_static(parse_catalogue({"models": [model]}, ENTRY))


async def test_out_after_the_first_byte_the_stream_breaks(two: Two, plane: ControlPlane) -> None:
    served = two.served

    async def begins(request: Received, line: Line) -> None:
        await line.send(SSE_HEAD, chunk(event("one")))
        await line.gone()

    two.one.script = two.two.script = begins
    async with quiet(served), raw_client(served.port) as client:
        await client.send(post(URL, {**CHAT, "stream": True}))
        received = await client.reader.readuntil(b"one")
        used = two.one if two.one.busy else two.two

        await ordered(served, plane, override(label(used), "out"))
        received += await client.reader.read()
        await until(lambda: not used.busy)

    # Between two events: the error as an event, and the connection ends without the end of the body.
    assert b'"code":"upstream_stream_interrupted"' in received.replace(b'": "', b'":"')
    assert not received.endswith(LAST_CHUNK)
    assert served.lines[-1]["outcome"] == "reset"


async def test_out_in_the_middle_of_a_whole_answer_is_an_error(
    plane: ControlPlane, start_engine: Start, start_router: Start
) -> None:
    async def begins(request: Received, line: Line) -> None:
        await line.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{")
        await line.gone()

    one: FakeEngine = await start_engine(begins)
    served: Served = await start_router(one, **on(plane))
    waiting = asking(served)
    await until(lambda: one.busy and backend_of(served, one).in_flight)
    await ordered(served, plane, override(label(one), "out"))

    assert (await waiting).status_code in (502, 503)


async def test_out_ends_streams_by_the_hundred_and_requests_go_on(
    plane: ControlPlane, start_engine: Start, start_router: Start
) -> None:
    async def begins(request: Received, line: Line) -> None:
        await line.send(SSE_HEAD, chunk(event("one")))
        await line.gone()

    one: FakeEngine = await start_engine(begins)
    served: Served = await start_router(one, **on(plane))
    async with quiet(served):
        tasks = [asking(served, stream=True) for _ in range(90)]
        await until(lambda: one.busy == 90)
        await ordered(served, plane, override(label(one), "out"))
        results = await asyncio.gather(*tasks, return_exceptions=True)

    assert {type(result) for result in results} == {httpx.RemoteProtocolError}
    assert backend_of(served, one).origin.in_flight == 0


async def test_out_of_one_model_leaves_those_of_another_at_the_same_address(
    plane: ControlPlane, start_engine: Start, start_router: Start
) -> None:
    paced = Paced()
    one: FakeEngine = await start_engine(paced)
    models = [{"name": name, "backends": [one.url]} for name in ("m", "n")]
    served: Served = await start_router(models=models, **on(plane))
    mine, other = asking(served, model="m"), asking(served, model="n")
    await paced.arrived(2)

    await ordered(served, plane, override(label(one), "out", model="m"))
    answer = await mine
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_backend_available")
    paced.answer(0)
    paced.answer(1)

    assert (await other).status_code == 200
    assert [row["state"] for row in (await served.client.get("/backends")).json()["data"]] == ["out", "ready"]


async def test_out_during_the_connect_the_request_goes_elsewhere(
    plane: ControlPlane, start_engine: Start, start_router: Start
) -> None:
    one, two = await start_engine(), await start_engine()
    go = asyncio.Event()

    async def resolve(host: str) -> list[str]:
        await go.wait()
        return ["127.0.0.1"]

    url = f"http://engine.test:{one.port}"
    served: Served = await start_router(models=[{"name": "m", "backends": [url]}], resolve=resolve, **on(plane))
    waiting = asking(served)
    [backend] = backends(served).values()
    await until(lambda: backend.in_flight)
    model = {"name": "m", "backends": [url, two.url]}
    served.router.core.registry.replace_static(parse_catalogue({"models": [model]}, ENTRY))

    await ordered(served, plane, override(f"engine.test:{one.port}", "out"))
    go.set()

    assert (await waiting).status_code == 200
    assert one.requests == []


async def test_out_wins_over_drain(two: Two, plane: ControlPlane) -> None:
    drain, out = override(label(two.one)), override(label(two.one), "out", model="m")
    await ordered(two.served, plane, drain, out)
    assert (await states(two.served))[label(two.one)] == "out"

    await ordered(two.served, plane, drain)
    assert (await states(two.served))[label(two.one)] == "draining"


async def test_a_drain_becomes_an_out(plane: ControlPlane, start_engine: Start, start_router: Start) -> None:
    one: FakeEngine = await start_engine(hang)
    served: Served = await start_router(one, **on(plane))
    waiting = asking(served)
    await until(lambda: one.busy)
    await ordered(served, plane, override(label(one)))
    assert one.busy == 1

    await ordered(served, plane, override(label(one), "out"))

    assert (await waiting).status_code == 503
    await until(lambda: not one.busy)


async def test_a_client_that_leaves_as_its_backend_is_taken_out_leaves_nothing(two: Two, plane: ControlPlane) -> None:
    two.one.script = two.two.script = hang
    async with quiet(two.served):
        async with raw_client(two.served.port) as client:
            await client.send(post(URL, CHAT))
            await until(lambda: two.one.busy + two.two.busy == 1)
            await ordered(two.served, plane, override(label(two.one), "out"))
        await until(lambda: not two.one.busy + two.two.busy)


async def all_of(session: ClientConnection) -> None:
    while True:
        await session.recv()


async def test_out_ends_a_session(plane: ControlPlane, start_router: Start) -> None:
    engine = await RealtimeEngine().start()
    try:
        models = [{"name": "voice", "backends": [engine.url]}]
        served: Served = await start_router(models=models, **on(plane, realtime="on"))
        url = f"ws://127.0.0.1:{served.port}/v1/realtime?model=voice"
        async with connect(url, proxy=None) as session:
            await ordered(served, plane, override(engine.url.partition("://")[2]))
            # A drain leaves it.
            await (await session.ping())
            await ordered(served, plane, override(engine.url.partition("://")[2], "out"))
            with pytest.raises(ConnectionClosedError) as closed:
                await all_of(session)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1011
    finally:
        await engine.stop()


async def test_out_of_the_first_of_two_hedged_attempts_the_second_one_answers(
    plane: ControlPlane, start_engine: Start, start_router: Start
) -> None:
    paced = Paced()
    engines = [await start_engine(paced) for _ in range(2)]
    served: Served = await start_router(*engines, entry={"hedge": {"after": 50, "budget": 0.5}}, **on(plane))
    waiting = [asking(served) for _ in range(2)]
    await paced.arrived(3)
    # The one that is asked by both, or by any: its attempts end, and the others go on.
    await ordered(served, plane, override(label(engines[0]), "out"))
    for number in range(3):
        paced.answer(number)
    await until(lambda: all(task.done() for task in waiting) or len(paced.who) > 3)
    for number in range(3, len(paced.who)):
        paced.answer(number)

    assert [answer.status_code for answer in await asyncio.gather(*waiting)] == [200, 200]


# All backends of a model


@pytest.mark.parametrize("action", ["drain", "out"])
async def test_without_a_backend_the_answer_is_503(action: str, two: Two, plane: ControlPlane) -> None:
    await ordered(two.served, plane, override(label(two.one), action), override(label(two.two)))

    answer = await two.served.chat()

    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "no_backend_available"
    assert int(answer.headers["retry-after"]) >= 1
    assert f"{action} by an override (driver)" in str(two.served.lines[-1])
    assert two.one.requests == two.two.requests == []


async def test_an_only_backend_is_no_exception(plane: ControlPlane, start_engine: Start, start_router: Start) -> None:
    one: FakeEngine = await start_engine()
    served: Served = await start_router(one, **on(plane))
    await ordered(served, plane, override(label(one)))

    assert (await served.chat()).status_code == 503
    assert one.requests == []


async def test_with_hold_requests_wait_for_the_return(
    plane: ControlPlane, start_engine: Start, start_router: Start
) -> None:
    paced = Paced()
    one: FakeEngine = await start_engine(paced)
    served: Served = await start_router(one, entry={"hold": 20}, **on(plane))
    before = asking(served)
    await paced.arrived(1)
    await ordered(served, plane, override(label(one), "out"))
    # The one that was in flight is held, too.
    after = asking(served)
    await until(lambda: plane.reports[-1]["models"][0]["queued"] == 2)

    await ordered(served, plane)
    await paced.answer_all(3)

    assert [answer.status_code for answer in (await before, await after)] == [200, 200]


async def test_the_time_of_a_request_goes_on_while_it_is_held(
    plane: ControlPlane, start_engine: Start, start_router: Start
) -> None:
    one: FakeEngine = await start_engine(hang)
    loop = asyncio.get_running_loop()
    served: Served = await start_router(one, entry={"hold": 60, "timeouts": {"total": 4}}, **on(plane))
    began = loop.time()
    waiting = asking(served)
    await until(lambda: one.busy)
    await asyncio.sleep(3)
    await ordered(served, plane, override(label(one), "out"))

    answer = await waiting
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_loading")
    # It would be 7 s if the time began anew.
    assert 3.5 < loop.time() - began < 6.5


async def test_a_member_and_a_shadow_on_a_backend_that_is_out_end_alone(
    plane: ControlPlane, start_engine: Start, start_router: Start
) -> None:
    slow, paced = await start_engine(hang), Paced()
    quick: FakeEngine = await start_engine(paced)
    models = [
        {"name": "slow", "backends": [slow.url]},
        {"name": "quick", "backends": [quick.url], "shadow": {"to": "slow", "sample": 1}},
        {"name": "race", "race": {"members": ["slow", "quick"]}},
    ]
    served: Served = await start_router(models=models, **on(plane))
    copied, raced = asking(served, model="quick"), asking(served, model="race")
    await paced.arrived(2)
    # A member, and a copy of each request to the other.
    await until(lambda: slow.busy == 3)

    await ordered(served, plane, override(label(slow), "out"))
    await until(lambda: not slow.busy)
    paced.answer(0)
    paced.answer(1)

    assert [answer.status_code for answer in await asyncio.gather(copied, raced)] == [200, 200]
    assert not served.router.core.fleet.models["slow"].in_flight


async def test_the_fallback_of_a_model_without_backends_answers(
    plane: ControlPlane, start_engine: Start, start_router: Start
) -> None:
    one, two = await start_engine(hang), await start_engine()
    models = [
        {"name": "m", "backends": [one.url], "fallbacks": ["n"]},
        {"name": "n", "backends": [two.url]},
    ]
    served: Served = await start_router(models=models, **on(plane))
    waiting = asking(served)
    await until(lambda: one.busy)
    await ordered(served, plane, override(label(one), "out"))

    for answer in (await waiting, await served.chat()):
        assert answer.headers["x-inference-model"] == "n"


async def test_adapters_are_drained_with_their_model(
    plane: ControlPlane, start_engine: Start, start_router: Start
) -> None:
    one, two = await start_engine(), await start_engine()
    served: Served = await start_router(one, two, entry={"adapters": ["lora"]}, **on(plane))
    await ordered(served, plane, override(label(one), model="m"))

    for _ in range(10):
        assert (await served.chat(model="lora")).status_code == 200

    assert (len(one.requests), len(two.requests)) == (0, 10)


async def test_the_key_of_a_conversation_moves_and_comes_back(
    plane: ControlPlane, start_engine: Start, start_router: Start
) -> None:
    engines = [await start_engine() for _ in range(3)]
    served: Served = await start_router(*engines, entry={"balancing": "prefix_affinity"}, **on(plane))
    await served.chat()
    [home] = [engine for engine in engines if engine.requests]
    await ordered(served, plane, override(label(home)))
    for _ in range(5):
        await served.chat()
    assert len(home.requests) == 1
    assert sorted(len(engine.requests) for engine in engines) == [0, 1, 5]

    await ordered(served, plane)
    await served.chat()

    assert len(home.requests) == 2


async def test_the_ids_of_a_variant_without_backends_go_to_the_others(
    plane: ControlPlane, start_engine: Start, start_router: Start
) -> None:
    one, two = await start_engine(), await start_engine()
    models = [
        {"name": "a", "backends": [one.url]},
        {"name": "b", "backends": [two.url]},
        {"name": "chat", "split": {"variants": {"a": 90, "b": 10}}},
    ]
    served: Served = await start_router(models=models, **on(plane))
    await ordered(served, plane, override(label(one)))

    answers = [await served.chat(model="chat", user=f"user-{number}") for number in range(10)]

    assert {answer.headers["x-inference-variant"] for answer in answers} == {"b"}


async def test_status_shows_it(two: Two, plane: ControlPlane, capsys: pytest.CaptureFixture[str]) -> None:
    await ordered(two.served, plane, override(label(two.one)), override(label(two.two), "out", reason="fire"))

    result = await asyncio.to_thread(status.run, argparse.Namespace(url=two.served.url, json=False))

    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert result == 1
    assert [(row[1], row[2], row[-1]) for row in rows] == [
        (label(two.one), "draining", "driver"),
        (label(two.two), "out", "fire"),
    ]


# Stored responses: only the backend that made one has it.

STORED = {"id": "resp_1", "object": "response", "status": "completed", "output": []}


@pytest.mark.parametrize(("action", "expected"), [("drain", 200), ("out", 503)])
async def test_a_stored_response_is_read_from_a_drained_backend_and_not_from_one_that_is_out(
    action: str, expected: int, two: Two, plane: ControlPlane
) -> None:
    async def responds(request: Received, line: Line) -> None:
        await line.send(json_response(STORED))

    for engine in (two.one, two.two):
        engine.script = engine.page = responds
    await two.served.client.post("/v1/responses", json={"model": "m", "input": "x"})
    home = two.one if two.one.requests else two.two
    await ordered(two.served, plane, override(label(home), action))

    assert (await two.served.client.get("/v1/responses/resp_1")).status_code == expected


# The end


async def test_a_return_is_a_slow_start(two: Two, plane: ControlPlane) -> None:
    await ordered(two.served, plane, override(label(two.one), "out"))
    await ordered(two.served, plane)

    assert (await states(two.served))[label(two.one)] == "recovering"
    assert 0.1 <= backend_of(two.served, two.one).share < 0.5
    two.one.script = two.two.script = hang
    tasks = [asking(two.served) for _ in range(30)]
    await until(lambda: two.one.busy + two.two.busy == 30)
    # A tenth of its weight, or a little more by now
    assert 1 <= two.one.busy <= 9
    for task in tasks:
        task.cancel()


async def test_it_ends_by_its_time_also_without_a_control_plane(
    start_engine: Start, start_router: Start, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = await start_engine(), await start_engine()
    async with ControlPlane() as plane:
        plane.models = None
        served: Served = await start_router(one, two, **on(plane))
        await ordered(served, plane, override(label(one), expires_in=3), override(label(two), expires_in=600))
        await plane.stop()
        assert (await states(served)) == {label(one): "draining", label(two): "draining"}

        await until(lambda: backend_of(served, one).override is None)

        assert (await served.chat()).status_code == 200
        assert one.requests
        assert two.requests == []
        assert await served.metric("inference_api_overrides_active", action="drain") == 1
        [line] = [line for line in caplog.records if line.message.startswith("the overrides cannot be refreshed")]
        assert line.levelname == "WARNING"


async def test_a_clock_that_is_set_back_makes_none_end_for_good(start_engine: Start, start_router: Start) -> None:
    one: FakeEngine = await start_engine()
    served: Served = await start_router(one)
    core, now = served.router.core, [1000.0]
    async with ControlPlane() as plane, httpx.AsyncClient(base_url=plane.url) as client:
        plane.order({**override(label(one)), "expires_at": "1970-01-01T00:20:00Z"})
        overrides = Overrides(core, client, 600, now=lambda: now[0], look=0.01)
        await overrides.start()
        task = asyncio.create_task(overrides.run())
        assert backend_of(served, one).override
        for moment, is_ordered in ((1200.0, False), (1199.9, True), (5000.0, False)):
            now[0] = moment
            await until(lambda wanted=is_ordered: bool(backend_of(served, one).override) is wanted)  # type: ignore[misc]
        task.cancel()
        await asyncio.wait([task])


async def test_one_that_has_ended_is_not_obeyed_though_it_is_listed(two: Two, plane: ControlPlane) -> None:
    holds, over = override(label(two.one)), override(label(two.two), "out", expires_in=-1)
    plane.order(holds, over)
    await until(lambda: plane.reports and plane.reports[-1]["overrides"] == [holds["id"]])

    assert await states(two.served) == {label(two.one): "draining", label(two.two): "ready"}


async def test_a_backend_that_is_broken_when_it_returns_stays_away(two: Two, plane: ControlPlane) -> None:
    backend = backend_of(two.served, two.one)
    await ordered(two.served, plane, override(label(two.one)))
    for _ in range(3):
        two.served.router.core.health.checked(backend.origin, False)
    assert (await states(two.served))[label(two.one)] == "draining"

    await ordered(two.served, plane)

    assert (await states(two.served))[label(two.one)] == "unhealthy"


# Other catalogues and addresses


async def test_it_survives_a_reload_and_backends_that_come_have_it_at_once(
    two: Two, plane: ControlPlane, start_engine: Start, tmp_path: Path
) -> None:
    served, third = two.served, await start_engine()
    await ordered(served, plane, override(label(two.one)), override(label(third), "out"))
    since = backend_of(served, two.one).override
    path = tmp_path / "new.json"

    def load(*engines: FakeEngine) -> None:
        path.write_bytes(orjson.dumps({"models": [{"name": "m", "backends": [engine.url for engine in engines]}]}))
        served.router.core.registry.replace_static(load_catalogue(path, ENTRY))

    load(third)
    assert backend_of(served, third).is_out
    assert (await served.chat()).status_code == 503
    load(two.one, two.two, third)
    assert backend_of(served, two.one).override == since
    for _ in range(20):
        assert (await served.chat()).status_code == 200

    assert len(two.two.requests) == 20


async def test_it_survives_a_change_of_dns(plane: ControlPlane, start_engine: Start, start_router: Start) -> None:
    one: FakeEngine = await start_engine()
    found = ["127.0.0.1"]

    async def resolve(host: str) -> list[str]:
        return found

    entry = {"name": "m", "backends": [{"url": f"http://engine.test:{one.port}", "discovery": "dns"}]}
    served: Served = await start_router(models=[entry], resolve=resolve, **on(plane, discovery_interval=0.05))
    await until(lambda: backends(served))
    await ordered(served, plane, override(f"127.0.0.2:{one.port}", "out"), override(f"127.0.0.1:{one.port}"))

    found[:] = ["127.0.0.2"]
    await until(lambda: f"127.0.0.2:{one.port}" in backends(served))
    assert backends(served)[f"127.0.0.2:{one.port}"].is_out
    found[:] = ["127.0.0.1"]
    await until(lambda: f"127.0.0.1:{one.port}" in backends(served))

    assert await states(served) == {f"127.0.0.1:{one.port}": "draining"}


# A start without a control plane


async def restarted(served_by: dict[str, Any], catalogue: Any) -> Any:
    settings = make_settings(served_by, GROUPS)
    return settings, build(settings, Outside(catalogue=parse_catalogue(catalogue)))


async def test_a_start_without_a_registry_obeys_what_the_file_has(
    start_engine: Start, start_router: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, cache = await start_engine(), tmp_path / "cache"
    port = free_port()
    async with ControlPlane(port) as plane:
        plane.models = None
        plane.give("/policy", policy_of())
        settings = on(plane, policy="registry", policy_cache=cache)
        served: Served = await start_router(one, **settings)
        await ordered(served, plane, override(label(one), "out"))
        await until(lambda: cache.exists() and label(one).encode() in cache.read_bytes())
        assert cache.stat().st_mode & 0o777 == 0o600

    settings, router = await restarted(settings, {"models": [{"name": "m", "backends": [one.url]}]})
    async with serving(router, settings) as url, httpx.AsyncClient(base_url=url) as client:
        answer = await client.post(URL, json=CHAT)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_backend_available")
        assert any("those of INFERENCE_API_POLICY_CACHE hold" in line.message for line in caplog.records)
        # The control plane is back, and has none any more.
        async with ControlPlane(port) as plane:
            plane.models = None
            plane.give("/policy", policy_of())
            await until(lambda: router.core.fleet.models["m"].backends[0].override is None)
            assert (await client.post(URL, json=CHAT)).status_code == 200
    assert one.asked.count("/x") == 0


@pytest.mark.parametrize("content", [b"", b"{}\n", b'{"overrides": 2}\n{}', b'{"overrides": 1}\nx'])
async def test_a_file_without_overrides_stops_no_start(
    content: bytes, start_engine: Start, start_router: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    cache.write_bytes(content)
    settings = {"registry_url": f"http://127.0.0.1:{free_port()}", "report_interval": 600}
    served: Served = await start_router(await start_engine(), policy="registry", policy_cache=cache, **settings)

    assert (await served.chat()).status_code == 200
    assert any("INFERENCE_API_POLICY_CACHE gives no overrides" in line.message for line in caplog.records)


async def test_the_time_of_the_file_stays_that_of_the_policy(
    plane: ControlPlane, start_engine: Start, start_router: Start, tmp_path: Path
) -> None:
    one, cache = await start_engine(), tmp_path / "cache"
    plane.give("/policy", policy_of())
    served: Served = await start_router(one, **on(plane, policy="registry", policy_cache=cache))
    await until(lambda: plane.waiting["/policy"] and plane.waiting["/overrides"])
    await until(lambda: cache.exists() and b'"overrides"' in cache.read_bytes())
    written = cache.stat().st_mtime_ns

    await ordered(served, plane, override(label(one)))
    await until(lambda: label(one).encode() in cache.read_bytes())

    assert cache.stat().st_mtime_ns == written


# reset_circuit


async def test_a_reset_closes_the_circuit_once_for_each_id(two: Two, plane: ControlPlane) -> None:
    served, backend = two.served, backend_of(two.served, two.one)
    core = served.router.core

    def opens() -> None:
        for _ in range(5):
            core.health._failed(backend.origin, asyncio.current_task())  # type: ignore[arg-type]
        backend.errors, backend.recent = 3, 3.0

    opens()
    assert (await states(served))[label(two.one)] == "open"
    reset = override(label(two.one), "reset_circuit")
    await ordered(served, plane, reset)

    # It is closed, and the backend comes back slowly.
    assert (await states(served))[label(two.one)] == "recovering"
    assert (backend.origin.failures, backend.errors, backend.recent, backend.last_error) == (0, 0, 0.0, None)
    assert await served.metric("inference_api_overrides_active", action="out") == 0

    # It stays listed, beside others that change; the circuit opens again, and stays so.
    opens()
    drain = override(label(two.two))
    await ordered(served, plane, reset, drain)
    await ordered(served, plane)
    await ordered(served, plane, reset)
    assert (await states(served))[label(two.one)] == "open"

    await ordered(served, plane, override(label(two.one), "reset_circuit", model="m"))
    assert (await states(served))[label(two.one)] == "recovering"


async def test_a_reset_closes_a_circuit_of_one_model(two: Two, plane: ControlPlane) -> None:
    backend = backend_of(two.served, two.one)
    core, now = two.served.router.core, asyncio.get_running_loop().time()
    core.health._faults._comparisons.begin(backend, now)
    core.health._breaker.open(backend.circuit, now)
    core.fleet.models["m"].refresh()
    await ordered(two.served, plane, override(label(two.one), "reset_circuit", model="other"))
    assert (await states(two.served))[label(two.one)] == "open"

    await ordered(two.served, plane, override(label(two.one), "reset_circuit", model="m"))

    assert (await states(two.served))[label(two.one)] == "recovering"
    assert not backend.compared
    assert (await two.served.chat()).status_code == 200


async def test_a_reset_of_a_good_backend_changes_nothing(two: Two, plane: ControlPlane) -> None:
    await ordered(two.served, plane, override(label(two.one), "reset_circuit"))

    assert await states(two.served) == {label(two.one): "ready", label(two.two): "ready"}


# Documents

GOOD = override("a:1")
BAD: dict[str, tuple[Any, str]] = {
    "no JSON": (b"<", "unexpected character"),
    "no object": ([], "it has no list of `overrides`"),
    "no list": ({"overrides": {}}, "it has no list of `overrides`"),
    "too many": ({"overrides": [1] * (MOST + 1)}, f"it has {MOST + 1} overrides; the limit is {MOST}"),
    "no object in it": ({"overrides": [GOOD, 7]}, "overrides.1: must be an object"),
    "no model": (
        {"overrides": [{key: value for key, value in GOOD.items() if key != "model"}]},
        "overrides.0: model is required",
    ),
    "another id": ({"overrides": [{**GOOD, "id": "x"}]}, "overrides.0: id must be"),
    "no label": ({"overrides": [{**GOOD, "backend": ""}]}, "overrides.0: backend must be a text"),
    "no text": ({"overrides": [{**GOOD, "reason": 7}]}, "overrides.0: reason must be a text"),
    "no name": ({"overrides": [{**GOOD, "model": 7}]}, "overrides.0: model must be a name, or null"),
    "no time": ({"overrides": [{**GOOD, "expires_at": "tomorrow"}]}, "overrides.0: must be a time in UTC"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_document_that_is_not_valid_is_refused_as_a_whole(case: str) -> None:
    document, reason = BAD[case]

    with pytest.raises(ValueError, match=r".") as refused:
        read_orders([document if isinstance(document, bytes) else orjson.dumps(document)])
    assert reason in str(refused.value)


async def test_after_a_bad_document_the_last_good_one_holds(
    two: Two, plane: ControlPlane, caplog: pytest.LogCaptureFixture
) -> None:
    await ordered(two.served, plane, override(label(two.one)))
    plane.give("/overrides", {"overrides": 7})
    await until(lambda: any("cannot be refreshed" in line.message for line in caplog.records))
    await asyncio.sleep(0.3)
    assert (await states(two.served))[label(two.one)] == "draining"
    assert sum("cannot be refreshed" in line.message for line in caplog.records) == 1

    await ordered(two.served, plane)
    assert any("gives the overrides again" in line.message for line in caplog.records)


async def test_an_action_that_is_not_known_is_ignored_and_told_once(
    two: Two, plane: ControlPlane, caplog: pytest.LogCaptureFixture
) -> None:
    drain = override(label(two.one))
    for _ in range(2):
        plane.order({**override(label(two.two)), "action": "throttle", "new": 1}, drain)
        etag = plane.etag("/overrides")
        await until(lambda etag=etag: plane.reports and plane.reports[-1]["etags"]["overrides"] == etag)  # type: ignore[misc]

    assert await states(two.served) == {label(two.one): "draining", label(two.two): "ready"}
    assert [line.message for line in caplog.records if "unknown" in line.message] == [
        "overrides with unknown actions are ignored: throttle"
    ]


def test_what_a_document_orders() -> None:
    def order(backend: str, action: Any, model: str | None = None, ends: float | None = None) -> Order:
        return Order(f"{backend}{action}{model}", backend, model, action, "x", ends)

    drain, out = order("a", "drain", ends=20.0), order("a", "out", "m")
    orders = Orders([drain, out, order("b", "drain", ends=10.0), order("c", "reset_circuit", ends=15.0)], 10.0)

    assert (orders.of("a", "m"), orders.of("a", "n"), orders.of("b", "m"), orders.of("c", "m")) == (
        out,
        drain,
        None,
        None,
    )
    assert (orders.count("drain"), orders.count("out")) == (1, 1)
    # One that has ended holds again if the clock is set back.
    assert [orders.are_old(now) for now in (9.9, 10.0, 14.9, 15.0)] == [True, False, False, True]
    assert not Orders([order("a", "drain")]).are_old(1e12)
    assert Orders([order("a", "drain", "m"), order("a", "out")]).of("a", "m") == order("a", "out")


def test_a_reason_is_shown_in_one_line() -> None:
    [order], unknown = read_orders([orjson.dumps({"overrides": [override("a", reason="one\ntwo\x1b" + "x" * 900)]})])

    assert order.reason.startswith("one two x")
    assert len(order.reason) == 500
    assert unknown == set()
    assert order.ends is None
    assert at(0).endswith("Z")


# Many


async def answers_in_pieces(request: Received, line: Line) -> None:
    pieces = [chunk(event()) for _ in range(5)]
    if b'"stream":true' not in request.body:
        await asyncio.sleep(0.03)
        return await line.send(json_response(COMPLETION))
    await line.send(SSE_HEAD)
    for piece in (*pieces, chunk(DONE) + LAST_CHUNK):
        await asyncio.sleep(0.01)
        await line.send(piece)


async def test_orders_in_quick_succession_fail_no_request_but_streams_that_have_begun(
    plane: ControlPlane, start_engine: Start, start_router: Start
) -> None:
    rand = random.Random(4)
    engines = [await start_engine(answers_in_pieces) for _ in range(3)]
    served: Served = await start_router(*engines, **on(plane, registry_refresh=600))
    over = asyncio.Event()
    results: set[Any] = set()

    async def client(stream: bool) -> None:
        while not over.is_set():
            try:
                answer = await served.chat(stream=stream)
                results.add((stream, answer.status_code))
            except httpx.RemoteProtocolError:
                results.add((stream, "broken"))

    async with quiet(served), asyncio.TaskGroup() as group:
        for number in range(20):
            group.create_task(client(number % 2 == 0))
        for _ in range(20):
            chosen = rand.sample(engines, rand.randint(0, 2))
            plane.order(*(override(label(one), rand.choice(["drain", "out", "reset_circuit"])) for one in chosen))
            await asyncio.sleep(rand.random() * 0.2)
        await ordered(served, plane)
        over.set()

    assert results <= {(True, 200), (False, 200), (True, "broken")}
    assert {(True, 200), (False, 200)} <= results
    assert [(one.origin.failures, one.last_error) for one in backends(served).values()] == [(0, None)] * 3


async def test_ten_thousand_overrides_for_six_thousand_backends_do_not_hold_the_loop() -> None:
    models = [
        {"name": f"m{number}", "backends": [f"http://10.0.{number // 250}.{number % 250}:{port}" for port in (1, 2, 3)]}
        for number in range(2000)
    ]
    settings = make_settings({"registry_url": "http://127.0.0.1:9", "report_interval": 5}, GROUPS)
    core = build(settings, Outside(catalogue=parse_catalogue({"models": models}))).core
    assert core.registry_client is not None
    overrides = Overrides(core, core.registry_client, 600)
    labels = [backend.label for model in core.fleet.models.values() for backend in model.backends]
    orders = [override(one) for one in (*labels, *(f"x:{number}" for number in range(MOST - len(labels))))]
    content = orjson.dumps({"overrides": orders})
    turns: list[float] = []

    async def watch() -> None:
        while True:
            # Of the processor: others use this machine, too.
            began = time.thread_time()
            await asyncio.sleep(0)
            turns.append(time.thread_time() - began)

    # What all tests before have left is not looked at: the server freezes what it starts with.
    gc.collect()
    gc.freeze()
    try:
        watching = asyncio.create_task(watch())
        await overrides.take([content])
        drained = orjson.loads(await ReportDocument(core, "USD").body())
        await overrides.take([b'{"overrides": []}'])
        back = orjson.loads(await ReportDocument(core, "USD").body())
        watching.cancel()
    finally:
        gc.unfreeze()

    assert len(drained["overrides"]) == MOST
    assert {row["state"] for row in drained["backends"]} == {"draining"}
    assert {row["state"] for row in back["backends"]} == {"recovering"}
    assert len(back["backends"]) == 6000
    # All of it takes 0.3 s.
    assert max(turns) < 0.15
