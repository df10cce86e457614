"""Backends that fail, hang, refuse and come back, behind a whole router: what its clients notice of it."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import pytest

from inference_api.routing.health import Health
from tests.fakes import (
    CHAT,
    COMPLETION,
    DONE,
    LAST_CHUNK,
    SSE_HEAD,
    STREAM,
    FakeEngine,
    Line,
    Received,
    Script,
    ScriptedServer,
    answer,
    chunk,
    event,
    hang,
    json_response,
    post,
    raw,
    raw_client,
    sse,
    until,
)

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
CHAT_URL = "/v1/chat/completions"
UNAVAILABLE = raw(json_response({"error": {"message": "loading"}}, "503 Service Unavailable"))


@pytest.fixture
async def start_server() -> AsyncIterator[Start]:
    """`await start_server(script)` -> an engine whose script answers GET /health as well."""
    async with AsyncExitStack() as stack:

        async def start(script: Script) -> ScriptedServer:
            server = ScriptedServer(script)
            await stack.enter_async_context(server)
            return server

        yield start


async def again(engine: FakeEngine, script: Script = answer) -> None:
    """Start an engine that was stopped, on the port that it had."""
    engine.requests.clear()
    engine.script = script
    await engine.__aenter__()


async def refuse_until_open(served: Any, engine: FakeEngine) -> None:
    """Stop the only engine, and send what it takes for the router to notice."""
    await engine.stop()
    for _ in range(5):
        assert (await served.chat()).status_code == 503
    assert await is_open(served, engine) == 1


def label(engine: FakeEngine) -> str:
    return engine.url.removeprefix("http://")


async def is_open(served: Any, engine: FakeEngine) -> float:
    return float(await served.metric("inference_api_backend_circuit_open", backend=label(engine)))


async def is_up(served: Any, engine: FakeEngine) -> float:
    return float(await served.metric("inference_api_backend_up", backend=label(engine)))


async def eventually(measure: Callable[[], Any], value: float) -> None:
    async with asyncio.timeout(30):
        while True:
            if await measure() == value:
                return
            await asyncio.sleep(0.01)


# The circuit breaker


async def test_t46_client_errors_never_open_a_circuit(start_engine: Start, start_router: Start) -> None:
    engine = await start_engine()
    served = await start_router(engine, max_attempts=1)

    for status in ("400 Bad Request", "404 Not Found", "422 Unprocessable Entity", "429 Too Many Requests"):
        engine.script = raw(json_response({"error": {}}, status))
        for _ in range(5):
            answers = await asyncio.gather(*(served.chat() for _ in range(50)))
            assert {response.status_code for response in answers} == {int(status[:3])}

    engine.script = answer
    assert await is_open(served, engine) == 0
    assert (await served.chat()).status_code == 200
    assert len(engine.requests) == 1001


async def test_t47_clients_that_leave_never_open_a_circuit(start_engine: Start, start_router: Start) -> None:
    engine: FakeEngine = await start_engine(hang)
    served = await start_router(engine)

    async def leave(document: dict[str, Any]) -> None:
        async with raw_client(served.port) as client:
            await client.send(post(CHAT_URL, document))
            await until(lambda: len(engine.requests) >= begun)

    for _ in range(20):
        begun = len(engine.requests) + 50
        await asyncio.gather(*(leave(CHAT if number % 2 else STREAM) for number in range(50)))
    await until(lambda: len(served.lines) == 1000)

    assert {line["outcome"] for line in served.lines} == {"client_gone"}
    engine.script = answer
    assert await is_open(served, engine) == 0
    assert (await served.chat()).status_code == 200


async def test_t48_half_open_lets_exactly_one_probe_through(start_engine: Start, start_router: Start) -> None:
    engine: FakeEngine = await start_engine()
    served = await start_router(engine, breaker_cooldown=0.1, connect_timeout=30, health_interval=600)
    await refuse_until_open(served, engine)
    turned_away = asyncio.Event()

    async def waits(request: Received, line: Line) -> None:
        await turned_away.wait()
        await answer(request, line)

    await again(engine, waits)
    await asyncio.sleep(0.2)
    codes: Counter[int] = Counter()

    async def chat() -> None:
        response = await served.chat()
        codes[response.status_code] += 1
        if response.status_code == 503:
            assert response.json()["error"]["code"] == "no_backend_available"
            assert 1 <= int(response.headers["retry-after"]) <= 60

    requests = [asyncio.create_task(chat()) for _ in range(500)]
    await until(lambda: codes[503] == 499, seconds=40)
    assert len(engine.requests) == 1
    turned_away.set()
    await asyncio.gather(*requests)

    assert codes == {503: 499, 200: 1}
    assert (await served.chat()).status_code == 200
    assert await is_open(served, engine) == 0


async def test_t49_a_probe_whose_client_leaves_makes_room_for_the_next(
    start_engine: Start, start_router: Start
) -> None:
    engine: FakeEngine = await start_engine()
    served = await start_router(engine, breaker_cooldown=0.1, connect_timeout=30, health_interval=600)
    await refuse_until_open(served, engine)
    await again(engine, hang)
    await asyncio.sleep(0.2)

    for number in range(1, 4):
        async with raw_client(served.port) as client:
            await client.send(post(CHAT_URL, CHAT))
            await until(lambda: len(engine.requests) == number)  # noqa: B023
            assert (await served.chat()).status_code == 503
        await until(lambda: engine.busy == 0)
        assert await is_open(served, engine) == 1
    engine.script = answer

    assert (await served.chat()).status_code == 200
    assert await is_open(served, engine) == 0


async def test_t50_a_probe_that_is_a_long_stream_closes_when_its_answer_begins(
    start_engine: Start, start_router: Start
) -> None:
    engine: FakeEngine = await start_engine()
    served = await start_router(engine, breaker_cooldown=0.1, connect_timeout=30, health_interval=600)
    await refuse_until_open(served, engine)
    await again(engine, sse(event(), then=Line.gone))
    await asyncio.sleep(0.2)

    async with raw_client(served.port) as client:
        await client.send(post(CHAT_URL, STREAM))
        await client.reader.readuntil(b"data: ")
        assert await is_open(served, engine) == 0
        assert engine.busy == 1
        engine.script = answer
        answers = await asyncio.gather(*(served.chat() for _ in range(20)))

    assert {response.status_code for response in answers} == {200}


async def test_a_backend_that_is_down_costs_a_few_attempts_and_then_none(
    start_engine: Start, start_router: Start
) -> None:
    dead, alive = await start_engine(), await start_engine()
    served = await start_router(dead, alive, entry={"balancing": "round_robin"})
    await dead.stop()

    answers = [await served.chat() for _ in range(40)]

    assert {response.status_code for response in answers} == {200}
    refused = await served.metric("inference_api_upstream_attempts_total", outcome="connect_failed")
    assert refused == 5
    assert [await is_open(served, engine) for engine in (dead, alive)] == [1, 0]


async def test_a_probe_that_fails_is_answered_by_another_backend(start_engine: Start, start_router: Start) -> None:
    dead, alive = await start_engine(), await start_engine()
    served = await start_router(dead, alive, entry={"balancing": "round_robin"}, breaker_cooldown=0.05)
    await dead.stop()

    for _ in range(60):
        assert (await served.chat()).status_code == 200
        await asyncio.sleep(0.01)
    assert await is_open(served, dead) == 1
    await again(dead)
    await asyncio.sleep(0.1)

    answers = [await served.chat() for _ in range(10)]

    assert {response.status_code for response in answers} == {200}
    assert len(dead.requests) >= 1
    assert await is_open(served, dead) == 0


@pytest.mark.parametrize("script", [sse(event(), then=Line.reset), raw(close=True), UNAVAILABLE])
async def test_broken_streams_silence_and_503_open_a_circuit(
    script: Script, start_engine: Start, start_router: Start
) -> None:
    broken, alive = await start_engine(script), await start_engine()
    served = await start_router(broken, alive, entry={"balancing": "round_robin"})

    for _ in range(10):
        async with raw_client(served.port) as client:
            await client.send(post(CHAT_URL, STREAM, b"connection: close\r\n"))
            await client.reader.read(-1)
    assert [await is_open(served, engine) for engine in (broken, alive)] == [1, 0]

    count = len(broken.requests)
    assert {(await served.chat()).status_code for _ in range(10)} == {200}
    assert len(broken.requests) == count


# Panic, and the only backend


async def test_t51_with_most_backends_out_all_are_used(start_engine: Start, start_router: Start) -> None:
    engines = [await start_engine(UNAVAILABLE), await start_engine(UNAVAILABLE), *[await start_engine() for _ in "cd"]]
    served = await start_router(*engines, entry={"balancing": "round_robin"}, max_attempts=1, breaker_cooldown=3600)

    async def traffic() -> list[int]:
        """Requests at each engine, of forty."""
        for engine in engines:
            engine.requests.clear()
        for _ in range(40):
            await served.chat()
        return [len(engine.requests) for engine in engines]

    await traffic()
    assert await served.metric("inference_api_panic_mode", model_name="m") == 0
    assert await traffic() == [0, 0, 20, 20]

    engines[2].script = UNAVAILABLE
    await traffic()

    assert [await is_open(served, engine) for engine in engines] == [1, 1, 1, 0]
    assert await served.metric("inference_api_panic_mode", model_name="m") == 1
    assert await traffic() == [10, 10, 10, 10]


async def test_t52_an_only_backend_is_tried_once_a_second_and_is_back_at_once(
    start_engine: Start, start_router: Start
) -> None:
    engine: FakeEngine = await start_engine()
    served = await start_router(engine)
    await refuse_until_open(served, engine)
    loop = asyncio.get_running_loop()

    began, asked = loop.time(), 0
    while loop.time() < began + 1.5:
        assert (await served.chat()).status_code == 503
        asked += 1
    took = loop.time() - began
    refused = await served.metric("inference_api_upstream_attempts_total", outcome="connect_failed")
    assert asked > 20
    assert 1 <= refused - 5 <= took
    assert await served.metric("inference_api_panic_mode", model_name="m") == 0
    await again(engine)

    async def status() -> float:
        return float((await served.chat()).status_code)

    back = loop.time()
    await eventually(status, 200)

    # A second until the next probe; the rest is for a busy machine.
    assert loop.time() - back < 10
    assert {(await served.chat()).status_code for _ in range(20)} == {200}


# Health checks and the watchdog


async def test_a_backend_that_fails_its_health_checks_gets_no_requests_until_it_passes(
    start_server: Start, start_router: Start
) -> None:
    healthy = False

    async def script(request: Received, line: Line) -> None:
        if request.target == "/health" and not healthy:
            await UNAVAILABLE(request, line)
        else:
            await answer(request, line)

    sick, well = await start_server(script), await start_server(answer)
    served = await start_router(sick, well, health_interval=0.05, entry={"balancing": "round_robin"})
    await eventually(lambda: is_up(served, sick), 0)
    assert await served.metric("inference_api_backend_probe_failures_total", backend=label(sick), kind="health") >= 3
    assert (await served.client.get("/readyz")).status_code == 200
    answers = [await served.chat() for _ in range(20)]
    assert {response.json()["id"] for response in answers} == {COMPLETION["id"]}
    assert [request.target for request in sick.requests if request.method == "POST"] == []

    healthy = True
    await eventually(lambda: is_up(served, sick), 1)

    async def is_used() -> bool:
        await served.chat()
        return any(request.method == "POST" for request in sick.requests)

    await eventually(is_used, True)


async def test_what_the_router_asks_for_itself_is_no_sign_of_life(start_engine: Start, start_router: Start) -> None:
    engine = await start_engine()
    served = await start_router(engine, health_interval=0.02)

    await until(lambda: served.router.core.fleet.models["m"].max_model_len and engine.connections > 5)
    assert served.router.core.transport.last_read(engine.url) == 0

    await served.chat()
    assert served.router.core.transport.last_read(engine.url) > 0


@pytest.fixture
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute of silence is over within a second, which is more than a busy machine stands still."""
    monkeypatch.setattr("inference_api.core.Health", partial(Health, poll_every=0.05, stuck_after=1.0))


