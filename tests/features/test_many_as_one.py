"""Each feature that stands between a client and a model, and each thing that can happen to a request.

docs/many.md has this table for people. Afterwards nothing is left: no request, no place, no connection, no task.
"""

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import orjson
import pytest

from tests.command import command, ready
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
from tests.features.members import EVENTS, cut, reset
from tests.policies import write

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
URL = "/v1/chat/completions"


class Row(NamedTuple):
    """One feature: its entry, and where it differs from a plain model.

    `other_answers`: another backend or model answers in the place of one that dies before its first byte. `streams`: it
    has streams.
    """

    entry: Callable[[str, str], dict[str, Any]]
    other_answers: bool = False
    streams: bool = True
    settings: dict[str, Any] = {}
    headers: dict[str, str] = {}


def on(**keys: Any) -> Callable[[str, str], dict[str, Any]]:
    """A model on the first engine with these keys."""
    return lambda engine, other: {"backends": [engine], **keys}


def of(**keys: Any) -> Callable[[str, str], dict[str, Any]]:
    """A virtual model."""
    return lambda engine, other: keys


ROWS: dict[str, Row] = {
    "fallback": Row(on(fallbacks=["other"]), other_answers=True),
    "split": Row(of(split={"variants": {"plain": 1, "other": 0}})),
    "race": Row(of(race={"members": ["plain", "other"], "stagger": 60}), other_answers=True),
    "consensus": Row(of(consensus={"members": ["plain", "twin", "other"], "quorum": 2}), streams=False),
    "hedge": Row(on(hedge={"after": 10_000})),
    "shadow": Row(on(shadow={"to": "other", "sample": 1})),
    "cache": Row(on(cache={"ttl": 60, "temperature": 2})),
    "queue": Row(on(max_in_flight=9, queue={"timeout": 9, "size": 9})),
    "hold": Row(on(hold=9)),
    "provider": Row(on(base_path="/v9", headers={"x-title": "a"}, routes=["chat_completions"])),
    "adapters": Row(on(adapters=["lora"], discover=True)),
    "cors": Row(on(), settings={"cors_origins": "https://app.example"}, headers={"origin": "https://app.example"}),
}


# What both engines list
LISTED = raw(json_response({"data": [{"id": name} for name in (*ROWS, "plain", "twin", "other")]}))


def catalogue(name: str, engine: FakeEngine, other: FakeEngine) -> list[dict[str, Any]]:
    own = ROWS[name].entry(engine.url, other.url)
    plain = {"plain": [engine.url], "twin": [engine.url], "other": [other.url]}
    return [{"name": name, **own}, *({"name": model, "backends": backends} for model, backends in plain.items())]


class Case:
    """A router with one feature on the way of a model; `engine` gets its requests, `other` those of other models."""

    def __init__(self, name: str, served: Served, engine: FakeEngine, other: FakeEngine) -> None:
        self.name, self.row, self.served, self.engine, self.other = name, ROWS[name], served, engine, other

    async def ask(self, stream: bool = False) -> httpx.Response:
        body = (STREAM if stream else CHAT) | {"model": self.name}
        return await self.served.client.post(URL, json=body, headers=self.row.headers)


async def answering(request: Received, line: Line) -> None:
    if b'"stream":true' in request.body.replace(b" ", b""):
        await line.send(SSE_HEAD, chunk(event("x")), chunk(DONE) + LAST_CHUNK)
    else:
        await line.send(json_response(COMPLETION))


@pytest.fixture(params=ROWS)
async def case(request: pytest.FixtureRequest, start_engine: Start, start_router: Start) -> Start:
    name = request.param

    async def case(script: Any = answering, **more: Any) -> Case:
        engine, other = await start_engine(script), await start_engine(answering)
        engine.page = other.page = LISTED
        models = catalogue(name, engine, other)
        served = await start_router(models=models, **ROWS[name].settings, **more)
        return Case(name, served, engine, other)

    return case


async def test_json(case: Start) -> None:
    it: Case = await case()

    async with quiet(it.served):
        answer = await it.ask()

    assert (answer.status_code, answer.json()) == (200, COMPLETION)


