"""T72, T73: engines that speak HTTP badly, or not at all. Nothing of it reaches a client, or any other request."""

import asyncio
import gzip
import tracemalloc
from contextlib import suppress
from typing import Any

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
    answer,
    chunk,
    event,
    json_response,
    post,
    raw,
)
from tests.faults.lab import URL, Lab, answers, broken_stream, outcomes, talk, told

pytestmark = pytest.mark.anyio

MEGABYTE = 1 << 20
BODY = orjson.dumps(COMPLETION)
JSON = b"content-type: application/json\r\n"
LENGTH = b"content-length: %d\r\n" % len(BODY)


def said(*lines: bytes, first: bytes = b"HTTP/1.1 200 OK", body: bytes = BODY) -> bytes:
    return first + b"\r\n" + JSON + b"".join(lines) + b"\r\n" + body


NO_ANSWERS = {
    "a large head": said(LENGTH, b"x: %b\r\n" % (b"y" * 300_000)),
    "many headers": said(LENGTH, b"x: 1\r\n" * 10_000),
    "two lengths": said(LENGTH, b"content-length: 3\r\n"),
    "the same length twice": said(LENGTH, LENGTH),
    "an odd length": said(b"content-length: +3\r\n"),
    "length and chunks": said(LENGTH, b"transfer-encoding: chunked\r\n", body=chunk(BODY) + LAST_CHUNK),
    "chunks and length": said(b"transfer-encoding: chunked\r\n", LENGTH, body=chunk(BODY) + LAST_CHUNK),
    "999": said(LENGTH, first=b"HTTP/1.1 999 Odd"),
    "600": said(LENGTH, first=b"HTTP/1.1 600 Odd"),
    "99": said(LENGTH, first=b"HTTP/1.1 099 Odd"),
    "four digits": said(LENGTH, first=b"HTTP/1.1 2000 OK"),
    "no status": said(LENGTH, first=b"HTTP/1.1"),
    "HTTP/0.9": BODY,
    "HTTP/3": said(LENGTH, first=b"HTTP/3.0 200 OK"),
    "another protocol": b"SSH-2.0-OpenSSH_9.2\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "nothing but zeros": bytes(1000),
    "a bare line feed in a header": said(LENGTH, b"x: a\nX-Inject: b\r\n"),
    "bare line feeds": said(LENGTH).replace(b"\r\n", b"\n"),
    "NUL in a header": said(LENGTH, b"x: a\x00b\r\n"),
    "a folded header": said(LENGTH, b"x: a\r\n b\r\n"),
    "a header without a name": said(LENGTH, b": x\r\n"),
    "an upgrade": b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\nPRI * HTTP/2.0\r\n",
    "endless interim answers": b"HTTP/1.1 100 Continue\r\n\r\n" * 30_000,
    "endless hints": b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n" * 30_000,
    "a bad chunk": said(b"transfer-encoding: chunked\r\n", body=b"zz\r\n" + BODY),
    "a negative chunk": said(b"transfer-encoding: chunked\r\n", body=b"-5\r\n" + BODY),
    "an endless chunk size": said(b"transfer-encoding: chunked\r\n", body=b"f" * 17 + b"\r\n"),
    "html for json": said(b"content-length: 15\r\n", body=b"<html>no</html>"),
    "moved": said(LENGTH, b"location: http://169.254.169.254/\r\n", first=b"HTTP/1.1 302 Found"),
    "moved for good": said(LENGTH, b"location: /v1/chat/completions/\r\n", first=b"HTTP/1.1 308 Moved"),
    "choices": said(LENGTH, b"location: /x\r\n", first=b"HTTP/1.1 300 Multiple Choices"),
}


@pytest.mark.parametrize("what", NO_ANSWERS)
async def test_t73_what_is_no_answer_is_a_502_and_not_repeated(what: str, lab: Lab) -> None:
    served = await lab.router(*[answers(raw(NO_ANSWERS[what], close=True), answer)] * 2)

    response = await served.chat()

    assert (response.status_code, response.json()["error"]["code"]) == (502, "upstream_protocol_error")
    assert {"x-inject", "location", "x", "link"}.isdisjoint(response.headers)
    assert outcomes(served) == ["protocol_error"]
    assert sum(len(engine.requests) for engine in lab.engines) == 1
    # The next one gets its own answer.
    assert (await served.chat()).json() == COMPLETION


