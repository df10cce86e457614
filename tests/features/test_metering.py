"""Streams are asked for their tokens, and the client sees nothing of it; without a report their events count."""

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, cast

import httpx
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_api.feature import Feature
from inference_api.features.delivery.metered import Calibration, metered
from inference_api.features.delivery.records import NOTHING, UNKNOWN, Metered
from inference_api.features.metering import FILTER, is_not_a_report
from inference_api.http.routes import INFERENCE_ROUTES
from inference_api.models import Call, Outcome, Reply, Send
from inference_api.relay.filter import FilteringPump
from inference_api.relay.typed_events import follow
from inference_api.routing.fleet import Model
from tests.conftest import Served
from tests.fakes import (
    CHAT,
    DONE,
    LAST_CHUNK,
    SSE_HEAD,
    STREAM,
    USAGE,
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
from tests.records import record_of

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
URL = "/v1/chat/completions"
JSON = {"content-type": "application/json"}
TEXTS = b"".join(event(f"word{number} ") for number in range(5))
REPORT = event(choices=[], usage=USAGE)


async def as_asked(request: Received, line: Line) -> None:
    """An engine that reports the tokens of a stream if it is asked to."""
    options = orjson.loads(request.body).get("stream_options") or {}
    report = REPORT if options.get("include_usage") else b""
    await line.send(SSE_HEAD, chunk(TEXTS), chunk(report + DONE) + LAST_CHUNK)


class Seen(NamedTuple):
    """A router, and the metered tokens of its requests."""

    served: Served
    metered: list[Metered | None]

    async def of(self, count: int = 1) -> list[Metered | None]:
        await until(lambda: len(self.metered) >= count)
        return self.metered


@pytest.fixture
async def router(start_router: Start) -> Start:
    async def router(*engines: FakeEngine, **more: Any) -> Seen:
        found: list[Metered | None] = []
        feature = Feature("seeing", record=lambda record: found.append(record.state.get("metered")))
        return Seen(await start_router(*engines, features=[feature], **{"usage": "log"} | more), found)

    return router


REPORTED = (3, None, 5, None, "reported")


# Usage-ask


@pytest.mark.parametrize(
    ("options", "sent"),
    [
        (b"", b'{"stream_options":{"include_usage":true},"model":"m"'),
        (b',"stream_options":null', b'"stream_options":{"include_usage":true}}'),
        (b',"stream_options": {"include_usage" : false}', b'"stream_options": {"include_usage" : true}}'),
        (
            b',"stream_options":{"continuous_usage_stats":false}',
            b'"stream_options":{"include_usage":true,"continuous_usage_stats":false}}',
        ),
        (b',"stream_options":{"include_usage":false},"stream_options":{}', b'"stream_options":{"include_usage":true}}'),
    ],
)
async def test_a_client_that_does_not_ask_sees_nothing_of_it(
    options: bytes, sent: bytes, start_engine: Start, router: Start
) -> None:
    engine = await start_engine(as_asked)
    it = await router(engine)
    body = orjson.dumps(STREAM)[:-1] + options + b"}"
    answer = await it.served.client.post(URL, content=body, headers=JSON)

    assert answer.content == TEXTS + DONE
    assert await it.of() == [REPORTED]
    assert sent in engine.requests[0].body
    # Nothing else changed.
    asked = json.loads(engine.requests[0].body)
    assert {name: value for name, value in asked.items() if name != "stream_options"} == STREAM
    assert asked["stream_options"]["include_usage"] is True
    assert it.served.lines[0]["completion_tokens"] == 5


@pytest.mark.parametrize("options", [{"include_usage": True}, {"include_usage": 1}, {"include_usage": True, "a": 1}])
async def test_a_client_that_asks_gets_what_it_asked_for(
    options: dict[str, Any], start_engine: Start, router: Start
) -> None:
    engine = await start_engine(as_asked)
    it = await router(engine)
    body = orjson.dumps(STREAM | {"stream_options": options})
    answer = await it.served.client.post(URL, content=body, headers=JSON)

    assert answer.content == TEXTS + REPORT + DONE
    assert engine.requests[0].body == body
    assert await it.of() == [REPORTED]


async def test_completions_are_asked_too(start_engine: Start, router: Start) -> None:
    engine = await start_engine(as_asked)
    it = await router(engine)
    answer = await it.served.client.post("/v1/completions", json={"model": "m", "prompt": "x", "stream": True})

    assert answer.content == TEXTS + DONE
    assert await it.of() == [REPORTED]


@pytest.mark.parametrize(
    ("path", "more"),
    [
        (URL, {"stream": False}),
        (URL, {}),
        ("/v1/messages", {"stream": True, "max_tokens": 5}),
        ("/v1/responses", {"stream": True, "input": "x"}),
        ("/invocations", {"stream": True}),
        (URL, {"stream": True, "stream_options": "wrong"}),
    ],
)
async def test_other_requests_stay_as_they_are(
    path: str, more: dict[str, Any], start_engine: Start, router: Start
) -> None:
    engine = await start_engine()
    it = await router(engine)
    body = orjson.dumps({**CHAT, **more})
    await it.served.client.post(path, content=body, headers=JSON)

    assert engine.requests[0].body == body


async def test_a_model_may_be_left_alone(start_engine: Start, router: Start) -> None:
    engine = await start_engine(as_asked)
    it = await router(engine, entry={"usage": "leave"})
    answer = await it.served.chat(stream=True)

    assert answer.content == TEXTS + DONE
    assert b"stream_options" not in engine.requests[0].body
    assert await it.of() == [(-(-len(engine.requests[0].body) // 4), None, 5, None, "counted")]


async def test_nothing_is_asked_or_metered_if_nobody_wants_it(start_engine: Start, router: Start) -> None:
    engine = await start_engine(as_asked)
    it = await router(engine, usage="off")
    await it.served.chat(stream=True)

    assert b"stream_options" not in engine.requests[0].body
    assert await it.of() == [None]


async def test_a_policy_wants_it(start_engine: Start, router: Start, tmp_path: Any) -> None:
    engine = await start_engine(as_asked)
    path = tmp_path / "policy.yaml"
    path.write_text("anonymous: {limits: [{tokens: 1000000, per: 60}]}")
    it = await router(engine, usage="off", policy=str(path))
    answer = await it.served.chat(stream=True)

    assert answer.content == TEXTS + DONE
    assert await it.of() == [REPORTED]


async def test_a_name_of_its_own_and_the_question_are_both_in_the_body(start_engine: Start, router: Start) -> None:
    engine = await start_engine(as_asked)
    it = await router(engine, entry={"served_model_name": "org/M"})
    for more in ({}, {"stream_options": None}, {"x": "é" * 100_000, "stream_options": {"include_usage": False}}):
        answer = await it.served.chat(stream=True, **more)
        assert answer.content == TEXTS + DONE
        asked = orjson.loads(engine.requests[-1].body)
        assert asked.pop("stream_options")["include_usage"] is True
        assert asked == {**STREAM, **{k: v for k, v in more.items() if k == "x"}, "model": "org/M"}


async def test_a_repeat_asks_again(start_engine: Start, router: Start) -> None:
    engines = [await start_engine(raw(json_response({}, "503 Busy"))) for _ in range(2)]
    it = await router(*engines)
    await it.served.chat(stream=True)
    for engine in engines:
        engine.script = as_asked
    answer = await it.served.chat(stream=True)

    first, second, third = (request.body for engine in engines for request in engine.requests)
    assert first == second == third
    assert b'{"stream_options":{"include_usage":true},' in first
    assert answer.content == TEXTS + DONE


async def test_a_large_body_is_asked(start_engine: Start, router: Start) -> None:
    engine = await start_engine(as_asked)
    it = await router(engine)
    prompt = '\\"stream_options\\":null é' * 100_000
    for more in (b"", b',"stream_options":{"include_usage":false}'):
        document = {**STREAM, "messages": [{"role": "user", "content": prompt}]}
        body = json.dumps(document).encode()[:-1] + more + b"}"
        answer = await it.served.client.post(URL, content=body, headers=JSON)
        assert answer.content == TEXTS + DONE
        assert orjson.loads(engine.requests[-1].body) == document | {"stream_options": {"include_usage": True}}


async def test_an_error_of_the_engine_is_passed_on(start_engine: Start, router: Start) -> None:
    engine = await start_engine(raw(json_response({"error": {"message": "no stream_options"}}, "400 Bad Request")))
    it = await router(engine)
    answer = await it.served.chat(stream=True)

    assert (answer.status_code, answer.json()) == (400, {"error": {"message": "no stream_options"}})
    assert await it.of() == [NOTHING]


# What is taken out of a stream

LONG = event("x" * 3000)
STREAMS: list[bytes] = [
    TEXTS + REPORT + DONE,
    TEXTS + REPORT.replace(b"\n\n", b"\r\n\r\n") + DONE,
    TEXTS.replace(b"\n\n", b"\r\n\r\n") + REPORT.replace(b"\n\n", b"\r\n\r\n") + DONE,
    TEXTS + REPORT.replace(b"[]", b"[ ]").replace(b'"usage":', b'"usage": ') + DONE,
    # A text that talks of it
    event('{"choices":[],"usage":{"prompt_tokens":1}}') + event(' _tokens" ') + REPORT + DONE,
    # As OpenAI: null in every other event
    b"".join(event(f"word{number}", usage=None) for number in range(3)) + REPORT + DONE,
    # Tokens in an event with a choice stay: it is the engine's own.
    event("a", usage=USAGE) + REPORT + DONE,
    # Another event without choices, as Azure's first
    event(choices=[], prompt_filter_results=[]) + TEXTS + REPORT + DONE,
    LONG + REPORT + LONG + DONE,
    TEXTS + b": ping\n\n" + REPORT + b": ping\n\n" + DONE,
]


def without_report(stream: bytes) -> bytes:
    for report in (REPORT, REPORT.replace(b"[]", b"[ ]").replace(b'"usage":', b'"usage": ')):
        stream = stream.replace(report, b"").replace(report.replace(b"\n\n", b"\r\n\r\n"), b"")
    return stream


def pumped(reads: Sequence[bytes], framed: bool) -> tuple[bytes, FilteringPump]:
    """What a client gets of a stream that comes in these reads."""
    sent: list[bytes] = []

    class Direct:
        frames = sent.append

        def respond(self, status: int, lines: bytes, body: bytes) -> bool:
            return False

        def push(self, body: bytes, more_body: bool) -> bool:
            sent.append(body)
            return True

    async def send(message: Any) -> None:
        raise NotImplementedError

    route = INFERENCE_ROUTES[0]
    direct: Any = Direct()
    pump = FilteringPump(FILTER, send, (), follow(route, True), 200, 60.0, lambda: None, direct)
    for read in reads:
        pump.data_received(read, False, read if framed else None)
    pump.data_received(b"", True)
    return b"".join(sent), pump


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("framed", [True, False])
def test_the_report_is_taken_out_and_nothing_else_however_it_comes(stream: bytes, framed: bool) -> None:
    expected = without_report(stream)
    assert expected != stream
    for size in (1, 2, 3, 7, 50, 1000, len(stream)):
        got, pump = pumped([stream[at : at + size] for at in range(0, len(stream), size)], framed)
        assert got == expected
        assert pump.verdict() is Outcome.OK


@given(st.sampled_from(STREAMS), st.lists(st.integers(0, 8000), max_size=12), st.booleans())
def test_any_cut_gives_the_same_bytes(stream: bytes, cuts: list[int], framed: bool) -> None:
    places = sorted({0, len(stream), *(cut % len(stream) for cut in cuts)})
    reads = [stream[start:end] for start, end in pairwise(places)]

    got, _ = pumped(reads, framed)

    assert got == without_report(stream)


@pytest.mark.parametrize(
    "text",
    ["data: {}\n\n", "data: [DONE]\n\n", 'data: {"choices":[]}\n\n', 'data: {"choices":[],"usage":null}\n\n', "x"],
)
def test_what_is_no_report_is_kept(text: str) -> None:
    assert is_not_a_report(text.encode())


async def test_an_engine_that_does_not_know_the_question_is_no_fault(start_engine: Start, router: Start) -> None:
    """Its streams have no report; they are counted."""
    it = await router(await start_engine(raw(SSE_HEAD, chunk(TEXTS), chunk(DONE) + LAST_CHUNK)))
    answer = await it.served.chat(stream=True)

    assert answer.content == TEXTS + DONE
    [tokens] = await it.of()
    assert tokens is not None
    assert tokens[2:] == (5, None, "counted")


async def test_the_official_client_does_not_meet_an_event_without_choices(start_engine: Start, router: Start) -> None:
    openai = pytest.importorskip("openai")
    it = await router(await start_engine(as_asked))
    async with openai.AsyncOpenAI(
        base_url=f"{it.served.url}/v1", api_key="x", http_client=httpx.AsyncClient()
    ) as client:
        asked = [{}, {"stream_options": {"include_usage": True}}]
        found = [[chunk async for chunk in await client.chat.completions.create(**STREAM, **more)] for more in asked]

    assert [chunk.choices[0].delta.content for chunk in found[0]] == [f"word{number} " for number in range(5)]
    assert [chunk.usage.completion_tokens for chunk in found[1] if chunk.usage] == [5]


# What is metered


async def test_a_json_answer_is_as_reported(start_engine: Start, router: Start) -> None:
    it = await router(await start_engine())
    await it.served.chat()

    assert await it.of() == [REPORTED]


@pytest.mark.parametrize(
    ("answer", "tokens"),
    [
        (json_response({}), UNKNOWN),
        (json_response({"usage": {}}), UNKNOWN),
        (json_response({"usage": {"prompt_tokens": 0, "completion_tokens": 0}}), (0, None, 0, None, "reported")),
        (json_response({"usage": {"prompt_tokens": 7}}), (7, None, None, None, "reported")),
        (json_response({}, "500 Internal Server Error"), NOTHING),
        (json_response({"usage": USAGE}, "429 Too Many Requests"), NOTHING),
        # An engine has answered with 2xx, and then broke: nobody knows.
        (b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{", UNKNOWN),
    ],
)
async def test_an_answer_without_a_report(answer: bytes, tokens: Metered, start_engine: Start, router: Start) -> None:
    it = await router(await start_engine(raw(answer, close=True)))
    await it.served.chat()

    assert await it.of() == [tokens]


async def test_a_feature_that_answers_by_itself_says_what_it_took(start_engine: Start, start_router: Start) -> None:
    """As a cache does."""

    def answering(send: Send) -> Send:
        async def answer(call: Call, model: Model) -> Reply:
            cast(dict[str, Any], call.state)["metered"] = (0, 0, 0, 0, "cache")
            return Reply(200, [(b"content-type", b"application/json")], httpx.ByteStream(b"{}"))

        return answer

    found: list[Any] = []
    seeing = Feature("seeing", record=lambda record: found.append(record.state["metered"]))
    served: Served = await start_router(
        await start_engine(), features=[Feature("cache", send=answering), seeing], usage="log"
    )
    await served.chat()

    await until(lambda: found)
    assert found == [(0, 0, 0, 0, "cache")]


async def test_tokens_of_an_embedding(start_engine: Start, router: Start) -> None:
    it = await router(await start_engine(raw(json_response({"usage": {"prompt_tokens": 7, "total_tokens": 7}}))))
    await it.served.client.post("/v1/embeddings", json={"model": "m", "input": "x"})

    assert await it.of() == [(7, None, 0, None, "reported")]


async def test_cached_tokens_of_the_messages_api_are_part_of_the_input(start_engine: Start, router: Start) -> None:
    usage = {
        "input_tokens": 10,
        "cache_read_input_tokens": 512,
        "cache_creation_input_tokens": 100,
        "output_tokens": 7,
    }
    it = await router(await start_engine(raw(json_response({"type": "message", "stop_reason": "x", "usage": usage}))))
    await it.served.client.post("/v1/messages", json={**CHAT, "max_tokens": 9})

    assert await it.of() == [(622, 512, 7, None, "reported")]


async def test_nobody_answered(start_engine: Start, router: Start) -> None:
    engine = await start_engine(hang)
    it = await router(engine)
    await it.served.chat(model="nope")
    async with raw_client(it.served.port) as client:
        await client.send(post(URL, STREAM))
        await until(lambda: engine.busy)

    # Nobody meters a request without a model, or with one: it is 0 in the record.
    assert set(await it.of(2)) <= {NOTHING, None}


async def test_a_stream_that_its_client_left_is_counted(start_engine: Start, router: Start) -> None:
    engine = await start_engine(sse(event("a"), event("b"), event("c"), then=Line.gone))
    it = await router(engine)
    request = post(URL, STREAM)
    async with raw_client(it.served.port) as client:
        await client.send(request)
        await client.reader.readuntil(b'"c"')
    body = len(request.partition(b"\r\n\r\n")[2])

    # By the client's body, not by the one that asked.
    assert await it.of() == [(-(-body // 4), None, 3, None, "counted")]


async def test_roles_and_ends_are_no_tokens(start_engine: Start, router: Start) -> None:
    role = event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
    engine = await start_engine(sse(role, event("a"), b": ping\n\n", event("b"), then=Line.reset))
    it = await router(engine)
    with pytest.raises(httpx.RemoteProtocolError):
        await it.served.chat(stream=True)

    [tokens] = await it.of()
    assert tokens is not None
    assert tokens[2:] == (2, None, "counted")


async def test_events_are_calibrated_by_what_engines_report(start_engine: Start, router: Start) -> None:
    """Speculative decoding: three tokens to an event."""
    report = event(choices=[], usage={"prompt_tokens": 3, "completion_tokens": 15})
    engine = await start_engine(raw(SSE_HEAD, chunk(TEXTS), chunk(report + DONE) + LAST_CHUNK))
    it = await router(engine)
    for _ in range(100):
        await it.served.chat(stream=True)
    engine.script = sse(*[event()] * 10, then=Line.reset)
    with pytest.raises(httpx.RemoteProtocolError):
        await it.served.chat(stream=True)

    found = await it.of(101)
    assert found[:100] == [(3, None, 15, None, "reported")] * 100
    assert found[100] is not None
    assert found[100][2:] == (30, None, "counted")


# Pure parts


def test_a_calibration_moves_by_a_sixteenth() -> None:
    calibration = Calibration()
    assert calibration.of("m") == 1.0
    calibration.learn("m", 30, 10, 1)

    assert calibration.of("m") == 1 + 2 / 16
    assert calibration.of("other") == 1.0


def test_removed_models_are_forgotten() -> None:
    calibration = Calibration()
    for number in range(3000):
        calibration.learn(f"m{number}", 30, 10, 10)

    assert calibration.of("m0") == 1.0
    assert calibration.of("m2999") > 1.0
    assert len(calibration._ratios) <= 1010


CUT = Outcome.CLIENT_GONE


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        # The last report of a stream that breaks after it is the truth.
        ({"outcome": CUT, "events": 9, "tokens": (3, 1, 5, None)}, (3, 1, 5, None, "reported")),
        # The beginning of a message says how long the prompt is, and of the answer nothing.
        ({"route": "messages", "outcome": CUT, "events": 9, "tokens": (3, 1, 1, None)}, (3, 1, 18, None, "counted")),
        ({"route": "messages", "outcome": CUT, "events": 9, "tokens": (3, 1, 40, None)}, (3, 1, 40, None, "reported")),
        ({"route": "messages", "events": 9, "tokens": (3, 1, 12, None)}, (3, 1, 12, None, "reported")),
        ({"route": "responses", "outcome": CUT, "events": 9}, (25, None, 18, None, "counted")),
        ({"outcome": CUT, "events": 0}, (25, None, 0, None, "counted")),
        ({"outcome": Outcome.OK, "events": 9}, (25, None, 18, None, "counted")),
        ({"outcome": Outcome.OK, "events": 0}, UNKNOWN),
        # Nothing is counted there.
        ({"route": "speech", "outcome": CUT}, UNKNOWN),
        ({"route": "embeddings", "stream": False, "tokens": (3, None, None, None)}, (3, None, 0, None, "reported")),
        ({"answered": 0}, NOTHING),
        ({"answered": 404, "tokens": (3, None, 5, None)}, NOTHING),
        # A real zero is not a missing one.
        ({"tokens": (0, 0, 0, 0), "events": 4}, (0, 0, 0, 0, "reported")),
    ],
)
def test_what_is_metered(fields: dict[str, Any], tokens: Metered) -> None:
    record = record_of(**{"stream": True, "body_size": 97, **fields})

    assert metered(record, 2.0) == tokens
