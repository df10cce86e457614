"""The HTTP surface on real sockets: what is let through, what is refused and how, and what a connection is good for."""

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import httpx
import openai
import orjson
import pytest

from inference_api.feature import Feature
from inference_api.http.routes import INFERENCE_ROUTES
from inference_api.models import Call, Reply, Send
from inference_api.routing.fleet import Model
from tests.conftest import Served
from tests.fakes import (
    CHAT,
    COMPLETION,
    Answer,
    FakeEngine,
    Line,
    event,
    hang,
    json_response,
    post,
    raw,
    raw_client,
    read_answer,
    until,
)

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
URL = "/v1/chat/completions"
JSON = {"content-type": "application/json"}
CHUNKED = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"
    b"content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
)
ENVELOPE = {"message", "type", "param", "code"}


def idle(served: Served) -> bool:
    """Nothing is counted as in flight any more, nowhere."""
    models = served.router.core.fleet.models.values()
    backends = [backend.in_flight for model in models for backend in model.backends]
    return not any([served.router.core.admission.in_flight, *backends, *(model.in_flight for model in models)])


async def talk(served: Served, *parts: bytes) -> Answer:
    """What a raw client gets that sends these bytes."""
    async with raw_client(served.port) as client:
        await client.send(*parts)
        return await read_answer(client.reader)


async def in_pieces(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


# Sizes


async def test_a_body_that_says_it_is_too_large_is_refused_before_it_is_sent(start_router: Start) -> None:
    served = await start_router(max_body_bytes=1000)

    async with raw_client(served.port) as client:
        head, _, _ = post(URL, b"x" * 1001, b"expect: 100-continue\r\n").partition(b"\r\n\r\n")
        await client.send(head + b"\r\n\r\n")
        answer = await read_answer(client.reader)
        rest = await client.reader.read(-1)

    # The first thing it hears is the refusal, not 100.
    assert (answer.status, answer.headers["connection"], rest) == (413, "close", b"")
    assert orjson.loads(answer.body)["error"]["code"] == "request_too_large"
    assert "1000 bytes" in orjson.loads(answer.body)["error"]["message"]
    assert idle(served)


async def test_a_body_of_exactly_the_limit_passes(start_engine: Start, start_router: Start) -> None:
    body = orjson.dumps(CHAT)
    served = await start_router(engine := await start_engine(), max_body_bytes=len(body))

    whole = await served.client.post(URL, content=body, headers=JSON)
    chunked = await served.client.post(URL, content=in_pieces(body[:9], body[9:]), headers=JSON)
    above = await served.client.post(URL, content=in_pieces(body, b" "), headers=JSON)

    assert [answer.status_code for answer in (whole, chunked, above)] == [200, 200, 413]
    assert [request.body for request in engine.requests] == [body, body]


async def test_the_openai_sdk_sees_the_413_while_it_is_still_sending(start_router: Start) -> None:
    served = await start_router(max_body_bytes=1000)
    text = "x" * 5_000_000

    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="k", max_retries=0) as client:
        with pytest.raises(openai.APIStatusError) as caught:
            await client.chat.completions.create(model="m", messages=[{"role": "user", "content": text}])

    assert caught.value.status_code == 413
    assert caught.value.code == "request_too_large"


async def test_a_client_that_waits_for_100_gets_it(served: Served, engine: FakeEngine) -> None:
    head, _, body = post(URL, CHAT, b"expect: 100-continue\r\n").partition(b"\r\n\r\n")

    async with raw_client(served.port) as client:
        await client.send(head + b"\r\n\r\n")
        assert (await read_answer(client.reader)).status == 100
        await client.send(body)
        answer = await read_answer(client.reader)

    assert (answer.status, engine.requests[0].body) == (200, body)
    assert engine.requests[0].header("expect") is None


async def test_a_chunked_request_reaches_the_engine_with_a_length(served: Served, engine: FakeEngine) -> None:
    body = orjson.dumps(CHAT)

    answer = await served.client.post(URL, content=in_pieces(body[:1], body[1:20], body[20:]), headers=JSON)

    assert answer.status_code == 200
    assert engine.requests[0].body == body
    assert engine.requests[0].header("content-length") == str(len(body))
    assert engine.requests[0].header("transfer-encoding") is None


# Paths and methods

ELSEWHERE = [
    "/v1",
    "/v1/chat",
    "/v1/chat/completions/x",
    "/V1/chat/completions",
    # What engines do for their operators.
    "/sleep",
    "//sleep",
    "/wake_up",
    "/collective_rpc",
    "/scale_elastic_ep",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/server_info",
    "/load",
    # And ways around.
    "/v1/%2e%2e/sleep",
    "/v1/../sleep",
    "/v1/chat/completions/../../../sleep",
    "/v1/chat/completions%2f..%2f..%2f..%2fsleep",
    "/v1/chat/completions;/sleep",
    "/v1/chat/completions%00",
    "/v1/chat/completions%3Fx",
    "/v1%2Fchat/completions",
    "/./sleep",
    "/\\sleep",
]


