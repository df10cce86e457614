"""The way of an answer to the client: what it is told, how it ends, and what a slow client costs."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import httpx
import orjson
import pytest

from inference_api.errors import RouterError, UpstreamProtocolError, UpstreamReset, UpstreamTimeout
from inference_api.feature import Feature
from inference_api.http.routes import INFERENCE_ROUTES
from inference_api.models import Call, Outcome, RawHeaders, Reply
from inference_api.relay.events import EventTracker
from inference_api.relay.pump import Pump
from inference_api.relay.relay import Relay
from inference_api.relay.typed_events import follow
from inference_api.routing.backend import Backend
from inference_api.upstream.failures import IdleTimeout, Malformed, TotalTimeout
from inference_api.upstream.response import ResponseStream
from inference_api.upstream.transport import Transport
from tests.fakes import (
    COMPLETION,
    DONE,
    LAST_CHUNK,
    SSE_HEAD,
    STREAM,
    USAGE,
    Line,
    chunk,
    event,
    json_response,
    post,
    raw,
    raw_client,
    request_for,
    sse,
    until,
)

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]

ROUTES = {route.label: route for route in INFERENCE_ROUTES}
JSON, SSE = b"application/json", b"text/event-stream; charset=utf-8"
ANSWER = orjson.dumps(COMPLETION)
LARGE = b'{"x":"' + os.urandom(3 * 2**19).hex().encode() + b'"}'
ERROR = b'data: {"error":{"message":"x","code":500}}\n\n'


# One answer, without a server


class Client:
    """An ASGI `send` that remembers. It hangs for ever, or fails, at the message of that number."""

    def __init__(self, *, hangs_at: int = -1, fails_at: int = -1, slow: bool = False) -> None:
        self.messages: list[Any] = []
        self.hangs_at = hangs_at
        self.fails_at = fails_at
        self.slow = slow

    async def __call__(self, message: Any) -> None:
        number = len(self.messages)
        if number == self.fails_at:
            raise RuntimeError("cannot send")
        if number == self.hangs_at:
            await asyncio.get_running_loop().create_future()
        if self.slow:
            waiting = asyncio.get_running_loop().create_future()
            asyncio.get_running_loop().call_later(0.002, waiting.set_result, None)
            await waiting
        self.messages.append(message)

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"])

    @property
    def headers(self) -> RawHeaders:
        headers: RawHeaders = self.messages[0]["headers"]
        return headers

    @property
    def body(self) -> bytes:
        return b"".join(message["body"] for message in self.messages[1:])

    @property
    def complete(self) -> bool:
        return bool(self.messages) and not self.messages[-1].get("more_body", True)


class Chunks(httpx.AsyncByteStream):
    """The body of a transport that is not ours."""

    def __init__(self, parts: tuple[bytes, ...], error: Exception | None) -> None:
        self._parts = parts
        self._error = error
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for part in self._parts:
            yield part
        if self._error is not None:
            raise self._error

    async def aclose(self) -> None:
        self.closed = True


class Desk:
    """Makes Replies; `ended` is how they ended."""

    def __init__(self, start_engine: Start, transport: Transport, pushed: bool) -> None:
        self._start_engine = start_engine
        self._transport = transport
        self._pushed = pushed
        self.ended: list[Outcome] = []
        self.stream: httpx.AsyncByteStream | None = None

    async def __call__(
        self, kind: bytes, *parts: bytes, status: int = 200, breaks: bool = False, length: int | None = None
    ) -> Reply:
        headers = [(b"content-type", kind)]
        if length is not None:
            headers.append((b"content-length", b"%d" % length))
        if self._pushed:
            headers, self.stream = await self._push(status, headers, parts, breaks)
        else:
            self.stream = Chunks(parts, httpx.ReadError("reset") if breaks else None)
        return self.reply(status, headers, self.stream)

    def reply(self, status: int, headers: RawHeaders, stream: httpx.AsyncByteStream) -> Reply:
        return Reply(status, headers, stream, Backend("m", "http://a:1"), lambda _, outcome: self.ended.append(outcome))

    async def _push(
        self, status: int, headers: RawHeaders, parts: tuple[bytes, ...], breaks: bool
    ) -> tuple[RawHeaders, httpx.AsyncByteStream]:
        lines = b"".join(b"%s: %s\r\n" % pair for pair in headers)
        chunked = b"content-length" not in dict(headers)
        head = b"HTTP/1.1 %d X\r\n%s%s\r\n" % (status, lines, b"transfer-encoding: chunked\r\n" if chunked else b"")
        end = LAST_CHUNK if chunked and not breaks else b""
        engine = await self._start_engine(raw(head, *(chunk(p) if chunked else p for p in parts), end, close=breaks))
        response = await self._transport.handle_async_request(request_for(engine))
        assert isinstance(response.stream, ResponseStream)
        return response.headers.raw, response.stream

    def closed(self) -> bool:
        if isinstance(self.stream, Chunks):
            return self.stream.closed
        return "0 active" in repr(self._transport)


@pytest.fixture(params=["pushed", "pulled"])
def desk(request: pytest.FixtureRequest, start_engine: Start, transport: Transport) -> Desk:
    return Desk(start_engine, transport, request.param == "pushed")


@pytest.fixture
def pushing(start_engine: Start, transport: Transport) -> Desk:
    return Desk(start_engine, transport, pushed=True)


def relay_of(reply: Reply, label: str = "chat_completions", **more: Any) -> Relay:
    return Relay(reply, Call(ROUTES[label], "m", False, b"", [], "rid", []), **more)


async def test_a_stream_passes_unchanged(desk: Desk) -> None:
    parts = (event("a"), event("b")[:20], event("b")[20:] + event(choices=[], usage=USAGE), DONE)
    relay, client = relay_of(await desk(SSE, *parts)), Client()

    outcome = await relay(client)

    assert (outcome, desk.ended) == (Outcome.OK, [Outcome.OK])
    assert client.body == b"".join(parts)
    assert client.complete
    assert (relay.streamed_events, relay.usage()) == (2, USAGE)
    assert desk.closed()


async def test_a_stream_is_not_held_back_by_those_between(desk: Desk) -> None:
    client = Client()

    await relay_of(await desk(SSE, event(), DONE, status=200))(client)

    assert client.status == 200
    assert [value for name, value in client.headers if name == b"cache-control"] == [b"no-cache"]
    assert dict(client.headers)[b"x-accel-buffering"] == b"no"
    assert dict(client.headers)[b"x-request-id"] == b"rid"
    assert dict(client.headers)[b"content-type"] == SSE


# Label, parts, whether the connection then breaks; outcome, and the code of the error event that follows the parts.
# None: none follows, and the stream is complete; "": none follows, and it is left open.
INTERRUPTED, TRUNCATED = "upstream_stream_interrupted", "upstream_stream_truncated"
COMPLETED = b'event: response.completed\ndata: {"type":"response.completed"}\n\n'
INCOMPLETE = b'event: response.incomplete\ndata: {"type":"response.incomplete"}\n\n'
STOPPED = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
ENDS: dict[str, tuple[str, list[bytes], bool, Outcome, str | None]] = {
    "breaks between events": ("chat_completions", [event()], True, Outcome.RESET, INTERRUPTED),
    "breaks inside an event": ("chat_completions", [event(), b"data: {"], True, Outcome.RESET, ""),
    "breaks before the blank line": ("chat_completions", [event(), event()[:-1]], True, Outcome.RESET, ""),
    "breaks at an odd newline": ("chat_completions", [event(), b"\n"], True, Outcome.RESET, ""),
    "breaks after the end": ("chat_completions", [event(), DONE], True, Outcome.OK, None),
    "breaks after the end, with types": ("responses", [event(), COMPLETED], True, Outcome.OK, None),
    "ends without its mark": ("chat_completions", [event(), event()], False, Outcome.TRUNCATED, TRUNCATED),
    "ends inside an event": ("chat_completions", [event(), b"data: {"], False, Outcome.TRUNCATED, ""),
    "is empty": ("chat_completions", [], False, Outcome.TRUNCATED, TRUNCATED),
    "has an error": ("chat_completions", [event(), ERROR, DONE], False, Outcome.ERROR_EVENT, None),
    "ends with an error": ("chat_completions", [event(), ERROR], False, Outcome.ERROR_EVENT, None),
    "completed": ("responses", [b"data: 1\n\n", COMPLETED], False, Outcome.OK, None),
    "incomplete": ("responses", [b"data: 1\n\n", INCOMPLETE], False, Outcome.OK, None),
    "message stopped": ("messages", [b"data: 1\n\n", STOPPED], False, Outcome.OK, None),
    "may end anywhere": ("embeddings", [b"data: 1\n\n", b"data: anything\n\n"], False, Outcome.OK, None),
}


@pytest.mark.parametrize(("label", "parts", "breaks", "outcome", "code"), ENDS.values(), ids=ENDS)
async def test_how_a_stream_ends(
    label: str, parts: list[bytes], breaks: bool, outcome: Outcome, code: str | None, desk: Desk
) -> None:
    client = Client()

    assert await relay_of(await desk(SSE, *parts, breaks=breaks), label)(client) is outcome

    passed, told = b"".join(parts), client.body
    assert told.startswith(passed)
    assert client.complete == (code is None)
    if code:
        mark, _, error = told[len(passed) :].partition(b"\ndata: ")
        document = orjson.loads(error)
        assert (mark, document["code"], document["error"]["code"]) == (b"event: error", code, code)
    else:
        assert told == passed
    assert desk.ended == [outcome]
    assert desk.closed()


@pytest.mark.parametrize(
    ("kind", "body"),
    [(SSE, ERROR), (JSON, b'{"error": {"message": "no"}}'), (JSON, LARGE)],
    ids=["event", "json", "large"],
)
@pytest.mark.parametrize("status", [400, 404, 422, 429, 500, 503])
async def test_a_refusal_passes_as_it_is(status: int, kind: bytes, body: bytes, desk: Desk) -> None:
    client = Client()

    assert await relay_of(await desk(kind, body, status=status))(client) is Outcome.of_status(status)

    assert (client.status, client.body, client.complete) == (status, body, True)


@pytest.mark.parametrize("length", [None, len(ANSWER)])
async def test_a_json_answer_has_a_length(length: int | None, desk: Desk) -> None:
    relay, client = relay_of(await desk(JSON, ANSWER[:9], ANSWER[9:], length=length)), Client()

    outcome = await relay(client)

    assert (outcome, desk.ended) == (Outcome.OK, [Outcome.OK])
    assert [value for name, value in client.headers if name == b"content-length"] == [b"%d" % len(ANSWER)]
    assert len(client.messages) == 2
    assert (client.body, client.complete) == (ANSWER, True)
    assert (relay.usage(), relay.streamed_events) == (USAGE, 0)


@pytest.mark.parametrize(
    "body",
    [
        b'{"a": NaN}',
        b'{"embedding":[Infinity,-Infinity]}',
        b"[]",
        b" \n{}\r\n",
        b"null",
        b'{"x":"' + b"y" * 80_000 + b'"} \n',
    ],
)
async def test_what_an_engine_takes_for_json_passes(body: bytes, desk: Desk) -> None:
    client = Client()

    assert await relay_of(await desk(JSON, body))(client) is Outcome.OK

    assert client.body == body


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>busy</html>", b'{"a":', b"ok", b'{"a":1}}', b'{"x":"' + b"y" * 80_000, b"<" + b"y" * 80_000 + b"}"],
)
async def test_an_answer_that_is_not_the_json_it_claims_to_be_is_refused(body: bytes, desk: Desk) -> None:
    client = Client()

    with pytest.raises(UpstreamProtocolError):
        await relay_of(await desk(JSON, *[body] * bool(body)))(client)

    assert client.messages == []
    assert desk.ended == [Outcome.PROTOCOL_ERROR]
    assert desk.closed()


@pytest.mark.parametrize(("kind", "status"), [(b"text/plain", 200), (b"audio/mpeg", 200), (JSON, 201), (JSON, 500)])
async def test_only_a_200_that_claims_to_be_json_must_be(kind: bytes, status: int, desk: Desk) -> None:
    client = Client()

    await relay_of(await desk(kind, b"\xff\0not json", status=status))(client)

    assert (client.status, client.body, client.complete) == (status, b"\xff\0not json", True)


@pytest.mark.parametrize("status", [204, 304])
async def test_an_answer_without_a_body_gets_no_length(status: int, desk: Desk) -> None:
    client = Client()

    assert await relay_of(await desk(JSON, status=status))(client) is Outcome.OK

    assert b"content-length" not in dict(client.headers)
    assert (client.body, client.complete) == (b"", True)


@pytest.mark.parametrize("parts", [(), (ANSWER[:50],)])
async def test_a_json_answer_that_breaks_off_becomes_an_error(parts: tuple[bytes, ...], desk: Desk) -> None:
    client = Client()

    with pytest.raises(UpstreamReset) as caught:
        await relay_of(await desk(JSON, *parts, breaks=True, length=len(ANSWER)))(client)

    assert client.messages == []
    assert desk.ended == [caught.value.outcome] == [Outcome.RESET]
    assert desk.closed()


@pytest.mark.parametrize(
    ("error", "kind", "final"),
    [
        (IdleTimeout("late"), UpstreamTimeout, True),
        (TotalTimeout("late"), UpstreamTimeout, True),
        (httpx.ReadTimeout("late"), UpstreamTimeout, True),
        (Malformed("junk"), UpstreamProtocolError, False),
        (httpx.ReadError("reset"), UpstreamReset, False),
    ],
)
async def test_how_a_json_answer_breaks_off_is_told(
    error: Exception, kind: type[RouterError], final: bool, pushing: Desk
) -> None:
    reply = pushing.reply(200, [(b"content-type", JSON)], Chunks((b"{",), error))

    with pytest.raises(kind) as caught:
        await relay_of(reply)(Client())

    assert ((b"x-should-retry", b"false") in caught.value.headers) == final


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (IdleTimeout("late"), b"upstream_idle_timeout"),
        (TotalTimeout("late"), b"upstream_timeout"),
        (Malformed("junk"), b"upstream_stream_interrupted"),
        (httpx.ReadError("reset"), b"upstream_stream_interrupted"),
        (httpx.ReadTimeout("late"), b"upstream_idle_timeout"),
    ],
)
async def test_how_a_stream_breaks_off_is_told(error: Exception, code: bytes, pushing: Desk) -> None:
    client = Client()

    await relay_of(pushing.reply(200, [(b"content-type", SSE)], Chunks((event(),), error)))(client)

    assert b'"code":"' + code in client.body
    assert not client.complete


async def test_a_large_json_answer_streams_through(desk: Desk) -> None:
    relay, client = (
        relay_of(await desk(JSON, *(LARGE[i : i + 100_000] for i in range(0, len(LARGE), 100_000)))),
        Client(),
    )

    outcome = await relay(client)

    assert (outcome, desk.ended) == (Outcome.OK, [Outcome.OK])
    assert client.body == LARGE
    assert client.complete
    assert len(client.messages) > 2


async def test_a_large_answer_that_breaks_off_is_left_open(desk: Desk) -> None:
    client = Client()

    outcome = await relay_of(await desk(JSON, LARGE[:-1000], breaks=True, length=len(LARGE)))(client)

    assert (outcome, desk.ended) == (Outcome.RESET, [Outcome.RESET])
    assert client.body == LARGE[:-1000]
    assert not client.complete


# Slow clients, and none


@pytest.mark.parametrize(("last", "breaks"), [(DONE, False), (b"", True)], ids=["ends", "breaks"])
async def test_a_client_that_is_slow_gets_every_byte(last: bytes, breaks: bool, desk: Desk) -> None:
    parts = [*(event(f"word{i}") for i in range(30)), *([last] if last else [])]
    client = Client(slow=True)

    outcome = await relay_of(await desk(SSE, *parts, breaks=breaks))(client)

    assert outcome is (Outcome.RESET if breaks else Outcome.OK)
    passed, error, _ = client.body.partition(b"event: error\n")
    assert (passed, bool(error)) == (b"".join(parts), breaks)
    assert client.complete == (not breaks)


@pytest.mark.parametrize("hangs_at", [1, 2])
@pytest.mark.parametrize("kind", [SSE, JSON])
async def test_a_client_that_stops_reading_is_given_up(kind: bytes, hangs_at: int, desk: Desk) -> None:
    parts = [event()] * 3 if kind is SSE else [LARGE[: 2**20 + 1], LARGE[2**20 + 1 :]]
    reply = await desk(kind, *parts)

    outcome = await relay_of(reply, write_stall=0.05)(Client(hangs_at=hangs_at))

    assert (outcome, desk.ended) == (Outcome.CLIENT_GONE, [Outcome.CLIENT_GONE])
    assert desk.closed()


async def test_a_client_that_stops_reading_before_the_error_event_is_given_up(desk: Desk) -> None:
    client = Client()
    reply = await desk(SSE, event(), breaks=True)
    relay = relay_of(reply, write_stall=0.05)

    async def send(message: Any) -> None:
        if message.get("body", b"").startswith(b"event: error"):
            await asyncio.get_running_loop().create_future()
        await client(message)

    async with asyncio.timeout(20):
        outcome = await relay(send)

    assert outcome in (Outcome.RESET, Outcome.CLIENT_GONE)
    assert desk.ended == [outcome]


@pytest.mark.parametrize("kind", [SSE, JSON])
@pytest.mark.parametrize("fails_at", [0, 1])
async def test_a_send_that_fails_fails_the_relay(kind: bytes, fails_at: int, desk: Desk) -> None:
    reply = await desk(kind, event() if kind is SSE else ANSWER)

    with pytest.raises(RuntimeError, match="cannot send"):
        await relay_of(reply)(Client(fails_at=fails_at))

    assert len(desk.ended) == 1
    assert desk.closed()


async def test_what_comes_while_a_send_waits_is_sent_in_its_turn(start_engine: Start, transport: Transport) -> None:
    engine = await start_engine(raw(SSE_HEAD))
    response = await transport.handle_async_request(request_for(engine))
    assert isinstance(response.stream, ResponseStream)
    client = Client(slow=True)
    pump = Pump(client, (), None, 200, 1.0)
    running = asyncio.ensure_future(pump.run(response.stream))
    await asyncio.sleep(0)

    for data in (b"a", b"b", b"c"):
        pump.data_received(data, complete=data == b"c")

    assert await running is Outcome.OK
    assert [message["body"] for message in client.messages] == [b"a", b"b", b"c"]
    assert client.complete
    await response.stream.aclose()


async def test_a_send_may_tidy_up_when_it_is_given_up(pushing: Desk) -> None:
    tidied: list[None] = []

    async def send(message: Any) -> None:
        if message.get("body"):
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                tidied.append(None)
                await asyncio.sleep(0)

    outcome = await relay_of(await pushing(SSE, event()), write_stall=0.05)(send)

    assert (outcome, tidied) == (Outcome.CLIENT_GONE, [None])


async def _cancelled(relay: Relay, client: Client, when: Callable[[], Any]) -> None:
    relaying = asyncio.ensure_future(relay(client))
    await until(when)
    relaying.cancel()
    with pytest.raises(asyncio.CancelledError):
        await relaying


async def test_a_client_that_leaves_while_it_is_waited_for_ends_the_exchange(desk: Desk) -> None:
    client = Client(hangs_at=2)
    relay = relay_of(await desk(SSE, event(), event()))

    await _cancelled(relay, client, lambda: len(client.messages) == 2 or client.body)

    assert (desk.ended, relay.outcome) == ([Outcome.CLIENT_GONE], Outcome.CLIENT_GONE)
    assert desk.closed()


@pytest.mark.parametrize(
    ("last", "outcome"), [(DONE, Outcome.OK), (ERROR + DONE, Outcome.ERROR_EVENT), (event(), Outcome.CLIENT_GONE)]
)
async def test_a_client_that_leaves_after_the_last_event_was_served(
    last: bytes, outcome: Outcome, pushing: Desk, start_engine: Start, transport: Transport
) -> None:
    engine = await start_engine(raw(SSE_HEAD + chunk(event()) + chunk(last)))
    response = await transport.handle_async_request(request_for(engine))
    client = Client()
    relay = relay_of(pushing.reply(200, response.headers.raw, response.stream))  # type: ignore[arg-type]

    await _cancelled(relay, client, lambda: client.body.endswith(last))

    assert (pushing.ended, relay.outcome) == ([outcome], outcome)
    assert "0 active, 0 idle" in repr(transport)


@pytest.mark.parametrize(("sent", "told"), [(event(), True), (event() + b"data: {", False), (event() + DONE, False)])
async def test_a_stream_that_the_router_interrupts_is_told_so_if_it_can_be(
    sent: bytes, told: bool, pushing: Desk, start_engine: Start, transport: Transport
) -> None:
    engine = await start_engine(raw(SSE_HEAD + chunk(sent)))
    response = await transport.handle_async_request(request_for(engine))
    client = Client()
    relay = relay_of(pushing.reply(200, response.headers.raw, response.stream))  # type: ignore[arg-type]
    await _cancelled(relay, client, lambda: client.body == sent)

    outcome = await relay.interrupt(client)

    assert outcome is (Outcome.OK if sent.endswith(DONE) else Outcome.DRAIN_TIMEOUT)
    assert (b"router_shutting_down" in client.body) == told
    assert client.body.startswith(sent)
    assert not client.complete


async def test_an_answer_of_another_kind_that_the_router_interrupts_is_only_left_open(
    pushing: Desk, start_engine: Start, transport: Transport
) -> None:
    engine = await start_engine(raw(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (2 * len(LARGE)), LARGE))
    response = await transport.handle_async_request(request_for(engine))
    client = Client()
    relay = relay_of(pushing.reply(200, [(b"content-type", b"audio/wav")], response.stream))  # type: ignore[arg-type]
    await _cancelled(relay, client, lambda: client.body == LARGE)

    assert await relay.interrupt(client) is Outcome.DRAIN_TIMEOUT
    assert client.body == LARGE
    assert not client.complete


async def test_after_a_piece_that_may_be_lost_nothing_is_told(
    pushing: Desk, start_engine: Start, transport: Transport
) -> None:
    engine = await start_engine(raw(SSE_HEAD + chunk(event())))
    response = await transport.handle_async_request(request_for(engine))
    client = Client(hangs_at=2)
    relay = relay_of(pushing.reply(200, response.headers.raw, response.stream))  # type: ignore[arg-type]
    await _cancelled(relay, client, lambda: relay.streamed_events == 1)
    client.hangs_at = -1

    assert await relay.interrupt(client) is Outcome.DRAIN_TIMEOUT
    assert client.body == b""


async def test_the_end_is_announced_before_the_last_byte(desk: Desk) -> None:
    for parts, kind in (((event(), DONE), SSE), ((ANSWER,), JSON), ((LARGE,), JSON)):
        client = Client()
        announced: list[bool] = []
        relay = relay_of(await desk(kind, *parts), before_end=lambda c=client, a=announced: a.append(c.complete))

        await relay(client)

        assert (announced, client.complete) == ([False], True)


async def test_an_end_that_is_none_is_not_announced(desk: Desk) -> None:
    announced: list[None] = []

    await relay_of(await desk(SSE, event()), before_end=lambda: announced.append(None))(Client())

    assert announced == []


# Taps


class Witness:
    """A tap that writes down what it sees."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def start(self, status: int, headers: RawHeaders) -> None:
        self.seen.append((status, dict(headers)[b"content-type"]))

    def chunk(self, data: bytes) -> None:
        self.seen.append(data)

    def end(self, outcome: Outcome) -> None:
        self.seen.append(outcome)


