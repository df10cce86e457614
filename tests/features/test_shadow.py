"""Shadowing: a copy that nobody sees, which neither delays nor fails the request, and is left out first."""

import asyncio
from collections.abc import Callable
from random import Random
from typing import Any

import orjson
import pytest

from inference_api.app import ENTRY
from inference_api.feature import Feature
from inference_api.observe.account import Record
from inference_api.routing.catalogue import parse_catalogue
from tests.conftest import Served
from tests.fakes import (
    CHAT,
    COMPLETION,
    DONE,
    LAST_CHUNK,
    SSE_HEAD,
    STREAM,
    USAGE,
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
from tests.features.limited import Limited

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
URL = "/v1/chat/completions"
METRIC = "inference_api_shadow_requests_total"


class Copied:
    """A router whose model `m` is copied to `next`."""

    def __init__(self, served: Served, engine: FakeEngine, target: FakeEngine, legs: list[Record]) -> None:
        self.served = served
        self.engine = engine
        self.target = target
        self.legs = legs

    async def results(self) -> dict[str, float]:
        names = ("ok", "error", "skipped")
        found = {n: await self.served.metric(METRIC, model_name="m", to="next", result=n) for n in names}
        return {name: count for name, count in found.items() if count}


@pytest.fixture
def start_shadow(start_engine: Start, start_router: Start) -> Start:
    """`await start_shadow(script, of_target)` -> Copied; `shadow`, `target`: more of the key, and of the target."""

    async def start(
        script: Script | None = None,
        of_target: Script | None = None,
        shadow: Any = (),
        target: Any = (),
        more: Any = (),
        features: Any = (),
        **settings: Any,
    ) -> Copied:
        engine, other = await start_engine(script), await start_engine(of_target)
        legs: list[Record] = []
        listens = Feature("listens", leg=lambda record, extra: legs.append(record))
        copies = {"to": "next", "sample": 1, **dict(shadow)}
        models = [
            {"name": "m", "backends": [engine.url], "shadow": copies},
            {"name": "next", "backends": [other.url], **dict(target)},
            *more,
        ]
        served = await start_router(models=models, features=[*features, listens], **settings)
        return Copied(served, engine, other, legs)

    return start


@pytest.mark.parametrize(
    ("shadow", "says"),
    [
        ({"to": "next"}, "shadow.sample"),
        ({"to": "next", "sample": 0}, "shadow.sample"),
        ({"to": "next", "sample": 2}, "shadow.sample"),
        ({"to": "next", "sample": 1, "max_in_flight": 0}, "shadow.max_in_flight"),
        ({"to": "m", "sample": 1}, "a cycle: m -> m"),
    ],
)
def test_a_shadow_that_is_none_is_refused_by_name(shadow: Any, says: str) -> None:
    models = [{"name": "m", "backends": ["http://m:1"], "shadow": shadow}, {"name": "next"}]
    [problem] = parse_catalogue({"models": models}, ENTRY).problems

    assert says in problem


def test_a_target_that_does_not_exist_is_warned_of() -> None:
    entry = {"name": "m", "backends": ["http://m:1"], "shadow": {"to": "nope", "sample": 1}}
    catalogue = parse_catalogue({"models": [entry]}, ENTRY)

    assert list(catalogue) == ["m"]
    assert catalogue.warnings == ["model 'm': shadow.to: there is no model 'nope'; it is left out"]


@pytest.mark.parametrize("stream", [False, True], ids=["json", "stream"])
async def test_the_copy_is_the_same_request(stream: bool, start_shadow: Start) -> None:
    copied: Copied = await start_shadow()

    async with quiet(copied.served):
        answer = await copied.served.chat(stream, user="ana")
        await until(lambda: copied.legs)

    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("x-inference")]
    [asked], [copy] = copied.engine.requests, copied.target.requests
    assert orjson.loads(copy.body) == orjson.loads(asked.body) | {"model": "next"}
    assert await copied.results() == {"ok": 1}


async def test_its_record_is_not_the_requests(start_shadow: Start) -> None:
    copied: Copied = await start_shadow()

    await copied.served.chat()

    await until(lambda: copied.legs and copied.served.lines)
    [leg], [line] = copied.legs, copied.served.lines
    assert (leg.extra["kind"], leg.model_name, leg.asked, leg.outcome) == ("shadow", "next", "m", "ok")
    assert leg.tokens[::2] == (USAGE["prompt_tokens"], USAGE["completion_tokens"])
    assert leg.request_id == line["request_id"]
    assert (line["model"], line["attempts"]) == ("m", 1)