@pytest.mark.parametrize("path", [f"/{URL}", f"{URL}/", "//v1//chat/completions//", f"{URL}///?a=%2F%2F&b"])
async def test_needless_slashes_do_not_matter(path: str, served: Served, engine: FakeEngine) -> None:
    answer = await talk(served, post(path, CHAT))

    assert answer.status == 200
    assert engine.requests[0].target == URL + path[path.find("?") :] * ("?" in path)


async def test_what_is_not_on_the_list_never_reaches_an_engine(served: Served, engine: FakeEngine) -> None:
    refused = {}
    for path in ELSEWHERE:
        answer = await talk(served, post(path, CHAT))
        error = orjson.loads(answer.body)["error"]
        refused[path] = (answer.status, error["code"], error["param"])

    assert refused == dict.fromkeys(ELSEWHERE, (404, "unknown_url", None))
    assert engine.requests == []


async def test_pages_are_answered_here(served: Served, engine: FakeEngine) -> None:
    for path in ("/", "/health", "/version", "/metrics"):
        assert (await served.client.get(path)).status_code == 200
        assert (await served.client.post(path, json=CHAT)).status_code == 405

    assert engine.requests == []


async def test_inference_is_post_only(served: Served, engine: FakeEngine) -> None:
    for path in [route.path for route in INFERENCE_ROUTES]:
        for method in ("GET", "HEAD", "OPTIONS", "DELETE", "PUT", "PATCH", "QUERY"):
            answer = await served.client.request(method, path)
            assert (method, path, answer.status_code) == (method, path, 405)
            assert (answer.headers["allow"], answer.headers["content-type"]) == ("POST", "application/json")
            assert answer.content == b"" if method == "HEAD" else answer.json()["error"]["code"] == "method_not_allowed"

    assert engine.requests == []


# Limits


async def test_more_requests_than_the_process_takes_are_refused_at_once(
    start_engine: Start, start_router: Start
) -> None:
    engine = await start_engine(hang)
    served = await start_router(engine, max_in_flight=1)

    async with raw_client(served.port) as client:
        await client.send(post(URL, CHAT))
        await until(lambda: engine.requests)
        refused = await served.chat()
        probe = await served.client.get("/readyz")
    await until(lambda: idle(served))
    engine.script = raw(json_response(COMPLETION))
    after = await served.chat()

    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
    assert refused.headers["retry-after"] == "1"
    assert (probe.status_code, after.status_code, len(engine.requests)) == (200, 200, 2)
    assert served.lines[0]["outcome"] == "shed"


async def test_clients_that_are_slow_to_send_keep_nobody_out(start_engine: Start, start_router: Start) -> None:
    served = await start_router(await start_engine(), max_in_flight=1)
    request = post(URL, CHAT)

    async with AsyncExitStack() as stack:
        slow = [await stack.enter_async_context(raw_client(served.port)) for _ in range(5)]
        for client in slow:
            await client.send(request[:-1])
        await until(lambda: served.router.core.admission.buffered == 5 * (len(orjson.dumps(CHAT)) - 1))
        assert (await served.chat()).status_code == 200
        for client in slow:
            await client.send(request[-1:])
            assert (await read_answer(client.reader)).status == 200

    assert served.router.core.admission.buffered == 0


async def test_where_there_is_no_place_a_body_is_not_waited_for(start_engine: Start, start_router: Start) -> None:
    engine = await start_engine(hang)
    served = await start_router(engine, max_in_flight=1)

    async with raw_client(served.port) as client, raw_client(served.port) as late:
        await client.send(post(URL, CHAT))
        await until(lambda: engine.requests)
        await late.send(post(URL, CHAT)[:-1])
        refused = await read_answer(late.reader)
        assert await late.reader.read(-1) == b""

    assert (refused.status, refused.headers["connection"], refused.headers["retry-after"]) == (503, "close", "1")
    assert orjson.loads(refused.body)["error"]["code"] == "overloaded"


async def test_bodies_have_so_much_memory_and_no_more(start_engine: Start, start_router: Start) -> None:
    served = await start_router(await start_engine(), max_body_bytes=100_000, max_buffered_bytes=150_000)
    unfinished = post(URL, CHAT | {"user": "x" * 90_000})[:-1]

    async with raw_client(served.port) as first, raw_client(served.port) as second:
        await first.send(unfinished)
        await until(lambda: served.router.core.admission.buffered > 90_000)
        await second.send(unfinished)
        refused = await read_answer(second.reader)
        # What comes with its head has a place of its own.
        assert (await served.chat()).status_code == 200
        await first.send(b"}")
        assert (await read_answer(first.reader)).status == 200

    assert (refused.status, refused.headers["connection"], refused.headers["retry-after"]) == (503, "close", "1")
    assert orjson.loads(refused.body)["error"]["code"] == "overloaded"
    await until(lambda: served.router.core.admission.buffered == 0)


