"""Limits: who is let through, what a refusal says, and that nothing of a request stays taken that should not."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import httpx
import orjson
import pytest

from inference_api.features import limits
from inference_api.models import Call
from inference_api.observe.account import Record
from tests.conftest import Served
from tests.fakes import (
    LAST_CHUNK,
    SSE_HEAD,
    Line,
    Received,
    chunk,
    event,
    form,
    hang,
    json_response,
    post,
    raw,
    raw_client,
    until,
)
from tests.features.limited import NOW, Limited, key, policy_of

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
URL = "/v1/chat/completions"


@pytest.fixture
def start_router(start_router: Start) -> Start:
    """Routers that know the tokens of the model `m`, as they do with POLICY."""

    async def start(*engines: Any, entry: dict[str, Any] | None = None, **more: Any) -> Served:
        priced = {"price": {"input": 1, "output": 1}, **(entry or {})}
        served: Served = await start_router(*engines, entry=priced, **more)
        return served

    return start


async def ask(served: Served, name: str | None = None, url: str = URL, **more: Any) -> httpx.Response:
    headers = {"content-type": "application/json"}
    if name is not None:
        headers["authorization"] = f"Bearer {name}"
    return await served.client.post(url, content=orjson.dumps(CHAT | more), headers=headers)


def rates(answer: httpx.Response) -> dict[str, str]:
    start = "x-ratelimit-"
    return {name.removeprefix(start): value for name, value in answer.headers.items() if name.startswith(start)}


async def finished(served: Served, count: int) -> None:
    """Wait until these requests have their Records."""
    await until(lambda: len(served.lines) >= count)


# What clients see


async def test_a_limit_lets_so_many_through_and_the_refusal_says_which_and_how_long(
    start_engine: Start, start_router: Start
) -> None:
    limited = Limited(keys=[key("batch", limits=[{"requests": 2, "per": 60}])])
    served = await start_router(await start_engine(), features=limited.features)

    answers = [await ask(served, "batch") for _ in range(3)]

    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert rates(answers[0]) == {"limit-requests": "2", "remaining-requests": "1", "reset-requests": "1m45s"}
    assert rates(answers[2]) == {"limit-requests": "2", "remaining-requests": "0", "reset-requests": "1m45s"}
    body = answers[2].json()
    assert body["error"] == {
        # The window ends in 45 s, and the one after it begins with 2 that fade: 1 of them after 30 s.
        "message": "Rate limit reached for key 'batch': 2 requests per 60 s. Try again in 75 s.",
        "type": "requests",
        "param": None,
        "code": "rate_limit_exceeded",
    }
    assert body["request_id"] == answers[2].headers["x-request-id"]
    waits = {name: answers[2].headers.get(name) for name in ("retry-after", "retry-after-ms", "x-should-retry")}
    assert waits == {"retry-after": "75", "retry-after-ms": "75000", "x-should-retry": "false"}
    assert await served.metric("inference_api_limits_refused_total", scope="key", unit="requests") == 1
    assert await served.metric("inference_api_rejected_requests_total", reason="rate_limit") == 1


async def test_after_the_wait_the_request_is_let_through(start_engine: Start, start_router: Start) -> None:
    limited = Limited(keys=[key("batch", limits=[{"requests": 2, "per": 60}])])
    served = await start_router(await start_engine(), features=limited.features)
    answers = [await ask(served, "batch") for _ in range(3)]
    wait = int(answers[2].headers["retry-after-ms"])

    limited.now = NOW + wait - 1
    early = await ask(served, "batch")
    limited.now = NOW + wait
    late = await ask(served, "batch")

    assert (early.status_code, early.headers["retry-after-ms"], early.headers["retry-after"]) == (429, "1", "1")
    assert late.status_code == 200


async def test_the_headers_are_on_every_answer_of_the_engine_and_of_the_router(
    start_engine: Start, start_router: Start
) -> None:
    engine = await start_engine()
    limited = Limited(anonymous={"limits": [{"requests": 10, "per": 60}, {"tokens": 1000, "per": 60}]})
    served = await start_router(engine, features=limited.features, max_attempts=1)
    left = {}

    for case, script in {
        "200": raw(json_response({"usage": {"prompt_tokens": 1, "completion_tokens": 1}})),
        "400": raw(json_response({}, "400 Bad Request")),
        "500": raw(json_response({}, "500 Internal Server Error")),
        "502": raw(b"nonsense\r\n\r\n", close=True),
        "stream": raw(SSE_HEAD, chunk(event()), chunk(b"data: [DONE]\n\n"), LAST_CHUNK),
    }.items():
        engine.script = script
        answer = await ask(served, max_tokens=10, stream=case == "stream")
        left[case] = answer.status_code, rates(answer)["remaining-requests"], rates(answer)["remaining-tokens"]
    await engine.stop()
    answer = await ask(served, max_tokens=10)
    left["503"] = answer.status_code, rates(answer)["remaining-requests"], rates(answer)["remaining-tokens"]

    assert {case: status for case, (status, _, _) in left.items()} == {
        "200": 200, "400": 400, "500": 500, "502": 502, "stream": 200, "503": 503,
    }  # fmt: skip
    assert [int(requests) for _, requests, _ in left.values()] == [9, 8, 7, 6, 5, 4]
    assert all(0 < int(tokens) < 1000 for _, _, tokens in left.values())


async def test_without_a_limit_there_are_no_headers(start_engine: Start, start_router: Start) -> None:
    limited = Limited(keys=[key("free"), key("other", limits=[{"requests": 1, "per": 60}])])
    served = await start_router(await start_engine(), features=limited.features)

    answer = await ask(served, "free")

    assert answer.status_code == 200
    assert rates(answer) == {}


async def test_the_headers_are_of_the_limit_with_the_smallest_share_left(
    start_engine: Start, start_router: Start
) -> None:
    limited = Limited(
        organisations=[{"name": "team-a", "limits": [{"requests": 600, "per": 60}]}],
        keys=[key("batch", organisation="team-a", limits=[{"requests": 5, "per": 10}])],
    )
    served = await start_router(await start_engine(), features=limited.features)

    answer = await ask(served, "batch")

    assert rates(answer) == {"limit-requests": "5", "remaining-requests": "4", "reset-requests": "15s"}


# Whose limits apply


async def test_the_limit_with_the_longest_wait_is_named(start_engine: Start, start_router: Start) -> None:
    limited = Limited(
        organisations=[{"name": "team-a", "limits": [{"requests": 1, "per": 3600}]}],
        keys=[key("batch", organisation="team-a", user="ana", limits=[{"requests": 1, "per": 1}])],
        limits=[{"scope": "user", "requests": 1, "per": 60}, {"scope": "all", "requests": 1, "per": 10}],
    )
    served = await start_router(await start_engine(), features=limited.features)

    await ask(served, "batch")
    answer = await ask(served, "batch")

    assert "organisation 'team-a': 1 requests per 3600 s" in answer.json()["error"]["message"]


async def test_a_refused_request_takes_nothing_of_its_other_limits(start_engine: Start, start_router: Start) -> None:
    """LiteLLM#39309: a request refused for one limit used up another."""
    limited = Limited(
        organisations=[{"name": "team-a", "limits": [{"requests": 600, "per": 60}, {"tokens": 9999, "per": 60}]}],
        keys=[
            key("small", organisation="team-a", limits=[{"requests": 1, "per": 60}]),
            key("streams", organisation="team-a", limits=[{"streams": 1}]),
            key("tokens", organisation="team-a", limits=[{"output_tokens": 10, "per": 60}]),
        ],
    )
    engine = await start_engine(raw(json_response({})))
    served = await start_router(engine, features=limited.features)
    for name in ("small", "tokens"):
        await ask(served, name, max_tokens=10)
    await finished(served, 2)
    before = limited.used("organisation:team-a:requests:60"), limited.used("organisation:team-a:tokens:60")

    async with raw_client(served.port) as client:
        engine.script = hang
        await client.send(post(URL, CHAT | {"stream": True, "max_tokens": 0}, b"authorization: Bearer streams\r\n"))
        await until(lambda: engine.busy)
        open_stream = limited.used("organisation:team-a:tokens:60") - before[1]
        refused = [await ask(served, "small"), await ask(served, "tokens", max_tokens=10)]
        refused.append(await ask(served, "streams", stream=True))
        after = limited.used("organisation:team-a:requests:60"), limited.used("organisation:team-a:tokens:60")

    assert [answer.status_code for answer in refused] == [429, 429, 429]
    assert after == (before[0] + 1, before[1] + open_stream)
    assert limited.used("key:streams00000:requests:60") == 0


