"""The queue of a model: each bound, each turn, and each end; afterwards nothing waits and nothing is in flight."""

import asyncio
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import orjson
import pytest

from inference_api.app import ENTRY, build, entry_of
from inference_api.core import Outside
from inference_api.features.queue import Bounds, Line, Wanted
from inference_api.routing.balance import make_balancer
from inference_api.routing.catalogue import load_catalogue, parse_catalogue
from inference_api.routing.fleet import Model
from inference_api.settings import Settings, make_settings
from tests.conftest import Served, serving
from tests.fakes import (
    COMPLETION,
    SSE_HEAD,
    FakeEngine,
    Received,
    chunk,
    event,
    hang,
    json_response,
    post,
    raw_client,
    read_answer,
    until,
)
from tests.fakes import Line as Connection
from tests.fakes import answer as answering
from tests.faults.quiescence import quiet
from tests.features.waiting import URL, Paced, asking, callers, depth, error, waiting

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]

QUEUE = {"timeout": 20, "size": 8, "per_caller": 8}
ONE = {"max_in_flight": 1, "queue": QUEUE}


async def reload(served: Served, tmp_path: Path, *models: dict[str, Any]) -> None:
    """Apply another catalogue, as a change of its file does."""
    path = tmp_path / "catalogue.json"
    path.write_bytes(orjson.dumps({"models": models}))
    served.router.core.registry.replace_static(load_catalogue(path, ENTRY))


# Turns


@pytest.mark.parametrize("stream", [False, True])
async def test_at_the_limit_a_request_waits_for_a_place(stream: bool, start_engine: Start, start_router: Start) -> None:
    paced = Paced()
    engine: FakeEngine = await start_engine(paced)
    served: Served = await start_router(engine, entry=ONE)

    async with quiet(served):
        first = asking(served, stream=stream)
        await paced.arrived(1)
        second = asking(served, stream=stream)
        await waiting(served, 1)
        shown = await served.metric("inference_api_queue_depth", model_name="m", kind="queue")
        paced.answer(0)
        await paced.arrived(2)
        paced.answer(1)
        answers = await first, await second

    assert [one.status_code for one in answers] == [200, 200]
    assert answers[0].content == answers[1].content
    assert (shown, depth(served)) == (1, 0)
    assert await served.metric("inference_api_queue_depth", model_name="m", kind="queue") == 0
    assert await served.metric("inference_api_queue_wait_seconds_count", model_name="m", kind="queue") == 1
    assert "queued_ms" not in served.lines[0]
    assert served.lines[1]["queued_ms"] > 0


async def test_callers_with_few_requests_do_not_wait_behind_one_with_many(
    tmp_path: Path, start_engine: Start, start_router: Start
) -> None:
    paced = Paced()
    served: Served = await start_router(
        await start_engine(paced), entry=ONE, **callers(tmp_path, greedy={}, ana={}, bob={})
    )

    async with quiet(served):
        tasks = [asking(served, "running", key="ana")]
        await paced.arrived(1)
        for number in range(2):
            tasks.append(asking(served, f"g{number}", key="greedy"))
            await waiting(served, number + 1)
        for who in ("ana", "bob"):
            # As many bytes as the others have
            tasks.append(asking(served, who[:2], key=who))
            await waiting(served, len(tasks) - 1)
        await paced.answer_all(5)
        await asyncio.gather(*tasks)

    assert paced.who == ["running", "g0", "an", "bo", "g1"]


async def test_a_lower_priority_number_goes_first_and_a_larger_weight_oftener(
    tmp_path: Path, start_engine: Start, start_router: Start
) -> None:
    paced = Paced()
    keys: dict[str, Any] = {"late": {"priority": 10}, "usual": {}, "heavy": {"weight": 100}}
    served: Served = await start_router(await start_engine(paced), entry=ONE, **callers(tmp_path, **keys))

    async with quiet(served):
        tasks = [asking(served, "running", key="usual")]
        await paced.arrived(1)
        for who in ("late", "usual", "usual", "heavy", "heavy"):
            tasks.append(asking(served, who, key=who))
            await waiting(served, len(tasks) - 1)
        await paced.answer_all(6)
        await asyncio.gather(*tasks)

    assert paced.who == ["running", "heavy", "heavy", "usual", "usual", "late"]


