"""What a feature can do at each seam: ASGI layers, Replies, single events, taps, attempts, names and callers."""

from collections.abc import Awaitable, Callable, Mapping
from itertools import pairwise
from typing import Any

import httpx
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import ASGIApp, Message, Receive, Scope
from starlette.types import Send as ASGISend

from inference_api.feature import Feature
from inference_api.http.accounts import ACCOUNT, respond
from inference_api.http.pipeline import Resolve
from inference_api.http.routes import INFERENCE_ROUTES
from inference_api.models import Call, Caller, EventFilter, Outcome, RawHeaders, Reply, Send
from inference_api.observe.account import Record
from inference_api.relay.filter import FilteringPump
from inference_api.relay.typed_events import follow
from inference_api.routing.fleet import Model
from inference_api.server.cycle import cycle_of
from inference_api.upstream.attempt import Attempt, SendAttempt
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
    chunk,
    event,
    json_response,
    post,
    raw,
    raw_client,
    read_answer,
    until,
)
from tests.features.everything import Forbidden, Unauthorized, knows

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
URL = "/v1/chat/completions"
JSON = {"content-type": "application/json"}


def answering(reply: Callable[[Call], Reply | None]) -> Callable[[Send], Send]:
    """A `send` layer that answers by itself, unless the function gives None."""

    def wrap(send: Send) -> Send:
        async def sending(call: Call, model: Model) -> Reply:
            return reply(call) or await send(call, model)

        return sending

    return wrap


def changing(change: Callable[[Call, Reply], None]) -> Callable[[Send], Send]:
    """A `send` layer that does something with each Reply."""

    def wrap(send: Send) -> Send:
        async def sending(call: Call, model: Model) -> Reply:
            reply = await send(call, model)
            change(call, reply)
            return reply

        return sending

    return wrap


# ASGI layers


class Listener:
    """A layer that records messages in both directions."""

    def __init__(self) -> None:
        self.statuses: list[int] = []
        self.sent = b""
        self.received = b""

    def __call__(self, app: ASGIApp) -> ASGIApp:
        async def layer(scope: Scope, receive: Receive, send: ASGISend) -> None:
            async def record(message: Message) -> None:
                if message["type"] == "http.response.start":
                    self.statuses.append(message["status"])
                    self.sent = b""
                else:
                    self.sent += message.get("body", b"")
                await send(message)

            async def record_received() -> Message:
                message = await receive()
                self.received += message.get("body", b"")
                return message

            await app(scope, record_received, record)

        return layer


async def test_a_layer_sees_every_byte_of_an_answer(start_engine: Start, start_router: Start) -> None:
    listener = Listener()
    engine = await start_engine()
    served: Served = await start_router(engine, features=[Feature("listener", layer=listener)])

    for stream in (False, True):
        assert (await served.chat(stream=stream)).content == listener.sent
    engine.script = raw(json_response({"error": {}}, "400 Bad Request"))
    assert (await served.chat()).content == listener.sent
    engine.script = raw(json_response({"x": "y" * 3_000_000}))
    assert (await served.chat()).content == listener.sent
    assert (await served.client.get("/v1/models")).content == listener.sent
    assert listener.statuses == [200, 200, 400, 200, 200]


async def test_a_layer_sees_every_byte_of_a_body(start_engine: Start, start_router: Start) -> None:
    listener = Listener()
    engine = await start_engine()
    served: Served = await start_router(engine, features=[Feature("listener", layer=listener)])
    body = orjson.dumps({**CHAT, "user": "x" * 200_000})

    async def pieces() -> Any:
        for at in range(0, len(body), 50_000):
            yield body[at : at + 50_000]

    for content in (body, pieces(), orjson.dumps(CHAT)):
        listener.received = b""
        assert (await served.client.post(URL, content=content, headers=JSON)).status_code == 200
        assert listener.received == engine.requests[-1].body
    assert [len(request.body) for request in engine.requests] == [len(body), len(body), len(orjson.dumps(CHAT))]