async def test_limits_of_user_organisation_and_all_are_shared_by_their_keys(
    start_engine: Start, start_router: Start
) -> None:
    limited = Limited(
        organisations=[{"name": "team-a"}, {"name": "team-b"}],
        keys=[
            key("a", organisation="team-a", user="ana"),
            key("b", organisation="team-a", user="bob"),
            key("c", organisation="team-b", user="ana"),
        ],
        limits=[
            {"scope": "user", "requests": 3, "per": 60},
            {"scope": "organisation", "name": "team-a", "requests": 3, "per": 60},
            {"scope": "all", "requests": 6, "per": 60},
        ],
    )
    served = await start_router(await start_engine(), features=limited.features)

    answers = [(await ask(served, name)) for name in "aabbccbc"]

    statuses = [answer.status_code for answer in answers]
    assert statuses == [200, 200, 200, 429, 200, 429, 429, 429]
    shown = [answer.json()["error"]["message"].split("for ")[1].split(":")[0] for answer in answers if answer.is_error]
    assert shown == ["organisation 'team-a'", "user 'ana'", "organisation 'team-a'", "user 'ana'"]


async def test_limits_of_one_name_share_a_counter_and_the_smallest_holds(
    start_engine: Start, start_router: Start
) -> None:
    limited = Limited(
        organisations=[{"name": "team-a", "limits": [{"requests": 5, "per": 60}]}],
        keys=[key("a", organisation="team-a")],
        limits=[
            {"scope": "organisation", "requests": 3, "per": 60},
            {"scope": "organisation", "name": "team-a", "requests": 4, "per": 60},
        ],
    )
    served = await start_router(await start_engine(), features=limited.features)

    answers = [await ask(served, "a") for _ in range(4)]

    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert [rates(answer)["limit-requests"] for answer in answers] == ["3"] * 4


