"""fallbacks: when another model answers, when none may, and what is told and counted of it."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import Served
from tests.fakes import (
    CHAT,
    COMPLETION,
    DONE,
    SSE_HEAD,
    STREAM,
    USAGE,
    FakeEngine,
    Script,
    chunk,
    event,
    hang,
    json_response,
    post,
    raw,
    raw_client,
    until,
)
from tests.faults.quiescence import quiet
from tests.features.limited import Limited, key
from tests.features.members import BUSY, OK, STREAMED, real, reset
from tests.features.test_usage import Accounted, account, plane  # noqa: F401
from tests.policies import write

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
URL = "/v1/chat/completions"
# Tokens of that answer
USED = USAGE["prompt_tokens"] + USAGE["completion_tokens"]


def status(line: str, headers: bytes = b"", **error: Any) -> Script:
    return raw(json_response({"error": {"message": "no", **error}}, line, headers))


TOO_LONG = status("400 Bad Request", code="context_length_exceeded")


class Pair:
    """A router with `a`, whose fallback is `b`."""

    def __init__(self, served: Served, a: FakeEngine, b: FakeEngine) -> None:
        self.served, self.a, self.b = served, a, b

    async def counted(self, reason: str) -> float:
        return await self.served.metric("inference_api_fallbacks_total", model_name="a", to="b", reason=reason)


@pytest.fixture
async def pair(start_engine: Start, start_router: Start) -> Start:
    async def pair(
        script: Script,
        second: Script = OK,
        entry: dict[str, Any] | None = None,
        contexts: tuple[int | None, int | None] = (64, 128),
        **settings: Any,
    ) -> Pair:
        a, b = await start_engine(script), await start_engine(second)
        for name, engine, size in zip("ab", (a, b), contexts, strict=True):
            engine.page = raw(json_response({"data": [{"id": name, "max_model_len": size}]}))
        models = [real("a", a, **({"fallbacks": ["b"]} | (entry or {}))), real("b", b)]
        served: Served = await start_router(models=models, max_attempts=1, **settings)
        known = served.router.core.fleet.models
        await until(lambda: (known["a"].max_model_len, known["b"].max_model_len) == contexts)
        return Pair(served, a, b)

    return pair


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (status("503 Service Unavailable"), "status"),
        (status("429 Too Many Requests"), "status"),
        (status("502 Bad Gateway"), "status"),
        (status("504 Gateway Timeout"), "status"),
        (reset, "reset"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_another_model_answers(pair: Start, script: Script, reason: str, stream: bool) -> None:
    it: Pair = await pair(script, STREAMED if stream else OK)

    async with quiet(it.served):
        answer = await it.served.chat(model="a", stream=stream)

    assert answer.status_code == 200
    assert (
        answer.content == (event("x") + DONE if stream else httpx.Response(200, json=COMPLETION).content) or not stream
    )
    assert (answer.headers["x-inference-model"], answer.headers["x-inference-fallback"]) == ("b", "1")
    assert await it.counted(reason) == 1
    [line] = it.served.lines
    assert (line["model"], line["asked_model"], line["fallback"], line["attempts"]) == ("b", "a", 1, 1)
    assert await it.served.metric("inference_api_requests_total", model_name="b") == 1
    assert await it.served.metric("inference_api_requests_total", model_name="a") == 0


async def test_no_backend_and_none_that_can_be_reached(start_engine: Start, start_router: Start) -> None:
    engine = await start_engine(OK)
    models = [real("empty", fallbacks=["b"]), real("gone", "http://127.0.0.1:9", fallbacks=["b"]), real("b", engine)]
    served: Served = await start_router(models=models, max_attempts=1)

    answers = [await served.chat(model=name) for name in ("empty", "gone")]

    assert [answer.status_code for answer in answers] == [200, 200]
    assert await served.metric("inference_api_fallbacks_total", model_name="empty", reason="no_backend") == 1
    assert await served.metric("inference_api_fallbacks_total", model_name="gone", reason="connect_failed") == 1


async def test_a_model_at_its_limit_and_the_first_byte_timeout(pair: Start) -> None:
    it: Pair = await pair(hang, entry={"max_in_flight": 1, "timeouts": {"first_byte": 0.5}})

    first = asyncio.create_task(it.served.chat(model="a"))
    await until(lambda: it.a.busy == 1)
    second = await it.served.chat(model="a")

    assert (second.status_code, second.headers["x-inference-model"]) == (200, "b")
    assert await it.counted("overloaded") == 1
    assert (await first).headers["x-inference-model"] == "b"
    assert await it.counted("first_byte_timeout") == 1


@pytest.mark.parametrize(
    "line", ["400 Bad Request", "404 Not Found", "422 Unprocessable Entity", "500 Internal Server Error"]
)
async def test_what_is_the_requests_own_fault_is_answered_as_it_is(pair: Start, line: str) -> None:
    it: Pair = await pair(status(line), entry={"context_fallbacks": ["b"]})

    answer = await it.served.chat(model="a")

    assert answer.status_code == int(line[:3])
    assert "x-inference-model" not in answer.headers
    assert it.b.requests == []


async def test_what_may_have_been_executed_is_not_executed_again(pair: Start) -> None:
    it: Pair = await pair(reset)

    answer = await it.served.client.post("/v1/responses", json={"model": "a", "input": "x"})

    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_reset")
    assert it.b.requests == []


async def test_the_client_turns_it_off(pair: Start) -> None:
    it: Pair = await pair(BUSY)

    answer = await it.served.client.post(URL, json=CHAT | {"model": "a"}, headers={"x-inference-fallback": "off"})

    assert answer.status_code == 503
    assert answer.json()["error"]["message"] == "no"
    assert ["x-inference-fallback" in dict(request.headers) for request in it.a.requests] == [False]


async def test_the_asked_models_error_if_none_answers(pair: Start) -> None:
    it: Pair = await pair(BUSY, status("429 Too Many Requests"))

    async with quiet(it.served):
        answer = await it.served.chat(model="a")

    assert (answer.status_code, answer.json()["error"]["message"]) == (503, "no")
    assert "x-inference-fallback" not in answer.headers
    assert [(line["model"], line["backend"]) for line in it.served.lines] == [("a", it.a.url.removeprefix("http://"))]
    assert await it.counted("status") == 0


async def test_the_list_is_in_order_and_a_fallbacks_own_are_not_followed(
    start_engine: Start, start_router: Start
) -> None:
    busy, engine = await start_engine(BUSY), await start_engine(OK)
    models = [
        real("a", busy, fallbacks=["x", "b", "c"]),
        real("b", busy, fallbacks=["d"]),
        real("c", engine),
        real("d", engine),
    ]
    served: Served = await start_router(models=models, max_attempts=1)

    answer = await served.chat(model="a")

    assert (answer.headers["x-inference-model"], answer.headers["x-inference-fallback"]) == ("c", "3")


async def test_what_a_fallback_may_have_executed_ends_the_list(start_engine: Start, start_router: Start) -> None:
    busy, dying, engine = await start_engine(BUSY), await start_engine(reset), await start_engine(OK)
    models = [real("a", busy, fallbacks=["b", "c"]), real("b", dying), real("c", engine)]
    served: Served = await start_router(models=models, max_attempts=1)

    async with quiet(served):
        answer = await served.client.post("/v1/responses", json={"model": "a", "input": "x"})

    assert (answer.status_code, len(dying.requests), len(engine.requests)) == (503, 1, 0)


async def test_a_fallback_without_the_route_is_skipped(start_engine: Start, start_router: Start) -> None:
    busy, engine = await start_engine(BUSY), await start_engine(OK)
    models = [
        real("a", busy, fallbacks=["b", "c"]),
        real("b", engine, routes=["embeddings"]),
        real("c", engine, adapters=["lora"]),
    ]
    served: Served = await start_router(models=models, max_attempts=1)

    assert (await served.chat(model="a")).headers["x-inference-model"] == "c"


async def test_an_adapter_is_a_fallback(start_engine: Start, start_router: Start) -> None:
    busy, engine = await start_engine(BUSY), await start_engine(OK)
    models = [real("a", busy, fallbacks=["lora"]), real("c", engine, adapters=["lora"])]
    served: Served = await start_router(models=models, max_attempts=1)

    assert (await served.chat(model="a")).headers["x-inference-model"] == "lora"
    assert await served.metric("inference_api_fallbacks_total", model_name="a", to="lora") == 1


# A context that is too long


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("400 Bad Request", {"code": "context_length_exceeded"}),
        (
            "400 Bad Request",
            {"message": "This model's maximum context length is 64 tokens. However, you requested 90."},
        ),
        ("422 Unprocessable Entity", {"message": "`inputs` tokens + `max_new_tokens` must be <= 64. Given: 90"}),
        (
            "400 Bad Request",
            {"message": "The input (90 tokens) is longer than the model's context length (64)."},
        ),
        ("400 Bad Request", {"type": "exceed_context_size_error"}),
    ],
)
async def test_a_longer_context_answers(pair: Start, line: str, error: dict[str, Any]) -> None:
    it: Pair = await pair(status(line, **error), entry={"fallbacks": None, "context_fallbacks": ["b"]})

    answer = await it.served.chat(model="a")

    assert (answer.status_code, answer.headers["x-inference-model"]) == (200, "b")
    assert await it.counted("context") == 1


@pytest.mark.parametrize(
    ("own", "other", "answers"), [(64, 128, True), (64, 64, False), (None, 64, True), (64, None, True)]
)
async def test_only_a_larger_context_or_an_unknown_one(pair: Start, own: Any, other: Any, answers: bool) -> None:
    it: Pair = await pair(TOO_LONG, entry={"fallbacks": None, "context_fallbacks": ["b"]}, contexts=(own, other))

    answer = await it.served.chat(model="a")

    assert (answer.status_code == 200) is answers
    if not answers:
        assert answer.json()["error"]["code"] == "context_length_exceeded"


async def test_fallbacks_do_not_help_a_long_context(pair: Start) -> None:
    it: Pair = await pair(TOO_LONG)

    assert (await it.served.chat(model="a")).status_code == 400
    assert it.b.requests == []


# One deadline, one client


async def test_all_models_share_one_deadline(pair: Start) -> None:
    it: Pair = await pair(hang, hang, {"timeouts": {"first_byte": 3.0}}, total_timeout=4.0, first_byte_timeout=30)
    loop = asyncio.get_running_loop()
    began = loop.time()

    answer = await it.served.chat(model="a")

    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "upstream_timeout")
    # With one of its own the second would end it after 7 s.
    assert 4.0 <= loop.time() - began < 6.5


@pytest.mark.parametrize("body", [CHAT, STREAM])
@pytest.mark.parametrize("second", [False, True])
async def test_a_client_that_leaves_ends_it(pair: Start, body: dict[str, Any], second: bool) -> None:
    it: Pair = await pair(BUSY if second else hang, hang)
    engine = it.b if second else it.a

    async with quiet(it.served):
        async with raw_client(it.served.port) as client:
            await client.send(post(URL, body | {"model": "a"}))
            await until(lambda: engine.busy == 1)
        await until(lambda: engine.busy == 0)

    assert len(it.b.requests) == int(second)
    assert [line["status"] for line in it.served.lines] == [499]


async def test_a_stream_that_breaks_after_its_first_byte_is_not_continued(pair: Start) -> None:
    it: Pair = await pair(raw(SSE_HEAD, chunk(event("x")), close=True))

    async with quiet(it.served):
        with pytest.raises(httpx.RemoteProtocolError):
            await it.served.chat(model="a", stream=True)

    assert it.b.requests == []


# Limits, access, records


async def test_who_may_not_use_a_fallback_skips_it(start_engine: Start, start_router: Start) -> None:
    limited = Limited(keys=[key("some", models=["a", "c"]), key("all")])
    busy, engine = await start_engine(BUSY), await start_engine(OK)
    models = [real("a", busy, fallbacks=["b", "c"]), real("b", engine), real("c", engine)]
    served: Served = await start_router(models=models, features=limited.features, max_attempts=1)

    async def answered_by(name: str) -> str:
        headers = {"authorization": f"Bearer {name}"}
        return (await served.client.post(URL, json=CHAT | {"model": "a"}, headers=headers)).headers["x-inference-model"]

    assert [await answered_by("all"), await answered_by("some")] == ["b", "c"]


async def test_the_limits_of_the_second_model_hold_and_the_callers_are_taken_once(
    start_engine: Start, start_router: Start
) -> None:
    limits = [
        {"scope": "all", "requests": 9, "per": 60},
        {"scope": "all", "tokens": 9000, "per": 60},
        {"scope": "model", "name": "a", "tokens": 9000, "per": 60},
        {"scope": "model", "name": "b", "requests": 1, "per": 60},
        {"scope": "model", "name": "b", "tokens": 9000, "per": 60},
    ]
    limited = Limited(limits=limits)
    busy, engine = await start_engine(BUSY), await start_engine(OK)
    models = [real("a", busy, fallbacks=["b"]), real("b", engine)]
    served: Served = await start_router(models=models, features=limited.features, max_attempts=1, usage="log")

    statuses = [(await served.chat(model="a", max_tokens=50)).status_code for _ in range(2)]
    await until(lambda: len(served.lines) == 2)

    assert statuses == [200, 503]
    assert limited.used("all::requests:60") == 2
    assert limited.used("model:b:requests:60") == 1
    used = USED
    assert [limited.used(f"{holder}:tokens:60") for holder in ("all:", "model:a", "model:b")] == [used, 0, used]


async def test_a_fallback_that_refuses_takes_nothing(start_engine: Start, start_router: Start) -> None:
    limited = Limited(limits=[{"scope": "model", "requests": 9, "per": 60}])
    busy, engine = await start_engine(BUSY), await start_engine(OK)
    models = [real("a", busy, fallbacks=["b", "c"]), real("b"), real("c", engine)]
    served: Served = await start_router(models=models, features=limited.features, max_attempts=1)

    assert (await served.chat(model="a")).headers["x-inference-model"] == "c"
    assert [limited.used(f"model:{name}:requests:60") for name in "bc"] == [0, 1]


async def test_a_fallback_without_a_price_is_not_for_a_cost_budget(
    start_engine: Start, start_router: Start, tmp_path: Path
) -> None:
    budgets = [{"scope": "all", "cost": 100, "per": "day"}]
    policy = str(write(tmp_path / "policy.json", {"budgets": budgets}))
    busy, engine = await start_engine(BUSY), await start_engine(OK)
    price = {"price": {"input": 1, "output": 1}}
    models = [real("a", busy, fallbacks=["b", "c"], **price), real("b", engine), real("c", engine, **price)]
    served: Served = await start_router(models=models, policy=policy, max_attempts=1)

    assert (await served.chat(model="a")).headers["x-inference-model"] == "c"


async def test_one_record_with_the_price_of_the_model_that_answered(
    start_engine: Start,
    account: Start,  # noqa: F811
) -> None:
    busy, engine = await start_engine(BUSY), await start_engine(OK)
    models = [
        real("a", busy, fallbacks=["b"], price={"input": 100, "output": 100}),
        real("b", engine, price={"input": 1, "output": 1}),
    ]
    it: Accounted = await account(models=models, max_attempts=1)

    await it.served.chat(model="a")
    [record] = await it.records()

    assert (record["asked_model"], record["model"], record["fallback"]) == ("a", "b", True)
    assert (record["attempts"], record["backend"]) == (1, engine.url.removeprefix("http://"))
    assert record["cost_nanos"] == USED * 1000


async def test_the_variant_of_a_split_has_its_fallbacks(start_engine: Start, start_router: Start) -> None:
    busy, engine = await start_engine(BUSY), await start_engine(OK)
    models = [
        {"name": "chat", "split": {"variants": {"a": 1, "b": 0}}},
        real("a", busy, fallbacks=["b"]),
        real("b", engine),
    ]
    served: Served = await start_router(models=models, max_attempts=1)

    answer = await served.chat(model="chat")

    headers = answer.headers
    assert (headers["x-inference-variant"], headers["x-inference-model"], headers["x-inference-fallback"]) == (
        "a",
        "b",
        "1",
    )
