"""Attempts, repeats and connections under faults: T12, T19, T20 and T25 to T45."""

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from email.utils import formatdate
from pathlib import Path
from threading import Thread
from typing import Any

import openai
import orjson
import pytest

from inference_api.settings import Settings
from tests.conftest import Served
from tests.fakes import (
    CHAT,
    COMPLETION,
    DONE,
    STREAM,
    Answer,
    FakeEngine,
    ImpatientEngine,
    Line,
    Received,
    Script,
    answer,
    chunk,
    event,
    full_listener,
    hang,
    json_response,
    post,
    raw,
    raw_client,
    read_answer,
    sse,
    until,
)
from tests.faults.quiescence import quiet

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]

# A health check would hang in a black hole too, and be counted by `quiet`.
UNCHECKED: dict[str, Any] = {"health_interval": 3600}
URL = "/v1/chat/completions"
CHATS = "chat_completions"
OK = json_response(COMPLETION)
# Each request has a connection of its own: of a reused one it could not be told whether it was stale.
FRESH = {"upstream_keepalive": 1e-6}


def numbered(number: int, **more: Any) -> dict[str, Any]:
    return {**CHAT, "messages": [{"role": "user", "content": f"request {number}"}], **more}


def status(code: int, headers: bytes = b"") -> Script:
    """A script: an OpenAI error with this status."""
    error = {"message": "engine", "type": "server_error", "param": None, "code": None}
    return raw(json_response({"error": error}, f"{code} X", headers))


async def reset(request: Received, line: Line) -> None:
    """Take the request, and close with RST before a byte of an answer."""
    line.reset()


def at(*urls: str, **more: Any) -> list[dict[str, Any]]:
    """A catalogue with the one model m."""
    return [{"name": "m", "backends": [{"url": url} for url in urls], **more}]


async def ask_raw(port: int, document: Any, path: str = URL) -> Answer:
    async with raw_client(port) as client:
        await client.send(post(path, document))
        return await read_answer(client.reader)


def requests(*engines: FakeEngine) -> int:
    return sum(len(engine.requests) for engine in engines)


@contextmanager
def impatient(keepalive: float) -> Iterator[ImpatientEngine]:
    """An engine on a thread of its own: it closes idle connections also while the router is busy."""

    async def slowly(request: Received, line: Line) -> None:
        await asyncio.sleep(0.02)
        await answer(request, line)

    loop, engine = asyncio.new_event_loop(), ImpatientEngine(slowly, keepalive)
    thread = Thread(target=loop.run_forever)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(engine.__aenter__(), loop).result(5)
        yield engine
        asyncio.run_coroutine_threadsafe(engine.stop(), loop).result(5)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


# Clients that leave


class Jitter(random.Random):
    """Always the same share of a back-off; a million of them is hours."""

    share = 0.5

    def random(self) -> float:
        return self.share


async def test_t12_a_client_that_leaves_during_the_back_off_is_not_served_again(
    start_engine: Start, start_router: Start
) -> None:
    async def busy(request: Received, line: Line) -> None:
        rand.share = 1e6
        await status(503)(request, line)

    rand = Jitter(1)
    engines = [await start_engine(busy) for _ in range(2)]
    served: Served = await start_router(*engines, rand=rand, total_timeout=10_000_000)
    async with quiet(served):
        async with raw_client(served.port) as client:
            await client.send(post(URL, CHAT))
            await until(lambda: requests(*engines) == 1 and not any(engine.busy for engine in engines))
            await asyncio.sleep(0.05)

        await until(lambda: served.lines)

    assert served.lines[0]["outcome"] == "client_gone"
    assert requests(*engines) == 1
    assert await served.metric("inference_api_retries_total") == 0