@pytest.mark.usefixtures("_soon")
async def test_t53_a_hung_engine_is_out_although_its_health_is_200(start_engine: Start, start_router: Start) -> None:
    hung, well = await start_engine(hang), await start_engine()
    served = await start_router(hung, well, health_interval=0.05, entry={"balancing": "round_robin"})
    async with AsyncExitStack() as stack:
        for document in (CHAT, STREAM) * 3:
            client = await stack.enter_async_context(raw_client(served.port))
            await client.send(post(CHAT_URL, document))
        await until(lambda: len(hung.requests) == 3)
        await eventually(lambda: is_up(served, hung), 0)

        assert {(await served.chat()).status_code for _ in range(20)} == {200}
        assert len(hung.requests) == 3
        assert await is_up(served, well) == 1
        hung.script = answer

    # Its clients have left, and a check passes: one request finds out that it is well again.
    async def is_back() -> bool:
        await served.chat()
        return len(hung.requests) > 3

    await eventually(is_back, True)
    await eventually(lambda: is_up(served, hung), 1)
    assert await is_open(served, hung) == 0


@pytest.mark.usefixtures("_soon")
async def test_t53_a_busy_engine_is_not_out(start_server: Start, start_router: Start) -> None:
    """Its /health takes longer than the router waits, and tokens flow."""
    checks = 0

    async def busy(request: Received, line: Line) -> None:
        nonlocal checks
        if request.target == "/health":
            checks += 1
            await hang(request, line)
        elif request.method == "POST":
            await line.send(SSE_HEAD)
            while checks < 12:
                await line.send(chunk(event()))
                await asyncio.sleep(0.01)
            await line.send(chunk(DONE) + LAST_CHUNK)

    engine, other = await start_server(busy), await start_server(answer)
    served = await start_router(
        engine, other, health_interval=0.05, health_timeout=0.1, entry={"balancing": "round_robin"}
    )

    async with asyncio.timeout(10):
        answers = await asyncio.gather(*(served.chat(stream=True) for _ in range(8)))

    assert {response.status_code for response in answers} == {200}
    assert checks >= 12
    assert await is_up(served, engine) == 1