async def test_a_place_is_kept_for_whom_it_was_given_to(start_engine: Start, start_router: Start) -> None:
    """The end of one request and the beginning of another in the same turn of the loop: the one that waits is next."""
    paced = Paced()
    served: Served = await start_router(await start_engine(paced), entry=ONE)

    async with quiet(served):
        tasks = [asking(served, "running")]
        await paced.arrived(1)
        tasks.append(asking(served, "waits"))
        await waiting(served, 1)
        model = served.router.core.fleet.models["m"]
        highest = 0

        def watch() -> None:
            nonlocal highest
            highest = max(highest, model.in_flight)

        model.subscribe(watch)
        paced.answer(0)
        tasks += [asking(served, f"new{number}") for number in range(3)]
        await paced.answer_all(5)
        await asyncio.gather(*tasks)
        model.unsubscribe(watch)

    assert paced.who[:2] == ["running", "waits"]
    assert highest == 1


# Bounds


async def test_a_full_queue_refuses(start_engine: Start, start_router: Start) -> None:
    paced = Paced()
    served: Served = await start_router(await start_engine(paced), entry={**ONE, "queue": {"timeout": 20, "size": 1}})

    async with quiet(served):
        first = asking(served)
        await paced.arrived(1)
        second = asking(served)
        await waiting(served, 1)
        refused = await served.chat()
        await paced.answer_all(2)
        await asyncio.gather(first, second)

    # Nothing has gone on yet by which a rate could be measured.
    assert error(refused) == (503, "overloaded", "The queue of the model 'm' is full.", "5")
    assert await served.metric("inference_api_rejected_requests_total", model_name="m", reason="queue_full") == 1
    assert await served.metric("inference_api_rejected_requests_total", model_name="m", reason="overload") == 0
    [line] = [line for line in served.lines if line["status"] == 503]
    assert (line["code"], line["outcome"], line["attempts"]) == ("overloaded", "shed", 0)


async def test_a_caller_has_its_part_of_the_queue(tmp_path: Path, start_engine: Start, start_router: Start) -> None:
    paced = Paced()
    # A quarter of it is for each.
    entry = {**ONE, "queue": {"timeout": 20, "size": 8}}
    served: Served = await start_router(await start_engine(paced), entry=entry, **callers(tmp_path, greedy={}, ana={}))

    async with quiet(served):
        tasks = [asking(served, key="ana")]
        await paced.arrived(1)
        for number in range(2):
            tasks.append(asking(served, key="greedy"))
            await waiting(served, number + 1)
        refused = await asking(served, key="greedy")
        tasks.append(asking(served, key="ana"))
        await waiting(served, 3)
        await paced.answer_all(4)
        answers = await asyncio.gather(*tasks)

    assert error(refused)[:2] == (503, "overloaded")
    assert "is full for this caller" in error(refused)[2]
    assert [answer.status_code for answer in answers] == [200] * 4
    assert await served.metric("inference_api_rejected_requests_total", model_name="m", reason="queue_full") == 1


async def test_callers_without_a_key_are_told_apart_by_address(start_engine: Start, start_router: Start) -> None:
    paced = Paced()
    entry = {**ONE, "queue": {"timeout": 20, "size": 4, "per_caller": 1}}
    served: Served = await start_router(await start_engine(paced), entry=entry, trusted_proxies="127.0.0.1")

    def from_address(address: str) -> "asyncio.Task[Any]":
        body = {"model": "m", "messages": []}
        return asyncio.create_task(served.client.post(URL, json=body, headers={"x-forwarded-for": address}))

    async with quiet(served):
        tasks = [from_address("192.0.2.1")]
        await paced.arrived(1)
        for number, address in enumerate(("192.0.2.1", "2001:db8::1")):
            tasks.append(from_address(address))
            await waiting(served, number + 1)
        refused = [await from_address(address) for address in ("::ffff:192.0.2.1", "2001:db8::2")]
        await paced.answer_all(3)
        await asyncio.gather(*tasks)

    assert [one.status_code for one in refused] == [503, 503]


