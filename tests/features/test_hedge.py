"""Hedging: a late request gets a second backend, within the budget, and the one that loses is not to blame."""

import asyncio
from collections.abc import Callable
from typing import Any

import orjson
import pytest

from inference_api.app import ENTRY
from inference_api.feature import Feature
from inference_api.models import Reply
from inference_api.observe.account import Record
from inference_api.routing.catalogue import parse_catalogue
from inference_api.upstream.attempt import Attempt, SendAttempt
from inference_api.upstream.response import ResponseStream
from tests.conftest import Served
from tests.fakes import (
    CHAT,
    COMPLETION,
    DONE,
    LAST_CHUNK,
    SSE_HEAD,
    STREAM,
    FakeEngine,
    Line,
    Received,
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

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
URL = "/v1/chat/completions"
SOON: dict[str, Any] = {"after": 50, "budget": 0.5}
FAST = raw(json_response(COMPLETION))


class Pair:
    """A router with a hedged model of two backends. The scripts answer its requests in turn, whichever gets them."""

    def __init__(self) -> None:
        self.scripts: list[Script] = []
        self.usual: Script = FAST
        self.engines: list[FakeEngine] = []
        # The engines in the order in which they were asked
        self.asked: list[FakeEngine] = []
        self.legs: list[Record] = []
        self.records: list[Record] = []
        self.served: Served

    def of(self, number: int) -> Script:
        async def script(request: Received, line: Line) -> None:
            self.asked.append(self.engines[number])
            await (self.scripts.pop(0) if self.scripts else self.usual)(request, line)

        return script

    async def results(self) -> dict[str, float]:
        name = "inference_api_hedges_total"
        found = {r: await self.served.metric(name, model_name="m", result=r) for r in ("won", "lost", "no_budget")}
        return {result: count for result, count in found.items() if count}

    async def outcomes(self) -> list[str]:
        """Of all attempts, by their backends in the order in which they were asked."""
        text = (await self.served.client.get("/metrics")).text
        lines = [line for line in text.splitlines() if line.startswith("inference_api_upstream_attempts_total{")]
        by_backend = {
            line.split('backend="')[1].split('"')[0]: line.split('outcome="')[1].split('"')[0] for line in lines
        }
        return [by_backend[engine.url.removeprefix("http://")] for engine in dict.fromkeys(self.asked)]


@pytest.fixture
def start_pair(start_engine: Start, start_router: Start) -> Start:
    """`await start_pair(script, ...)` -> a Pair whose first requests are answered so, and all others at once."""

    async def start(
        *scripts: Script, hedge: Any = None, entry: Any = (), backends: int = 2, features: Any = (), **settings: Any
    ) -> Pair:
        pair = Pair()
        pair.scripts = list(scripts)
        pair.engines = [await start_engine(pair.of(number)) for number in range(backends)]
        listens = Feature("listens", leg=lambda record, extra: pair.legs.append(record), record=pair.records.append)
        more = {"hedge": SOON if hedge is None else hedge, **dict(entry)}
        pair.served = await start_router(*pair.engines, entry=more, features=[*features, listens], **settings)
        return pair

    return start


@pytest.mark.parametrize(
    ("hedge", "says"),
    [
        ({"after": 49}, "hedge.after"),
        ({"after": "p99"}, "hedge.after"),
        ({"budget": 0}, "hedge.budget"),
        ({"budget": 0.6}, "hedge.budget"),
        ({"to": "x"}, "'to'"),
    ],
)
def test_a_hedge_that_is_none_is_refused_by_name(hedge: Any, says: str) -> None:
    [problem] = parse_catalogue({"models": [{"name": "m", "hedge": hedge}]}, ENTRY).problems

    assert says in problem


@pytest.mark.parametrize("stream", [False, True], ids=["json", "stream"])
async def test_a_late_request_is_answered_by_another_backend(stream: bool, start_pair: Start) -> None:
    body = [event("quick"), DONE]
    quick = raw(SSE_HEAD, *map(chunk, body), LAST_CHUNK) if stream else FAST
    pair: Pair = await start_pair(hang, quick)

    async with quiet(pair.served):
        answer = await pair.served.chat(stream)

    assert answer.content == (b"".join(body) if stream else orjson.dumps(COMPLETION))
    assert "x-inference-model" not in answer.headers
    first, second = pair.asked
    assert first is not second
    assert await pair.outcomes() == ["hedge_lost", "ok"]
    assert await pair.results() == {"won": 1}
    # The same request; every attempt has an id of its own.
    one, other = first.requests[0], second.requests[0]
    assert one.body == other.body
    assert one.header("x-request-id") != other.header("x-request-id")


async def test_the_loser_has_a_record(start_pair: Start) -> None:
    pair: Pair = await start_pair(hang, FAST)

    await pair.served.chat()

    await until(lambda: pair.served.lines)
    [leg], [record], [line] = pair.legs, pair.records, pair.served.lines
    first, second = (engine.url.removeprefix("http://") for engine in pair.asked)
    assert (leg.extra["kind"], leg.outcome, leg.backend, leg.model_name) == ("hedge", "hedge_lost", first, "m")
    assert (record.backend, record.attempts, record.outcome) == (second, 1, "ok")
    assert leg.request_id == record.request_id
    assert line["model"] == "m"


async def test_the_first_may_win_after_all(start_pair: Start) -> None:
    asked = asyncio.Event()

    async def slow(request: Received, line: Line) -> None:
        await asked.wait()
        await line.send(json_response(COMPLETION))

    async def slower(request: Received, line: Line) -> None:
        asked.set()
        await hang(request, line)

    pair: Pair = await start_pair(slow, slower)

    async with quiet(pair.served):
        assert (await pair.served.chat()).status_code == 200

    assert await pair.results() == {"lost": 1}
    assert await pair.outcomes() == ["ok", "hedge_lost"]
    assert [leg.outcome for leg in pair.legs] == ["hedge_lost"]


async def test_a_head_is_no_first_byte(start_pair: Start) -> None:
    async def head_only(request: Received, line: Line) -> None:
        await line.send(SSE_HEAD)
        await line.gone()

    pair: Pair = await start_pair(head_only, raw(SSE_HEAD, chunk(event()), chunk(DONE) + LAST_CHUNK))

    async with quiet(pair.served):
        await pair.served.chat(stream=True)

    assert await pair.results() == {"won": 1}


async def test_what_is_not_late_is_not_hedged(start_pair: Start) -> None:
    pair: Pair = await start_pair(hedge={"after": 60_000})

    for _ in range(5):
        await pair.served.chat()

    assert len(pair.asked) == 5
    assert await pair.results() == {}
    assert pair.legs == []


async def test_the_budget_is_a_share_of_the_requests(start_pair: Start) -> None:
    async def late(request: Received, line: Line) -> None:
        await asyncio.sleep(0.2)
        await line.send(json_response(COMPLETION))

    pair: Pair = await start_pair(hedge={"after": 50, "budget": 0.1})
    pair.usual = late

    for _ in range(20):
        assert (await pair.served.chat()).status_code == 200

    results = await pair.results()
    assert results["no_budget"] == 18
    assert results.get("won", 0) + results.get("lost", 0) == 2
    assert len(pair.asked) == 22


async def test_a_busy_model_is_not_hedged(start_pair: Start) -> None:
    release = asyncio.Event()

    async def late(request: Received, line: Line) -> None:
        await release.wait()
        await line.send(json_response(COMPLETION))

    pair: Pair = await start_pair(entry={"max_in_flight": 4})
    pair.usual = late
    # The last one to become late is the third, of four.
    asking = [asyncio.create_task(pair.served.chat()) for _ in range(3)]
    await until(lambda: len(pair.asked) == 3)
    await asyncio.sleep(0.15)
    release.set()
    await asyncio.gather(*asking)

    assert len(pair.asked) == 3
    assert await pair.results() == {}


async def test_an_only_backend_is_not_asked_twice(start_pair: Start) -> None:
    async def late(request: Received, line: Line) -> None:
        await asyncio.sleep(0.15)
        await line.send(json_response(COMPLETION))

    pair: Pair = await start_pair(late, backends=1)

    assert (await pair.served.chat()).status_code == 200
    assert len(pair.asked) == 1


async def test_what_may_be_stored_is_not_hedged(start_pair: Start) -> None:
    async def late(request: Received, line: Line) -> None:
        await asyncio.sleep(0.15)
        await line.send(json_response({"id": "r"}))

    pair: Pair = await start_pair(late)

    assert (await pair.served.client.post("/v1/responses", json={"model": "m", "input": "x"})).status_code == 200
    assert len(pair.asked) == 1


async def test_p95_is_known_after_a_hundred(start_pair: Start) -> None:
    pair: Pair = await start_pair(hedge={"after": "p95"})
    for _ in range(99):
        await pair.served.chat()

    async def late(request: Received, line: Line) -> None:
        await asyncio.sleep(0.3)
        await line.send(json_response(COMPLETION))

    # The hundredth first byte is its own.
    pair.scripts = [late]
    await pair.served.chat()
    assert len(pair.asked) == 100
    # Streams have a percentile of their own.
    pair.scripts = [raw(SSE_HEAD, chunk(event()), chunk(DONE) + LAST_CHUNK)]
    await pair.served.chat(stream=True)

    pair.scripts = [hang, FAST]
    async with quiet(pair.served):
        assert (await pair.served.chat()).status_code == 200
    assert await pair.results() == {"won": 1}


async def test_an_error_does_not_win(start_pair: Start) -> None:
    asked = asyncio.Event()

    async def slow(request: Received, line: Line) -> None:
        await asked.wait()
        await line.send(json_response(COMPLETION))

    async def refuses(request: Received, line: Line) -> None:
        await line.send(json_response({"error": {}}, "400 Bad Request"))
        await until(lambda: any(leg.outcome == "upstream_4xx" for leg in pair.legs) or not line.left)
        asked.set()

    pair: Pair = await start_pair(slow, refuses)

    async with quiet(pair.served):
        assert (await pair.served.chat()).status_code == 200

    assert await pair.outcomes() == ["ok", "upstream_4xx"]
    assert await pair.results() == {"lost": 1}


async def test_if_the_first_fails_the_second_is_waited_for(start_pair: Start) -> None:
    broken = asyncio.Event()

    async def breaks(request: Received, line: Line) -> None:
        await until(lambda: len(pair.asked) == 2)
        line.reset()
        broken.set()

    async def quick(request: Received, line: Line) -> None:
        await broken.wait()
        await line.send(json_response(COMPLETION))

    pair: Pair = await start_pair(breaks, quick)

    async with quiet(pair.served):
        assert (await pair.served.chat()).status_code == 200

    assert await pair.results() == {"won": 1}
    assert await pair.outcomes() == ["reset", "ok"]


async def test_if_both_fail_the_first_decides_what_follows(start_pair: Start) -> None:
    async def late_refusal(request: Received, line: Line) -> None:
        await until(lambda: len(pair.asked) == 2)
        await line.send(json_response({"error": {"message": "first"}}, "400 Bad Request"))

    pair: Pair = await start_pair(late_refusal, raw(json_response({"error": {}}, "404 Not Found")))

    async with quiet(pair.served):
        answer = await pair.served.chat()

    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "first")