async def test_a_layer_gives_an_answer_of_its_own(start_router: Start) -> None:
    def preflight(app: ASGIApp) -> ASGIApp:
        async def layer(scope: Scope, receive: Receive, send: ASGISend) -> None:
            if scope["type"] == "http" and scope["method"] == "OPTIONS":
                await respond(scope, send, 204, [(b"access-control-max-age", b"600")])
            else:
                await app(scope, receive, send)

        return layer

    served: Served = await start_router(features=[Feature("preflight", layer=preflight)])

    answer = await served.client.options("/v1/chat/completions", headers={"x-request-id": "mine"})

    assert (answer.status_code, answer.headers["access-control-max-age"]) == (204, "600")
    assert answer.headers["x-request-id"] == "mine"
    assert [(line["status"], line["outcome"], line["request_id"]) for line in served.lines] == [(204, "ok", "mine")]


async def test_headers_of_the_account_are_on_every_answer(start_engine: Start, start_router: Start) -> None:
    sends: list[object] = []

    def marking(app: ASGIApp) -> ASGIApp:
        def layer(scope: Scope, receive: Receive, send: ASGISend) -> Awaitable[None]:
            if scope["type"] == "http":
                mark = dict(scope["headers"]).get(b"x-mark")
                scope[ACCOUNT].answer_headers += [] if mark is None else [(b"x-marked", mark)]
            return app(scope, receive, send)

        return layer

    def fails(app: ASGIApp) -> ASGIApp:
        async def layer(scope: Scope, receive: Receive, send: ASGISend) -> None:
            if scope["type"] == "http":
                sends.append(cycle_of(send))
            if scope.get("path") == "/fails":
                raise ValueError
            if scope.get("path") == "/own":
                await respond(scope, send, 204, [])
            else:
                await app(scope, receive, send)

        return layer

    features = [Feature("mark", layer=marking), Feature("door", layer=fails, identify=knows)]
    engine = await start_engine()
    served: Served = await start_router(engine, features=features)
    events = [event(f"word{number} ") for number in range(5)]
    nobody = {"authorization": "Bearer wrong"}

    for mark in ("1", None, "2"):
        served.client.headers.pop("x-mark", None)
        served.client.headers.update({"x-mark": mark} if mark else {})
        engine.script = raw(json_response(COMPLETION))
        whole = await served.chat()
        engine.script = raw(SSE_HEAD, *map(chunk, [*events, DONE]), LAST_CHUNK)
        stream = await served.chat(stream=True)
        engine.script = raw(json_response({"id": "resp_1"}))
        stored = [
            await served.client.post("/v1/responses", json={"model": "m", "input": "x"}),
            await served.client.get("/v1/responses/resp_1"),
        ]
        others = {
            path: (await served.client.get(path, headers=headers)).headers.get_list("x-marked")
            for path, headers in (
                ("/v1/models", {}),
                ("/own", {}),
                ("/nope", {}),
                ("/fails", {}),
                ("/v1/models/m", nobody),
            )
        }

        wanted = [mark] if mark else []
        assert (whole.content, stream.content) == (orjson.dumps(COMPLETION), b"".join(events) + DONE)
        assert [answer.status_code for answer in stored] == [200, 200]
        for answer in (whole, stream, *stored, await served.chat(model="nope")):
            assert answer.headers.get_list("x-marked") == wanted
        assert others == dict.fromkeys(others, wanted)
    # The short cuts are left.
    assert None not in sends


async def test_an_error_of_a_layer_is_answered_counted_and_logged(start_router: Start) -> None:
    def refusing(app: ASGIApp) -> ASGIApp:
        async def layer(scope: Scope, receive: Receive, send: ASGISend) -> None:
            if scope["type"] == "http" and scope["path"] == URL:
                raise Unauthorized
            await app(scope, receive, send)

        return layer

    records: list[Record] = []
    served: Served = await start_router(features=[Feature("door", layer=refusing, record=records.append)])

    answer = await served.chat()

    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert answer.json()["request_id"] == answer.headers["x-request-id"]
    [line] = served.lines
    assert (line["status"], line["code"], line["bytes"]) == (401, "invalid_api_key", len(answer.content))
    assert await served.metric("inference_api_requests_total", code="401") == 1
    assert [(record.status, record.outcome) for record in records] == [(401, Outcome.REFUSED)]


# The way to a Reply