@pytest.mark.parametrize(
    "entry",
    [{"queue": {**QUEUE, "timeout": 0.3}}, {"timeouts": {"total": 0.3}}],
    ids=["timeout", "the request's own deadline"],
)
async def test_nobody_waits_for_longer_than_the_timeout(
    entry: dict[str, Any], start_engine: Start, start_router: Start
) -> None:
    paced = Paced()
    served: Served = await start_router(await start_engine(paced), entry={**ONE, **entry})

    async with quiet(served):
        # A stream has another deadline.
        first = asking(served, stream=True)
        await paced.arrived(1)
        late = await served.chat()
        paced.answer(0)
        await first

    status, code, message, retry_after = error(late)
    assert (status, code, retry_after) == (503, "overloaded", "5")
    # Of its own deadline a part may have gone before.
    (seconds,) = map(float, re.findall(r"^No place of the model 'm' became free within ([0-9.]+) s\.$", message))
    assert 0 < seconds <= 0.3
    assert await served.metric("inference_api_rejected_requests_total", model_name="m", reason="queue_timeout") == 1
    [line] = [line for line in served.lines if line["status"] == 503]
    assert line["queued_ms"] >= 1000 * seconds - 10
    assert line["queued_ms"] <= line["latency_ms"]


async def test_the_wait_is_a_part_of_the_time_of_a_request(start_engine: Start, start_router: Start) -> None:
    paced = Paced()
    engine: FakeEngine = await start_engine(paced)
    served: Served = await start_router(engine, entry={**ONE, "timeouts": {"total": 10.0}})

    async with quiet(served):
        first = asking(served, stream=True)
        await paced.arrived(1)
        began = time.monotonic()
        second = asking(served)
        await waiting(served, 1)
        await until(lambda: time.monotonic() - began > 8)
        paced.answer(0)
        late = await second
        await first

    assert late.status_code == 504
    # It would be 18 s if the wait did not count.
    assert 9.9 < time.monotonic() - began < 17.5


async def test_retry_after_is_measured(start_engine: Start, start_router: Start) -> None:
    from inference_api.features.queueing.waits import Rate

    rate = Rate()
    rate.begin(100.0)
    assert rate.seconds_for(200, 100.0) == 5
    for number in range(1, 101):
        rate.went_on(100.0 + number / 50)

    # Fifty a second
    assert rate.seconds_for(200, 102.0) == 4
    assert rate.seconds_for(1, 102.0) == 1
    # Nothing has gone on for a while.
    assert rate.seconds_for(200, 110.0) > 20


async def test_the_limit_of_the_process_is_not_waited_for(start_engine: Start, start_router: Start) -> None:
    paced = Paced()
    served: Served = await start_router(await start_engine(paced), entry=ONE, max_in_flight=2)

    async with quiet(served):
        first = asking(served)
        await paced.arrived(1)
        second = asking(served)
        await waiting(served, 1)
        # In one piece: it is counted before anybody looks at the limit.
        async with raw_client(served.port) as client:
            await client.send(post(URL, {"model": "m", "messages": []}))
            refused = await asyncio.wait_for(read_answer(client.reader), 10)
        await paced.answer_all(2)
        answers = await asyncio.gather(first, second)

    assert [answer.status_code for answer in answers] == [200, 200]
    message = orjson.loads(refused.body)["error"]["message"]
    assert message.startswith("The router is at its limit of 2 concurrent requests")
    assert await served.metric("inference_api_rejected_requests_total", model_name="m", reason="overload") == 1