async def test_a_first_that_fails_at_once_is_repeated_as_ever(start_pair: Start) -> None:
    async def breaks(request: Received, line: Line) -> None:
        line.reset()

    pair: Pair = await start_pair(breaks, hedge={"after": 60_000})

    async with quiet(pair.served):
        assert (await pair.served.chat()).status_code == 200

    assert await pair.served.metric("inference_api_retries_total", reason="reset") == 1
    await until(lambda: pair.served.lines)
    assert pair.served.lines[0]["attempts"] == 2


async def test_the_loser_is_not_to_blame(start_pair: Start) -> None:
    pair: Pair = await start_pair(hang, FAST, FAST, FAST, hang, FAST, breaker_failures=1)

    for _ in range(4):
        await pair.served.chat()

    assert await pair.results() == {"won": 2}

    backends = (await pair.served.client.get("/backends")).json()["data"]
    assert {one["state"] for one in backends} == {"ready"}


@pytest.mark.parametrize("moment", ["before it is late", "when it is", "in mid-stream"])
async def test_a_client_that_leaves_cancels_both(moment: str, start_pair: Start) -> None:
    async def one_event(request: Received, line: Line) -> None:
        await line.send(SSE_HEAD, chunk(event()))
        await line.gone()

    second = one_event if moment == "in mid-stream" else hang
    pair: Pair = await start_pair(hang, second, hedge={"after": 60_000 if moment == "before it is late" else 50})
    async with quiet(pair.served), raw_client(pair.served.port) as client:
        await client.send(post(URL, STREAM))
        if moment == "in mid-stream":
            await client.reader.readuntil(b"data: ")
        else:
            await until(lambda: len(pair.asked) == (1 if moment == "before it is late" else 2))

    await until(lambda: pair.served.lines)
    [line] = pair.served.lines
    assert (line["outcome"], line["status"], line["attempts"]) == ("client_gone", 499, 1)
    # The request's own attempt has no Record beside it.
    legs = [(leg.extra["kind"], str(leg.outcome)) for leg in pair.legs]
    assert (
        legs
        == {
            "before it is late": [],
            "when it is": [("hedge", "client_gone")],
            "in mid-stream": [("hedge", "hedge_lost")],
        }[moment]
    )


