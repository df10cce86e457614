"""What engines write in their own way is passed on as it is, is understood, and blames nobody."""

import asyncio
import gzip
import json
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
import pytest

from inference_api.upstream.transport import Transport
from tests.conftest import Served
from tests.fakes import (
    CHAT,
    COMPLETION,
    DONE,
    LAST_CHUNK,
    SSE_HEAD,
    STREAM,
    USAGE,
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
from tests.faults.lab import UNFRAMED_HEAD, URL, Lab, broken_stream, outcomes, talk, told

pytestmark = pytest.mark.anyio
End = Callable[[Line], Awaitable[None] | None]

MESSAGES, RESPONSES, COMPLETIONS = "/v1/messages", "/v1/responses", "/v1/completions"
BOM = b"\xef\xbb\xbf"


async def whole(line: Line) -> None:
    await line.send(LAST_CHUNK)


def typed(**document: Any) -> bytes:
    return b"data: " + orjson.dumps(document) + b"\n\n"


def named(**document: Any) -> bytes:
    return b"event: %b\n" % document["type"].encode() + typed(**document)


def finished(reason: str = "stop", **more: Any) -> bytes:
    return event(choices=[{"index": 0, "delta": {}, "finish_reason": reason}], **more)


def ask(path: str, **more: Any) -> dict[str, Any]:
    return {**STREAM, "input": "x", "prompt": "x", **more} if path != URL else STREAM | more


async def passed(served: Served, path: str, parts: tuple[bytes, ...]) -> str:
    """Ask for a stream that must come whole, byte for byte; its outcome."""
    async with raw_client(served.port) as client, asyncio.timeout(10):
        await client.send(post(path, ask(path), b"connection: close\r\n"))
        answer = await read_answer(client.reader)
    assert (answer.status, answer.body) == (200, b"".join(parts))
    await until(lambda: served.lines)
    return outcomes(served)[0]


# The end of a stream

START = named(type="message_start", message={"usage": {"input_tokens": 9, "output_tokens": 0}})
DELTA = named(type="content_block_delta", index=0, delta={"type": "text_delta", "text": "x"})
STOP = named(type="message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 2})
SAID = named(type="response.output_text.delta", delta="x")

COMPLETE: dict[str, tuple[str, tuple[bytes, ...], End]] = {
    "[DONE] with one line break": (URL, (event(), b"data: [DONE]\n"), whole),
    "[DONE] without a line break": (URL, (event(), b"data: [DONE]"), whole),
    "[DONE] behind an event": (URL, (event() + b"data: [DONE]",), whole),
    "nothing but [DONE]": (URL, (b"data: [DONE]",), whole),
    "[DONE] with other line breaks": (URL, (event(), b"data: [DONE]\n\r\n"), whole),
    "[DONE] behind a byte order mark": (URL, (BOM + DONE,), whole),
    "[DONE] in quotes": (URL, (event(), b'data: "[DONE]"\n\n'), whole),
    "[DONE] and the connection's end": (URL, (event(), DONE), Line.close),
    "[DONE] and a reset": (URL, (event(), DONE), Line.reset),
    "[DONE], unfinished, and the connection's end": (URL, (event(), b"data: [DONE]"), Line.close),
    "[DONE] and silence": (URL, (event(), DONE), Line.gone),
    "[DONE] and garbage": (URL, (event(), DONE), lambda line: line.send(b"zz\r\n")),
    "a finish without [DONE]": (URL, (event(), finished()), whole),
    "a finish and a usage without [DONE]": (URL, (event(), finished(), event(choices=[], usage=USAGE)), whole),
    "a completion that finishes": (COMPLETIONS, (event(choices=[{"text": "x", "finish_reason": "length"}]),), whole),
    "a JSON document": (URL, (b'{\n  "choices": []\n}\n',), whole),
    "message_stop without a name": (MESSAGES, (START, DELTA, STOP, typed(type="message_stop")), whole),
    "message_stop, unfinished": (MESSAGES, (START, DELTA, STOP, named(type="message_stop")[:-1]), whole),
    "message_stop and a reset": (MESSAGES, (START, DELTA, named(type="message_stop")), Line.reset),
    "response.completed without a name": (RESPONSES, (SAID, typed(type="response.completed", response={})), whole),
    "response.completed, unfinished": (RESPONSES, (SAID, named(type="response.completed")[:-2]), whole),
    "response.completed and [DONE]": (RESPONSES, (SAID, typed(type="response.completed"), DONE), whole),
    "response.incomplete and the connection's end": (RESPONSES, (SAID, named(type="response.incomplete")), Line.close),
}


@pytest.mark.parametrize("what", COMPLETE)
async def test_a_stream_is_complete_when_its_last_event_says_so(what: str, lab: Lab) -> None:
    path, parts, end = COMPLETE[what]
    served = await lab.router(sse(*parts, then=end), entry={"timeouts": {"idle": 0.8}})

    assert await passed(served, path, parts) == "ok"


ERRORS: dict[str, tuple[str, bytes]] = {
    "as OpenAI": (URL, typed(error={"message": "x", "code": 500})),
    "with spaces": (URL, b'data: { "error" : {"message": "x"} }\n\n'),
    "printed": (URL, b"data: " + orjson.dumps({"error": {"message": "x"}}, option=orjson.OPT_INDENT_2) + b"\n\n"),
    "a type": (URL, typed(type="error", message="x")),
    "an object": (URL, typed(object="error", message="x")),
    "beside choices": (URL, event(error={"message": "x"})),
    "TGI": (URL, b'data:{"error":"x","error_type":"generation"}\n\n'),
    "a name": (MESSAGES, named(type="error", error={"type": "overloaded_error"})),
    "response.failed": (RESPONSES, named(type="response.failed", response={"error": {"code": "x"}})),
    "response.failed without a name": (RESPONSES, typed(type="response.failed", response={})),
}
ENDS: dict[str, End] = {
    "the end": whole,
    "[DONE]": lambda line: line.send(chunk(DONE) + LAST_CHUNK),
    "the connection's end": Line.close,
    "a reset": Line.reset,
    "silence": Line.gone,
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("what", ERRORS)
async def test_an_error_of_the_engine_is_the_only_one(what: str, end: str, lab: Lab) -> None:
    path, error = ERRORS[what]
    first = {URL: event(), MESSAGES: START + DELTA, RESPONSES: SAID}[path]
    served = await lab.router(sse(first, error, then=ENDS[end]), entry={"timeouts": {"idle": 0.8}})

    parts = (first, error, DONE) if end == "[DONE]" else (first, error)
    assert await passed(served, path, parts) == "error_event"
    assert await served.metric("inference_api_stream_aborts_total", reason="error_event") == 1
    assert served.router.core.fleet.models["m"].backends[0].origin.failures == 0


async def test_a_client_that_leaves_at_an_error_has_seen_the_end(lab: Lab) -> None:
    error = typed(error={"message": "x"})
    served = await lab.router(sse(event(), error, then=Line.gone))

    async with raw_client(served.port) as client:
        await client.send(post(URL, STREAM))
        await client.reader.readuntil(error)

    await until(lambda: served.lines)
    assert outcomes(served) == ["error_event"]


ABORTED: dict[str, tuple[str, Script, tuple[bytes, ...]]] = {
    "chat": (URL, sse(event(), finished("abort"), DONE, then=whole), (event(), finished("abort"), DONE)),
    "chat, in one read": (URL, sse(event() + finished("abort") + DONE, then=whole), (event(), finished("abort"), DONE)),
    "chat, with usage": (
        URL,
        sse(event(), finished("abort"), event(choices=[], usage=USAGE), DONE, then=whole),
        (event(), finished("abort"), event(choices=[], usage=USAGE), DONE),
    ),
    "chat, usage in each": (URL, sse(event(), finished("abort", usage=USAGE), DONE, then=whole), (
        event(), finished("abort", usage=USAGE), DONE)),
    "a response": (
        RESPONSES,
        sse(SAID, named(type="response.completed", response={"object": "response", "status": "cancelled"}), then=whole),
        (SAID, named(type="response.completed", response={"object": "response", "status": "cancelled"})),
    ),
    "a message": (
        MESSAGES,
        sse(START, named(type="message_delta", delta={"stop_reason": None}), named(type="message_stop"), then=whole),
        (START, named(type="message_delta", delta={"stop_reason": None}), named(type="message_stop")),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", ABORTED)
async def test_a_generation_that_the_engine_aborted_is_no_success(what: str, lab: Lab) -> None:
    path, script, parts = ABORTED[what]
    served = await lab.router(script)

    assert await passed(served, path, parts) == "aborted"
    assert await served.metric("inference_api_stream_aborts_total", reason="aborted") == 1


@pytest.mark.parametrize("padding", [0, 80_000])
async def test_an_answer_that_the_engine_aborted_is_no_success(padding: int, lab: Lab) -> None:
    choice = {"index": 0, "message": {"content": "x" * padding}, "finish_reason": "abort"}
    answer = json_response(COMPLETION | {"choices": [choice]})
    served = await lab.router(raw(answer))

    assert (await served.chat()).content == answer.partition(b"\r\n\r\n")[2]
    assert outcomes(served) == ["aborted"]


TWO = {"n": 2}
CODE_500 = typed(error={"message": "x", "code": 500})
HALF = b'event: error\ndata: {"e'
TRUNCATED = "upstream_stream_truncated"
BROKEN: dict[str, tuple[dict[str, Any], Script, bytes, str | None]] = {
    "half a [DONE]": ({}, sse(event(), b"data: [DON", then=whole), event() + b"data: [DON", None),
    "[DONE] in a text": ({}, sse(event("[DONE]"), then=whole), event("[DONE]"), TRUNCATED),
    "half an error": ({}, sse(event(), HALF, then=Line.close), event() + HALF, None),
    "an error in a text": (
        {},
        sse(event('{"error": {}}'), then=whole),
        event('{"error": {}}'),
        TRUNCATED,
    ),
    "a finish, and then more": ({}, sse(finished() + event(), then=whole), finished() + event(), TRUNCATED),
    "a finish and a reset": ({}, sse(finished(), then=Line.reset), finished(), "upstream_stream_interrupted"),
    "one of two choices, without framing": (TWO, raw(UNFRAMED_HEAD, finished(), close=True), finished(), TRUNCATED),
    "an error, and half an event": ({}, sse(CODE_500 + b"data: {", then=Line.close), CODE_500 + b"data: {", None),
    "half a document": ({}, sse(b'{"choices": [', then=whole), b'{"choices": [', None),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
async def test_a_stream_that_stopped_early_does_not_look_complete(what: str, lab: Lab) -> None:
    more, script, body, code = BROKEN[what]
    served = await lab.router(script)

    said = await broken_stream(served, **more)

    assert (said, None) == (body, code) if code is None else told(said) == (body, code)
    assert outcomes(served)[0] in ("truncated", "reset")


@pytest.mark.parametrize("last", [b'event: message_stop\ndata: {"type":"mess', b"event: message_stop\n"])
async def test_the_name_of_a_last_event_is_not_all_of_it(last: bytes, lab: Lab) -> None:
    served = await lab.router(sse(START, DELTA, last, then=whole))

    said = await talk(served, post(MESSAGES, STREAM))

    assert not said.endswith(LAST_CHUNK)
    assert outcomes(served) == ["truncated"]


async def test_with_framing_the_last_choice_that_finishes_is_the_last(lab: Lab) -> None:
    served = await lab.router(sse(finished(), finished(), then=whole))

    assert (await served.client.post(URL, json=STREAM | TWO)).content == finished() * 2
    assert outcomes(served) == ["ok"]


async def test_one_choice_that_finishes_is_complete_without_framing(lab: Lab) -> None:
    served = await lab.router(raw(UNFRAMED_HEAD, event(), finished(), close=True))

    assert await passed(served, URL, (event(), finished())) == "ok"


# What the head says


def headed(kind: bytes, more: bytes = b"") -> bytes:
    return b"HTTP/1.1 200 OK\r\n%btransfer-encoding: chunked\r\n%b\r\n" % (
        b"content-type: %b\r\n" % kind if kind else b"", more,
    )  # fmt: skip


@pytest.mark.parametrize("first", [event(), b": ping\n\n", b"\n\n" + event(), BOM + event(), b"event: x\n" + event()])
@pytest.mark.parametrize("kind", [b"", b"text/plain", b"application/octet-stream", b"application/json; charset=utf-8"])
async def test_a_stream_is_one_under_any_type(kind: bytes, first: bytes, lab: Lab) -> None:
    seen = asyncio.Event()

    async def script(request: Received, line: Line) -> None:
        await line.send(headed(kind), *[chunk(first[i : i + 1]) for i in range(len(first))])
        await seen.wait()
        await line.send(chunk(DONE) + LAST_CHUNK)

    served = await lab.router(script)
    async with raw_client(served.port) as client, asyncio.timeout(10):
        await client.send(post(URL, STREAM))
        head = await client.reader.readuntil(b"\r\n\r\n")
        await client.reader.readuntil(first[-3:-2])
        seen.set()
        rest = await client.reader.readuntil(LAST_CHUNK)

    assert b"\r\ncontent-type: text/event-stream; charset=utf-8\r\n" in head
    assert head.count(b"content-type") == 1
    assert chunk(DONE) in rest
    await until(lambda: served.lines)
    assert outcomes(served) == ["ok"]


@pytest.mark.parametrize("body", [b"\n\n" + orjson.dumps(COMPLETION), orjson.dumps({"error": {"message": "x"}})])
@pytest.mark.parametrize("kind", [b"application/json", b"", b"text/plain"])
async def test_one_document_is_no_stream(kind: bytes, body: bytes, lab: Lab) -> None:
    served = await lab.router(raw(headed(kind), chunk(body[:5]), chunk(body[5:]) + LAST_CHUNK))

    response = await served.chat(stream=True)

    assert (response.content, response.headers.get("content-type", "")) == (body, kind.decode())
    assert response.headers["content-length"] == str(len(body))
    assert outcomes(served) == ["ok"]


@pytest.mark.parametrize(
    ("kind", "more", "first"),
    [
        (b"application/x-ndjson", b"", b'{"a":1}\n'),
        (b"audio/mpeg", b"", b"ID3\x04"),
        (b"text/event-stream", b"content-encoding: gzip\r\n", gzip.compress(event())),
        (b"application/json", b"content-encoding: br\r\n", b"\x8b\x02\x80"),
    ],
)
async def test_what_only_the_client_can_read_is_not_held_back(kind: bytes, more: bytes, first: bytes, lab: Lab) -> None:
    seen = asyncio.Event()

    async def script(request: Received, line: Line) -> None:
        await line.send(headed(kind, more) + chunk(first))
        await seen.wait()
        await line.send(chunk(b"rest") + LAST_CHUNK)

    served = await lab.router(script)
    async with raw_client(served.port) as client, asyncio.timeout(10):
        await client.send(post(URL, STREAM))
        head = await client.reader.readuntil(b"\r\n\r\n")
        await client.reader.readuntil(chunk(first))
        seen.set()
        assert await client.reader.readuntil(LAST_CHUNK) == chunk(b"rest") + LAST_CHUNK

    assert b"\r\ncontent-type: %b\r\n" % kind in head
    assert more in head
    await until(lambda: served.lines)
    assert outcomes(served) == ["ok"]


USED = b'"usage":{"prompt_tokens":1,"completion_tokens":2}'
LONG = b'{"a":"' + b"x" * 70_000 + b'",' + USED + b"}"
ANSWERS: dict[str, tuple[bytes, bytes]] = {
    "a byte order mark": (b"application/json", BOM + b"{" + USED + b"}"),
    "a lone surrogate": (b"application/json", b'{"content":"\\ud83d",' + USED + b"}"),
    "a number beyond a double": (b"application/json", b'{"x":1e999,' + USED + b"}"),
    "NaN": (b"application/json", b'{"x":NaN,' + USED + b"}"),
    "depth": (b"application/json", b'{"x":' + b"[" * 2000 + b"]" * 2000 + b"," + USED + b"}"),
    "padding before": (b"application/json", b"\n" * 100 + LONG),
    "padding behind": (b"application/json", LONG + b" " * 100),
    "a byte order mark before much": (b"application/json", BOM + LONG),
    "JSON lines": (b"application/json", b'{"a":1}\n{' + USED + b"}\n"),
    "JSON lines by their type": (b"application/x-ndjson", b"1\n2\n"),
    "a JSON text sequence": (b"application/json-seq", b'\x1e{"a":1}\n'),
    "a JSON type of another kind": (b"application/problem+json", b"{" + USED + b"}"),
    "text": (b"text/plain", b"hello"),
    "bytes": (b"application/octet-stream", bytes(range(256))),
}


@pytest.mark.parametrize("what", ANSWERS)
async def test_an_answer_in_a_dialect_of_json_passes_as_it_came(what: str, lab: Lab) -> None:
    kind, body = ANSWERS[what]
    head = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n" % (kind, len(body))
    served = await lab.router(raw(head + body))

    response = await served.chat()

    assert (response.status_code, response.content) == (200, body)
    assert outcomes(served) == ["ok"]
    assert served.lines[0]["completion_tokens"] == (2 if USED in body else None)


async def test_a_compressed_answer_passes_as_it_came(lab: Lab) -> None:
    body = gzip.compress(orjson.dumps(COMPLETION))
    served = await lab.router(raw(json_response(0).partition(b"content-length")[0] + b"content-encoding: gzip\r\n"
                                  b"content-length: %d\r\n\r\n" % len(body) + body))  # fmt: skip

    assert (await served.chat()).json() == COMPLETION
    assert outcomes(served) == ["ok"]


async def test_a_head_may_be_as_long_as_that_of_two_thousand_embeddings(lab: Lab) -> None:
    # As vLLM writes it.
    item = {"embed_dtype": "float32", "endianness": "native", "shape": [1024]}
    items = [{"index": i, "start": i * 4096, "end": (i + 1) * 4096, **item} for i in range(2048)]
    metadata = json.dumps({"id": "embd-1", "created": 1, "model": "m", "data": items}).encode()
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\ncontent-length: 3\r\nmetadata: %b\r\n\r\n"
    served = await lab.router(raw(head % metadata + b"abc"))

    said = await talk(served, post("/v1/embeddings", {"model": "m", "input": "x"}, b"connection: close\r\n"))

    assert len(metadata) > 220_000
    assert b"\r\nmetadata: %b\r\n" % metadata in said
    assert said.endswith(b"\r\n\r\nabc")


@pytest.mark.parametrize("body", [CHAT, STREAM])
@pytest.mark.parametrize("more", [b"", b"content-length: 0\r\n"])
async def test_a_204_typed_as_a_stream_has_no_events(more: bytes, body: dict[str, Any], lab: Lab) -> None:
    served = await lab.router(raw(b"HTTP/1.1 204 No Content\r\ncontent-type: text/event-stream\r\n" + more + b"\r\n"))

    response = await served.client.post(URL, json=body)

    assert (response.status_code, response.content) == (204, b"")
    assert "transfer-encoding" not in response.headers
    assert outcomes(served) == ["ok"]


@pytest.mark.parametrize("coding", [b"identity", b"Identity"])
async def test_the_identity_coding_ends_with_the_connection(coding: bytes, lab: Lab) -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ntransfer-encoding: " + coding + b"\r\n\r\n"
    body = orjson.dumps(COMPLETION)

    async def script(request: Received, line: Line) -> None:
        stream = b'"stream":true' in request.body
        kind, parts = (b"text/event-stream", [event(), DONE]) if stream else (b"application/json", [body])
        await line.send(head % kind, *parts)
        line.close()

    served = await lab.router(script)

    assert (await served.chat()).content == body
    assert (await served.chat(stream=True)).content == event() + DONE
    assert outcomes(served) == ["ok", "ok"]


# Signs of life

PINGS = (b": ping\n\n", b":\n\n", b"\n\n", b'event: ping\ndata: {"type": "ping"}\n\n')


async def pinging(line: Line, ping: bytes, framed: bool, every: float = 0.1) -> None:
    while not line.writer.is_closing():
        await line.send(chunk(ping) if framed else ping)
        await asyncio.sleep(every)


@pytest.mark.parametrize("framed", [True, False])
@pytest.mark.parametrize("begun", [b"", event()])
@pytest.mark.parametrize("ping", PINGS)
async def test_an_engine_that_only_pings_is_silent(ping: bytes, begun: bytes, framed: bool, lab: Lab) -> None:
    async def script(request: Received, line: Line) -> None:
        await line.send(SSE_HEAD if framed else UNFRAMED_HEAD)
        if begun:
            await line.send(chunk(begun) if framed else begun)
        await pinging(line, ping, framed)

    served = await lab.router(script, entry={"timeouts": {"idle": 2}})

    passed, code = told(await broken_stream(served))

    assert code == "upstream_idle_timeout"
    assert passed.startswith(begun + ping * 2)
    assert outcomes(served) == ["idle_timeout"]


@pytest.mark.parametrize("framed", [True, False])
async def test_pings_are_not_heard_of_a_backend(framed: bool, lab: Lab) -> None:
    go_on = asyncio.Event()

    async def script(request: Received, line: Line) -> None:
        await line.send(SSE_HEAD if framed else UNFRAMED_HEAD)
        await line.send(chunk(event()) if framed else event())
        await go_on.wait()
        await pinging(line, b": ping\n\n", framed, 0.01)

    engine = await lab.engine(script)
    served = await lab.router(engine)
    transport = served.router.core.transport
    assert isinstance(transport, Transport)
    async with raw_client(served.port) as client, asyncio.timeout(10):
        await client.send(post(URL, STREAM))
        await client.reader.readuntil(event())
        heard = transport.last_read(engine.url)
        go_on.set()
        for _ in range(5):
            await client.reader.readuntil(b": ping\n\n")

        assert transport.last_read(engine.url) == heard > 0
    await until(lambda: served.lines)


async def test_pings_are_no_tokens(lab: Lab) -> None:
    role = event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
    parts = (b":\n\n", role, b": x\n\n", event(), b":\n\n", event(), event() + b":\n\n", DONE)
    served = await lab.router(sse(*parts, then=whole))

    assert await passed(served, URL, parts) == "ok"
    assert served.lines[0]["events"] == 3
    assert await served.metric("inference_api_tokens_total", type="output_estimate") == 3


# Tokens

CACHED = {"input_tokens": 2, "cache_read_input_tokens": 7, "output_tokens": 4}
UNCACHED = {"input_tokens": 7, "input_tokens_details": {"cached_tokens": 0}, "output_tokens": 2}
COUNTED: dict[str, tuple[str, tuple[bytes, ...], tuple[int, int, int | None]]] = {
    "chat": (
        URL,
        (event(), event(choices=[], usage=USAGE | {"prompt_tokens_details": {"cached_tokens": 2}}), DONE),
        (3, 5, 2),
    ),
    "the input is in message_start only": (MESSAGES, (START, DELTA, STOP, named(type="message_stop")), (9, 2, None)),
    "a cache of messages": (
        MESSAGES,
        (
            START,
            DELTA,
            named(type="message_delta", delta={}, usage=CACHED),
            named(type="message_stop"),
        ),
        (9, 4, 7),
    ),
    "a response without names": (
        RESPONSES,
        (
            typed(type="response.created", response={"usage": None}),
            typed(type="response.output_text.delta", delta='"usage":{"input_tokens":1}'),
            typed(
                type="response.completed",
                response={"usage": UNCACHED},
            ),
        ),
        (7, 2, 0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", COUNTED)
async def test_the_tokens_of_a_stream_are_counted(what: str, lab: Lab) -> None:
    path, parts, (prompt, completion, cached) = COUNTED[what]
    served = await lab.router(sse(*parts, then=whole))

    assert await passed(served, path, parts) == "ok"

    [line] = served.lines
    assert (line["prompt_tokens"], line["completion_tokens"], line.get("cached_tokens")) == (prompt, completion, cached)
    assert await served.metric("inference_api_tokens_total", type="cached_input") == (cached or 0)