# Ends


async def test_a_client_that_leaves_makes_room_at_once(start_engine: Start, start_router: Start) -> None:
    paced = Paced()
    entry = {**ONE, "queue": {"timeout": 20, "size": 1}}
    served: Served = await start_router(await start_engine(paced), entry=entry)

    async with quiet(served):
        first = asking(served, "running")
        await paced.arrived(1)
        async with raw_client(served.port) as client:
            await client.send(post(URL, {"model": "m", "messages": [], "user": "leaves"}))
            await waiting(served, 1)
        await waiting(served, 0)
        second = asking(served, "stays")
        await waiting(served, 1)
        await paced.answer_all(2)
        await asyncio.gather(first, second)

    assert paced.who == ["running", "stays"]
    [line] = [line for line in served.lines if line["outcome"] == "client_gone"]
    assert (line["status"], line["attempts"]) == (499, 0)
    assert line["queued_ms"] > 0


async def test_a_client_that_leaves_in_mid_stream_makes_room(start_engine: Start, start_router: Start) -> None:
    served: Served = await start_router(await start_engine(streaming), entry=ONE)

    async with quiet(served):
        async with raw_client(served.port) as client:
            await client.send(post(URL, {"model": "m", "messages": [], "stream": True}))
            await client.reader.readuntil(b"data: ")
            second = asking(served, "ends")
            await waiting(served, 1)
        assert (await second).status_code == 200


async def streaming(request: Received, line: Connection) -> None:
    """An event, and no end of the stream; other requests are answered."""
    if b'"ends"' in request.body:
        return await line.send(json_response(COMPLETION))
    await line.send(SSE_HEAD, chunk(event()))
    await line.gone()


async def dies_before(request: Received, line: Connection) -> None:
    line.reset()


async def dies_after(request: Received, line: Connection) -> None:
    await line.send(SSE_HEAD, chunk(event()))
    line.reset()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("dies", [dies_before, dies_after])
async def test_the_place_of_a_request_whose_engine_dies_goes_to_the_next(
    dies: Any, stream: bool, start_engine: Start, start_router: Start
) -> None:
    engine: FakeEngine = await start_engine()
    paced = Paced(dies)
    engine.script = paced
    served: Served = await start_router(engine, entry=ONE, retry_budget=0)

    async with quiet(served):
        first = asking(served, stream=stream)
        await paced.arrived(1)
        second = asking(served, "next", stream=stream)
        await waiting(served, 1)
        engine.script = answering
        paced.answer(0)
        await asyncio.gather(first, return_exceptions=True)
        answer = await second

    assert answer.status_code == 200
    assert served.lines[0]["outcome"] in ("reset", "truncated", "connect_failed")


async def test_a_limit_refuses_before_the_queue_and_the_queue_gives_everything_back(
    tmp_path: Path, start_engine: Start, start_router: Start
) -> None:
    paced = Paced()
    ana = {"limits": [{"requests": 3, "per": 3600}, {"streams": 2}]}
    entry = {**ONE, "queue": {"timeout": 20, "size": 1}}
    served: Served = await start_router(await start_engine(paced), entry=entry, **callers(tmp_path, ana=ana))

    async with quiet(served):
        first = asking(served, key="ana", stream=True)
        await paced.arrived(1)
        second = asking(served, key="ana", stream=True)
        await waiting(served, 1)
        # Refused by its limit of streams; by the queue, whose refusal takes no request; and then let through.
        streams = await asking(served, key="ana", stream=True)
        full = await asking(served, key="ana")
        again = await asking(served, key="ana")
        await paced.answer_all(2)
        await asyncio.gather(first, second)
        third = asking(served, key="ana", stream=True)
        await paced.arrived(3)
        paced.answer(2)
        answers = [streams, full, again, await third, await asking(served, key="ana")]

    assert [answer.status_code for answer in answers] == [429, 503, 503, 200, 429]
    assert full.headers["x-ratelimit-remaining-requests"] == again.headers["x-ratelimit-remaining-requests"] == "0"