@pytest.mark.parametrize("stream", [False, True])
async def test_a_layer_answers_without_a_backend(stream: bool, start_engine: Start, start_router: Start) -> None:
    body = event(usage=USAGE) + DONE if stream else orjson.dumps(COMPLETION)
    kind = b"text/event-stream" if stream else b"application/json"

    def cached(call: Call) -> Reply:
        reply = Reply(200, [(b"content-type", kind)], httpx.ByteStream(body), attempts=0)
        reply.extra += ((b"x-cache", b"hit"),)
        return reply

    engine = await start_engine()
    served: Served = await start_router(engine, features=[Feature("cache", send=answering(cached))])

    answer = await served.chat(stream=stream)

    assert (answer.status_code, answer.content, answer.headers["x-cache"]) == (200, body, "hit")
    assert answer.headers["content-type"].encode() == kind
    [line] = served.lines
    assert (line["backend"], line["attempts"], line["outcome"]) == (None, 0, "ok")
    assert (line["model"], line["prompt_tokens"], line["bytes"]) == ("m", 3, len(body))
    assert await served.metric("inference_api_requests_total", model_name="m", code="200") == 1
    assert engine.requests == []
    assert served.router.core.fleet.models["m"].in_flight == 0


@pytest.mark.parametrize("size", [10, 300_000])
async def test_a_feature_finds_the_fields_that_it_names(size: int, start_engine: Start, start_router: Start) -> None:
    seen: list[Mapping[str, Any]] = []

    def look(send: Send) -> Send:
        def looking(call: Call, model: Model) -> Awaitable[Reply]:
            seen.append(call.fields)
            return send(call, model)

        return looking

    engine = await start_engine()
    first = Feature("first", fields=("max_tokens", "n"), send=look)
    served: Served = await start_router(engine, features=[first, Feature("second", fields=("n", "store"))])
    sent: dict[str, Any] = {"max_tokens": 7, "n": "many", "other": 1, "user": "x" * size}

    assert (await served.chat(**sent)).status_code == 200
    assert (await served.chat(messages="none", **sent)).status_code == 422
    engine.script = raw(json_response({"id": "resp_1"}))
    form = await served.client.post("/v1/images/edits", data={"model": "m", "n": "2"}, files={"image": b"x"})
    made = await served.client.post("/v1/responses", json={"model": "m", "input": "x", "store": True, **sent})
    found = await served.client.get("/v1/responses/resp_1")

    assert [answer.status_code for answer in (form, made, found)] == [200] * 3
    named = {"model": "m", "max_tokens": 7, "n": "many"}
    # Of `user` a split keeps the value.
    seen = [{name: value for name, value in fields.items() if name != "user"} for fields in seen]
    assert seen == [named | {"stream": False}, {"model": "m", "stream": False}, named | {"store": True}]


@pytest.mark.parametrize("stream", [False, True])
async def test_headers_of_one_answer_are_in_no_other(stream: bool, start_engine: Start, start_router: Start) -> None:
    def mark(call: Call, reply: Reply) -> None:
        if b"marked" in call.body:
            reply.extra += ((b"x-mark", call.request_id.encode()),)

    engine = await start_engine()
    served: Served = await start_router(engine, features=[Feature("mark", send=changing(mark))])

    seen = []
    for user in ("marked", "plain", "marked", "plain"):
        answer = await served.chat(stream=stream, user=user)
        seen.append(answer.headers.get("x-mark") == answer.headers["x-request-id"])
        assert ("x-mark" in answer.headers) == (user == "marked")

    assert seen == [True, False, True, False]


# Single events

USAGE_EVENT = event(choices=[], usage=USAGE)


async def test_an_event_that_is_filtered_is_counted_and_not_sent(start_engine: Start, start_router: Start) -> None:
    def hide(call: Call, reply: Reply) -> None:
        reply.filter = EventFilter(b'"choices":[]', lambda event: False)

    events = [event(f"word{number} ") for number in range(5)]
    served: Served = await start_router(
        engine := await start_engine(), features=[Feature("usage", send=changing(hide))]
    )
    whole = b"".join([*events, USAGE_EVENT, DONE])
    for parts in (
        (*events, USAGE_EVENT, DONE),
        (whole,),
        (whole[:-40], whole[-40:]),
        (whole[: len(events[0]) + 9], whole[len(events[0]) + 9 :]),
    ):
        engine.script = raw(SSE_HEAD, *map(chunk, parts), LAST_CHUNK)

        answer = await served.chat(stream=True)

        assert answer.content == b"".join(events) + DONE
        line = served.lines[-1]
        assert (line["prompt_tokens"], line["completion_tokens"], line["outcome"]) == (3, 5, "ok")
        assert line["bytes"] == len(answer.content)


