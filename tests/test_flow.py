"""The path of one request, end to end: a real server, real sockets, scripted engines."""

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.fakes import (
    CHAT,
    COMPLETION,
    DONE,
    LAST_CHUNK,
    STREAM,
    FakeEngine,
    Line,
    Received,
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


async def test_a_json_answer_comes_back_byte_for_byte(start_engine: Start, start_router: Start) -> None:
    served = await start_router(engine := await start_engine())

    response = await served.chat()

    assert response.status_code == 200
    assert response.content == json_response(COMPLETION).partition(b"\r\n\r\n")[2]
    assert len(engine.requests) == 1


async def test_a_stream_comes_back_byte_for_byte(start_engine: Start, start_router: Start) -> None:
    events = [event(f"wörd{i}") for i in range(50)]
    engine = await start_engine(sse(*events, DONE, then=lambda line: line.send(LAST_CHUNK)))
    served = await start_router(engine)

    response = await served.chat(stream=True)

    assert response.content == b"".join(events) + DONE
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize(("written", "base"), [("/v1", ""), ("/v1/", ""), ("/gateway/v1", "/gateway")])
@pytest.mark.parametrize("discovery", ["static", "dns"])
async def test_a_backend_url_may_end_in_the_v1_of_the_routes(
    start_engine: Start, start_router: Start, written: str, base: str, discovery: str
) -> None:
    engine = await start_engine()
    url = f"http://localhost:{engine.port}{written}" if discovery == "dns" else engine.url + written
    backend = {"url": url, "discovery": discovery}
    served = await start_router(models=[{"name": "m", "backends": [backend]}], health_interval=0.05)

    assert (await served.chat()).status_code == 200
    assert [request.target for request in engine.requests] == [f"{base}/v1/chat/completions"]
    await until(lambda: {f"{base}/health", f"{base}/v1/models"} <= {*engine.asked})


async def test_the_body_reaches_the_engine_byte_for_byte(start_engine: Start, start_router: Start) -> None:
    served = await start_router(engine := await start_engine())
    body = (
        b'{ "model": "x", "big": 123456789012345678901, "f": 1e-7, "model":"m" ,\n"messages":[{"a":"\\u00e9"}],"zz":1}'
    )

    await served.client.post(
        "/v1/chat/completions?api-version=1&x=%20", content=body, headers={"content-type": "application/json"}
    )

    assert engine.requests[0].body == body
    assert engine.requests[0].target == "/v1/chat/completions?api-version=1&x=%20"


async def test_an_event_is_seen_before_the_next_one_is_made(start_engine: Start, start_router: Start) -> None:
    seen = asyncio.Event()

    async def script(request: Received, line: Line) -> None:
        await sse(event("first"))(request, line)
        await asyncio.wait_for(seen.wait(), 20)
        await line.send(chunk(DONE) + LAST_CHUNK)

    served = await start_router(await start_engine(script))

    async with served.client.stream("POST", "/v1/chat/completions", json=STREAM) as response:
        chunks = response.aiter_raw()
        assert await anext(chunks) == event("first")
        seen.set()
        assert b"".join([data async for data in chunks]) == DONE


@pytest.mark.parametrize("body", [CHAT, STREAM])
async def test_a_client_that_leaves_closes_the_engines_connection(
    body: dict[str, Any], start_engine: Start, start_router: Start
) -> None:
    engine: FakeEngine = await start_engine(hang)
    served = await start_router(engine)

    async with raw_client(served.port) as client:
        await client.send(post("/v1/chat/completions", body))
        await until(lambda: engine.requests)
        assert served.router.core.admission.in_flight == 1

    await until(lambda: engine.busy == 0)
    await until(lambda: served.lines)
    assert served.lines[0]["outcome"] == "client_gone"
    assert served.lines[0]["status"] == 499
    assert served.router.core.admission.in_flight == 0


async def test_a_client_that_leaves_mid_stream_closes_the_engines_connection(
    start_engine: Start, start_router: Start
) -> None:
    engine = await start_engine(sse(event(), then=Line.gone))
    served = await start_router(engine)

    async with raw_client(served.port) as client:
        await client.send(post("/v1/chat/completions", STREAM))
        await client.reader.readuntil(b"data: ")

    await until(lambda: engine.busy == 0)
    await until(lambda: served.lines)
    assert served.lines[0]["outcome"] == "client_gone"
    assert await served.metric("inference_api_stream_aborts_total", reason="client_disconnect") == 1


async def test_a_client_that_hangs_up_at_done_was_served(start_engine: Start, start_router: Start) -> None:
    engine = await start_engine(sse(event(), DONE, then=Line.gone))
    served = await start_router(engine)

    async with raw_client(served.port) as client:
        await client.send(post("/v1/chat/completions", STREAM))
        await client.reader.readuntil(DONE)

    await until(lambda: served.lines)
    assert served.lines[0]["outcome"] == "ok"
    assert served.lines[0]["status"] == 200


async def test_a_stream_that_breaks_between_events_says_so_and_is_cut(start_engine: Start, start_router: Start) -> None:
    served = await start_router(await start_engine(sse(event(), then=Line.reset)))

    async with raw_client(served.port) as client:
        await client.send(post("/v1/chat/completions", STREAM))
        received = await client.reader.read(-1)

    assert received.count(b"event: error") == 1
    assert b'"code":"upstream_stream_interrupted"' in received
    assert b"[DONE]" not in received
    assert not received.endswith(LAST_CHUNK)


async def test_a_stream_that_breaks_inside_an_event_is_only_cut(start_engine: Start, start_router: Start) -> None:
    served = await start_router(await start_engine(sse(event(), b'data: {"choices', then=Line.reset)))

    with pytest.raises(httpx.RemoteProtocolError, match="incomplete chunked read"):
        await served.chat(stream=True)

    assert served.lines[0]["outcome"] == "reset"


async def test_a_stream_that_ends_without_done_is_not_complete(start_engine: Start, start_router: Start) -> None:
    served = await start_router(await start_engine(sse(event(), then=lambda line: line.send(LAST_CHUNK))))

    async with raw_client(served.port) as client:
        await client.send(post("/v1/chat/completions", STREAM))
        received = await client.reader.read(-1)

    assert b'"code":"upstream_stream_truncated"' in received
    assert not received.endswith(LAST_CHUNK)
    assert served.lines[0]["outcome"] == "truncated"


async def test_a_refused_connection_is_tried_on_another_backend(start_engine: Start, start_router: Start) -> None:
    dead, alive = await start_engine(), await start_engine()
    served = await start_router(dead, alive)
    await dead.stop()

    answers = [await served.chat() for _ in range(20)]

    assert {response.status_code for response in answers} == {200}
    assert len(alive.requests) == 20


async def test_surplus_bytes_never_reach_the_next_request(start_engine: Start, start_router: Start) -> None:
    poison = json_response({"secret": "of somebody else"})
    engine = await start_engine(raw(json_response(COMPLETION) + poison))
    served = await start_router(engine)

    answers = [(await served.chat()).json() for _ in range(3)]

    assert answers == [COMPLETION] * 3
    assert engine.connections >= 3


async def test_an_openai_error_names_the_model_and_lists_the_known(start_engine: Start, start_router: Start) -> None:
    served = await start_router(engine := await start_engine())

    response = await served.chat(model="nope")

    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert "'nope'" in response.json()["error"]["message"]
    assert "Known models: m." in response.json()["error"]["message"]
    assert response.json()["request_id"] == response.headers["x-request-id"]
    assert engine.requests == []