async def test_in_a_drain_those_that_wait_go_on(start_engine: Start, start_router: Start) -> None:
    paced = Paced()
    served: Served = await start_router(await start_engine(paced), entry=ONE)

    async with quiet(served):
        first = asking(served)
        await paced.arrived(1)
        second = asking(served)
        await waiting(served, 1)
        served.router.drain()
        third = asking(served)
        await waiting(served, 2)
        await paced.answer_all(3)
        answers = await asyncio.gather(first, second, third)

    assert [answer.status_code for answer in answers] == [200] * 3


async def test_at_the_end_of_a_drain_those_that_wait_are_refused(tmp_path: Path, start_engine: Start) -> None:
    engine: FakeEngine = await start_engine(hang)
    path = tmp_path / "catalogue.json"
    path.write_bytes(orjson.dumps({"models": [{"name": "m", "backends": [engine.url], **ONE}]}))
    settings: Settings = make_settings({"catalogue": path, "drain_timeout": 1}, ())
    router = build(settings, Outside())

    async with AsyncExitStack() as clients:
        async with serving(router, settings) as url:
            port = int(url.rsplit(":", 1)[1])
            running, waits = [await clients.enter_async_context(raw_client(port)) for _ in range(2)]
            await running.send(post(URL, {"model": "m", "messages": []}))
            await until(lambda: engine.busy)
            await waits.send(post(URL, {"model": "m", "messages": []}))
            await until(lambda: router.core.admission.in_flight == 2)
        answer = await read_answer(waits.reader)

    assert (answer.status, orjson.loads(answer.body)["error"]["code"]) == (503, "shutting_down")
    assert router.core.fleet.models["m"].in_flight == router.core.admission.in_flight == 0


# Reloads


async def test_a_higher_limit_lets_them_go_on_at_once(tmp_path: Path, start_engine: Start, start_router: Start) -> None:
    paced = Paced()
    engine: FakeEngine = await start_engine(paced)
    served: Served = await start_router(engine, entry=ONE)

    async with quiet(served):
        tasks = [asking(served, str(number)) for number in range(4)]
        await waiting(served, 3)
        await reload(served, tmp_path, {"name": "m", "backends": [engine.url], **ONE, "max_in_flight": 3})
        await paced.arrived(3)
        await waiting(served, 1)
        await paced.answer_all(4)
        answers = await asyncio.gather(*tasks)

    assert [answer.status_code for answer in answers] == [200] * 4


@pytest.mark.parametrize(
    "models",
    [lambda url: [{"name": "m", "backends": [url]}], lambda url: [{"name": "other", "backends": [url]}]],
    ids=["without limit and queue", "without the model"],
)
async def test_what_waits_is_served_by_a_catalogue_without_the_queue(
    models: Any, tmp_path: Path, start_engine: Start, start_router: Start
) -> None:
    paced = Paced()
    engine: FakeEngine = await start_engine(paced)
    served: Served = await start_router(engine, entry=ONE)

    async with quiet(served):
        tasks = [asking(served, str(number)) for number in range(3)]
        await waiting(served, 2)
        model = served.router.core.fleet.models["m"]
        await reload(served, tmp_path, *models(engine.url))
        await paced.answer_all(3)
        answers = await asyncio.gather(*tasks)

    assert [answer.status_code for answer in answers] == [200] * 3
    assert (model.in_flight, model.waiting) == (0, ())
    assert depth(served) == 0


async def test_a_queue_that_comes_while_requests_run_counts_them(
    tmp_path: Path, start_engine: Start, start_router: Start
) -> None:
    paced = Paced()
    engine: FakeEngine = await start_engine(paced)
    served: Served = await start_router(engine)

    async with quiet(served):
        first = asking(served)
        await paced.arrived(1)
        await reload(served, tmp_path, {"name": "m", "backends": [engine.url], **ONE})
        second = asking(served)
        await waiting(served, 1)
        await paced.answer_all(2)
        answers = await asyncio.gather(first, second)

    assert [answer.status_code for answer in answers] == [200] * 2


