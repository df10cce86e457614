"""The answer cache: the same bytes for the same request, for those who may share them, and for nobody else."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from inference_api.app import ENTRY
from inference_api.feature import Feature
from inference_api.features.cache import KEY, CacheEntry
from inference_api.features.delivery.records import METERED
from inference_api.observe.account import Record
from inference_api.routing.catalogue import parse_catalogue
from tests.conftest import Served
from tests.fakes import (
    CHAT,
    COMPLETION,
    DONE,
    LAST_CHUNK,
    SSE_HEAD,
    USAGE,
    FakeEngine,
    Line,
    Received,
    answer,
    chunk,
    event,
    json_response,
    post,
    raw,
    raw_client,
    sse,
    until,
)
from tests.faults.quiescence import quiet
from tests.features.limited import Limited, key
from tests.policies import bearer, entry, policy_of, write

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
URL = "/v1/chat/completions"
COLD = {**CHAT, "temperature": 0}
CACHED = {"cache": {"ttl": 60}}
LENGTH = {**COMPLETION, "choices": [{"index": 0, "message": {"content": "a"}, "finish_reason": "length"}]}


@pytest.fixture
async def engine(start_engine: Start) -> FakeEngine:
    found: FakeEngine = await start_engine()
    return found


async def ask(served: Served, url: str = URL, headers: dict[str, str] | None = None, **more: Any) -> httpx.Response:
    return await served.client.post(url, json=COLD | more, headers=headers)


def result(found: httpx.Response) -> str | None:
    told: str | None = found.headers.get("x-inference-cache")
    return told


def of(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {name}"}


# The entry


def problem(cache: Any) -> str:
    [found] = parse_catalogue({"models": [{"name": "m", "cache": cache}]}, ENTRY).problems
    return found


def test_the_key_of_the_catalogue() -> None:
    [found] = parse_catalogue({"models": [{"name": "m", "cache": {"ttl": 300}}]}, ENTRY).values()

    assert KEY.of(found) == CacheEntry(ttl=300.0, scope="org", temperature=0.0)


@pytest.mark.parametrize(
    ("cache", "says"),
    [
        ({}, "ttl"),
        ({"ttl": 0}, "greater than 0"),
        ({"ttl": "60"}, "valid number"),
        ({"ttl": 60, "scope": "user"}, "must be org, key or all"),
        ({"ttl": 60, "temperature": 2.5}, "less than or equal to 2"),
        ({"ttl": 60, "size": 1}, "size"),
    ],
)
def test_a_key_that_is_not_valid_is_refused_by_name(cache: Any, says: str) -> None:
    assert says in problem(cache)


# Hits


@pytest.mark.parametrize("stream", [False, True])
async def test_a_repeated_request_gets_the_same_bytes(stream: bool, engine: FakeEngine, start_router: Start) -> None:
    served: Served = await start_router(engine, entry=CACHED)

    first, second = [await ask(served, stream=stream) for _ in range(2)]

    assert len(engine.requests) == 1
    assert second.content == first.content
    assert [result(one) for one in (first, second)] == ["miss", "hit"]
    assert ("age" in first.headers, second.headers["age"]) == (False, "0")
    assert second.headers["content-type"] == first.headers["content-type"]
    assert second.headers["x-request-id"] != first.headers["x-request-id"]
    assert (await served.metric("inference_api_cache_entries")) == 1
    assert (await served.metric("inference_api_cache_bytes")) > len(first.content)
    assert [await served.metric("inference_api_cache_requests_total", result=one) for one in ("hit", "miss")] == [1, 1]


async def test_a_hit_has_a_record_of_its_own(engine: FakeEngine, start_router: Start) -> None:
    records: list[Record] = []
    served: Served = await start_router(
        engine,
        entry={**CACHED, "price": {"input": 1, "output": 2}},
        features=[Feature("records", record=records.append)],
    )

    for stream in (False, True):
        for _ in range(3):
            await ask(served, stream=stream)
    await until(lambda: len(records) == 6)

    hits = [record for record in records if record.extra["cache"] == "hit"]
    assert [(one.backend, one.attempts, one.status, one.stream) for one in hits] == [
        (None, 0, 200, False),
        (None, 0, 200, False),
        (None, 0, 200, True),
        (None, 0, 200, True),
    ]
    assert {one.state[METERED] for one in hits} == {(0, 0, 0, 0, "cache")}
    assert {one.extra["cost_nanos"] for one in hits} == {0}
    assert [line["cache"] for line in served.lines] == ["miss", "hit", "hit"] * 2
    # Each stored answer took 3 and 5 tokens; of the stream they are known although the client did not ask for them.
    assert await served.metric("inference_api_saved_tokens_total", model_name="m", type="input") == 4 * 3
    assert await served.metric("inference_api_saved_tokens_total", model_name="m", type="output") == 4 * 5
    assert await served.metric("inference_api_saved_cost_nanos_total", model_name="m") == 4 * 13_000
    # Engines have made them once.
    assert await served.metric("inference_api_tokens_total", model_name="m", type="output") == 2 * 5


async def test_what_only_the_engine_was_asked_for_stays_out(engine: FakeEngine, start_router: Start) -> None:
    """The router asks for the usage of streams, and takes the event out: of the stored bytes, too."""
    engine.script = raw(SSE_HEAD, chunk(event("a")), chunk(event(choices=[], usage=USAGE)), chunk(DONE) + LAST_CHUNK)
    served: Served = await start_router(engine, entry={**CACHED, "price": {"input": 1, "output": 1}})

    asked = [await ask(served, stream=True, stream_options={"include_usage": True}) for _ in range(2)]
    plain = [await ask(served, stream=True) for _ in range(2)]

    assert b'"usage"' in asked[0].content == asked[1].content
    assert b'"usage"' not in plain[0].content == plain[1].content
    assert [result(one) for one in (*asked, *plain)] == ["miss", "hit", "miss", "hit"]


async def test_only_the_head_of_the_answer_that_all_may_see_is_kept(engine: FakeEngine, start_router: Start) -> None:
    engine.script = raw(json_response(COMPLETION, headers=b"openai-organization: org-1\r\nx-run: 7\r\n"))
    served: Served = await start_router(engine, entry=CACHED)

    first, second = [await ask(served) for _ in range(2)]

    assert first.headers["x-run"] == "7"
    assert {"x-run", "openai-organization"}.isdisjoint(second.headers)


@pytest.mark.parametrize(
    ("url", "body", "given"),
    [
        ("/v1/completions", {"prompt": "a", "temperature": 0}, COMPLETION),
        ("/v1/embeddings", {"input": "a"}, {"data": [{"embedding": [0.5]}], "usage": {"prompt_tokens": 1}}),
        ("/v1/rerank", {"query": "a", "documents": ["b"]}, {"results": []}),
        ("/v1/score", {"text_1": "a", "text_2": "b"}, {"data": []}),
        ("/tokenize", {"prompt": "a"}, {"tokens": [1]}),
        ("/v1/responses", {"input": "a", "store": False, "temperature": 0}, {"status": "completed"}),
        # A bare list, as some engines give
        ("/rerank", {"query": "a", "documents": ["b"]}, [{"index": 0}]),
    ],
)
async def test_the_routes_that_are_answered_alike(
    url: str, body: dict[str, Any], given: Any, engine: FakeEngine, start_router: Start
) -> None:
    engine.script = raw(json_response(given))
    served: Served = await start_router(engine, entry=CACHED)

    found = [await served.client.post(url, json={"model": "m", **body}) for _ in range(2)]

    assert [result(one) for one in found] == ["miss", "hit"]
    assert found[0].json() == found[1].json() == given


# What passes by the cache


@pytest.mark.parametrize(
    ("url", "body"),
    [
        (URL, CHAT),
        (URL, {**CHAT, "temperature": None}),
        (URL, {**CHAT, "temperature": 0.1}),
        (URL, {**CHAT, "temperature": "0"}),
        (URL, {**CHAT, "temperature": False}),
        ("/v1/completions", {"model": "m", "prompt": "a"}),
        ("/v1/responses", {"model": "m", "input": "a", "temperature": 0}),
        ("/v1/responses", {"model": "m", "input": "a", "temperature": 0, "store": True}),
        ("/v1/messages", {"model": "m", "messages": [], "max_tokens": 1, "temperature": 0}),
        ("/v1/moderations", {"model": "m", "input": "a"}),
    ],
)
async def test_what_may_be_answered_otherwise_is_not_looked_for(
    url: str, body: dict[str, Any], engine: FakeEngine, start_router: Start
) -> None:
    served: Served = await start_router(engine, entry=CACHED)

    found = [await served.client.post(url, json=body) for _ in range(2)]

    assert [result(one) for one in found] == ["bypass"] * 2
    assert len(engine.requests) == 2
    assert await served.metric("inference_api_cache_requests_total", model_name="m", result="bypass") == 2
    assert [line["cache"] for line in served.lines] == ["bypass"] * 2


async def test_a_higher_temperature_may_be_allowed(engine: FakeEngine, start_router: Start) -> None:
    served: Served = await start_router(engine, entry={"cache": {"ttl": 60, "temperature": 1}})

    found = [await served.client.post(URL, json=CHAT) for _ in range(2)]
    hotter = await served.client.post(URL, json={**CHAT, "temperature": 1.1})

    assert [result(one) for one in (*found, hotter)] == ["miss", "hit", "bypass"]


async def test_a_model_without_the_key_has_no_cache(engine: FakeEngine, start_router: Start) -> None:
    served: Served = await start_router(engine)

    found = [await ask(served) for _ in range(2)]

    assert [result(one) for one in found] == [None, None]
    assert len(engine.requests) == 2
    assert "cache" not in served.lines[0]
    assert "inference_api_cache" not in (await served.client.get("/metrics")).text


async def test_cache_control_of_the_request(engine: FakeEngine, start_router: Start) -> None:
    served: Served = await start_router(engine, entry=CACHED)

    async def told(*values: str) -> tuple[str | None, int]:
        headers = [("cache-control", value) for value in values]
        found = await served.client.post(URL, json=COLD, headers=headers)
        return result(found), len(engine.requests)

    # Neither looked for nor stored
    assert await told("no-store") == ("bypass", 1)
    assert await told() == ("miss", 2)
    assert await told("NO-STORE, max-age=60") == ("bypass", 3)
    # Asked anew, and stored
    assert await told("no-cache") == ("miss", 4)
    assert await told("max-age=0") == ("miss", 5)
    assert await told("max-age=60, no-cache") == ("miss", 6)
    assert await told("max-age=60", "no-cache") == ("miss", 7)
    assert await told("max-age=60") == ("hit", 7)
    assert await told("max-age=sixty, x, =") == ("hit", 7)
    assert await served.metric("inference_api_cache_entries") == 1


# What is not stored


def truncated(line: Line) -> None:
    line.close()


@pytest.mark.parametrize(
    ("stream", "script"),
    [
        (False, raw(json_response({"error": {"message": "x"}}, "400 Bad Request"))),
        (False, raw(json_response({"error": {"message": "x"}}))),
        (False, raw(json_response({"error": {}}, "500 Internal Server Error"))),
        (False, raw(json_response({}, "201 Created"))),
        (False, raw(json_response(LENGTH))),
        (False, raw(json_response({**COMPLETION, "choices": [*COMPLETION["choices"], *LENGTH["choices"]]}))),  # type: ignore[misc]
        (False, raw(json_response({"data": "x" * 262_144}))),
        (False, raw(b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: 2\r\n\r\nhi")),
        (
            False,
            raw(
                b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-encoding: gzip\r\n"
                b"content-length: 2\r\n\r\n\x1f\x8b",
                close=True,
            ),
        ),
        (True, raw(SSE_HEAD, chunk(event("a")), chunk(event(choices=LENGTH["choices"]) + DONE) + LAST_CHUNK)),
        (True, raw(SSE_HEAD, chunk(event("x" * 262_144)), chunk(DONE) + LAST_CHUNK)),
        (True, raw(SSE_HEAD, chunk(event("a")), chunk(b'data: {"error":{"message":"x"}}\n\n') + LAST_CHUNK)),
        (True, sse(event("a"), then=truncated)),
        (True, raw(SSE_HEAD, chunk(event("a")) + LAST_CHUNK)),
    ],
)
async def test_what_is_not_whole_and_good_is_not_stored(
    stream: bool, script: Any, engine: FakeEngine, start_router: Start
) -> None:
    engine.script = script
    served: Served = await start_router(engine, entry=CACHED, max_attempts=1)

    for _ in range(2):
        async with raw_client(served.port) as client:
            await client.send(post(URL, {**COLD, "stream": stream}, b"connection: close\r\n"))
            assert await client.reader.read(-1)

    assert len(engine.requests) == 2
    assert await served.metric("inference_api_cache_entries") == 0


async def test_an_answer_that_its_client_left_is_not_stored(engine: FakeEngine, start_router: Start) -> None:
    async def script(request: Received, line: Line) -> None:
        await line.send(SSE_HEAD, chunk(event("a")))
        await line.gone()

    engine.script = script
    served: Served = await start_router(engine, entry=CACHED)
    async with raw_client(served.port) as client:
        await client.send(post(URL, {**COLD, "stream": True}))
        await client.reader.readuntil(b"data: ")
    await until(lambda: served.lines)

    engine.script = answer
    whole = await ask(served, stream=True)

    assert (result(whole), whole.content.endswith(DONE)) == ("miss", True)


@pytest.mark.parametrize("status", ["incomplete", "failed", "in_progress", None])
async def test_a_response_that_is_not_completed_is_not_stored(
    status: str | None, engine: FakeEngine, start_router: Start
) -> None:
    engine.script = raw(json_response({"status": status}))
    served: Served = await start_router(engine, entry=CACHED)
    body = {"model": "m", "input": "a", "store": False, "temperature": 0}

    found = [await served.client.post("/v1/responses", json=body) for _ in range(2)]

    assert [result(one) for one in found] == ["miss", "miss"]


@pytest.mark.parametrize("end", ["completed", "incomplete"])
async def test_a_stream_of_a_response(end: str, engine: FakeEngine, start_router: Start) -> None:
    last = b'event: response.%b\ndata: {"type": "response.%b", "response": {}}\n\n' % ((end.encode(),) * 2)
    engine.script = raw(SSE_HEAD, chunk(last) + LAST_CHUNK)
    served: Served = await start_router(engine, entry=CACHED)
    body = {"model": "m", "input": "a", "store": False, "temperature": 0, "stream": True}

    found = [await served.client.post("/v1/responses", json=body) for _ in range(2)]

    assert [result(one) for one in found] == ["miss", "hit" if end == "completed" else "miss"]


async def test_an_answer_is_gone_when_its_time_is_over(engine: FakeEngine, start_router: Start) -> None:
    served: Served = await start_router(engine, entry={"cache": {"ttl": 0.05}})
    await ask(served)
    async with asyncio.timeout(10):
        while len(engine.requests) < 2:
            await ask(served)

    assert await served.metric("inference_api_cache_evictions_total", reason="ttl") >= 1


async def test_the_least_recently_used_answer_makes_room(engine: FakeEngine, start_router: Start) -> None:
    engine.script = raw(json_response({"data": "x" * 200_000}))
    served: Served = await start_router(engine, entry=CACHED, cache_bytes=1 << 20)

    for seed in range(5):
        await ask(served, seed=seed)
    # The first is used, the second is the oldest of the others.
    assert result(await ask(served, seed=0)) == "hit"
    await ask(served, seed=5)

    assert result(await ask(served, seed=0)) == "hit"
    assert await served.metric("inference_api_cache_evictions_total", reason="size") == 1
    assert await served.metric("inference_api_cache_bytes") <= 1 << 20
    assert result(await ask(served, seed=1)) == "miss"


# Who shares an answer

POLICY: dict[str, Any] = {
    "organisations": [{"name": "a"}, {"name": "b"}],
    "keys": [
        key("anna", organisation="a"),
        key("alan", organisation="a"),
        key("bert", organisation="b"),
        key("carl"),
        key("cora"),
    ],
}


@pytest.mark.parametrize(
    ("scope", "results"),
    [
        # anna, alan, bert, carl, cora, nobody: each after the ones before it
        ("org", ["miss", "hit", "miss", "miss", "miss", "miss"]),
        ("key", ["miss", "miss", "miss", "miss", "miss", "miss"]),
        ("all", ["miss", "hit", "hit", "hit", "hit", "hit"]),
    ],
)
async def test_who_shares_answers(scope: str, results: list[str], engine: FakeEngine, start_router: Start) -> None:
    served: Served = await start_router(
        engine, entry={"cache": {"ttl": 60, "scope": scope}}, features=Limited(**POLICY).features
    )

    names = ["anna", "alan", "bert", "carl", "cora", None]
    found = [await ask(served, headers=of(name) if name else None) for name in names]
    again = [await ask(served, headers=of(name) if name else None) for name in names]

    assert [result(one) for one in found] == results
    assert [result(one) for one in again] == ["hit"] * 6


async def test_callers_of_a_provider_do_not_share_what_they_pass_through(
    engine: FakeEngine, start_router: Start
) -> None:
    """The router does not know them; only the provider can tell whether a key is valid."""
    through = {"cache": {"ttl": 60, "scope": "all"}, "credentials": "passthrough"}
    served: Served = await start_router(engine, entry=through)

    found = [await ask(served, headers=of(name)) for name in ("right", "right", "wrong")]

    assert [result(one) for one in found] == ["miss", "hit", "miss"]


async def test_another_entry_has_other_answers(engine: FakeEngine, start_router: Start) -> None:
    served: Served = await start_router(engine, entry=CACHED)
    await ask(served)
    moved = {"name": "m", "backends": [{"url": engine.url}], "version": "2", **CACHED}
    served.router.core.registry.replace_static(parse_catalogue({"models": [moved]}, ENTRY))

    assert result(await ask(served)) == "miss"
    assert result(await ask(served)) == "hit"


async def test_headers_that_engines_read_count(engine: FakeEngine, start_router: Start) -> None:
    served: Served = await start_router(engine, entry=CACHED)

    tries: list[dict[str, str]] = [{}, {"openai-beta": "a"}, {"openai-beta": "b"}, {"user-agent": "x"}, {"x-a": "b"}]

    assert [result(await ask(served, headers=one)) for one in tries] == ["miss", "miss", "miss", "hit", "hit"]


@pytest.mark.parametrize(
    "more",
    [
        {"messages": [{"role": "user", "content": "hello "}]},
        {"messages": [{"role": "user", "content": "hello", "name": "a"}]},
        {"seed": 1},
        {"user": "ana"},
        {"stream": True},
        {"stream": None},
        {"max_tokens": 5},
        {"tools": []},
        {"model": "alias"},
        {"anything": {"new": 1}},
    ],
)
async def test_any_other_field_is_another_request(more: Any, engine: FakeEngine, start_router: Start) -> None:
    served: Served = await start_router(engine, entry={**CACHED, "aliases": ["alias"]})
    await ask(served)

    assert result(await ask(served, **more)) == "miss"
    assert result(await ask(served)) == "hit"


async def test_a_large_body(engine: FakeEngine, start_router: Start) -> None:
    served: Served = await start_router(engine, entry=CACHED)
    text = "x" * 300_000

    found = [await ask(served, seed=0, input=text), await ask(served, seed=0, input=text)]
    other = await ask(served, seed=0, input=text[:-1] + "y")

    assert [result(one) for one in (*found, other)] == ["miss", "hit", "miss"]


# Requests at the same time


class Held:
    """A script that answers when it is let go."""

    def __init__(self, *parts: bytes) -> None:
        self.parts = parts or (json_response(COMPLETION),)
        self.go = asyncio.Event()

    async def __call__(self, request: Received, line: Line) -> None:
        left = asyncio.create_task(line.gone())
        going = asyncio.create_task(self.go.wait())
        await asyncio.wait({left, going}, return_when=asyncio.FIRST_COMPLETED)
        if going.done():
            left.cancel()
            await line.send(*self.parts)
        going.cancel()


def waiting(served: Served) -> int:
    return served.router.core.admission.in_flight


async def test_equal_requests_at_once_ask_once(engine: FakeEngine, start_router: Start) -> None:
    served: Served = await start_router(engine, entry=CACHED)
    engine.script = held = Held()

    asked = [asyncio.create_task(ask(served)) for _ in range(20)]
    await until(lambda: waiting(served) == 20)
    held.go.set()
    found = await asyncio.gather(*asked)

    assert len(engine.requests) == 1
    assert len({one.content for one in found}) == 1
    assert sorted(result(one) or "" for one in found) == ["hit"] * 19 + ["miss"]
    assert len({one.headers["x-request-id"] for one in found}) == 20


async def test_a_leader_that_leaves_hands_over(engine: FakeEngine, start_router: Start) -> None:
    served: Served = await start_router(engine, entry=CACHED)
    engine.script = held = Held()

    async with quiet(served):
        async with raw_client(served.port) as leader:
            await leader.send(post(URL, COLD))
            await until(lambda: engine.busy == 1)
            asked = [asyncio.create_task(ask(served)) for _ in range(3)]
            await until(lambda: waiting(served) == 4)
        await until(lambda: len(engine.requests) == 2)
        held.go.set()
        found = await asyncio.gather(*asked)

    assert len(engine.requests) == 2
    assert sorted(result(one) or "" for one in found) == ["hit", "hit", "miss"]
    assert [line["outcome"] for line in served.lines].count("client_gone") == 1


async def test_a_leader_that_fails_hands_over(engine: FakeEngine, start_router: Start) -> None:
    served: Served = await start_router(engine, entry=CACHED, max_attempts=1)
    first = Held(json_response({"error": {}}, "500 Internal Server Error"))

    async def script(request: Received, line: Line) -> None:
        await (first if len(engine.requests) == 1 else answer)(request, line)

    engine.script = script
    asked = [asyncio.create_task(ask(served)) for _ in range(4)]
    await until(lambda: waiting(served) == 4)
    first.go.set()
    found = await asyncio.gather(*asked)

    assert sorted(one.status_code for one in found) == [200, 200, 200, 500]
    assert len(engine.requests) == 2


@pytest.mark.parametrize("entry", [{"hold": 1.0}, {"max_in_flight": 1, "queue": {"timeout": 1.0, "size": 8}}])
async def test_a_leader_that_is_refused_makes_all_ask(
    entry: dict[str, Any], engine: FakeEngine, start_router: Start
) -> None:
    """One after the other each would wait for a place, or a backend, as long as it may."""
    engine.script = Held(json_response(COMPLETION))
    served: Served = await start_router(*([] if "hold" in entry else [engine]), entry={**CACHED, **entry})
    other = asyncio.create_task(ask(served, temperature=1))
    if "hold" not in entry:
        await until(lambda: engine.busy)
    found = await asyncio.gather(*[ask(served) for _ in range(8)])
    other.cancel()
    await asyncio.gather(other, return_exceptions=True)

    assert [(one.status_code, result(one)) for one in found] == [(503, "miss")] * 8
    # In turn the last would be there after 8 s.
    assert max(one.elapsed.total_seconds() for one in found) < 6


@pytest.mark.parametrize("given", [json_response(LENGTH), json_response({"error": {}}, "400 Bad Request")])
async def test_an_answer_that_is_not_for_others_makes_all_ask(
    given: bytes, engine: FakeEngine, start_router: Start
) -> None:
    """One after the other they would wait for each other's answers in turn."""
    served: Served = await start_router(engine, entry=CACHED)
    first, rest = Held(given), Held(given)

    async def script(request: Received, line: Line) -> None:
        await (first if len(engine.requests) == 1 else rest)(request, line)

    engine.script = script
    asked = [asyncio.create_task(ask(served)) for _ in range(4)]
    await until(lambda: waiting(served) == 4)
    first.go.set()
    await until(lambda: engine.busy == 3)
    rest.go.set()
    found = await asyncio.gather(*asked)

    assert [result(one) for one in found] == ["miss"] * 4