async def test_stream(case: Start) -> None:
    it: Case = await case()

    async with quiet(it.served):
        answer = await it.ask(stream=True)

    if it.row.streams:
        assert (answer.status_code, answer.content) == (200, EVENTS)
    else:
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, "stream")


@pytest.mark.parametrize("body", [CHAT, STREAM])
async def test_the_client_leaves(case: Start, body: dict[str, Any]) -> None:
    it: Case = await case(hang)
    if body is STREAM and not it.row.streams:
        return

    async with quiet(it.served):
        async with raw_client(it.served.port) as client:
            await client.send(post(URL, body | {"model": it.name}))
            await until(lambda: it.engine.busy)
        await until(lambda: not it.engine.busy)
        await until(lambda: it.served.lines)

    assert [line["status"] for line in it.served.lines] == [499]


@pytest.mark.parametrize("stream", [False, True])
async def test_the_backend_dies_before_the_first_byte(case: Start, stream: bool) -> None:
    it: Case = await case(reset, max_attempts=1)
    if stream and not it.row.streams:
        return

    async with quiet(it.served):
        answer = await it.ask(stream)

    if it.row.other_answers:
        assert answer.status_code == 200
        assert answer.headers["x-inference-model"] == "other"
    elif it.name == "consensus":
        # One of three has answered: the first that did, with its own vote.
        assert (answer.status_code, answer.headers["x-inference-votes"]) == (200, "1/3")
    else:
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_reset")


async def test_the_backend_dies_after_the_first_byte(case: Start) -> None:
    it: Case = await case(cut)
    if not it.row.streams:
        return

    async with quiet(it.served):
        with pytest.raises(httpx.RemoteProtocolError):
            await it.ask(stream=True)

    assert [(line["status"], line["outcome"]) for line in it.served.lines] in ([(200, "reset")], [(200, "truncated")])


@pytest.mark.parametrize("stream", [False, True])
async def test_a_limit_refuses(case: Start, tmp_path: Path, stream: bool) -> None:
    policy = write(tmp_path / "policy.json", {"anonymous": {"limits": [{"requests": 1, "per": 60}]}})
    it: Case = await case(policy=str(policy))
    if stream and not it.row.streams:
        return

    async with quiet(it.served):
        first, second = await it.ask(stream), await it.ask(stream)
        asked = len(it.engine.requests)

    assert (first.status_code, second.status_code) == (200, 429)
    assert second.headers["x-ratelimit-remaining-requests"] == "0"
    assert len(it.engine.requests) == asked


async def test_the_router_drains(tmp_path: Path, start_engine: Start) -> None:
    """Requests through every feature are under way when it is asked to stop: all end well."""
    released = asyncio.Event()

    async def late(request: Received, line: Line) -> None:
        await released.wait()
        await answering(request, line)

    engine, other = await start_engine(late), await start_engine(late)
    engine.page = other.page = LISTED
    models = {model["name"]: model for name in ROWS for model in catalogue(name, engine, other)}
    models |= {"empty": {"name": "empty", "hold": 60}}
    path = tmp_path / "models.json"
    path.write_bytes(orjson.dumps({"models": list(models.values())}))
    asks = [(name, stream) for name, row in ROWS.items() for stream in {False, row.streams}]
    async with command(tmp_path, engine, catalogue=path, drain_timeout=30) as router:
        await ready(router.client)
        bodies = [(STREAM if stream else CHAT) | {"model": name, "user": str(stream)} for name, stream in asks]
        # The race's second member has not begun.
        running = [asyncio.create_task(router.client.post(URL, json=body)) for body in bodies]
        held = asyncio.create_task(router.client.post(URL, json=CHAT | {"model": "empty"}))
        await until(lambda: engine.busy >= len(asks))

        router.tell(signal.SIGTERM)
        refused = await held
        released.set()
        answers = await asyncio.gather(*running)
        code, _, err = await router.stop()

    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
    for (name, stream), answer in zip(asks, answers, strict=True):
        assert (name, answer.status_code) == (name, 200)
        assert answer.content == EVENTS if stream else answer.json() == COMPLETION
    assert (code, err) == (0, "")