@pytest.mark.parametrize(("kind", "parts"), [(SSE, (event(), DONE)), (JSON, (ANSWER,)), (JSON, (LARGE,))])
async def test_taps_see_what_the_client_gets(kind: bytes, parts: tuple[bytes, ...], desk: Desk) -> None:
    taps, client = (Witness(), Witness()), Client()

    reply = await desk(kind, *parts)
    reply.taps = taps
    outcome = await relay_of(reply)(client)

    assert (taps[0].seen[0], taps[0].seen[-1]) == ((200, kind), outcome)
    assert b"".join(data for data in taps[0].seen if isinstance(data, bytes)) == client.body
    assert taps[1].seen == taps[0].seen


async def test_a_piece_that_goes_on_as_it_came_is_seen_as_any_other() -> None:
    witness, written, tracker = Witness(), list[bytes](), EventTracker()
    direct: Any = SimpleNamespace(frames=written.append)
    pump = Pump(Client(), (witness,), tracker, 200, 5.0, direct=direct)

    pump.data_received(event(), False, chunk(event()))

    assert (written, witness.seen) == ([chunk(event())], [event()])
    assert (pump.size, tracker.tokens) == (len(event()), 1)


ROLE = event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
FIRST_TOKENS = {
    "chat_completions": ([b": x\n\n", ROLE, ROLE, event(choices=[])], event()),
    "completions": ([b"\n\n"], event(choices=[{"text": "x"}])),
    "responses": (
        [b"event: response.created\ndata: {}\n\n", b'data: {"type":"response.in_progress"}\n\n'],
        b'data: {"type":"response.output_text.delta"}\n\n',
    ),
    "messages": (
        [b"event: message_start\ndata: {}\n\n", b'event: ping\ndata: {"type":"ping"}\n\n'],
        b'event: content_block_delta\ndata: {"type":"content_block_delta"}\n\n',
    ),
}


