"""A part of a feature that fails: the answer, the counts, and the other parts go on without it."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope
from starlette.types import Send as ASGISend

from inference_api.feature import Feature
from inference_api.models import Call, Outcome, RawHeaders, Reply, Send
from inference_api.observe.account import Record
from inference_api.routing.fleet import Model
from tests.conftest import Served
from tests.fakes import LAST_CHUNK, SSE_HEAD, STREAM, Line, Received, chunk, event, post, raw_client, until
from tests.faults.quiescence import quiet

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
URL = "/v1/chat/completions"


class Broken(Exception):
    """A defect of a feature."""


def breaks(*_: Any) -> Any:
    raise Broken


async def test_a_sink_that_fails_takes_nothing_from_the_others(
    start_engine: Start, start_router: Start, caplog: pytest.LogCaptureFixture
) -> None:
    records: list[Record] = []
    features = [Feature("broken", record=breaks), Feature("sound", record=records.append)]
    served: Served = await start_router(await start_engine(), features=features)

    answer = await served.chat()
    async with raw_client(served.port) as client:
        await client.send(b"no HTTP\r\n\r\n")
        await client.reader.read()
    await until(lambda: len(served.lines) == 2)

    assert answer.status_code == 200
    assert [record.status for record in records] == [200, 400]
    assert await served.metric("inference_api_requests_total", code="200") == 1
    told = [record for record in caplog.records if record.exc_info is not None]
    assert [record.getMessage() for record in told] == ["a sink failed"] * 2


class BrokenTap:
    """Fails at one of its calls."""

    def __init__(self, at: str) -> None:
        self._at = at

    def _reach(self, call: str) -> None:
        if call == self._at:
            raise Broken

    def start(self, status: int, headers: RawHeaders) -> None:
        self._reach("start")

    def chunk(self, data: bytes) -> None:
        self._reach("chunk")

    def end(self, outcome: Outcome) -> None:
        self._reach("end")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("at", ["made", "start", "chunk", "end"])
async def test_a_tap_that_fails_leaves_nothing_in_flight(
    at: str, stream: bool, start_engine: Start, start_router: Start
) -> None:
    tap = breaks if at == "made" else lambda call, reply: BrokenTap(at)
    engine = await start_engine()
    served: Served = await start_router(engine, features=[Feature("broken", tap=tap)])

    async with quiet(served):
        async with raw_client(served.port) as client:
            await client.send(post(URL, {**STREAM, "stream": stream}))
            await until(lambda: served.lines)
        await until(lambda: not engine.busy)

    assert served.lines[0]["outcome"] == "internal_error"
    # No fault of the backend
    [backend] = served.router.core.fleet.models["m"].backends
    assert (backend.origin.failures, backend.errors) == (0, 0)


async def test_one_who_waits_for_the_end_and_fails_changes_nothing(start_engine: Start, start_router: Start) -> None:
    ended: list[Outcome] = []

    def wrap(send: Send) -> Send:
        async def sending(call: Call, model: Model) -> Reply:
            reply = await send(call, model)
            reply.on_end(lambda reply, outcome: ended.append(outcome))
            reply.on_end(breaks)
            return reply

        return sending

    served: Served = await start_router(await start_engine(), features=[Feature("broken", send=wrap)])

    async with quiet(served):
        assert (await served.chat()).status_code == 200
        assert (await served.chat(stream=True)).content.endswith(b"[DONE]\n\n")

    assert ended == [Outcome.OK, Outcome.OK]
    await until(lambda: len(served.lines) == 2)
    assert [line["outcome"] for line in served.lines] == ["ok", "ok"]


async def test_a_feature_that_cannot_end_does_not_keep_the_others_from_it(
    start_router: Start, caplog: pytest.LogCaptureFixture
) -> None:
    closed: list[str] = []
    features = [Feature("broken", close=breaks), Feature("sound", close=lambda: closed.append("sound"))]
    served: Served = await start_router(features=features)

    served.router.close()

    assert closed == ["sound"]
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR] == [
        "the feature broken did not end as it should"
    ]


def hesitant(app: ASGIApp) -> ASGIApp:
    """A layer that gives others a turn before each message."""

    async def layer(scope: Scope, receive: Receive, send: ASGISend) -> None:
        async def receive_later() -> Message:
            await asyncio.sleep(0)
            return await receive()

        async def send_later(message: Message) -> None:
            await asyncio.sleep(0)
            await send(message)

        await app(scope, receive_later, send_later)

    return layer


async def test_a_layer_may_give_others_a_turn(start_engine: Start, start_router: Start) -> None:
    async def left_alone(request: Received, line: Line) -> None:
        await line.send(SSE_HEAD, chunk(event()))
        await line.gone()

    async def much(request: Received, line: Line) -> None:
        await line.send(SSE_HEAD, *[chunk(event("x" * 10_000)) for _ in range(300)])
        await line.send(chunk(b"data: [DONE]\n\n") + LAST_CHUNK)

    engine = await start_engine()
    served: Served = await start_router(engine, features=[Feature("hesitant", layer=hesitant)])

    async with quiet(served):
        assert (await served.chat()).status_code == 200
        engine.script = much
        assert len((await served.chat(stream=True)).content) > 3_000_000
        engine.script = left_alone
        async with raw_client(served.port) as client:
            await client.send(post(URL, STREAM))
            await client.reader.readuntil(b"data: ")
        await until(lambda: not engine.busy and len(served.lines) == 3)

    assert [line["outcome"] for line in served.lines] == ["ok", "ok", "client_gone"]