async def test_t19_the_total_time_of_an_answer(start_engine: Start, start_router: Start) -> None:
    async def dribble(request: Received, line: Line) -> None:
        await line.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100000\r\n\r\n")
        with suppress(ConnectionError):
            while True:
                await line.send(b" ")
                await asyncio.sleep(0.01)

    engine = await start_engine()
    served = await start_router(engine, total_timeout=0.8)
    async with quiet(served):
        for script in (hang, dribble):
            engine.script = script
            response = await served.chat()

            assert (response.status_code, response.json()["error"]["code"]) == (504, "upstream_timeout")
            assert response.headers["x-should-retry"] == "false"
    assert [line["outcome"] for line in served.lines] == ["total_timeout"] * 2
    assert len(engine.requests) == 2


async def test_t19_the_total_time_of_a_stream(start_engine: Start, start_router: Start) -> None:
    async def endless(request: Received, line: Line) -> None:
        await sse()(request, line)
        with suppress(ConnectionError):
            while True:
                await line.send(chunk(event()))
                await asyncio.sleep(0.01)

    served = await start_router(await start_engine(endless), stream_timeout=0.8)
    async with quiet(served), raw_client(served.port) as client:
        await client.send(post(URL, STREAM))
        received = await client.reader.read(-1)

    assert received.count(b'"code":"upstream_timeout"') == 2  # once for each of two SDKs, in one event
    assert received.count(b"event: error") == 1
    assert b"[DONE]" not in received
    assert not received.endswith(b"0\r\n\r\n")


