"""T01-T07, T17-T19, T21-T24: an answer on its way. It arrives as it was sent, or it does not look complete."""

import asyncio
import random
from collections.abc import Callable
from typing import Any

import httpx
import openai
import orjson
import pytest

from tests.fakes import (
    CHAT,
    COMPLETION,
    DONE,
    LAST_CHUNK,
    SSE_HEAD,
    STREAM,
    Line,
    Received,
    Script,
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
from tests.faults.lab import (
    ERROR_EVENT,
    OLD_HEAD,
    UNFRAMED_HEAD,
    URL,
    Lab,
    broken_stream,
    events,
    outcomes,
    talk,
    told,
)

pytestmark = pytest.mark.anyio

FIVE = events(5)


# T01


def cut_at_random(data: bytes, seed: int) -> list[bytes]:
    """The same bytes in pieces of 1 to 200: within characters, within line ends, within the chunks' own framing."""
    rand, pieces = random.Random(seed), []
    while data:
        size = rand.randint(1, 200)
        pieces.append(data[:size])
        data = data[size:]
    return pieces


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n"])
async def test_t01_a_clean_stream_is_the_same_byte_for_byte(end: bytes, lab: Lab) -> None:
    body = b"".join(event(f"wörd {i} 漢字 ").replace(b"\n\n", end) for i in range(1000)) + b"data: [DONE]" + end
    wire = SSE_HEAD + b"".join(map(chunk, cut_at_random(body, 1))) + LAST_CHUNK
    served = await lab.router(raw(*cut_at_random(wire, 2)))

    response = await served.chat(stream=True)

    assert response.content == body
    assert outcomes(served) == ["ok"]


async def test_t01_an_event_is_seen_before_the_engine_sends_the_next(lab: Lab) -> None:
    seen = asyncio.Queue[None]()

    async def script(request: Received, line: Line) -> None:
        await line.send(SSE_HEAD)
        for one in FIVE:
            await line.send(chunk(one))
            await seen.get()
        await line.send(chunk(DONE) + LAST_CHUNK)

    served = await lab.router(script)

    async with served.client.stream("POST", URL, json=STREAM) as response:
        chunks = response.aiter_raw()
        for one in FIVE:
            assert await anext(chunks) == one
            seen.put_nowait(None)
        assert await anext(chunks) == DONE


# T02 to T07: engines that break off


async def test_t02_reset_at_an_event_boundary_is_told_and_cut(lab: Lab) -> None:
    served = await lab.router(*[sse(*FIVE, then=Line.reset)] * 2)

    body = await broken_stream(served)

    assert told(body) == (b"".join(FIVE), "upstream_stream_interrupted")
    assert body.count(ERROR_EVENT) == 1
    assert b"[DONE]" not in body
    assert sum(len(engine.requests) for engine in lab.engines) == 1
    assert outcomes(served) == ["reset"]


async def test_t02_the_openai_sdk_raises(lab: Lab) -> None:
    served = await lab.router(sse(*FIVE, then=Line.reset))

    async with openai.AsyncOpenAI(base_url=served.url + "/v1", api_key="x", max_retries=0) as client:
        stream = await client.chat.completions.create(model="m", messages=[], stream=True)
        for _ in FIVE:
            assert await anext(stream)
        with pytest.raises(openai.APIError, match="closed the connection"):
            await anext(stream)


@pytest.mark.parametrize("end", [Line.reset, Line.close])
async def test_t03_death_inside_an_event_is_only_cut(end: Callable[[Line], None], lab: Lab) -> None:
    served = await lab.router(sse(*FIVE, b'data: {"choices":[{"del', then=end))

    assert await broken_stream(served) == b"".join(FIVE) + b'data: {"choices":[{"del'
    with pytest.raises(httpx.RemoteProtocolError, match="incomplete chunked read"):
        await served.chat(stream=True)

    assert outcomes(served) == ["reset", "reset"]


async def test_t04_a_clean_end_without_done_is_told_and_cut(lab: Lab) -> None:
    served = await lab.router(sse(*FIVE[:3], then=lambda line: line.send(LAST_CHUNK)))

    body = await broken_stream(served)

    assert told(body) == (b"".join(FIVE[:3]), "upstream_stream_truncated")
    assert b"[DONE]" not in body
    assert outcomes(served) == ["truncated"]


@pytest.mark.parametrize("head", [UNFRAMED_HEAD, OLD_HEAD])
async def test_t05_the_end_of_the_connection_is_no_end_of_the_stream(head: bytes, lab: Lab) -> None:
    served = await lab.router(raw(head, *FIVE[:3], close=True))

    assert told(await broken_stream(served)) == (b"".join(FIVE[:3]), "upstream_stream_truncated")
    assert outcomes(served) == ["truncated"]


async def test_t05_a_reset_of_a_stream_without_framing_is_told(lab: Lab) -> None:
    async def script(request: Received, line: Line) -> None:
        await line.send(UNFRAMED_HEAD, *FIVE)
        await asyncio.sleep(0.02)
        line.reset()

    served = await lab.router(script)

    assert told(await broken_stream(served)) == (b"".join(FIVE), "upstream_stream_interrupted")
    assert outcomes(served) == ["reset"]


@pytest.mark.parametrize("head", [UNFRAMED_HEAD, OLD_HEAD])
async def test_t05_a_stream_without_framing_may_be_complete(head: bytes, lab: Lab) -> None:
    served = await lab.router(raw(head, *FIVE, DONE, close=True))

    assert (await served.chat(stream=True)).content == b"".join(FIVE) + DONE
    assert outcomes(served) == ["ok"]


@pytest.mark.parametrize("code", [400, 500])
async def test_t06_an_error_event_before_done_passes_and_is_no_success(code: int, lab: Lab) -> None:
    error = b"data: " + orjson.dumps({"error": {"message": "no", "type": "x", "param": None, "code": code}}) + b"\n\n"
    served = await lab.router(sse(FIVE[0], error, DONE, then=lambda line: line.send(LAST_CHUNK)))

    for _ in range(6):
        assert (await served.chat(stream=True)).content == FIVE[0] + error + DONE
    assert outcomes(served) == ["error_event"] * 6
    # As for a status 500: what one request does to an engine must not put it out for all.
    assert served.router.core.fleet.models["m"].backends[0].origin.failures == 0
    assert await served.metric("inference_api_stream_aborts_total", reason="error_event") == 6


@pytest.mark.parametrize("end", [Line.reset, Line.close])
async def test_t07_a_short_json_body_is_a_502(end: Callable[[Line], None], lab: Lab) -> None:
    async def script(request: Received, line: Line) -> None:
        await line.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{'a':")
        await asyncio.sleep(0.02)
        end(line)

    engine = await lab.engine(script)
    served = await lab.router(engine, await lab.engine(script))

    response = await served.chat()

    assert (response.status_code, response.json()["error"]["code"]) == (502, "upstream_reset")
    assert sum(len(engine.requests) for engine in lab.engines) == 1
    assert outcomes(served) == ["reset"]


async def test_t07_a_large_body_that_is_cut_is_short(lab: Lab) -> None:
    whole = json_response({"x": "y" * 3_000_000})
    served = await lab.router(raw(whole[:-100], close=True))

    said = await talk(served, post(URL, CHAT))

    head, _, body = said.partition(b"\r\n\r\n")
    length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
    assert len(body) == length - 100
    assert outcomes(served) == ["reset"]
    # Its head said 200, and so does its line; this is what tells that it broke.
    assert await served.metric("inference_api_requests_total", code="200") == 1
    assert await served.metric("inference_api_stream_aborts_total", reason="upstream_reset") == 1


# T17 to T19: engines that fall silent


async def test_t17_silence_between_events_is_told_and_cut(lab: Lab) -> None:
    engine = await lab.engine(sse(*FIVE[:3], then=Line.gone))
    served = await lab.router(engine, entry={"timeouts": {"idle": 0.8}})

    assert told(await broken_stream(served)) == (b"".join(FIVE[:3]), "upstream_idle_timeout")
    assert outcomes(served) == ["idle_timeout"]


@pytest.mark.parametrize("sign", [event(), b"data: x\n\n", b"x"])
async def test_t17_any_byte_of_an_event_is_a_sign_that_it_goes_on(sign: bytes, lab: Lab) -> None:
    async def script(request: Received, line: Line) -> None:
        await line.send(SSE_HEAD)
        # Altogether longer than may pass without one.
        for _ in range(8):
            await line.send(chunk(sign))
            await asyncio.sleep(0.5)
        await line.send(chunk(b"\n\n" + DONE) + LAST_CHUNK)

    served = await lab.router(script, entry={"timeouts": {"idle": 3}})

    response = await served.chat(stream=True)

    assert response.content == sign * 8 + b"\n\n" + DONE


async def test_t18_a_head_alone_goes_out_at_once_and_the_silence_is_told(lab: Lab) -> None:
    served = await lab.router(sse(then=Line.gone), entry={"timeouts": {"idle": 1.0, "first_byte": 0.8}})

    async with raw_client(served.port) as client:
        await client.send(post(URL, STREAM))
        head = await client.reader.readuntil(b"\r\n\r\n")
        assert outcomes(served) == []
        rest = await client.reader.read(-1)

    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b'"code":"upstream_idle_timeout"' in rest
    assert outcomes(served) == ["idle_timeout"]
    # It had no byte of a body, and no time to a first token; it is a broken stream all the same.
    assert await served.metric("inference_api_stream_aborts_total", model_name="m", reason="idle_timeout") == 1
    assert await served.metric("inference_api_time_to_first_token_seconds_count") == 0


@pytest.mark.parametrize("body", [CHAT, STREAM])
async def test_t18_silence_from_the_beginning_is_a_504_and_not_repeated(body: dict[str, Any], lab: Lab) -> None:
    async def script(request: Received, line: Line) -> None:
        await line.gone()

    engines = [await lab.engine(script) for _ in range(2)]
    served = await lab.router(*engines, entry={"timeouts": {"first_byte": 0.8}})

    response = await served.client.post(URL, json=body)

    assert (response.status_code, response.json()["error"]["code"]) == (504, "upstream_timeout")
    assert response.headers["x-should-retry"] == "false"
    assert sum(len(engine.requests) for engine in engines) == 1
    assert outcomes(served) == ["first_byte_timeout"]


# T21 to T24


async def test_t21_an_event_of_ten_megabytes_passes(lab: Lab) -> None:
    piece = b"x" * 2**16
    body = b"data: " + piece * 160 + b"\n\n" + DONE
    served = await lab.router(sse(b"data: ", *[piece] * 160, b"\n\n", DONE, then=lambda line: line.send(LAST_CHUNK)))

    response = await served.chat(stream=True)

    assert len(response.content) == len(body)
    assert response.content == body
    assert outcomes(served) == ["ok"]


async def test_t21_an_event_that_is_no_text_passes(lab: Lab) -> None:
    odd = b'data: {"x":"\xff\xfe\xc3"}\n\ndata: \x00\x01\n\n'
    served = await lab.router(sse(odd, DONE, then=lambda line: line.send(LAST_CHUNK)))

    assert (await served.chat(stream=True)).content == odd + DONE


async def test_t22_nothing_is_compressed_or_held_back(lab: Lab) -> None:
    engine = await lab.engine(sse(then=Line.gone))
    served = await lab.router(engine)

    async with raw_client(served.port) as client:
        await client.send(post(URL, STREAM, b"accept-encoding: gzip, br\r\n"))
        # The head comes before there is any event.
        head = (await client.reader.readuntil(b"\r\n\r\n")).lower()

    assert b"\r\ncontent-encoding:" not in head
    assert b"\r\ncache-control: no-cache\r\n" in head
    assert b"\r\nx-accel-buffering: no\r\n" in head
    assert engine.requests[0].header("accept-encoding") == "identity"
    await until(lambda: outcomes(served) == ["client_gone"])


@pytest.mark.parametrize("status", ["400 Bad Request", "422 No", "500 Internal Server Error"])
async def test_t23_a_refusal_of_a_stream_is_json_as_it_came(status: str, lab: Lab) -> None:
    refusal = json_response({"error": {"message": "no"}}, status)
    served = await lab.router(raw(refusal), raw(refusal))

    response = await served.chat(stream=True)

    assert response.status_code == int(status[:3])
    assert response.headers["content-type"] == "application/json"
    assert response.content == refusal.partition(b"\r\n\r\n")[2]
    assert sum(len(engine.requests) for engine in lab.engines) == 1


EARLY_HINTS = b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n"
BODILESS: list[tuple[Script, int]] = [
    (raw(b"HTTP/1.1 204 No Content\r\n\r\n"), 204),
    (raw(b'HTTP/1.1 304 Not Modified\r\netag: "x"\r\ncontent-length: 5\r\n\r\n'), 304),
    (raw(EARLY_HINTS + b"HTTP/1.1 100 Continue\r\n\r\n", json_response(COMPLETION)), 200),
]


@pytest.mark.parametrize(("script", "status"), BODILESS)
async def test_t24_answers_without_a_body_and_interim_ones_are_framed_right(
    script: Script, status: int, lab: Lab
) -> None:
    served = await lab.router(engine := await lab.engine(script))

    async with raw_client(served.port) as client:
        for _ in range(2):
            await client.send(post(URL, CHAT))
            head = await client.reader.readuntil(b"\r\n\r\n")
            assert int(head[9:12]) == status
            assert b"link:" not in head
            if status == 200:
                length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
                assert orjson.loads(await client.reader.readexactly(length)) == COMPLETION
        await client.send(b"HEAD /v1/models HTTP/1.1\r\nhost: x\r\n\r\nGET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
        without, listed = await client.reader.readuntil(b"\r\n\r\n"), await read_answer(client.reader)

    assert without.startswith(b"HTTP/1.1 200 ")
    assert (listed.status, orjson.loads(listed.body)["object"]) == (200, "list")
    # On one connection, apart from the one for GET /v1/models.
    assert len({request.connection for request in engine.requests}) == 1