class Written:
    """What a client gets, from a server that takes whole chunks as they come, and from one that does not."""

    def __init__(self, takes_frames: bool) -> None:
        self.body = b""
        self.frames: Any = self._frame if takes_frames else None

    def _frame(self, frame: bytes) -> None:
        self.body += frame.partition(b"\r\n")[2][:-2]

    def push(self, body: bytes, more_body: bool) -> bool:
        self.body += body
        return True

    def respond(self, status: int, lines: bytes, body: bytes) -> bool:
        raise AssertionError("a stream is no whole answer")


def filtered(pieces: list[bytes], takes_frames: bool) -> tuple[bytes, Any]:
    """The bytes that a client gets of these reads, and what followed them."""

    async def send(message: Message) -> None:
        raise AssertionError("nothing is in its way")

    written, tracker = Written(takes_frames), follow(INFERENCE_ROUTES[0], False)
    common = send, (), tracker, 200, 5.0, lambda: None, written
    pump = FilteringPump(EventFilter(b'"choices":[]', lambda event: b"keep" in event), *common)
    for piece in pieces:
        pump.data_received(piece, False, chunk(piece) if takes_frames else None)
    pump.data_received(b"", True)
    return written.body, tracker


EVENTS = st.lists(
    st.sampled_from(
        [
            event("a").strip(),
            b": ping",
            b"event: x\ndata: {}",
            USAGE_EVENT.strip(),
            event(choices=[], user="keep").strip(),
            event(choices=[], usage={"prompt_tokens": 1, "completion_tokens": 1}).strip(),
        ]
    ),
    max_size=6,
)
BLANK_LINES = st.sampled_from([b"\n\n", b"\r\n\r\n", b"\r\r"])