@pytest.mark.timeout(300)
async def test_t20_a_storm_of_clients_that_leave(start_engine: Start, start_router: Start) -> None:
    storm, workers = 10_000, 100
    rand = random.Random(1)

    async def script(request: Received, line: Line) -> None:
        await asyncio.sleep(0.005)
        with suppress(ConnectionError):
            await answer(request, line)

    async def worker() -> None:
        loop = asyncio.get_running_loop()
        for _ in range(storm // workers):
            document = numbered(rand.randrange(10**6), stream=rand.random() < 0.5)
            transport, _ = await loop.create_connection(asyncio.Protocol, "127.0.0.1", served.port)
            transport.write(post(URL, document))
            await asyncio.sleep(rand.uniform(0.0005, 0.02))
            transport.abort()

    served: Served = await start_router(await start_engine(script))
    async with quiet(served):
        await asyncio.gather(*(worker() for _ in range(workers)))
        answers = await asyncio.gather(*(ask_raw(served.port, numbered(number)) for number in range(100)))

        assert {got.status for got in answers} == {200}
    assert "client_gone" in {line["outcome"] for line in served.lines}
    assert len(served.lines) <= storm + 100


# Backends that cannot be reached


async def test_t25_one_of_two_backends_refuses_connections(start_engine: Start, start_router: Start) -> None:
    dead, alive = await start_engine(), await start_engine()
    served = await start_router(dead, alive)
    await dead.stop()
    async with quiet(served):
        answers = [await served.client.post(URL, json=numbered(number)) for number in range(100)]

    assert {response.status_code for response in answers} == {200}
    assert sorted(request.body for request in alive.requests) == sorted(
        response.request.content for response in answers
    )
    # The circuit opens at the fifth; until then each refused attempt is one repeat, and no more.
    assert await served.metric("inference_api_retries_total", model_name="m", reason="connect") == 5
    label = dead.url.removeprefix("http://")
    assert await served.metric("inference_api_backend_circuit_open", backend=label) == 1


async def test_t26_all_backends_refuse_connections(start_engine: Start, start_router: Start) -> None:
    engines = [await start_engine() for _ in range(3)]
    served = await start_router(*engines)
    for engine in engines:
        await engine.stop()
    async with quiet(served):
        async with asyncio.timeout(20):
            response = await served.chat()

    assert (response.status_code, response.json()["error"]["code"]) == (503, "no_backend_available")
    # A client that tries again twice, as the SDKs do, has its error after two seconds.
    assert response.headers["retry-after"] == "1"
    assert served.lines[0]["attempts"] == 2


async def test_t27_a_backend_that_swallows_connections(start_engine: Start, start_router: Start) -> None:
    engine = await start_engine()
    with full_listener() as hole:
        served = await start_router(
            models=at(engine.url, hole, balancing="round_robin"), connect_timeout=0.8, **UNCHECKED
        )
        async with quiet(served):
            took = []
            for number in range(4):
                began = time.monotonic()
                assert (await served.client.post(URL, json=numbered(number))).status_code == 200
                took.append(time.monotonic() - began)

    assert sum(seconds > 0.79 for seconds in took) >= 2
    assert len(engine.requests) == 4
    assert await served.metric("inference_api_retries_total", reason="connect") == 2


async def test_t37_attempts_share_one_deadline(start_router: Start) -> None:
    with full_listener() as one, full_listener() as two:
        served = await start_router(
            models=at(one, two, timeouts={"total": 2.0}), connect_timeout=1.2, total_timeout=2.0, **UNCHECKED
        )
        async with quiet(served):
            response = await served.chat()

    assert (response.status_code, response.headers["x-should-retry"]) == (504, "false")
    # The second attempt had 1.2 s of its own, and 0.8 s of the deadline's: with 1.2 it would have failed to connect.
    assert (served.lines[0]["attempts"], served.lines[0]["outcome"]) == (2, "total_timeout")


async def test_t37_no_attempt_starts_after_the_deadline(start_engine: Start, start_router: Start) -> None:
    engine = await start_engine()
    with full_listener() as hole:
        served = await start_router(
            models=at(engine.url, hole, balancing="round_robin"), connect_timeout=30, total_timeout=1, **UNCHECKED
        )
        async with quiet(served):
            answers = [await served.chat() for _ in range(2)]

    assert sorted(response.status_code for response in answers) == [200, 504]
    assert len(engine.requests) == 1


# Connections that were idle


async def test_t28_backends_that_close_idle_connections_just_then(start_router: Start) -> None:
    keepalive, clients, rounds = 0.1, 60, 20
    stale = 0.0

    async def client(number: int) -> list[int]:
        rand = random.Random(number)
        statuses = []
        async with raw_client(served.port) as line:
            for turn in range(rounds):
                await line.send(post(URL, numbered(number * rounds + turn)))
                statuses.append((await read_answer(line.reader)).status)
                await asyncio.sleep(keepalive + rand.uniform(-0.004, 0.004))
        return statuses

    with impatient(keepalive) as engine:
        served = await start_router(engine, upstream_keepalive=10)
        # Who is first is a matter of microseconds: on a busy machine it may take more than one go.
        for _ in range(5):
            engine.executed.clear()
            async with quiet(served):
                statuses = await asyncio.gather(*(client(number) for number in range(clients)))

            assert statuses == [[200] * rounds] * clients
            assert len({request.body for request in engine.executed}) == len(engine.executed) == clients * rounds
            if stale := await served.metric("inference_api_retries_total", reason="stale"):
                break
    assert stale > 0


async def test_t29_a_connection_is_given_up_before_the_backend_closes_it(start_router: Start) -> None:
    with impatient(keepalive=0.6) as engine:
        served = await start_router(engine, upstream_keepalive=0.3)
        async with quiet(served):
            for pause in (0.0, 0.45):
                await asyncio.sleep(pause)
                await served.chat()

        first, second = engine.executed
        assert first.connection != second.connection
    assert await served.metric("inference_api_retries_total") == 0
    # vLLM closes after 5 s.
    assert Settings().upstream_keepalive < 4.9


# Backends that go silent


async def test_t30_a_reset_without_a_byte_is_tried_on_one_other_backend(
    start_engine: Start, start_router: Start
) -> None:
    engines = [await start_engine(reset) for _ in range(3)]
    served = await start_router(*engines, **FRESH)
    async with quiet(served):
        response = await served.chat()

        assert (response.status_code, response.json()["error"]["code"]) == (502, "upstream_reset")
        assert sorted(len(engine.requests) for engine in engines) == [0, 1, 1]


async def test_t30_a_reset_is_final_where_a_second_run_does_harm(start_engine: Start, start_router: Start) -> None:
    engines = [await start_engine(reset) for _ in range(2)]
    served = await start_router(*engines, **FRESH)
    async with quiet(served):
        response = await served.client.post("/v1/responses", json={"model": "m", "input": "x"})
        unknown = await served.client.post("/v1/files", json={"model": "m"})

    assert (response.status_code, response.json()["error"]["code"]) == (502, "upstream_reset")
    assert "x-should-retry" not in response.headers
    assert unknown.status_code == 404
    assert requests(*engines) == 1


async def test_t30_one_dying_backend_costs_no_client_anything(start_engine: Start, start_router: Start) -> None:
    """Also equal requests, all in the hands of a backend at its death."""
    gate = asyncio.Event()

    async def die_together(request: Received, line: Line) -> None:
        await gate.wait()
        line.reset()

    dying, alive = await start_engine(die_together), await start_engine()
    served = await start_router(dying, alive, entry={"balancing": "round_robin"}, **FRESH)
    async with quiet(served):
        asking = [asyncio.create_task(ask_raw(served.port, CHAT)) for _ in range(60)]
        await until(lambda: len(dying.requests) == 30)
        gate.set()
        answers = await asyncio.gather(*asking)

    assert {got.status for got in answers} == {200}
    assert len(alive.requests) == 60
    assert await served.metric("inference_api_retries_total", reason="reset") == 30


@pytest.mark.parametrize(
    ("part", "code"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-type: text/", "upstream_reset"),
        (b"H", "upstream_reset"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "upstream_protocol_error"),
    ],
)
@pytest.mark.parametrize("end", [Line.close, Line.reset])
async def test_t31_a_head_that_is_none_is_not_tried_again(
    part: bytes, code: str, end: Callable[[Line], None], start_engine: Start, start_router: Start
) -> None:
    async def script(request: Received, line: Line) -> None:
        await line.send(part)
        await asyncio.sleep(0.02)
        end(line)

    engines = [await start_engine(script) for _ in range(2)]
    served = await start_router(*engines)
    async with quiet(served):
        response = await served.chat()

    assert (response.status_code, response.json()["error"]["code"]) == (502, code)
    assert requests(*engines) == 1


async def test_t32_nothing_is_tried_again_once_the_client_has_a_byte(start_engine: Start, start_router: Start) -> None:
    engines = [await start_engine(sse(event(), then=Line.reset)) for _ in range(2)]
    served = await start_router(*engines)
    async with quiet(served), raw_client(served.port) as client:
        await client.send(post(URL, STREAM))
        received = await client.reader.read(-1)

    assert received.count(b"event: error") == 1
    assert requests(*engines) == 1


# Backends that say no


@pytest.mark.parametrize("code", [400, 401, 404, 408, 409, 422, 429, 500, 501, 502, 503, 504])
@pytest.mark.parametrize("more", [(), (429, 502, 504)])
async def test_t33_a_status_is_tried_again_if_the_settings_say_so(
    code: int, more: tuple[int, ...], start_engine: Start, start_router: Start
) -> None:
    bad, good = await start_engine(status(code)), await start_engine()
    served = await start_router(bad, good, entry={"balancing": "round_robin"}, retry_on_status=frozenset({503, *more}))
    async with quiet(served):
        answers = [await served.client.post(URL, json=numbered(number)) for number in range(4)]

    repeated = code in (503, *more)
    assert sorted(response.status_code for response in answers) == ([200] * 4 if repeated else [200, 200, code, code])
    assert len(bad.requests) == 2
    assert await served.metric("inference_api_retries_total", reason="status") == (2 if repeated else 0)


async def test_t34_a_backend_that_asks_for_a_rest_has_it(start_engine: Start, start_router: Start) -> None:
    tired, awake = await start_engine(status(429, b"retry-after: 7\r\n")), await start_engine()
    served = await start_router(tired, awake, entry={"balancing": "round_robin"}, retry_on_status=frozenset({429}))
    async with quiet(served):
        answers = [await served.client.post(URL, json=numbered(number)) for number in range(20)]

    assert {response.status_code for response in answers} == {200}
    assert (len(tired.requests), len(awake.requests)) == (1, 20)


async def test_t34_a_rest_may_be_asked_for_by_a_date(start_engine: Start, start_router: Start) -> None:
    date = formatdate(time.time() + 20, usegmt=True).encode()
    tired, awake = await start_engine(status(503, b"retry-after: %b\r\n" % date)), await start_engine()
    served = await start_router(tired, awake, entry={"balancing": "round_robin"})
    async with quiet(served):
        answers = [await served.client.post(URL, json=numbered(number)) for number in range(20)]

    assert {response.status_code for response in answers} == {200}
    assert (len(tired.requests), len(awake.requests)) == (1, 20)


async def test_t34_if_all_are_tired_none_is_asked_twice(start_engine: Start, start_router: Start) -> None:
    engines = [await start_engine(status(429, b"retry-after: %d\r\n" % seconds)) for seconds in (9, 4, 17)]
    served = await start_router(*engines, retry_on_status=frozenset({429}), max_attempts=3)
    async with quiet(served):
        response = await served.chat()

    assert (response.status_code, response.headers["x-should-retry"]) == (429, "false")
    assert response.headers["retry-after"] in ("9", "4", "17")
    assert [len(engine.requests) for engine in engines] == [1, 1, 1]
    assert response.json()["error"]["message"] == "engine"


async def test_t35_repeats_have_a_budget(start_engine: Start, start_router: Start) -> None:
    gate = asyncio.Event()

    async def slow(request: Received, line: Line) -> None:
        await gate.wait()
        await line.send(OK)

    broken, healthy = await start_engine(reset), await start_engine(slow)
    served: Served = await start_router(
        broken, healthy, entry={"balancing": "round_robin"}, breaker_failures=10**6, **FRESH
    )
    # It has been failing for a while, or its end would be a reason to send everything elsewhere.
    served.router.core.fleet.models["m"].backends[0].origin.failures = 1
    async with quiet(served):
        asking = [asyncio.create_task(ask_raw(served.port, numbered(number))) for number in range(300)]
        await until(
            lambda: len(broken.requests) == 150 and served.router.core.admission.in_flight == len(healthy.requests)
        )
        upstream = requests(broken, healthy)
        gate.set()
        answers = await asyncio.gather(*asking)

    refused = [got for got in answers if got.status != 200]
    repeats = await served.metric("inference_api_retries_total", reason="reset")
    assert repeats + len(refused) == 150
    assert 3 <= repeats <= 0.2 * 300
    assert upstream <= 1.2 * 300
    assert {(got.status, got.headers["x-should-retry"]) for got in refused} == {(502, "false")}
    assert {orjson.loads(got.body)["error"]["code"] for got in refused} == {"upstream_reset"}
    assert await served.metric("inference_api_retries_total", reason="budget_exhausted") == len(refused)


def sdk(served: Served) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=served.url + "/v1", api_key="unused", max_retries=2)