async def test_a_drain_ends_both(start_pair: Start) -> None:
    pair: Pair = await start_pair(hang, hang)
    async with quiet(pair.served):
        asking = asyncio.create_task(pair.served.chat())
        await until(lambda: len(pair.asked) == 2)
        [request] = [task for task in asyncio.all_tasks() if "Accounts.__call__" in repr(task.get_coro())]
        # What the server does at the end of DRAIN_TIMEOUT
        request.cancel()
        answer = await asking

    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")


async def test_a_backend_that_dies_after_the_first_byte_breaks_the_stream(start_pair: Start) -> None:
    async def dies(request: Received, line: Line) -> None:
        await line.send(SSE_HEAD, chunk(event()))
        await asyncio.sleep(0.02)
        line.reset()

    pair: Pair = await start_pair(hang, dies)

    async with quiet(pair.served), raw_client(pair.served.port) as client:
        await client.send(post(URL, STREAM))
        seen = await client.reader.read(-1)

    assert b"upstream_stream_interrupted" in seen
    assert DONE not in seen


async def test_a_hedge_in_a_race_loses_with_it(start_pair: Start, start_engine: Start, start_router: Start) -> None:
    slow, slower, quick = await start_engine(hang), await start_engine(hang), await start_engine(hang)

    async def last(request: Received, line: Line) -> None:
        await until(lambda: slow.busy and slower.busy)
        await line.send(json_response(COMPLETION))

    quick.script = last
    legs: list[Record] = []
    listens = Feature("listens", leg=lambda record, extra: legs.append(record))
    models = [
        {"name": "a", "backends": [slow.url, slower.url], "hedge": SOON},
        {"name": "b", "backends": [quick.url]},
        {"name": "m", "race": {"members": ["a", "b"]}},
    ]
    served: Served = await start_router(models=models, features=[listens])

    async with quiet(served):
        answer = await served.client.post(URL, json=CHAT)

    assert answer.headers["x-inference-model"] == "b"
    kinds = sorted((leg.extra["kind"], leg.model_name, str(leg.outcome)) for leg in legs)
    assert kinds == [("hedge", "a", "race_lost"), ("race", "a", "race_lost")]


async def test_a_client_that_leaves_as_the_second_wins_leaves_nothing(start_pair: Start) -> None:
    """The task of the request is cancelled twice: by its client, and by the attempt that won."""
    leaves: list[asyncio.Task[Any]] = []

    def attempts(send: SendAttempt) -> SendAttempt:
        async def attempting(attempt: Attempt) -> Reply:
            if not attempt.tried:
                task = asyncio.current_task()
                assert task is not None
                leaves.append(task)
                return await send(attempt)
            reply = await send(attempt)
            assert isinstance(reply.stream, ResponseStream)
            await reply.stream.peek()
            # In the turn in which the second one has won, and before the first one has its own
            asyncio.get_running_loop().call_soon(leaves[0].cancel)
            return reply

        return attempting

    pair: Pair = await start_pair(hang, FAST, features=[Feature("leaves", attempt=attempts)])

    async with quiet(pair.served):
        answer = await pair.served.chat()

    assert answer.json()["error"]["code"] == "shutting_down"
    assert [leg.extra["kind"] for leg in pair.legs] == ["hedge"]