@given(EVENTS, BLANK_LINES, st.lists(st.integers(0, 1200), max_size=6), st.booleans())
def test_exactly_the_marked_events_are_missing_however_the_bytes_come(
    events: list[bytes], blank: bytes, cuts: list[int], takes_frames: bool
) -> None:
    written = [text.replace(b"\n", blank[: len(blank) // 2]) + blank for text in events] + [b"data: [DONE]" + blank]
    whole = b"".join(written)
    ends = [0, *sorted(min(cut, len(whole)) for cut in cuts), len(whole)]
    pieces = [whole[start:end] for start, end in pairwise(ends) if start < end]

    body, tracker = filtered(pieces, takes_frames)

    assert body == b"".join(text for text in written if b'"choices":[]' not in text or b"keep" in text)
    assert tracker.verdict() is Outcome.OK
    reported = [text for text in events if b'"usage"' in text]
    assert tracker.usage() == (orjson.loads(reported[-1][6:])["usage"] if reported else None)


def test_a_marked_event_is_missing_wherever_it_is_split() -> None:
    whole = event("a") + USAGE_EVENT + event("b") + DONE

    for cut in range(1, len(whole)):
        for takes_frames in (False, True):
            body, tracker = filtered([whole[:cut], whole[cut:]], takes_frames)
            assert (cut, body, tracker.usage()) == (cut, event("a") + event("b") + DONE, USAGE)


def test_an_event_too_large_to_be_held_is_passed_on() -> None:
    large = b"data: " + b"x" * (3 << 20) + b"\n\n"
    pieces = [large[at : at + 65536] for at in range(0, len(large), 65536)]

    body, _ = filtered([*pieces, USAGE_EVENT + DONE], False)

    assert body == large + DONE


# Taps, attempts


class Ear:
    """A tap that hears all."""

    def __init__(self) -> None:
        self.heard = b""
        self.outcome: Outcome | None = None

    def start(self, status: int, headers: RawHeaders) -> None:
        assert status == 200

    def chunk(self, data: bytes) -> None:
        self.heard += data

    def end(self, outcome: Outcome) -> None:
        self.outcome = outcome


@pytest.mark.parametrize("stream", [False, True])
async def test_a_tap_gets_what_the_client_gets(stream: bool, start_engine: Start, start_router: Start) -> None:
    ears: list[Ear] = []

    def listen(call: Call, reply: Reply) -> Ear | None:
        if b"nobody" in call.body:
            return None
        ears.append(Ear())
        return ears[-1]

    def hide(call: Call, reply: Reply) -> None:
        reply.filter = EventFilter(b'"choices":[]', lambda event: False)

    features = [Feature("ear", tap=listen), Feature("usage", send=changing(hide))]
    served: Served = await start_router(await start_engine(), features=features)

    answer, other = await served.chat(stream=stream), await served.chat(stream=stream, user="nobody")

    [ear] = ears
    assert answer.content == other.content == ear.heard
    assert ear.outcome is Outcome.OK


async def test_a_wrapper_of_attempts_gets_their_number(start_engine: Start, start_router: Start) -> None:
    attempts: list[Attempt] = []

    def wrap(send: SendAttempt) -> SendAttempt:
        async def attempting(attempt: Attempt) -> Reply:
            attempts.append(attempt)
            lines = attempt.prepared.lines + b"x-attempt: %d\r\n" % attempt.number
            return await send(attempt._replace(prepared=attempt.prepared._replace(lines=lines)))

        return attempting

    engine = await start_engine()
    answers = [raw(json_response({}, "503 Service Unavailable", b"retry-after: 0\r\n")), raw(json_response(COMPLETION))]

    async def script(request: Any, line: Any) -> None:
        await answers.pop(0)(request, line)

    engine.script = script
    other = await start_engine(script)
    served: Served = await start_router(engine, other, features=[Feature("attempts", attempt=wrap)])

    assert (await served.chat()).status_code == 200

    first, second = attempts
    assert [(attempt.number, attempt.tried) for attempt in attempts] == [(1, ()), (2, (first.backend,))]
    assert first.call.tried == [first.backend, second.backend]
    sent = [request.header("x-attempt") for each in (engine, other) for request in each.requests]
    assert sorted(sent, key=str) == ["1", "2"]


# Who asks, and for what


def keep_to_own(resolve: Resolve) -> Resolve:
    def resolved(name: str, caller: Caller | None) -> Model:
        model = resolve(name, caller)
        if caller is not None and not caller.may_use(model.name):
            raise Forbidden(name)
        return model

    return resolved


async def test_a_caller_sees_and_uses_its_own_models(start_engine: Start, start_router: Start) -> None:
    engine = await start_engine()
    records: list[Record] = []
    models = [{"name": name, "backends": [engine.url]} for name in ("m", "secret")]
    door = Feature("door", identify=knows, resolve=keep_to_own, record=records.append)
    served: Served = await start_router(models=models, features=[door])
    headers = {"authorization": "Bearer alice:m"}

    async def names(**headers: str) -> list[str]:
        listed = (await served.client.get("/v1/models", headers=headers)).json()
        return [card["id"] for card in listed["data"]]

    # The list for everybody is rendered once, and is not hers.
    assert [await names(), await names(**headers), await names()] == [["m", "secret"], ["m"], ["m", "secret"]]
    for model, status in (("m", 200), ("secret", 403), ("nope", 404)):
        body = {**CHAT, "model": model}
        card = await served.client.get(f"/v1/models/{model}", headers=headers)
        answer = await served.client.post(URL, json=body, headers=headers)
        assert (model, answer.status_code, card.status_code) == (model, status, status)
        if status == 404:
            assert "secret" not in answer.text + card.text

    assert len(engine.requests) == 1
    assert {record.caller.id for record in records if record.caller} == {"alice"}


async def test_the_caller_is_read_anew_from_a_head_that_repeats(start_engine: Start, start_router: Start) -> None:
    """On one connection, where a head that is known is not parsed again."""
    callers: list[str | None] = []
    door = Feature(
        "door", identify=knows, record=lambda record: callers.append(record.caller.id if record.caller else None)
    )
    served: Served = await start_router(await start_engine(), features=[door])

    async with raw_client(served.port) as client:
        for token in (b"alice:m", b"alice:m", b"bob:m", b"alice:m"):
            await client.send(post(URL, STREAM, b"authorization: Bearer %b\r\n" % token))
            assert (await read_answer(client.reader)).status == 200

    assert callers == ["alice", "alice", "bob", "alice"]


async def test_probes_and_preflights_are_open_to_everybody(start_router: Start) -> None:
    served: Served = await start_router(features=[Feature("door", identify=knows)])
    headers = {"authorization": "Bearer wrong"}

    for path in ("/readyz", "/readyz/"):
        assert (await served.client.get(path, headers=headers)).status_code == 200
    assert (await served.client.options(URL, headers=headers)).status_code == 405
    assert (await served.client.get("/v1/models", headers=headers)).status_code == 401


async def test_a_task_that_fails_is_logged_at_once(
    start_engine: Start, start_router: Start, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail() -> None:
        raise RuntimeError("no such thing")

    served: Served = await start_router(await start_engine(), features=[Feature("task", tasks=(fail,))])

    await until(lambda: any(record.exc_info for record in caplog.records))
    assert (await served.chat()).status_code == 200


async def test_a_feature_of_a_key_applies_to_the_models_that_have_it(start_engine: Start, start_router: Start) -> None:
    """Its `send` and `annotate` are not on the path of other models."""
    met: list[str] = []

    def wrap(send: Send) -> Send:
        async def sending(call: Call, model: Model) -> Reply:
            met.append(f"send {model.name}")
            return await send(call, model)

        return sending

    def annotate(record: Record, extra: dict[str, Any]) -> None:
        met.append(f"annotate {record.model_name}")
        extra["noted"] = record.status

    feature = Feature("keyed", send=wrap, annotate=annotate, for_model=lambda entry: entry.owner == "paying")
    engine = await start_engine()
    entries = [
        {"name": name, "owner": owner, "backends": [engine.url]} for name, owner in (("m", "paying"), ("n", "x"))
    ]
    served: Served = await start_router(models=entries, features=[feature])

    for name in ("m", "n", "nope"):
        await served.chat(model=name)
    await until(lambda: len(served.lines) == 3)

    assert met == ["send m", "annotate m"]
    assert [line.get("noted") for line in served.lines] == [200, None, None]


async def test_an_annotator_that_fails_spoils_nothing(start_engine: Start, start_router: Start) -> None:
    def annotate(record: Record, extra: dict[str, Any]) -> None:
        raise ValueError

    records: list[Record] = []
    feature = Feature("failing", annotate=annotate, record=records.append)
    served: Served = await start_router(await start_engine(), features=[feature])

    assert (await served.chat()).status_code == 200
    await until(lambda: served.lines)
    assert [record.status for record in records] == [200]


async def test_a_feature_may_keep_the_router_from_being_ready(start_engine: Start, start_router: Start) -> None:
    reasons: list[str | None] = ["no_policy", None]
    feature = Feature("careful", ready=lambda: reasons[0])
    served: Served = await start_router(await start_engine(), features=[feature])

    answers = [await served.client.get("/readyz")]
    reasons.pop(0)
    answers.append(await served.client.get("/readyz"))

    assert [(answer.status_code, answer.json()["status"]) for answer in answers] == [(503, "no_policy"), (200, "ready")]


async def test_headers_of_a_call_are_on_its_errors_too(start_engine: Start, start_router: Start) -> None:
    def wrap(send: Send) -> Send:
        async def sending(call: Call, model: Model) -> Reply:
            call.answer_headers.append((b"x-noted", b"1"))
            return await send(call, model)

        return sending

    async def broken(request: Received, line: Line) -> None:
        await line.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{")
        line.close()

    engine = await start_engine()
    served: Served = await start_router(engine, features=[Feature("noting", send=wrap)], max_in_flight=1)

    well = await served.chat()
    engine.script = broken
    failed = await served.chat()
    served.router.core.admission.in_flight += 1
    async with raw_client(served.port) as client:
        # With its body at once: before waiting for one, the router would have refused without looking at it.
        await client.send(post("/v1/chat/completions", CHAT))
        full = await read_answer(client.reader)
    served.router.core.admission.in_flight -= 1

    assert [well.status_code, failed.status_code, full.status] == [200, 502, 503]
    assert [answer.headers["x-noted"] for answer in (well, failed, full)] == ["1"] * 3