async def test_t73_an_answer_in_another_coding_has_no_end_that_could_be_seen(lab: Lab) -> None:
    served = await lab.router(raw(said(b"transfer-encoding: chunked, gzip\r\n", body=b"xyz"), close=True))

    response = await served.chat()

    assert (response.status_code, response.json()["error"]["code"]) == (502, "upstream_reset")


async def test_t73_a_head_without_an_end_costs_no_memory(lab: Lab) -> None:
    async def script(request: Received, line: Line) -> None:
        await line.send(b"HTTP/1.1 200 OK\r\nx: ")
        while True:
            await line.send(b"y" * 65536)

    served = await lab.router(script)
    tracemalloc.start()

    response = await served.chat()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert response.json()["error"]["code"] == "upstream_protocol_error"
    assert peak < 2 * MEGABYTE


@pytest.mark.parametrize("drip", [b"HTTP/1.1 100 Continue\r\n\r\n", b"x: y\r\n"])
async def test_t73_an_engine_that_drips_its_head_runs_out_of_time(drip: bytes, lab: Lab) -> None:
    async def script(request: Received, line: Line) -> None:
        await line.send(b"" if drip.startswith(b"HTTP") else b"HTTP/1.1 200 OK\r\n")
        while True:
            await line.send(drip)
            await asyncio.sleep(0.05)

    served = await lab.router(script, entry={"timeouts": {"first_byte": 0.8}})

    response = await served.chat()

    assert (response.status_code, response.json()["error"]["code"]) == (504, "upstream_timeout")


async def test_t73_a_stream_that_turns_to_garbage_is_told_and_cut(lab: Lab) -> None:
    served = await lab.router(raw(SSE_HEAD, chunk(event("a")), b"zz\r\ngarbage"))

    assert told(await broken_stream(served)) == (event("a"), "upstream_stream_interrupted")
    assert outcomes(served) == ["protocol_error"]


POISON = json_response({"secret": "of somebody else"})
SURPLUS: dict[str, Script] = {
    "at once": raw(json_response(COMPLETION) + POISON),
    "a little": raw(json_response(COMPLETION) + b"x"),
    "after chunks": raw(said(b"transfer-encoding: chunked\r\n", body=chunk(BODY) + LAST_CHUNK) + POISON),
}


@pytest.mark.parametrize("what", SURPLUS)
async def test_t73_bytes_too_many_never_reach_another_request(what: str, lab: Lab) -> None:
    engine = await lab.engine(SURPLUS[what])
    served = await lab.router(engine)

    assert [(await served.chat()).json() for _ in range(3)] == [COMPLETION] * 3
    assert len({request.connection for request in engine.requests}) == 3


async def test_t73_bytes_that_come_after_the_answer_never_reach_another_request(lab: Lab) -> None:
    async def script(request: Received, line: Line) -> None:
        await line.send(json_response(COMPLETION))
        await asyncio.sleep(0.05)
        with suppress(ConnectionError):
            await line.send(POISON)

    engine = await lab.engine(script)
    served = await lab.router(engine)

    for _ in range(3):
        assert (await served.chat()).json() == COMPLETION
        await asyncio.sleep(0.1)
    assert len({request.connection for request in engine.requests}) == 3


async def test_t72_a_compressed_answer_is_never_inflated(lab: Lab) -> None:
    bomb = gzip.compress(bytes(64 * MEGABYTE))
    head = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n"
    octets, json = (head % (kind, len(bomb)) + bomb for kind in (b"application/octet-stream", b"application/json"))
    served = await lab.router(answers(raw(octets), raw(json)))
    tracemalloc.start()

    passed = [await talk(served, _close(CHAT)) for _ in range(2)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert all(answer.endswith(bomb) and b"\r\ncontent-encoding: gzip\r\n" in answer for answer in passed)
    assert peak < 4 * MEGABYTE


async def test_t72_a_compressed_stream_passes_raw_with_the_end_that_it_has(lab: Lab) -> None:
    squeezed = gzip.compress(event() + DONE)
    head = SSE_HEAD.replace(b"\r\n\r\n", b"\r\ncontent-encoding: gzip\r\n\r\n")
    served = await lab.router(raw(head, chunk(squeezed), LAST_CHUNK))

    assert (await talk(served, _close(STREAM))).endswith(chunk(squeezed) + LAST_CHUNK)
    assert outcomes(served) == ["ok"]


def _close(body: dict[str, Any]) -> bytes:
    return post(URL, body, b"connection: close\r\n")