# The entry


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"queue": QUEUE}, "`queue` needs `max_in_flight`"),
        ({**ONE, "queue": {"timeout": 0, "size": 1}}, "greater than 0"),
        ({**ONE, "queue": {"timeout": 1, "size": 0}}, "greater than or equal to 1"),
        ({**ONE, "queue": {"timeout": 1, "size": 100_001}}, "less than or equal to 100000"),
        ({**ONE, "queue": {"timeout": 1}}, "size"),
        ({**ONE, "queue": {**QUEUE, "per_caller": 0}}, "per_caller"),
        ({**ONE, "queue": {**QUEUE, "seconds": 1}}, "seconds"),
    ],
)
def test_an_entry_is_refused_alone_and_says_why(given: dict[str, Any], says: str) -> None:
    document = {"models": [{"name": "bad", **given}, {"name": "good", **ONE}]}
    catalogue = parse_catalogue(document, entry_of(Settings()))

    assert list(catalogue) == ["good"]
    [problem] = catalogue.problems
    assert problem.startswith("model 'bad'")
    assert says in problem


@pytest.mark.parametrize(("size", "part"), [(200, 50), (3, 1), (4, 1), (9, 2)])
def test_a_caller_has_a_quarter_of_the_queue_unless_the_entry_says_otherwise(size: int, part: int) -> None:
    assert Bounds(timeout=1, size=size).of_caller == part
    assert Bounds(timeout=1, size=size, per_caller=7).of_caller == 7


# The line alone


@pytest.fixture
def line() -> Iterator[Line]:
    [entry] = parse_catalogue({"models": [{"name": "m", **ONE}]}, ENTRY).values()
    model = Model(entry, (), make_balancer("round_robin"))
    model.in_flight = 1
    made = Line(model)
    yield made
    assert (len(made.queue), model.waiting) == (0, ())


async def test_a_place_that_came_too_late_goes_to_the_next(line: Line) -> None:
    """A client leaves after its place was given, and before its task has run."""
    model = vars(line)["_model"]
    leaves, stays = (
        asyncio.create_task(line.place(Wanted(who, 0, 1.0, 1), time.monotonic() + 20)) for who in ("a", "b")
    )
    await asyncio.sleep(0)
    model.in_flight = 0
    line.fill()
    assert model.in_flight == 1

    leaves.cancel()
    await asyncio.gather(leaves, return_exceptions=True)
    await stays

    assert leaves.cancelled()
    assert model.in_flight == 1


async def test_one_that_has_left_gets_no_place(line: Line) -> None:
    """A client leaves, and a place becomes free before its task has run."""
    model = vars(line)["_model"]
    leaves, stays = (
        asyncio.create_task(line.place(Wanted(who, 0, 1.0, 1), time.monotonic() + 20)) for who in ("a", "b")
    )
    await asyncio.sleep(0)
    leaves.cancel()
    model.in_flight = 0
    line.fill()
    await asyncio.gather(leaves, return_exceptions=True)
    await stays

    assert model.in_flight == 1


async def test_a_limit_that_is_lowered_meanwhile_holds(line: Line) -> None:
    """A place is given, and before its task has run a catalogue takes it away again."""
    model = vars(line)["_model"]
    entry, model.entry = model.entry, model.entry.model_copy(update={"max_in_flight": 2})
    waits = asyncio.create_task(line.place(Wanted("a", 0, 1.0, 1), time.monotonic() + 20))
    await asyncio.sleep(0)
    line.fill()
    assert model.in_flight == 2
    model.entry = entry
    await asyncio.sleep(0)
    assert (model.in_flight, len(line.queue)) == (1, 1)

    model.in_flight = 0
    line.fill()
    await waits
    assert model.in_flight == 1