async def test_a_copy_of_a_stream_is_counted(start_shadow: Start) -> None:
    copied: Copied = await start_shadow()

    await copied.served.chat(stream=True)

    await until(lambda: copied.legs)
    [leg] = copied.legs
    assert (leg.events, leg.tokens[2], leg.outcome) == (5, USAGE["completion_tokens"], "ok")


async def test_a_slow_copy_does_not_delay_the_request(start_shadow: Start) -> None:
    release = asyncio.Event()

    async def slow(request: Received, line: Line) -> None:
        await release.wait()
        await line.send(json_response(COMPLETION))

    copied: Copied = await start_shadow(None, slow)

    async with quiet(copied.served):
        assert (await copied.served.chat()).status_code == 200
        await until(lambda: copied.target.busy)
        release.set()
        await until(lambda: copied.legs)


async def breaks(request: Received, line: Line) -> None:
    line.reset()


async def breaks_off(request: Received, line: Line) -> None:
    await line.send(SSE_HEAD, chunk(event()))
    line.reset()


BAD: dict[str, Script] = {
    "an error": raw(json_response({"error": {}}, "500 Internal Server Error")),
    "dies before its first byte": breaks,
    "dies in its body": breaks_off,
    "no json": raw(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 3\r\n\r\noh!"),
    "an incomplete stream": raw(SSE_HEAD, chunk(event()), LAST_CHUNK),
}


@pytest.mark.parametrize("bad", BAD)
async def test_a_copy_that_fails_does_no_harm(bad: str, start_shadow: Start) -> None:
    copied: Copied = await start_shadow(None, BAD[bad])

    async with quiet(copied.served):
        assert (await copied.served.chat()).status_code == 200
        await until(lambda: copied.legs)

    assert await copied.results() == {"error": 1}


async def test_a_target_without_a_backend_does_no_harm(start_shadow: Start) -> None:
    copied: Copied = await start_shadow()
    await copied.target.stop()

    async with quiet(copied.served):
        assert (await copied.served.chat()).status_code == 200
        await until(lambda: copied.legs)

    assert await copied.results() == {"error": 1}


async def test_a_large_copy_is_dropped_as_it_comes(start_shadow: Start) -> None:
    large = raw(json_response({"choices": [{"message": {"content": "x" * 2_000_000}}]}))
    copied: Copied = await start_shadow(None, large)

    async with quiet(copied.served):
        await copied.served.chat()
        await until(lambda: copied.legs)

    assert await copied.results() == {"ok": 1}


async def test_a_sample_is_a_share(start_shadow: Start) -> None:
    copied: Copied = await start_shadow(shadow={"sample": 0.3}, rand=Random(1))

    for _ in range(60):
        await copied.served.chat()

    await until(lambda: not copied.target.busy)
    assert 8 <= len(copied.target.requests) <= 30
    assert sum((await copied.results()).values()) == len(copied.target.requests)


async def test_too_many_copies_are_left_out(start_shadow: Start) -> None:
    copied: Copied = await start_shadow(None, hang, shadow={"max_in_flight": 2})

    for _ in range(5):
        assert (await copied.served.chat()).status_code == 200
    await until(lambda: copied.target.busy == 2)

    assert await copied.results() == {"skipped": 3}


async def test_a_busy_target_gets_no_copies(start_shadow: Start) -> None:
    copied: Copied = await start_shadow(None, hang, target={"max_in_flight": 10})
    asking = [asyncio.create_task(copied.served.chat(model="next")) for _ in range(7)]
    await until(lambda: copied.target.busy == 7)

    assert (await copied.served.chat()).status_code == 200

    assert await copied.results() == {"skipped": 1}
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)


async def test_a_target_that_is_gone_gets_no_copies(start_shadow: Start) -> None:
    copied: Copied = await start_shadow(shadow={"to": "nope"})

    assert (await copied.served.chat()).status_code == 200

    assert await copied.served.metric(METRIC, model_name="m", to="nope", result="skipped") == 1