async def test_one_that_waits_may_leave(engine: FakeEngine, start_router: Start) -> None:
    served: Served = await start_router(engine, entry=CACHED)
    engine.script = held = Held()

    async with quiet(served):
        leader = asyncio.create_task(ask(served))
        await until(lambda: engine.busy == 1)
        async with raw_client(served.port) as client:
            await client.send(post(URL, COLD))
            await until(lambda: waiting(served) == 2)
        await until(lambda: served.lines)
        held.go.set()
        assert result(await leader) == "miss"

    assert [(line["outcome"], line["attempts"], line["cache"]) for line in served.lines] == [
        ("client_gone", 0, "miss"),
        ("ok", 1, "miss"),
    ]


async def test_no_request_waits_longer_than_it_may(engine: FakeEngine, start_router: Start) -> None:
    """The deadline is its own, and not that of the one it waits for."""
    served: Served = await start_router(engine, entry={**CACHED, "timeouts": {"total": 1.0}})
    engine.script = Held()

    async with quiet(served):
        asked = [asyncio.create_task(ask(served)) for _ in range(3)]
        found = await asyncio.gather(*asked)

    assert {one.status_code for one in found} == {504}
    assert {one.json()["error"]["code"] for one in found} == {"upstream_timeout"}


async def test_streams_do_not_wait_for_one_another(engine: FakeEngine, start_router: Start) -> None:
    served: Served = await start_router(engine, entry=CACHED)
    engine.script = held = Held(SSE_HEAD, chunk(event("a") + DONE) + LAST_CHUNK)

    asked = [asyncio.create_task(ask(served, stream=True)) for _ in range(3)]
    await until(lambda: engine.busy == 3)
    held.go.set()
    await asyncio.gather(*asked)

    assert result(await ask(served, stream=True)) == "hit"