@pytest.mark.parametrize(("backends", "attempts"), [(1, 3), (2, 2), (3, 6)])
async def test_t36_the_sdk_and_the_router_do_not_multiply(
    backends: int, attempts: int, start_engine: Start, start_router: Start
) -> None:
    """What a sole backend says is for the SDK to judge; of two, both were asked; of three, one might still answer."""
    engines = [await start_engine(status(503, b"retry-after-ms: 1\r\n")) for _ in range(backends)]
    served = await start_router(*engines)
    async with quiet(served), sdk(served) as api:
        with pytest.raises(openai.InternalServerError) as caught:
            await api.chat.completions.create(model="m", messages=[{"role": "user", "content": "x"}])

    assert caught.value.status_code == 503
    assert requests(*engines) == attempts


# Requests that kill


@pytest.mark.parametrize("warm", [False, True])
async def test_t38_a_request_that_kills_backends_kills_two(
    warm: bool, start_engine: Start, start_router: Start
) -> None:
    killed: list[asyncio.Task[None]] = []

    async def mortal(request: Received, line: Line) -> None:
        if b"poison" in request.body:
            await asyncio.sleep(0.01)
            engine = next(engine for engine in engines if request in engine.requests)
            killed.append(asyncio.create_task(engine.stop()))
            await asyncio.sleep(30)
        await answer(request, line)

    engines: list[FakeEngine] = [await start_engine(mortal) for _ in range(4)]
    # Three, so that a request finds a backend that lives, in whatever order they are.
    served = await start_router(*engines, entry={"balancing": "round_robin"}, max_attempts=3)
    async with quiet(served):
        async with sdk(served) as api:
            if warm:
                await asyncio.gather(*(ask_raw(served.port, numbered(number)) for number in range(8)))
            with pytest.raises(openai.InternalServerError) as caught:
                await api.chat.completions.create(model="m", messages=[{"role": "user", "content": "poison"}])
            answers = [await served.client.post(URL, json=numbered(number)) for number in range(20)]
        await asyncio.gather(*killed)

    assert len(killed) == 2
    assert (caught.value.status_code, caught.value.response.headers["x-should-retry"]) == (502, "false")
    assert {response.status_code for response in answers} == {200}
    assert await served.metric("inference_api_retries_total", reason="poison") == 1