async def test_a_limit_of_models_holds_for_them_alone_counted_together(
    start_engine: Start, start_router: Start
) -> None:
    engine = await start_engine()
    limited = Limited(keys=[key("a", limits=[{"requests": 2, "per": 60, "models": ["llama-*", "chat"]}])])
    models = [{"name": name, "backends": [engine.url]} for name in ("llama-1", "llama-2", "chat", "m")]
    served = await start_router(models=models, features=limited.features)

    answers = {name: await ask(served, "a", model=name) for name in ("m", "llama-1", "llama-2", "chat")}

    assert {name: answer.status_code for name, answer in answers.items()} == {
        "m": 200, "llama-1": 200, "llama-2": 200, "chat": 429,
    }  # fmt: skip
    assert "2 requests per 60 s for these models." in answers["chat"].json()["error"]["message"]
    assert rates(answers["m"]) == {}


async def test_limits_of_models_are_of_the_name_in_the_catalogue(start_engine: Start, start_router: Start) -> None:
    engine = await start_engine()
    limited = Limited(
        limits=[
            {"scope": "model", "name": "llama", "requests": 1, "per": 60},
            {"scope": "model", "requests": 2, "per": 60},
        ]
    )
    models = [
        {"name": "llama", "aliases": ["gpt-4"], "backends": [engine.url]},
        {"name": "m", "backends": [engine.url]},
    ]
    served = await start_router(models=models, features=limited.features)

    answers = [await ask(served, model=name) for name in ("llama", "gpt-4", "m", "m", "m")]

    assert [answer.status_code for answer in answers] == [200, 429, 200, 200, 429]
    shown = [answer.json()["error"]["message"].split("for ")[1].split(":")[0] for answer in answers if answer.is_error]
    assert shown == ["model 'llama'", "model 'm'"]