async def test_more_requests_than_a_model_takes_are_refused_at_once(start_engine: Start, start_router: Start) -> None:
    engine, other = await start_engine(hang), await start_engine()
    models = [
        {"name": "m", "backends": [{"url": engine.url}], "max_in_flight": 1},
        {"name": "other", "backends": [{"url": other.url}]},
    ]
    served = await start_router(models=models)

    async with raw_client(served.port) as client:
        await client.send(post(URL, CHAT))
        await until(lambda: engine.requests)
        refused = await served.chat()
        others = await served.chat(model="other")
    await until(lambda: idle(served))

    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
    assert "'m'" in refused.json()["error"]["message"]
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert others.status_code == 200


# Errors

NO_BOUNDARY = (b"application/json", b"multipart/form-data")
ERRORS: dict[str, tuple[int, str, bytes]] = {
    "invalid_json": (400, "invalid_json", post(URL, b"{")),
    "bad_form": (400, "bad_request", post("/v1/audio/translations", b"").replace(*NO_BOUNDARY)),
    "unknown_model": (404, "model_not_found", post(URL, {**CHAT, "model": "nope"})),
    "unknown_url": (404, "unknown_url", post("/nope", CHAT)),
    "method": (405, "method_not_allowed", b"GET /v1/score HTTP/1.1\r\nhost: x\r\n\r\n"),
    "too_large": (413, "request_too_large", post(URL, CHAT).replace(b"content-length: ", b"content-length: 999999999")),
    "media_type": (415, "unsupported_media_type", post(URL, CHAT).replace(b"application/json", b"text/plain")),
    "encoding": (415, "unsupported_media_type", post(URL, CHAT, b"content-encoding: gzip\r\n")),
    "invalid": (422, "validation_error", post(URL, {"model": "m"})),
    "reset": (502, "upstream_reset", post("/v1/responses", {"model": "m", "input": "reset"})),
    "not_http": (502, "upstream_protocol_error", post(URL, {**CHAT, "x": "not http"})),
    "not_json": (502, "upstream_protocol_error", post(URL, {**CHAT, "x": "not json"})),
    "no_backend": (503, "no_backend_available", post(URL, {**CHAT, "model": "down"})),
    "timeout": (504, "upstream_timeout", post(URL, {**CHAT, "x": "silence"})),
}  # fmt: skip


async def misbehave(request: Any, line: Line) -> None:
    """What the body names."""
    if b"reset" in request.body:
        line.reset()
    elif b"not http" in request.body:
        await line.send(b"SMTP ready\r\n\r\n")
    elif b"not json" in request.body:
        await line.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 4\r\n\r\n<ht>")
    else:
        await hang(request, line)


async def test_every_error_has_all_keys_and_names_no_host(start_engine: Start, start_router: Start) -> None:
    engine, down = await start_engine(misbehave), await start_engine()
    await down.stop()
    models = [
        {"name": "m", "backends": [{"url": engine.url}], "timeouts": {"first_byte": 0.8}},
        {"name": "down", "backends": [{"url": down.url}]},
    ]
    served = await start_router(models=models)
    hosts = ("127.0.0.1", "localhost", f":{engine.port}", f":{down.port}", "Traceback")

    for case, (status, code, request) in ERRORS.items():
        answer = await talk(served, request)
        body = orjson.loads(answer.body)
        assert (case, answer.status, body["error"]["code"]) == (case, status, code)
        assert (set(body), set(body["error"])) == ({"error", "request_id"}, ENVELOPE)
        assert body["request_id"] == answer.headers["x-request-id"] != ""
        assert answer.headers["content-type"] == "application/json"
        assert body["error"]["type"] == ("invalid_request_error" if status < 500 else "server_error")
        assert re.fullmatch(r"[A-Z].*\.", body["error"]["message"])
        assert not any(host in body["error"]["message"] for host in hosts)
    await until(lambda: idle(served))


async def test_an_error_of_the_engine_passes_as_it_is(served: Served, engine: FakeEngine) -> None:
    problem = {"error": {"message": "too long", "code": 400}, "detail": 1}
    engine.script = raw(json_response(problem, "400 Bad Request", b"x-special: 1\r\n"))

    answer = await served.chat()

    assert (answer.status_code, answer.json(), answer.headers["x-special"]) == (400, problem, "1")
    assert served.lines[0]["outcome"] == "upstream_4xx"


# Request ids