# What must not pass from one to the other


async def test_t39_bytes_beyond_an_answer_reach_nobody(start_engine: Start, start_router: Start) -> None:
    poison = json_response({"secret": "of somebody else"})
    engine = await start_engine(raw(OK + poison))
    served = await start_router(engine)
    async with quiet(served):
        answers = [(await served.chat()).json() for _ in range(5)]

    assert answers == [COMPLETION] * 5
    assert len({request.connection for request in engine.requests}) == 5


async def test_t40_an_answer_before_the_end_of_the_request(start_router: Start) -> None:
    connections = 0

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            head = await reader.readuntil(b"\r\n\r\n")
            if head.startswith(b"POST"):
                connections += 1
                writer.write(json_response({"error": {"message": "too long"}}, "413 Content Too Large"))
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    async with server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        served = await start_router(models=at(url))
        async with quiet(served):
            body = orjson.dumps(numbered(1, padding="x" * 8_000_000))
            answers = [await ask_raw(served.port, body) for _ in range(10)]

    assert {got.status for got in answers} == {413}
    assert {orjson.loads(got.body)["error"]["message"] for got in answers} == {"too long"}
    assert connections == 10


async def test_t41_a_backend_that_hangs_holds_up_nobody_else(start_engine: Start, start_router: Start) -> None:
    stuck, well = await start_engine(hang), await start_engine()
    models = [*at(stuck.url), {"name": "n", "backends": [{"url": well.url}]}]
    models += [{"name": "both", "backends": [{"url": stuck.url}, {"url": well.url}], "balancing": "least_in_flight"}]
    served = await start_router(models=models)
    async with quiet(served), AsyncExitStack() as stack:
        for number in range(256):
            client = await stack.enter_async_context(raw_client(served.port))
            await client.send(post(URL, numbered(number, model="both" if number % 2 else "m")))
        # Whoever has both knows what the stuck one has of the other model.
        await until(lambda: stuck.busy >= 128)
        async with asyncio.timeout(10):
            statuses = [(await served.chat(model=model)).status_code for model in ("n", "both") * 20]

    assert set(statuses) == {200}