# Sleep


@pytest.mark.parametrize("settings", [{}, {"load_signal_interval": 0.05}], ids=["by default", "with the load signal"])
async def test_t85_a_sleeping_engine_gets_no_requests_although_its_health_is_200(
    start_engine: Start, start_router: Start, settings: dict[str, float]
) -> None:
    """It looks idle, and would hold each request until somebody wakes it."""
    sleeper, other = await start_engine(), await start_engine()
    sleeper.page, other.page = sleep_state(0), sleep_state(1)
    served = await start_router(sleeper, other, health_interval=0.05, entry={"balancing": "round_robin"}, **settings)
    await eventually(lambda: is_asleep(served, sleeper), 1)
    sleeper.script = hang

    assert {(await served.chat()).status_code for _ in range(20)} == {200}
    assert (len(sleeper.requests), len(other.requests)) == (0, 20)
    # Out, and not failed: nothing that an alert looks at.
    assert (await is_up(served, sleeper), await is_open(served, sleeper)) == (1, 0)
    assert await served.metric("inference_api_panic_mode", model_name="m") == 0

    other.page = sleep_state(0)
    await eventually(lambda: is_asleep(served, other), 1)
    response = await served.chat()
    assert (response.status_code, response.json()["error"]["code"]) == (503, "no_backend_available")
    assert (response.headers["retry-after"], "asleep" in response.json()["error"]["message"]) == ("10", True)

    sleeper.page, sleeper.script = sleep_state(1), answer
    await eventually(lambda: is_asleep(served, sleeper), 0)
    assert (await served.chat()).status_code == 200
    assert len(sleeper.requests) == 1