async def test_callers_without_a_key_are_counted_by_their_address(start_engine: Start, start_router: Start) -> None:
    limited = Limited(anonymous={"limits": [{"requests": 1, "per": 60}]}, keys=[key("a")])
    served = await start_router(await start_engine(), features=limited.features, trusted_proxies="127.0.0.1")
    addresses = ["203.0.113.1", "203.0.113.2", "::ffff:203.0.113.1", "2001:db8::1", "2001:db8::2", "2001:db8:0:1::1"]

    statuses = []
    for address in addresses:
        answer = await served.client.post(URL, json=CHAT, headers={"x-forwarded-for": f"9.9.9.9, {address}"})
        statuses.append(answer.status_code)
    with_key = [await ask(served, "a") for _ in range(2)]

    assert statuses == [200, 200, 429, 200, 429, 200]
    assert [answer.status_code for answer in with_key] == [200, 200]


async def test_a_limit_of_addresses_is_for_callers_with_a_key_too(start_engine: Start, start_router: Start) -> None:
    limited = Limited(keys=[key("a"), key("b")], limits=[{"scope": "address", "requests": 2, "per": 60}])
    served = await start_router(await start_engine(), features=limited.features)

    answers = [await ask(served, name) for name in ("a", "b", None)]

    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert "for your address: 2 requests per 60 s." in answers[2].json()["error"]["message"]


async def test_a_new_policy_keeps_the_counts(start_engine: Start, start_router: Start) -> None:
    """LiteLLM#29424: stale counters after a change."""
    limited = Limited(keys=[key("a", limits=[{"requests": 3, "per": 60}])])
    served = await start_router(await start_engine(), features=limited.features)
    for _ in range(2):
        await ask(served, "a")

    limited.policies.replace(policy_of(keys=[key("a", limits=[{"requests": 2, "per": 60}])]))
    smaller = await ask(served, "a")
    limited.policies.replace(policy_of(keys=[key("a", limits=[{"requests": 9, "per": 60}])]))
    larger = await ask(served, "a")

    assert (smaller.status_code, larger.status_code) == (429, 200)
    assert rates(larger)["remaining-requests"] == "6"


async def test_a_share_divides_each_limit(start_engine: Start, start_router: Start) -> None:
    limited = Limited(
        3, keys=[key("a", limits=[{"requests": 7, "per": 60}]), key("b", limits=[{"requests": 1, "per": 60}])]
    )
    served = await start_router(await start_engine(), features=limited.features)

    answers = [await ask(served, "a") for _ in range(3)]
    least = [await ask(served, "b") for _ in range(2)]

    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert [answer.status_code for answer in least] == [200, 429]
    assert "2 requests per 60 s" in answers[2].json()["error"]["message"]
    assert rates(answers[0])["limit-requests"] == "2"
    assert await served.metric("inference_api_limits_routers") == 3


# What counts as a request


async def test_what_is_refused_before_limits_takes_nothing(start_engine: Start, start_router: Start) -> None:
    limited = Limited(keys=[key("a", limits=[{"requests": 1, "per": 60}])])
    served = await start_router(await start_engine(), features=limited.features)

    answers = [
        await ask(served, "a", model="nope"),
        await ask(served, "a", messages=None),
        await served.client.get("/v1/models", headers={"authorization": "Bearer a"}),
        await served.client.get(URL, headers={"authorization": "Bearer a"}),
    ]
    last = await ask(served, "a")

    assert [answer.status_code for answer in answers] == [404, 422, 200, 405]
    assert all(rates(answer) == {} for answer in answers)
    assert last.status_code == 200