@pytest.mark.parametrize("seed", range(2))
async def test_t42_clients_killed_at_any_moment_leave_nothing(
    seed: int, start_engine: Start, start_router: Start
) -> None:
    """500 each."""
    rand = random.Random(seed)

    async def script(request: Received, line: Line) -> None:
        await asyncio.sleep(rand.uniform(0, 0.01))
        with suppress(ConnectionError):
            kind = rand.randrange(4)
            if kind == 0:
                await status(503)(request, line)
            elif kind == 1:
                line.reset()
            else:
                await sse(event(), event(), DONE, then=lambda line: line.send(b"0\r\n\r\n"))(request, line)

    async def client(number: int) -> None:
        async with raw_client(served.port) as line:
            message = post(URL, numbered(number, stream=True, padding="x" * rand.choice([0, 100_000])))
            with suppress(ConnectionError):
                await line.send(message[: rand.choice([len(message), len(message), rand.randrange(len(message))])])
                async with asyncio.timeout(rand.uniform(0, 0.04)):
                    while await line.reader.read(65536):
                        pass
            if rand.random() < 0.5:
                line.reset()

    async def quick(number: int) -> None:
        with suppress(TimeoutError):
            await client(number)

    engines = [await start_engine(script) for _ in range(3)]
    served = await start_router(*engines)
    async with quiet(served):
        for start in range(0, 500, 50):
            await asyncio.gather(*(quick(number) for number in range(start, start + 50)))
    assert not any(engine.busy for engine in engines)


