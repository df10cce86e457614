"""A race: the first byte of a good answer wins, the others are cancelled and cost no backend its standing."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
import pytest

from inference_api.app import ENTRY
from inference_api.feature import Feature
from inference_api.models import Call, Reply, Send
from inference_api.observe.account import Record
from inference_api.routing.catalogue import parse_catalogue
from inference_api.routing.fleet import Model
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
from tests.faults.quiescence import quiet
from tests.features.several import Several, start_several

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
URL = "/v1/chat/completions"
FAST = json_response({**COMPLETION, "model": "the fast one"})


@pytest.fixture
def start_race(start_engine: Start, start_router: Start) -> Start:
    """`await start_race(script, ...)` -> Several: a race, `fastest`, of as many members."""

    async def start(*scripts: Any, stagger: float = 0.0, **more: Any) -> Several:
        return await start_several(start_engine, start_router, "fastest", {"stagger": stagger}, "race", scripts, **more)

    return start


def refused(*models: dict[str, Any]) -> list[str]:
    plain: list[dict[str, Any]] = [{"name": name, "backends": [f"http://{name}:1"]} for name in "ab"]
    return parse_catalogue({"models": [*plain, *models]}, ENTRY).problems


@pytest.mark.parametrize(
    ("race", "says"),
    [
        ({"members": ["a"]}, "race.members"),
        ({"members": ["a", "a"]}, "listed twice"),
        ({"members": ["a", "b"], "stagger": -1}, "race.stagger"),
        ({"members": ["a", "nope"]}, "model 'r': race.members: there is no model 'nope'"),
        ({"members": ["a", "r"]}, "model 'r': a cycle: r -> r"),
    ],
)
def test_a_race_that_is_none_is_refused_by_name(race: Any, says: str) -> None:
    [problem] = refused({"name": "r", "race": race})

    assert says in problem


def test_a_race_has_no_backends_of_its_own() -> None:
    [problem] = refused({"name": "r", "race": {"members": ["a", "b"]}, "backends": ["http://x:1"]})

    assert "the key 'backends' does not go with `race`" in problem


@pytest.mark.parametrize("stream", [False, True], ids=["json", "stream"])
async def test_the_first_byte_wins(stream: bool, start_race: Start) -> None:
    body = [event("from b"), DONE]
    fast = raw(SSE_HEAD, *map(chunk, body), LAST_CHUNK) if stream else raw(FAST)
    race: Several = await start_race(hang, fast, hang)

    async with quiet(race.served):
        answer = await race.ask(stream=stream)

    assert answer.content == (b"".join(body) if stream else FAST.split(b"\r\n\r\n", 1)[1])
    assert answer.headers["x-inference-model"] == "b"
    await until(lambda: not any(engine.busy for engine in race.engines))
    assert await race.outcomes("a") == {"race_lost": 1}
    assert await race.outcomes("b") == {"ok": 1}
    assert await race.served.metric("inference_api_race_wins_total", model_name="fastest", member="b") == 1
    assert await race.served.metric("inference_api_requests_total", model_name="b", code="200") == 1


async def test_a_head_wins_nothing(start_race: Start) -> None:
    """Engines answer with a head before they have begun to work."""

    async def head_only(request: Received, line: Line) -> None:
        await line.send(SSE_HEAD)
        await line.gone()

    race: Several = await start_race(head_only, sse(event("b"), DONE, then=lambda line: line.send(LAST_CHUNK)))

    async with quiet(race.served):
        answer = await race.ask(stream=True)

    assert answer.headers["x-inference-model"] == "b"
    assert await race.outcomes("a") == {"race_lost": 1}


async def test_each_member_that_lost_has_a_record(start_race: Start) -> None:
    race: Several = await start_race(hang, raw(FAST))

    await race.ask()

    await until(lambda: race.legs and race.served.lines)
    [leg], [record], [line] = race.legs, race.records, race.served.lines
    assert (leg.extra["kind"], leg.model_name, leg.asked, leg.outcome) == ("race", "a", "fastest", "race_lost")
    assert (leg.request_id, leg.attempts, leg.status) == (record.request_id, 1, 0)
    assert (record.model_name, record.attempts, record.outcome) == ("b", 1, "ok")
    assert record.backend == race.engines[1].url.removeprefix("http://")
    assert (line["model"], line["asked_model"]) == ("b", "fastest")


async def test_the_loser_is_not_to_blame(start_race: Start) -> None:
    race: Several = await start_race(hang, raw(FAST), breaker_failures=1)

    for _ in range(3):
        await race.ask()

    backends = (await race.served.client.get("/backends")).json()["data"]
    assert {one["state"] for one in backends} == {"ready"}


async def test_a_member_that_fails_loses(start_race: Start) -> None:
    race: Several = await start_race(raw(json_response({"error": {}}, "500 Internal Server Error")), raw(FAST))

    async with quiet(race.served):
        answer = await race.ask()

    assert (answer.status_code, answer.headers["x-inference-model"]) == (200, "b")
    [leg] = race.legs
    assert (leg.outcome, leg.status) == ("upstream_5xx", 500)


async def test_a_body_that_breaks_off_before_its_first_byte_loses(start_race: Start) -> None:
    broken = asyncio.Event()

    async def breaks(request: Received, line: Line) -> None:
        await line.send(SSE_HEAD)
        line.reset()
        await until(lambda: race.served.router.core.fleet.models["a"].in_flight == 0)
        broken.set()

    async def answers(request: Received, line: Line) -> None:
        await broken.wait()
        await line.send(SSE_HEAD, chunk(event("b")), chunk(DONE) + LAST_CHUNK)

    race: Several = await start_race(breaks, answers)

    async with quiet(race.served):
        answer = await race.ask(stream=True)

    assert answer.headers["x-inference-model"] == "b"
    assert [leg.outcome for leg in race.legs] == ["reset"]


async def test_if_all_fail_the_answer_is_the_first_members(start_race: Start) -> None:
    first = {"error": {"message": "of a", "code": 400}}
    # It answers last.
    release = asyncio.Event()

    async def slow(request: Received, line: Line) -> None:
        await release.wait()
        await line.send(json_response(first, "400 Bad Request"))

    async def quick(request: Received, line: Line) -> None:
        await line.send(json_response({"error": {}}, "404 Not Found"))
        release.set()

    race: Several = await start_race(slow, quick)
    async with quiet(race.served):
        answer = await race.ask()

    assert (answer.status_code, answer.json()) == (400, first)
    assert answer.headers["x-inference-model"] == "a"
    assert await race.served.metric("inference_api_race_wins_total") == 0


async def test_if_all_fail_the_error_is_the_first_members(start_race: Start) -> None:
    race: Several = await start_race(hang, raw(json_response({"error": {}}, "400 Bad Request")))
    await race.engines[0].stop()

    answer = await race.ask()

    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_backend_available")
    assert "'a'" in answer.json()["error"]["message"]


async def test_stagger_spares_the_later_ones(start_race: Start) -> None:
    race: Several = await start_race(raw(FAST), raw(FAST), stagger=60)

    answer = await race.ask()

    assert answer.headers["x-inference-model"] == "a"
    assert race.engines[1].requests == []


async def test_stagger_starts_the_next_one(start_race: Start) -> None:
    race: Several = await start_race(hang, raw(FAST), stagger=0.05)

    answer = await race.ask()

    assert answer.headers["x-inference-model"] == "b"


async def test_one_that_fails_starts_the_next_at_once(start_race: Start) -> None:
    broken = raw(json_response({"error": {}}, "400 Bad Request"))
    race: Several = await start_race(broken, raw(FAST), raw(FAST), stagger=60)

    answer = await race.ask()

    assert answer.headers["x-inference-model"] == "b"
    assert race.engines[2].requests == []


@pytest.mark.parametrize("moment", ["before the first byte", "in mid-stream"])
async def test_a_client_that_leaves_cancels_all(moment: str, start_race: Start) -> None:
    async def one_event(request: Received, line: Line) -> None:
        await line.send(SSE_HEAD, chunk(event()))
        await line.gone()

    race: Several = await start_race(hang, hang if moment == "before the first byte" else one_event)
    async with quiet(race.served), raw_client(race.served.port) as client:
        await client.send(post(URL, {**STREAM, "model": "fastest"}))
        if moment == "in mid-stream":
            await client.reader.readuntil(b"data: ")
        else:
            await until(lambda: all(engine.busy for engine in race.engines))

    await until(lambda: race.served.lines)
    [line] = race.served.lines
    assert (line["outcome"], line["status"], line["asked_model"]) == ("client_gone", 499, "fastest")
    # Nobody got an answer of any: each has a Record, and the request shows that backends were asked.
    kinds = [(leg.model_name, str(leg.outcome)) for leg in race.legs]
    assert kinds == (
        [("a", "client_gone"), ("b", "client_gone")] if moment != "in mid-stream" else [("a", "race_lost")]
    )
    assert line["attempts"] == 1


async def test_a_drain_ends_all(start_race: Start) -> None:
    race: Several = await start_race(hang, hang)
    async with quiet(race.served):
        asking = asyncio.create_task(race.ask())
        await until(lambda: all(engine.busy for engine in race.engines))
        [request] = [task for task in asyncio.all_tasks() if "Accounts.__call__" in repr(task.get_coro())]
        # What the server does at the end of DRAIN_TIMEOUT
        request.cancel()
        answer = await asking

    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")


async def test_a_backend_that_dies_after_the_first_byte_breaks_the_stream(start_race: Start) -> None:
    race: Several = await start_race(hang, sse(event("b"), then=Line.reset))

    async with quiet(race.served), raw_client(race.served.port) as client:
        await client.send(post(URL, {**STREAM, "model": "fastest"}))
        seen = await client.reader.read(-1)

    assert b"upstream_stream_interrupted" in seen
    assert DONE not in seen


async def test_a_member_at_its_limit_loses(start_race: Start) -> None:
    race: Several = await start_race(hang, raw(FAST), members={"max_in_flight": 1})
    async with quiet(race.served), raw_client(race.served.port) as busy:
        await busy.send(post(URL, {**CHAT, "model": "a"}))
        await until(lambda: race.engines[0].busy)
        answer = await race.ask()

    assert answer.headers["x-inference-model"] == "b"
    # It never reached a backend.
    assert race.legs == []


async def test_what_may_be_stored_does_not_race(start_race: Start) -> None:
    race: Several = await start_race(raw(json_response({"id": "r"})), raw(json_response({"id": "r"})))
    body = {"model": "fastest", "input": "x"}

    stored = await race.served.client.post("/v1/responses", json=body)
    not_stored = await race.served.client.post("/v1/responses", json={**body, "store": False})

    error = stored.json()["error"]
    assert (stored.status_code, error["code"], error["param"]) == (422, "validation_error", "model")
    assert not_stored.status_code == 200


async def test_races_may_be_nested(start_race: Start) -> None:
    outer = {"name": "outer", "race": {"members": ["fastest", "d"]}}
    last = {"name": "d"}
    race: Several = await start_race(hang, raw(FAST), more=[last, outer])

    async with quiet(race.served):
        answer = await race.ask("outer")

    assert answer.headers["x-inference-model"] == "b"
    await until(lambda: race.served.lines)
    assert race.served.lines[0]["model"] == "b"
    assert [(leg.model_name, leg.asked) for leg in race.legs] == [("a", "outer")]
    wins = [("fastest", "b"), ("outer", "fastest")]
    assert [
        await race.served.metric("inference_api_race_wins_total", model_name=name, member=member)
        for name, member in wins
    ] == [1, 1]


async def test_a_race_within_a_race_that_loses_is_cancelled_to_the_last_member(
    start_race: Start, start_engine: Start
) -> None:
    quickest: FakeEngine = await start_engine(raw(FAST))
    inner = {"name": "inner", "race": {"members": ["a", "b"]}}
    outer = {"name": "outer", "race": {"members": ["inner", "d"]}}
    race: Several = await start_race(hang, hang, more=[inner, {"name": "d", "backends": [quickest.url]}, outer])

    async with quiet(race.served):
        answer = await race.ask("outer")

    assert answer.headers["x-inference-model"] == "d"
    # Each that ran, once
    assert [(leg.model_name, str(leg.outcome)) for leg in race.legs] == [("a", "race_lost"), ("b", "race_lost")]


async def test_the_members_are_asked_by_their_own_names(start_race: Start) -> None:
    race: Several = await start_race(raw(FAST), raw(FAST))

    await race.ask()

    await until(lambda: all(engine.requests for engine in race.engines))
    assert [orjson.loads(engine.requests[0].body)["model"] for engine in race.engines] == ["a", "b"]


async def test_a_race_is_listed(start_race: Start) -> None:
    race: Several = await start_race(hang, hang)

    assert "fastest" in {card["id"] for card in (await race.served.client.get("/v1/models")).json()["data"]}


async def test_every_leg_ends_once_also_one_that_reached_no_backend(start_race: Start) -> None:
    """What features have reserved for a member is released with its leg, or with the request."""
    reserved: list[str] = []

    def member(send: Send) -> Send:
        def reserving(call: Call, model: Model) -> Awaitable[Reply]:
            reserved.append(model.name)
            return send(call, model)

        return reserving

    def leg(record: Record, extra: dict[str, Any]) -> None:
        reserved.remove(record.model_name)

    counts = Feature("counts", member=member, leg=leg)
    race: Several = await start_race(hang, hang, raw(FAST), members={"max_in_flight": 1}, features=[counts])
    async with quiet(race.served), raw_client(race.served.port) as busy:
        await busy.send(post(URL, {**CHAT, "model": "a"}))
        await until(lambda: race.engines[0].busy)
        await race.ask()

    assert reserved == ["c"]