async def test_a_refusal_by_the_router_gives_everything_back(start_engine: Start, start_router: Start) -> None:
    engine = await start_engine()
    limited = Limited(keys=[key("a", limits=[{"requests": 9, "per": 60}, {"tokens": 999, "per": 60}, {"streams": 1}])])
    served = await start_router(engine, features=limited.features, entry={"max_in_flight": 1})
    await engine.stop()

    no_backend = await ask(served, "a", stream=True)
    await finished(served, 1)
    counts = limited.used("key:a00000000000:requests:60"), limited.used("key:a00000000000:tokens:60")
    again = await ask(served, "a", stream=True)

    assert (no_backend.status_code, again.status_code) == (503, 503)
    assert rates(no_backend)["remaining-requests"] == "8"
    assert counts == (0, 0)


async def test_an_overloaded_model_gives_everything_back(start_engine: Start, start_router: Start) -> None:
    engine = await start_engine(hang)
    limited = Limited(keys=[key("a", limits=[{"requests": 9, "per": 60}])])
    served = await start_router(engine, features=limited.features, entry={"max_in_flight": 1})

    async with raw_client(served.port) as client:
        await client.send(post(URL, CHAT, b"authorization: Bearer a\r\n"))
        await until(lambda: engine.busy)
        refused = await ask(served, "a")
        await finished(served, 1)
        assert refused.json()["error"]["code"] == "overloaded"
        assert limited.used("key:a00000000000:requests:60") == 1
    await finished(served, 2)

    # The client that left has made a request.
    assert limited.used("key:a00000000000:requests:60") == 1