async def upstream_id(served: Served, engine: FakeEngine, headers: list[tuple[str, Any]]) -> tuple[str, str]:
    """(the id that the client sees, the id that the engine sees)."""
    answer = await served.client.post(URL, json=CHAT, headers=[(name, value) for name, value in headers])
    sent = engine.requests[-1].header("x-request-id")
    assert sent is not None
    assert served.lines[-1]["request_id"] == answer.headers["x-request-id"]
    return answer.headers["x-request-id"], sent


@pytest.mark.parametrize("given", ["abc", "A-b_c.9", "x" * 128])
@pytest.mark.parametrize("header", ["x-request-id", "X-Correlation-ID"])
async def test_a_good_request_id_is_kept(header: str, given: str, served: Served, engine: FakeEngine) -> None:
    echoed, sent = await upstream_id(served, engine, [(header, given)])

    assert echoed == given
    assert sent.startswith(given)


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "x" * 5000, 'a"b', "a,b", "ü".encode(), "a/b"])
async def test_a_bad_request_id_is_replaced(given: str | bytes, served: Served, engine: FakeEngine) -> None:
    echoed, sent = await upstream_id(served, engine, [("x-request-id", given)])

    assert re.fullmatch("[0-9a-f]{32}", echoed)
    assert sent.startswith(echoed)


async def test_a_bad_request_id_gives_way_to_a_good_correlation_id(served: Served, engine: FakeEngine) -> None:
    headers: list[tuple[str, str | bytes]] = [("x-request-id", "a b"), ("x-correlation-id", "good")]

    assert (await upstream_id(served, engine, headers))[0] == "good"


async def test_engines_never_see_an_id_twice(served: Served, engine: FakeEngine) -> None:
    seen = {(await upstream_id(served, engine, [("x-request-id", "same")]))[1] for _ in range(20)}

    assert len(seen) == 20
    assert len({(await upstream_id(served, engine, []))[0] for _ in range(20)}) == 20


# Failures of the router itself


def boom(send: Send) -> Send:
    """A `send` layer that raises once it has been awaited."""

    async def raising(call: Call, model: Model) -> Reply:
        await asyncio.sleep(0)
        raise RuntimeError("a bug")

    return raising


async def test_a_layer_that_raises_is_a_500_that_says_nothing(
    start_router: Start, caplog: pytest.LogCaptureFixture
) -> None:
    served = await start_router(features=[Feature("boom", send=boom)])

    headers = {"authorization": "Bearer KEY", "x-request-id": "given"}
    answer = await served.client.post(URL, json={**CHAT, "x": "PROMPT"}, headers=headers)

    body = answer.json()
    assert (answer.status_code, body["error"]["code"], body["request_id"]) == (500, "internal_error", "given")
    assert "a bug" not in answer.text
    [line] = served.lines
    assert (line["outcome"], line["status"]) == ("internal_error", 500)
    [record] = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert record.fields == {"request_id": "given"}  # type: ignore[attr-defined]
    assert "a bug" in caplog.text
    assert not re.search("PROMPT|KEY|hello", caplog.text)
    assert idle(served)


async def test_an_exception_in_mid_answer_cuts_the_connection(
    start_engine: Start, start_router: Start, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            yield event("a")
            raise RuntimeError("a bug")

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, headers={"content-type": "text/event-stream"}, stream=Broken())

    served = await start_router(await start_engine(), transport=httpx.MockTransport(answer))

    with pytest.raises(httpx.RemoteProtocolError, match="incomplete chunked read"):
        await served.chat(stream=True)

    assert served.lines[0]["outcome"] == "internal_error"
    assert "a bug" in caplog.text
    assert idle(served)


# How answers are accounted


async def test_an_answer_too_large_to_be_held_is_a_success(served: Served, engine: FakeEngine) -> None:
    document = {**COMPLETION, "x": "a" * 3_000_000}
    engine.script = raw(json_response(document))

    answer = await served.chat()

    assert answer.json() == document
    await until(lambda: served.lines)
    assert (served.lines[0]["outcome"], served.lines[0]["status"]) == ("ok", 200)


async def test_the_status_of_an_invalid_body_is_each_routers_own(start_engine: Start, start_router: Start) -> None:
    engine = await start_engine()
    usual: Served = await start_router(engine)
    as_vllm: Served = await start_router(engine, validation_status="400")
    statuses = []

    for served in (usual, as_vllm, usual):
        answer = await served.client.post(URL, json={"model": "m"})
        assert answer.json()["error"]["code"] == "validation_error"
        document = (await served.client.get("/openapi.json")).json()
        responses = document["paths"][URL]["post"]["responses"]
        statuses.append((answer.status_code, "422" in responses, served.lines[0]["status"]))

    assert statuses == [(422, True, 422), (400, False, 400), (422, True, 422)]