@pytest.mark.parametrize(
    ("path", "body", "copies"),
    [
        (URL, {**CHAT, "store": True}, 0),
        (URL, {**CHAT, "store": False}, 1),
        ("/v1/responses", {"model": "m", "input": "x"}, 0),
        ("/v1/responses", {"model": "m", "input": "x", "store": True}, 0),
        ("/v1/responses", {"model": "m", "input": "x", "store": False}, 1),
    ],
)
async def test_what_may_be_stored_is_not_copied(
    path: str, body: dict[str, Any], copies: int, start_shadow: Start
) -> None:
    copied: Copied = await start_shadow()

    await copied.served.client.post(path, json=body)
    await copied.served.chat()
    await until(lambda: len(copied.legs) == copies + 1)

    assert len(copied.target.requests) == copies + 1


async def test_a_refused_request_is_not_copied(start_shadow: Start) -> None:
    copied: Copied = await start_shadow(max_in_flight=1)
    copied.engine.script = hang
    async with raw_client(copied.served.port) as client:
        await client.send(post(URL, CHAT))
        await until(lambda: copied.engine.busy)
        assert (await copied.served.chat()).status_code == 503

    await until(lambda: copied.legs)
    assert len(copied.target.requests) == 1


async def test_a_copy_outlives_a_client_that_leaves(start_shadow: Start) -> None:
    release = asyncio.Event()

    async def slow(request: Received, line: Line) -> None:
        await release.wait()
        await line.send(json_response(COMPLETION))

    copied: Copied = await start_shadow(hang, slow)
    async with quiet(copied.served):
        async with raw_client(copied.served.port) as client:
            await client.send(post(URL, STREAM))
            await until(lambda: copied.engine.busy and copied.target.busy)
        await until(lambda: copied.served.lines and not copied.engine.busy)
        assert copied.target.busy
        release.set()
        await until(lambda: copied.legs)

    assert await copied.results() == {"ok": 1}


async def test_a_drain_ends_all_copies_at_once(start_shadow: Start) -> None:
    copied: Copied = await start_shadow(None, hang)
    async with quiet(copied.served):
        await copied.served.chat()
        await until(lambda: copied.target.busy)

        copied.served.router.drain()
        await until(lambda: not copied.target.busy)
        # Requests are still answered, and not copied any more.
        assert (await copied.served.chat()).status_code == 200

    assert await copied.results() == {"error": 1, "skipped": 1}
    assert [leg.outcome for leg in copied.legs] == ["drain_timeout"]


async def test_a_copy_takes_nothing_from_limits(start_shadow: Start) -> None:
    limited = Limited(limits=[{"scope": "model", "requests": 1, "per": 60}])
    copied: Copied = await start_shadow(features=limited.features)

    assert (await copied.served.chat()).status_code == 200
    await until(lambda: copied.legs)

    assert await copied.results() == {"ok": 1}
    # The copy has not taken the only request of its model.
    assert (await copied.served.chat(model="next")).status_code == 200
    assert (await copied.served.chat(model="next")).status_code == 429


async def test_a_copy_is_not_copied(start_shadow: Start, start_engine: Start) -> None:
    last: FakeEngine = await start_engine()
    copied: Copied = await start_shadow(
        target={"shadow": {"to": "last", "sample": 1}}, more=[{"name": "last", "backends": [last.url]}]
    )

    await copied.served.chat()
    await until(lambda: copied.legs)
    assert last.requests == []

    await copied.served.chat(model="next")
    await until(lambda: last.requests)


async def test_a_target_may_be_a_race_whose_losers_are_not_billed(start_shadow: Start, start_engine: Start) -> None:
    slow = await start_engine(hang)
    race = {"name": "next2", "race": {"members": ["slow", "next"]}}
    copied: Copied = await start_shadow(shadow={"to": "next2"}, more=[{"name": "slow", "backends": [slow.url]}, race])

    async with quiet(copied.served):
        await copied.served.chat()
        await until(lambda: len(copied.legs) == 2)

    assert {(leg.extra["kind"], leg.model_name) for leg in copied.legs} == {("shadow", "slow"), ("shadow", "next")}


async def test_the_stream_of_the_client_is_the_engines(start_shadow: Start) -> None:
    body = [event("own"), DONE]
    copied: Copied = await start_shadow(raw(SSE_HEAD, *map(chunk, body), LAST_CHUNK))

    answer = await copied.served.chat(stream=True)

    assert answer.content == b"".join(body)