@pytest.mark.parametrize(
    ("script", "status"),
    [
        (raw(json_response({}, "400 Bad Request")), 400),
        (raw(json_response({}, "500 Internal Server Error")), 500),
        (raw(json_response({}, "503 Service Unavailable")), 503),
        (raw(b"nonsense\r\n\r\n", close=True), 502),
        (raw(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 50\r\n\r\n{", close=True), 502),
    ],
)
async def test_a_failure_of_the_engine_gives_the_tokens_back_but_not_the_request(
    script: Any, status: int, start_engine: Start, start_router: Start
) -> None:
    limited = Limited(keys=[key("a", limits=[{"requests": 9, "per": 60}, {"tokens": 9999, "per": 60}])])
    served = await start_router(await start_engine(script), features=limited.features, max_attempts=1)

    answer = await ask(served, "a", max_tokens=500)
    await finished(served, 1)

    assert answer.status_code == status
    assert limited.used("key:a00000000000:requests:60") == 1
    assert limited.used("key:a00000000000:tokens:60") == 0


# Tokens


def usage(read: int | None, made: int | None) -> Any:
    given = {"prompt_tokens": read, "completion_tokens": made}
    return raw(json_response({"usage": {name: value for name, value in given.items() if value is not None}}))


async def test_tokens_are_reserved_and_settled(start_engine: Start, start_router: Start) -> None:
    """LiteLLM#18730, #23775: five at once must not all pass on what the first has left."""
    engine = await start_engine(hang)
    limited = Limited(keys=[key("a", limits=[{"tokens": 1000, "per": 60}])])
    served = await start_router(engine, features=limited.features)

    async with raw_client(served.port) as client:
        await client.send(post(URL, CHAT | {"max_tokens": 600}, b"authorization: Bearer a\r\n"))
        await until(lambda: engine.busy)
        second = await ask(served, "a", max_tokens=600)
        engine.script = usage(10, 20)
        small = await ask(served, "a", max_tokens=100)
        await finished(served, 2)

    assert (second.status_code, small.status_code) == (429, 200)
    error = second.json()["error"]
    assert error["type"] == "tokens"
    wanted = 600 + -(-len(orjson.dumps(CHAT | {"max_tokens": 600})) // 4)
    assert f"for key 'a': 1000 tokens per 60 s, {wanted} requested. Try again in " in error["message"]
    assert rates(small)["limit-tokens"] == "1000"
    await finished(served, 3)
    assert limited.used("key:a00000000000:tokens:60") == 30


@pytest.mark.parametrize(
    ("fields", "output"),
    [
        ({"max_tokens": 1, "max_completion_tokens": 300}, 300),
        ({"max_completion_tokens": 1, "max_tokens": 300}, 300),
        ({"max_output_tokens": 300}, 300),
        ({"max_tokens": 100, "n": 3}, 300),
        ({"max_tokens": "300"}, 300),
        ({"max_tokens": 300.0}, 300),
        ({"max_tokens": None}, 1000),
        ({"max_tokens": True, "n": 2}, 2000),
        ({"max_tokens": -5}, 1000),
        ({}, 1000),
        ({"max_tokens": [1], "n": {}}, 1000),
    ],
)
async def test_the_largest_maximum_is_reserved(
    fields: dict[str, Any], output: int, start_engine: Start, start_router: Start
) -> None:
    """LiteLLM#34223, #37001, #34728: a small field must not hide a large one."""
    limited = Limited(keys=[key("a", limits=[{"output_tokens": 10_000, "per": 60}])])
    served = await start_router(await start_engine(usage(1, 1)), features=limited.features)

    answer = await ask(served, "a", **fields)

    assert rates(answer)["remaining-tokens"] == str(10_000 - output)


async def test_a_large_request_passes_an_empty_window(start_engine: Start, start_router: Start) -> None:
    """LiteLLM#28805, #29191, #29193: a reservation above the limit refused every request."""
    limited = Limited(keys=[key("a", limits=[{"tokens": 100, "per": 60}, {"input_tokens": 5, "per": 60}])])
    served = await start_router(await start_engine(usage(10, 20)), features=limited.features)

    first, second = await ask(served, "a", max_tokens=5000), await ask(served, "a", max_tokens=5000)
    await finished(served, 2)

    assert (first.status_code, second.status_code) == (200, 429)
    assert rates(first)["remaining-tokens"] == "0"
    assert limited.used("key:a00000000000:tokens:60") == 30
    # More than the limit was used, and counts.
    assert limited.used("key:a00000000000:input_tokens:60") == 10


async def test_unknown_use_gives_nothing_back(start_engine: Start, start_router: Start) -> None:
    engine = await start_engine(raw(json_response({"choices": []})))
    limited = Limited(keys=[key("a", limits=[{"output_tokens": 1000, "per": 60}])])
    served = await start_router(engine, features=limited.features)

    await ask(served, "a", max_tokens=100)
    await finished(served, 1)

    assert limited.used("key:a00000000000:output_tokens:60") == 100


async def test_an_aborted_stream_is_settled_by_its_events(start_engine: Start, start_router: Start) -> None:
    async def three(request: Received, line: Line) -> None:
        await line.send(SSE_HEAD, *(chunk(event(f"word{i} ")) for i in range(3)))
        await line.gone()

    engine = await start_engine(three)
    limited = Limited(keys=[key("a", limits=[{"output_tokens": 1000, "per": 60}, {"streams": 1}])])
    served = await start_router(engine, features=limited.features)

    async with raw_client(served.port) as client:
        await client.send(post(URL, CHAT | {"stream": True}, b"authorization: Bearer a\r\n"))
        await client.reader.readuntil(b"word2")
    await finished(served, 1)

    assert served.lines[0]["outcome"] == "client_gone"
    assert limited.used("key:a00000000000:output_tokens:60") == 3
    assert limited.store.streams("key:a00000000000").own == 0


async def test_a_refund_goes_to_the_window_it_was_taken_from(start_engine: Start, start_router: Start) -> None:
    engine = await start_engine(hang)
    limited = Limited(keys=[key("a", limits=[{"output_tokens": 1000, "per": 60}])])
    served = await start_router(engine, features=limited.features)

    async with raw_client(served.port) as client:
        await client.send(post(URL, CHAT | {"max_tokens": 600}, b"authorization: Bearer a\r\n"))
        await until(lambda: engine.busy)
        # The next minute has begun.
        limited.now = NOW + 60_000
        engine.script = usage(1, 50)
        await ask(served, "a", max_tokens=100)
    await finished(served, 2)

    window = limited.store.window("key:a00000000000:output_tokens:60", 60_000)
    assert (window.current, window.previous) == (50, 0)


async def test_what_is_used_beyond_the_reservation_counts_when_it_is_known(
    start_engine: Start, start_router: Start
) -> None:
    limited = Limited(keys=[key("a", limits=[{"output_tokens": 100, "per": 60}])])
    served = await start_router(await start_engine(usage(1, 500)), features=limited.features)

    await ask(served, "a", max_tokens=50)
    await finished(served, 1)
    refused = await ask(served, "a", max_tokens=50)

    assert limited.used("key:a00000000000:output_tokens:60") == 500
    assert refused.status_code == 429


async def test_input_is_a_quarter_of_the_body_at_most_what_the_model_takes(
    start_engine: Start, start_router: Start
) -> None:
    engine = await start_engine(hang)
    limited = Limited(keys=[key("a", limits=[{"input_tokens": 100_000, "per": 60}])])
    served = await start_router(engine, features=limited.features)
    model = served.router.core.fleet.models["m"]
    engine.script = raw(json_response({}))
    left = [100_000]

    async def taken(answer: httpx.Response) -> int:
        left.append(int(rates(answer)["remaining-tokens"]))
        return left[-2] - left[-1]

    async def input_of(text: str, most: int | None) -> int:
        model.max_model_len = most
        return await taken(await ask(served, "a", messages=[{"role": "user", "content": text}]))

    assert await input_of("x" * 4000, None) == 1014
    assert await input_of("x" * 4000, 1024) == 1014
    assert await input_of("x" * 400_000, 1024) == 1024
    # Bytes of media say nothing of tokens.
    assert await input_of("data:image/png;base64,AA", 1024) == 1000
    upload = form(
        b'content-disposition: form-data; name="model"\r\n\r\nm',
        b'content-disposition: form-data; name="file"; filename="a.wav"\r\n\r\n' + b"x" * 10_000,
    )
    headers = {"content-type": "multipart/form-data; boundary=B", "authorization": "Bearer a"}
    assert await taken(await served.client.post("/v1/audio/transcriptions", content=upload, headers=headers)) == 1000


async def test_the_mean_of_a_model_follows_what_its_engine_reports(start_engine: Start, start_router: Start) -> None:
    limited = Limited(keys=[key("a", limits=[{"output_tokens": 100_000, "per": 60}])])
    served = await start_router(await start_engine(usage(1, 200)), features=limited.features)

    answers = []
    for number in range(3):
        answers.append(await ask(served, "a"))
        await finished(served, number + 1)

    # 1000, then 15/16 of it and 1/16 of 200
    reserved = [
        100_000 - 200 * number - int(rates(answer)["remaining-tokens"]) for number, answer in enumerate(answers)
    ]
    assert reserved == [1000, 950, 903]


@pytest.mark.parametrize("url", ["/v1/embeddings", "/tokenize"])
async def test_a_route_that_generates_nothing_reserves_no_output(
    url: str, start_engine: Start, start_router: Start
) -> None:
    limited = Limited(keys=[key("a", limits=[{"output_tokens": 100, "per": 60}, {"tokens": 1000, "per": 60}])])
    served = await start_router(await start_engine(usage(7, None)), features=limited.features)

    await ask(served, "a", url=url, input="hello", prompt="hello", max_tokens=50)
    await finished(served, 1)

    assert limited.used("key:a00000000000:output_tokens:60") == 0
    assert limited.used("key:a00000000000:tokens:60") == 7


# Streams


async def test_so_many_streams_at_once(start_engine: Start, start_router: Start) -> None:
    engine = await start_engine(hang)
    limited = Limited(keys=[key("a", user="ana", limits=[{"streams": 2}])])
    served = await start_router(engine, features=limited.features)

    async with raw_client(served.port) as one, raw_client(served.port) as two:
        for client in (one, two):
            await client.send(post(URL, CHAT | {"stream": True}, b"authorization: Bearer a\r\n"))
        await until(lambda: engine.busy == 2)
        refused = await ask(served, "a", stream=True)
        engine.script = usage(1, 1)
        whole = await ask(served, "a")
    await finished(served, 4)
    engine.script = raw(SSE_HEAD, chunk(event()), chunk(b"data: [DONE]\n\n"), LAST_CHUNK)
    free = await ask(served, "a", stream=True)

    assert (refused.status_code, whole.status_code, free.status_code) == (429, 200, 200)
    assert refused.json()["error"] == {
        "message": "Rate limit reached for key 'a': 2 streams at once. Try again in 1 s.",
        "type": "requests",
        "param": None,
        "code": "rate_limit_exceeded",
    }
    assert (refused.headers["retry-after"], refused.headers["retry-after-ms"]) == ("1", "1000")
    assert "x-should-retry" not in refused.headers
    await until(lambda: limited.store.streams("key:a00000000000").own == 0)


ENDS: dict[str, Any] = {
    "complete": raw(SSE_HEAD, chunk(event()), chunk(b"data: [DONE]\n\n"), LAST_CHUNK),
    "truncated": raw(SSE_HEAD, chunk(event()), LAST_CHUNK, close=True),
    "broken": raw(SSE_HEAD, chunk(event()), close=True),
    "refused": raw(json_response({}, "400 Bad Request")),
    "failed": raw(json_response({}, "500 Internal Server Error")),
    "nonsense": raw(b"nonsense\r\n\r\n", close=True),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("url", [URL, "/v1/messages", "/v1/responses"])
async def test_a_stream_is_released_however_it_ends(
    end: str, url: str, start_engine: Start, start_router: Start
) -> None:
    """LiteLLM#1477, #16011, #27955, #30020: slots that were never given back, by route and by end."""
    limited = Limited(keys=[key("a", limits=[{"streams": 1}])])
    served = await start_router(await start_engine(ENDS[end]), features=limited.features, max_attempts=1)

    with suppress(httpx.RemoteProtocolError):
        await ask(served, "a", url=url, stream=True, input="x")
    await finished(served, 1)

    assert limited.store.streams("key:a00000000000").own == 0


@pytest.mark.parametrize("moment", ["before the first byte", "in mid-stream"])
async def test_a_stream_is_released_when_its_client_leaves(
    moment: str, start_engine: Start, start_router: Start
) -> None:
    """LiteLLM#27955: cancelled streams."""

    async def one(request: Received, line: Line) -> None:
        if moment == "in mid-stream":
            await line.send(SSE_HEAD, chunk(event()))
        await line.gone()

    engine = await start_engine(one)
    limited = Limited(keys=[key("a", limits=[{"streams": 1}])])
    served = await start_router(engine, features=limited.features)

    async with raw_client(served.port) as client:
        await client.send(post(URL, CHAT | {"stream": True}, b"authorization: Bearer a\r\n"))
        await until(lambda: engine.busy)
        if moment == "in mid-stream":
            await client.reader.readuntil(b"data: ")
        assert limited.store.streams("key:a00000000000").own == 1
    await finished(served, 1)

    assert limited.store.streams("key:a00000000000").own == 0


async def test_many_at_once_do_not_pass_more_than_the_limit(start_engine: Start, start_router: Start) -> None:
    """LiteLLM#10555, #3788: checks that race."""
    limited = Limited(keys=[key("a", limits=[{"requests": 20, "per": 60}])])
    served = await start_router(await start_engine(), features=limited.features)

    answers = await asyncio.gather(*(ask(served, "a") for _ in range(60)))

    assert sorted(answer.status_code for answer in answers) == [200] * 20 + [429] * 40


def test_the_places_of_the_hot_path_are_those_of_the_fields() -> None:
    places = [getattr(limits, name) for name in ("_STREAM", "_CALLER", "_STATE", "_HEADERS")]
    of_record = [getattr(limits, f"_RECORD_{name}") for name in ("MODEL", "CODE", "STATE", "FIELDS")]

    assert [Call._fields[place] for place in places] == ["stream", "caller", "state", "answer_headers"]
    assert [Record._fields[place] for place in of_record] == ["model_name", "code", "state", "fields"]
    # limiting/amounts.py
    assert [Call._fields[place] for place in (0, 3, 8)] == ["route", "body", "fields"]