async def test_t43_open_streams_do_not_make_the_next_request_dearer(start_engine: Start, start_router: Start) -> None:
    """2,000 streams are for the benchmark; 300 show what grows with their number."""
    gate = asyncio.Event()

    async def script(request: Received, line: Line) -> None:
        if b'"stream":true' in request.body:
            await sse(event(), then=lambda line: gate.wait())(request, line)
            await line.send(chunk(DONE) + b"0\r\n\r\n")
        else:
            await line.send(OK)

    async def cost() -> float:
        """Seconds of CPU per request, the client's and the engine's included; the least of five."""
        times = []
        for _ in range(5):
            began = time.process_time()
            for _ in range(20):
                assert (await served.chat()).status_code == 200
            times.append((time.process_time() - began) / 20)
        return min(times)

    engines = [await start_engine(script) for _ in range(8)]
    served = await start_router(*engines)
    async with quiet(served):
        before = await cost()
        async with AsyncExitStack() as stack:
            for number in range(300):
                client = await stack.enter_async_context(raw_client(served.port))
                await client.send(post(URL, numbered(number, stream=True)))
                await client.reader.readuntil(b"data: ")
            with_streams = await cost()
            gate.set()

    assert with_streams < 2 * before


async def test_t44_cookies_go_from_nobody_to_nobody(start_engine: Start, start_router: Start) -> None:
    cookie = b"set-cookie: sid=alice; Domain=localhost; Path=/\r\nset-cookie: own=1\r\n"
    engine = await start_engine(raw(json_response(COMPLETION, headers=cookie)))
    served = await start_router(models=at(f"http://localhost:{engine.port}"))
    async with quiet(served):
        alice = await served.chat()
        await served.client.post(URL, json=CHAT, headers={"cookie": "mine=1"})

    assert "set-cookie" not in alice.headers
    assert [request.header("cookie") for request in engine.requests] == [None, None]
    assert engine.requests[0].header("host") == f"localhost:{engine.port}"


async def test_t45_the_environment_does_not_bend_the_way_to_a_backend(
    start_engine: Start, start_router: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trap, engine = await start_engine(), await start_engine()
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, trap.url)
        monkeypatch.setenv(name.upper(), trap.url)
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "missing.pem"))
    served = await start_router(engine)
    async with quiet(served):
        response = await served.chat()

    assert response.status_code == 200
    assert engine.requests[0].header("authorization") is None
    assert engine.requests[0].target == URL
    assert trap.connections == 0