@pytest.mark.parametrize("pieces", [1, 5])
@pytest.mark.parametrize("framed", [True, False])
@pytest.mark.parametrize("label", FIRST_TOKENS)
async def test_the_first_token_is_no_ping_and_no_event_without_one(label: str, framed: bool, pieces: int) -> None:
    before, token = FIRST_TOKENS[label]
    now, written = 1.0, list[bytes]()
    direct: Any = SimpleNamespace(frames=written.append if framed else None, push=lambda data, more: True)
    tracker = follow(ROUTES[label], False)
    pump = Pump(Client(), (), tracker, 200, 5.0, direct=direct, clock=lambda: now)

    for data in before:
        for at in range(pieces):
            piece = data[at * len(data) // pieces : (at + 1) * len(data) // pieces]
            pump.data_received(piece, False, chunk(piece))
    assert (pump.first_at, tracker.tokens) == (0.0, 0)
    for now in (7.0, 8.0, 9.0):  # noqa: B007
        pump.data_received(token, False, chunk(token))

    assert (pump.first_at, tracker.tokens) == (7.0, 3)


@pytest.mark.parametrize(
    ("script", "outcome"),
    [
        (raw(json_response(COMPLETION)), Outcome.OK),
        (raw(SSE_HEAD + chunk(DONE) + LAST_CHUNK), Outcome.OK),
        # After the tap was made, and before it saw a byte.
        (raw(json_response(COMPLETION)[:-5], close=True), Outcome.RESET),
    ],
)
async def test_a_tap_is_told_of_the_end_once(
    script: Any, outcome: Outcome, start_engine: Start, start_router: Start
) -> None:
    witness = Witness()
    feature = Feature("witness", tap=lambda call, reply: witness)
    served = await start_router(await start_engine(script), features=[feature])

    await served.chat()

    assert [item for item in witness.seen if isinstance(item, Outcome)] == [outcome]
    assert witness.seen[-1] is outcome


# The same through a router with real sockets


async def test_a_stream_with_a_length_that_is_cut_is_cut(start_engine: Start, start_router: Start) -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n" % (len(event()) + 10)
    served = await start_router(await start_engine(raw(head + event(), close=True)))

    async with raw_client(served.port) as client:
        await client.send(post("/v1/chat/completions", STREAM))
        received = await client.reader.read(-1)

    assert event()[:40] in received
    assert b"upstream_stream_interrupted" in received
    assert served.lines[0]["outcome"] == "reset"


@pytest.mark.parametrize("then", [lambda line: line.send(chunk(DONE) + LAST_CHUNK), Line.close], ids=["ends", "breaks"])
async def test_a_stream_over_a_plain_httpx_transport(
    then: Callable[[Line], Any], start_engine: Start, start_router: Start
) -> None:
    events = [event(f"word{i}") for i in range(20)]
    served = await start_router(await start_engine(sse(*events, then=then)), transport=httpx.AsyncHTTPTransport())

    async with raw_client(served.port) as client:
        await client.send(post("/v1/chat/completions", STREAM, b"connection: close\r\n"))
        received = await client.reader.read(-1)

    assert all(one in received for one in events)
    breaks = then is Line.close
    assert (DONE in received, received.endswith(LAST_CHUNK)) == (not breaks, not breaks)
    assert (b"upstream_stream_interrupted" in received) == breaks
    assert (served.lines[0]["outcome"] == "ok") == (not breaks)


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize(
    ("body", "kind", "outcome"),
    [
        (event("a") + DONE, b"text/event-stream; charset=utf-8", Outcome.OK),
        (event("a"), b"text/event-stream; charset=utf-8", Outcome.TRUNCATED),
        (ANSWER, b"text/plain", Outcome.OK),
        (b"no json, no events", b"text/plain", Outcome.OK),
    ],
    ids=["events", "events that break off", "json", "other"],
)
async def test_an_answer_without_a_label_is_what_its_first_bytes_say(
    size: int, body: bytes, kind: bytes, outcome: Outcome, desk: Desk
) -> None:
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    call, client = Call(ROUTES["chat_completions"], "m", True, b"", [], "rid", []), Client()

    assert await Relay(await desk(b"text/plain", *parts), call)(client) is outcome

    assert dict(client.headers)[b"content-type"] == kind
    assert client.body.startswith(body)
    assert client.complete == (outcome is Outcome.OK)
    assert (desk.ended, desk.closed()) == ([outcome], True)