def sleep_state(awake: int) -> Script:
    """What a vLLM tells on /metrics, as far as it matters, which is told in answer to all that it is asked."""
    page = f"""vllm:num_requests_running{{engine="0"}} 0
vllm:num_requests_waiting{{engine="0"}} 0
vllm:engine_sleep_state{{engine="0",sleep_state="awake"}} {awake}
"""
    return raw(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(page) + page.encode())


async def is_asleep(served: Any, engine: FakeEngine) -> float:
    return float(await served.metric("inference_api_backend_asleep", backend=label(engine)))


# Clocks


@pytest.mark.parametrize("jump", [3600.0, -3600.0])
async def test_t61_a_clock_that_jumps_moves_no_cooldown(
    jump: float, start_engine: Start, start_router: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing, well = await start_engine(UNAVAILABLE), await start_engine()
    served = await start_router(failing, well, breaker_cooldown=0.5, entry={"balancing": "round_robin"})
    real, loop = time.time, asyncio.get_running_loop()
    opened = 0.0
    while not await is_open(served, failing):
        opened = loop.time()
        await served.chat()
    failing.script = answer
    count = len(failing.requests)

    monkeypatch.setattr(time, "time", lambda: real() + jump)
    while len(failing.requests) == count:
        response = await served.chat()
        assert response.status_code == 200
        await asyncio.sleep(0.01)

    assert loop.time() - opened >= 0.4
    assert all(0 <= line["latency_ms"] < 60_000 for line in served.lines)
