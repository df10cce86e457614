"""Asking engines for their context length: those that tell, those that do not, and those not to be listened to."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import httpx
import pytest

from inference_api.discovery.engines import EngineFacts
from inference_api.routing.backend import Backend
from inference_api.routing.balance import make_balancer
from inference_api.routing.catalogue import parse_catalogue
from inference_api.routing.fleet import Fleet
from inference_api.upstream.transport import Transport
from tests.fakes import Line, Received, Script, hang, json_response, raw, until

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]


def cards(*cards: tuple[str, Any]) -> Script:
    return raw(json_response({"data": [{"id": name, "max_model_len": length} for name, length in cards]}))


def fleet_of(*urls: str, **entry: Any) -> Fleet:
    fleet = Fleet(make_balancer)
    document = {"models": [{"name": "m", "backends": [{"url": url} for url in urls], **entry}]}
    fleet.update(parse_catalogue(document))
    return fleet


async def learned(fleet: Fleet, transport: httpx.AsyncBaseTransport, seconds: float = 5.0) -> int | None:
    """What one look finds out about `m`."""
    async with asyncio.timeout(20):
        await EngineFacts(fleet, transport, timeout=seconds).poll()
    return fleet.models["m"].max_model_len


async def test_the_context_length_is_learned_and_shown(start_engine: Start, start_router: Start) -> None:
    served = await start_router(await start_engine())
    model = served.router.core.fleet.models["m"]
    await until(lambda: model.max_model_len)

    [card] = (await served.client.get("/v1/models")).json()["data"]
    assert (card["id"], card["max_model_len"]) == ("m", 1024)


async def test_a_list_of_the_models_is_made_again_when_a_length_is_learned(start: Start, transport: Transport) -> None:
    server = await start(cards(("other", 1), ("m", 4096)))
    fleet = fleet_of(server.url)
    version = fleet.version

    assert await learned(fleet, transport) == 4096
    assert fleet.version > version
    [request] = server.requests
    assert (request.method, request.target) == ("GET", "/v1/models")


async def test_the_length_of_the_entry_holds_until_an_engine_tells_its_own(start: Start, transport: Transport) -> None:
    server = await start(cards(("m", 4096)))
    fleet = fleet_of(server.url, max_model_len=2048)
    silent = fleet_of("http://127.0.0.1:1", max_model_len=2048)

    assert fleet.models["m"].max_model_len == 2048
    assert await learned(fleet, transport) == 4096
    assert await learned(silent, transport) == 2048
    # Another entry, of which the engine has not told anything yet
    fleet.update(parse_catalogue({"models": [{"name": "m", "backends": [server.url], "max_model_len": 1024}]}))
    assert fleet.models["m"].max_model_len == 1024


async def test_an_engine_that_comes_back_with_another_length_is_believed(start: Start, start_router: Start) -> None:
    server = await start(cards(("m", 4096)))
    served = await start_router(server)
    fleet, transport = served.router.core.fleet, served.router.core.transport
    await until(lambda: fleet.models["m"].max_model_len == 4096)
    version = fleet.version
    assert await learned(fleet, transport) == 4096
    assert fleet.version == version
    server.script = cards(("m", 8192))
    assert await learned(fleet, transport) == 8192

    assert fleet.version > version
    [card] = (await served.client.get("/v1/models")).json()["data"]
    assert card["max_model_len"] == 8192


@pytest.mark.parametrize("script", [hang, raw(close=True), raw(json_response({})), cards(("m", None))])
async def test_silence_leaves_what_was_known(start: Start, transport: Transport, script: Script) -> None:
    server = await start(cards(("m", 4096)))
    fleet = fleet_of(server.url)
    await learned(fleet, transport)
    server.script = script

    assert await learned(fleet, transport, 0.3) == 4096


@pytest.mark.parametrize("script", [cards(("m", 4096), ("n", 2048)), raw(close=True)])
async def test_an_engine_of_several_models_is_asked_once(start: Start, transport: Transport, script: Script) -> None:
    server = await start(script)
    fleet = fleet_of()
    both = [{"name": name, "backends": [{"url": server.url}]} for name in ("m", "n")]
    fleet.update(parse_catalogue({"models": both}))
    known = await learned(fleet, transport)

    assert len(server.requests) == 1
    assert (known, fleet.models["n"].max_model_len) in {(4096, 2048), (None, None)}


async def test_those_that_are_out_are_not_asked(start: Start, transport: Transport) -> None:
    out, well = await start(cards(("m", 4096))), await start(cards(("m", 8192)))
    fleet = fleet_of(out.url, well.url)
    model = fleet.models["m"]
    model.backends[0].origin.asleep = True
    model.refresh()

    assert await learned(fleet, transport) == 8192
    assert out.requests == []


@pytest.mark.parametrize(
    ("told", "length"),
    [
        ([("m", 1), ("served", 2)], 2),
        ([("anything", 3)], 3),
        ([("m", 1), ("lora", 2)], None),
    ],
    ids=["by its own name", "the only one", "none of several"],
)
async def test_the_engine_knows_the_model_by_its_served_name(
    start: Start, transport: Transport, told: list[tuple[str, int]], length: int | None
) -> None:
    fleet = fleet_of((await start(cards(*told))).url, served_model_name="served")

    assert await learned(fleet, transport) == length


@pytest.mark.parametrize(
    "answer",
    [
        raw(json_response([])),
        raw(json_response("m")),
        raw(json_response(None)),
        raw(json_response({})),
        raw(json_response({"data": None})),
        raw(json_response({"data": {"id": "m", "max_model_len": 1}})),
        raw(json_response({"data": []})),
        raw(json_response({"data": ["m", None, 5]})),
        raw(json_response({"data": [{"max_model_len": 1}, {"id": "n", "max_model_len": 1}]})),
        raw(json_response({"data": [{"id": "m"}]})),
        *(cards(("m", value)) for value in (None, "4096", 4096.0, 0, -1, [1], True)),
        raw(json_response({"detail": "Not Found"}, "404 Not Found")),
        raw(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n<html"),
        raw(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"),
        raw(b"HTTP/1.1 204 No Content\r\n\r\n"),
    ],
)
async def test_an_answer_of_another_shape_tells_nothing(start: Start, transport: Transport, answer: Script) -> None:
    server = await start(answer)

    assert await learned(fleet_of(server.url), transport) is None
    assert server.requests


async def endless(request: Received, line: Line) -> None:
    await line.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
    while not line.writer.is_closing():
        await line.send(b"10000\r\n" + b" " * 65536 + b"\r\n")


async def dripping(request: Received, line: Line) -> None:
    await line.send(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n")
    while not line.writer.is_closing():
        await line.send(b" ")
        await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    "script",
    [hang, dripping, endless, raw(close=True), raw(b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{", close=True)],
    ids=["hangs", "drips", "never ends", "closes", "breaks off"],
)
async def test_an_engine_that_does_not_answer_is_left_and_the_next_one_asked(
    start: Start, transport: Transport, script: Script
) -> None:
    bad, good = await start(script), await start(cards(("m", 4096)))

    assert await learned(fleet_of(bad.url, good.url), transport, 0.8) == 4096
    assert len(bad.requests) == 1
    await until(lambda: bad.open == 0)


async def test_an_answer_that_is_too_large_is_not_believed(start: Start, transport: Transport) -> None:
    body = b" " * (1 << 20) + b'{"data": [{"id": "m", "max_model_len": 4096}]}'
    server = await start(raw(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body), body))

    assert await learned(fleet_of(server.url), transport) is None


async def test_a_refused_connection_is_passed_over(start: Start, transport: Transport) -> None:
    gone, good = await start(hang), await start(cards(("m", 4096)))
    await gone.stop()

    assert await learned(fleet_of(gone.url, good.url), transport) == 4096


async def test_a_backend_that_does_not_know_is_passed_over(start: Start, transport: Transport) -> None:
    silent, telling = await start(raw(json_response({}, "404 Not Found"))), await start(cards(("m", 4096)))

    assert await learned(fleet_of(silent.url, telling.url), transport) == 4096


async def test_of_several_backends_the_first_that_tells_is_believed(start: Start, transport: Transport) -> None:
    first, second = await start(cards(("m", 1024))), await start(cards(("m", 2048)))

    assert await learned(fleet_of(first.url, second.url), transport) == 1024
    assert second.requests == []


async def test_of_many_backends_only_a_few_are_asked(start: Start, transport: Transport) -> None:
    server = await start(raw(b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{", close=True))

    assert await learned(fleet_of(*(f"{server.url}/{number}" for number in range(20))), transport) is None
    assert len(server.requests) <= 3


async def test_a_hung_engine_does_not_keep_the_others_from_being_asked(start: Start, transport: Transport) -> None:
    hung, good = await start(hang), await start(cards(("m", 4096)))
    fleet = Fleet(make_balancer)
    models = [{"name": f"h{number}", "backends": [{"url": hung.url}]} for number in range(5)]
    fleet.update(parse_catalogue({"models": [*models, {"name": "m", "backends": [{"url": good.url}]}]}))
    task = asyncio.create_task(EngineFacts(fleet, transport).run())
    await until(lambda: fleet.models["m"].max_model_len == 4096)
    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: hung.open == 0)


async def test_a_model_without_backends_is_nothing_to_ask(transport: Transport) -> None:
    assert await learned(fleet_of(), transport) is None


async def test_engines_are_asked_again_now_and_then(start: Start, transport: Transport) -> None:
    server = await start(raw(json_response({})))
    fleet = fleet_of(server.url)
    task = asyncio.create_task(EngineFacts(fleet, transport, every=0.02, rand=lambda: 0.5).run())
    await until(lambda: len(server.requests) >= 2)
    server.script = cards(("m", 4096))
    await until(lambda: fleet.models["m"].max_model_len == 4096)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def test_a_url_that_cannot_be_asked_does_not_end_the_asking(start: Start, transport: Transport) -> None:
    good = await start(cards(("m", 4096)))
    fleet = fleet_of(good.url)
    # Past the catalogue's check, as a future one might let it.
    model = fleet.models["m"]
    model.backends = (Backend("m", "http://[v1.x]"), *model.backends)

    assert await learned(fleet, transport) == 4096


async def test_a_failure_nobody_thought_of_does_not_end_the_asking() -> None:
    answers: list[Exception | httpx.Response] = [
        httpx.Response(200, json={"data": [{"id": "m", "max_model_len": 7}]}),
        RuntimeError("the transport has a bug"),
    ]

    def respond(request: httpx.Request) -> httpx.Response:
        answer = answers.pop()
        if isinstance(answer, Exception):
            raise answer
        return answer

    fleet = fleet_of("http://engine")
    task = asyncio.create_task(EngineFacts(fleet, httpx.MockTransport(respond), every=0.01).run())
    await until(lambda: fleet.models["m"].max_model_len == 7)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def test_a_name_that_the_engine_does_not_know_is_told_once_with_the_right_one(
    start: Start, transport: Transport, caplog: pytest.LogCaptureFixture
) -> None:
    server = await start(cards(("org/Model", 1)))
    fleet = fleet_of(server.url)
    facts = EngineFacts(fleet, transport)
    for _ in range(2):
        await facts.poll()

    assert caplog.messages == [
        'a backend does not serve the model of its entry: it serves "org/Model"; set served_model_name: "org/Model"'
    ]

    server.script = cards(("a", 1), ("m", 1))
    await facts.poll()
    server.script = cards(("a", 1), ("b", 1))
    await facts.poll()
    assert caplog.messages[1:] == [
        'a backend does not serve the model of its entry: it serves "a", "b"; set served_model_name to one of them'
    ]


@pytest.mark.parametrize("entry", [{"engine": "tgi"}, {"engine": "llamacpp"}, {"served_model_name": "org/Model"}])
async def test_an_engine_that_takes_the_name_is_not_told_of(
    start: Start, transport: Transport, caplog: pytest.LogCaptureFixture, entry: dict[str, Any]
) -> None:
    server = await start(cards(("org/Model", 1)))
    await EngineFacts(fleet_of(server.url, **entry), transport).poll()

    assert caplog.messages == []