async def test_a_request_that_wants_no_cache_waits_for_nobody(engine: FakeEngine, start_router: Start) -> None:
    served: Served = await start_router(engine, entry=CACHED)
    engine.script = held = Held()

    asked = [asyncio.create_task(ask(served)), asyncio.create_task(ask(served, headers={"cache-control": "no-cache"}))]
    await until(lambda: engine.busy == 2)
    held.go.set()

    assert [result(one) for one in await asyncio.gather(*asked)] == ["miss", "miss"]


# With limits


@pytest.fixture
def limited(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """The settings of a router with these limits for the key of EXAMPLE."""

    def limited(*limits: dict[str, Any]) -> dict[str, Any]:
        path = write(tmp_path / "policy.json", policy_of(entry(limits=list(limits))))
        return {"auth": "keys", "policy": str(path)}

    return limited


async def test_the_tokens_of_a_hit_are_given_back(
    engine: FakeEngine, start_router: Start, limited: Callable[..., dict[str, Any]]
) -> None:
    settings = limited({"requests": 100, "per": 3600}, {"tokens": 1000, "per": 3600})
    served: Served = await start_router(engine, entry=CACHED, **settings)

    headers = [(await ask(served, headers=bearer(), max_tokens=50)).headers for _ in range(4)]

    assert [one["x-inference-cache"] for one in headers] == ["miss", "hit", "hit", "hit"]
    # A hit counts as a request.
    assert [one["x-ratelimit-remaining-requests"] for one in headers] == ["99", "98", "97", "96"]
    # Of what is reserved the miss keeps 8 tokens, and a hit none.
    remaining = [int(one["x-ratelimit-remaining-tokens"]) for one in headers]
    assert remaining == [remaining[0], *[remaining[0] - 8] * 3]


async def test_a_request_over_its_limit_gets_no_cached_answer(
    engine: FakeEngine, start_router: Start, limited: Callable[..., dict[str, Any]]
) -> None:
    served: Served = await start_router(engine, entry=CACHED, **limited({"requests": 2, "per": 3600}))

    found = [await ask(served, headers=bearer()) for _ in range(3)]

    assert [(one.status_code, result(one)) for one in found] == [(200, "miss"), (200, "hit"), (429, None)]


async def test_hits_need_no_backend(engine: FakeEngine, start_router: Start) -> None:
    served: Served = await start_router(engine, entry=CACHED)
    await ask(served)
    await engine.stop()

    assert result(await ask(served)) == "hit"
    other = await ask(served, seed=1)
    assert (other.status_code, result(other)) == (503, "miss")


# With models that stand for others


def together(*engines: FakeEngine, **virtual: Any) -> list[dict[str, Any]]:
    """The models a, b, ... on one engine each, and a virtual one."""
    models = [{"name": name, "backends": [engine.url]} for name, engine in zip("abc", engines, strict=False)]
    return [*models, {"name": "m", **virtual}]


@pytest.mark.parametrize(
    ("virtual", "header", "asked"),
    [
        ({"race": {"members": ["a", "b"], "stagger": 60}}, ("x-inference-model", "a"), 1),
        ({"consensus": {"members": ["a", "b", "c"], "quorum": 3}}, ("x-inference-votes", "3/3"), 3),
    ],
)
async def test_a_virtual_model_may_have_a_cache(
    virtual: dict[str, Any], header: tuple[str, str], asked: int, start_engine: Start, start_router: Start
) -> None:
    engines = [await start_engine() for _ in range(3)]
    served: Served = await start_router(models=together(*engines, **virtual, **CACHED))

    first, second = [await ask(served) for _ in range(2)]

    assert [result(one) for one in (first, second)] == ["miss", "hit"]
    assert first.content == second.content
    assert sum(len(engine.requests) for engine in engines) == asked
    name, value = header
    assert (first.headers[name], second.headers[name]) == (value, value)
    assert {line["model"] for line in served.lines} == {"a"}
    assert [line.get("votes") for line in served.lines] == [value if name == "x-inference-votes" else None] * 2
    assert (served.lines[1]["attempts"], served.lines[1]["backend"]) == (0, None)
    assert await served.metric("inference_api_saved_tokens_total", model_name="m", type="output") == 5


async def test_another_entry_of_a_member_has_other_answers(start_engine: Start, start_router: Start) -> None:
    engines = [await start_engine() for _ in range(2)]
    virtual = {"race": {"members": ["a", "b"], "stagger": 60}, **CACHED}
    served: Served = await start_router(models=together(*engines, **virtual))
    await ask(served)
    changed = together(*engines, **virtual)
    changed[1]["version"] = "2"
    served.router.core.registry.replace_static(parse_catalogue({"models": changed}, ENTRY))

    assert [result(await ask(served)) for _ in range(2)] == ["miss", "hit"]


async def test_the_answer_of_a_fallback_is_not_stored(start_engine: Start, start_router: Start) -> None:
    """It would outlive the failure for which it was given."""
    down, up = await start_engine(raw(json_response({}, "503 Service Unavailable"))), await start_engine()
    models = [
        {"name": "m", "backends": [down.url], "fallbacks": ["b"], **CACHED},
        {"name": "b", "backends": [up.url], **CACHED},
    ]
    served: Served = await start_router(models=models, max_attempts=1)

    found = [await ask(served) for _ in range(2)]
    down.script = answer
    again = [await ask(served) for _ in range(2)]

    assert [(result(one), one.headers.get("x-inference-fallback")) for one in found] == [("miss", "1")] * 2
    assert [(result(one), one.headers.get("x-inference-fallback")) for one in again] == [("miss", None), ("hit", None)]


async def test_each_variant_has_its_own_answers(start_engine: Start, start_router: Start) -> None:
    engines = [await start_engine() for _ in range(2)]
    models = [{"name": name, "backends": [engine.url], **CACHED} for name, engine in zip("ab", engines, strict=True)]
    models.append({"name": "m", "split": {"variants": {"a": 50, "b": 50}, "sticky": "user"}})
    served: Served = await start_router(models=models)

    found = [await ask(served, user=f"user {number}") for number in range(8) for _ in range(2)]

    variants = [one.headers["x-inference-variant"] for one in found]
    assert set(variants) == {"a", "b"}
    assert [result(one) for one in found] == ["miss", "hit"] * 8
    assert [len(engine.requests) for engine in engines] == [variants.count(name) / 2 for name in "ab"]
