"""Requests that are held while a model has no backend: each way on, and each end; afterwards nothing is left."""

import asyncio
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from inference_api.app import ENTRY
from inference_api.features.hold import Room
from inference_api.features.queueing.activation import Activations
from inference_api.routing.balance import make_balancer
from inference_api.routing.catalogue import load_catalogue, parse_catalogue
from inference_api.routing.fleet import Fleet
from tests.conftest import Served
from tests.fakes import (
    SSE_HEAD,
    FakeEngine,
    Line,
    Received,
    ScriptedServer,
    chunk,
    event,
    json_response,
    post,
    raw_client,
    read_answer,
    until,
)
from tests.faults.quiescence import quiet
from tests.features.waiting import URL, Paced, asking, callers, depth, error, waiting
from tests.ports import free_port

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]

HELD = {"hold": 20}


async def scale(served: Served, tmp_path: Path, *engines: FakeEngine, **more: Any) -> None:
    """Give the model these backends, as discovery or a changed catalogue does."""
    path = tmp_path / "catalogue.json"
    backends = [engine.url for engine in engines]
    path.write_bytes(orjson.dumps({"models": [{"name": "m", "backends": backends, **HELD, **more}]}))
    served.router.core.registry.replace_static(load_catalogue(path, ENTRY))


class Sleeper:
    """The GETs of an engine that says in its metrics whether it is awake."""

    def __init__(self, engine: FakeEngine, is_awake: bool = True) -> None:
        self.is_awake = is_awake
        engine.page = self

    async def __call__(self, request: Received, line: Line) -> None:
        if request.target != "/metrics":
            return await line.send(json_response({"data": []}))
        state = f'vllm:engine_sleep_state{{engine="0",sleep_state="awake"}} {int(self.is_awake)}.0\n'.encode()
        await line.send(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: %d\r\n\r\n" % len(state), state
        )


async def says(served: Served, asleep: bool) -> None:
    """Wait until the router knows that its one engine sleeps, or does not."""
    [backend] = served.router.core.fleet.models["m"].backends
    await until(lambda: backend.origin.asleep is asleep)


# Ways on


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_waits_until_there_is_a_backend(
    stream: bool, tmp_path: Path, start_engine: Start, start_router: Start
) -> None:
    engine: FakeEngine = await start_engine()
    served: Served = await start_router(entry=HELD)

    async with quiet(served):
        held = asking(served, stream=stream)
        await waiting(served, 1, "hold")
        shown = await served.metric("inference_api_queue_depth", model_name="m", kind="hold")
        await scale(served, tmp_path, engine)
        answer = await held

    assert answer.status_code == 200
    assert shown == 1
    assert await served.metric("inference_api_queue_depth", model_name="m", kind="hold") == 0
    assert await served.metric("inference_api_queue_wait_seconds_count", model_name="m", kind="hold") == 1
    [line] = served.lines
    assert line["queued_ms"] > 0
    assert line["attempts"] == 1


async def test_a_name_that_gets_an_address_wakes_them(start_engine: Start, start_router: Start) -> None:
    engine: FakeEngine = await start_engine()
    found: list[str] = []

    async def resolve(host: str) -> list[str]:
        if not found:
            raise OSError(-2, "Name or service not known")
        return found

    backend = {"url": f"http://engines.test:{engine.port}", "discovery": "dns"}
    models = [{"name": "m", "backends": [backend], **HELD}]
    served: Served = await start_router(models=models, resolve=resolve, discovery_interval=0.1)

    held = asking(served)
    await waiting(served, 1, "hold")
    found.append("127.0.0.1")

    assert (await held).status_code == 200


async def test_a_backend_that_wakes_up_is_a_backend(start_engine: Start, start_router: Start) -> None:
    engine: FakeEngine = await start_engine()
    sleeper = Sleeper(engine, is_awake=False)
    served: Served = await start_router(engine, entry=HELD, health_interval=0.1)

    await says(served, asleep=True)
    held = asking(served)
    await waiting(served, 1, "hold")
    sleeper.is_awake = True

    assert (await held).status_code == 200
    assert served.router.core.fleet.models["m"].waiting == ()


async def test_two_for_each_backend_go_on_at_once_and_the_next_when_one_has_an_answer(
    tmp_path: Path, start_engine: Start, start_router: Start
) -> None:
    paced, other = Paced(), Paced()
    engines = [await start_engine(paced), await start_engine(other)]
    served: Served = await start_router(entry=HELD)

    async with quiet(served):
        tasks = []
        for number in range(7):
            tasks.append(asking(served, str(number)))
            await waiting(served, number + 1, "hold")
        await scale(served, tmp_path, *engines)
        await until(lambda: len(paced.who) + len(other.who) == 4)
        assert depth(served, "hold") == 3
        # First come, first served
        assert sorted(paced.who + other.who) == ["0", "1", "2", "3"]
        # One that comes now is behind those that wait.
        tasks.append(asking(served, "7"))
        await waiting(served, 4, "hold")
        paced.answer(0)
        await until(lambda: len(paced.who) + len(other.who) == 5)
        assert depth(served, "hold") == 3
        await asyncio.gather(paced_all(paced, tasks), paced_all(other, tasks))
        answers = await asyncio.gather(*tasks)

    assert [answer.status_code for answer in answers] == [200] * 8


async def paced_all(paced: Paced, tasks: list["asyncio.Task[httpx.Response]"]) -> None:
    """Answer whatever comes, until all have an answer."""
    number = 0
    while not all(task.done() for task in tasks):
        if number < len(paced.who):
            paced.answer(number)
            number += 1
        await asyncio.sleep(0.001)


async def test_the_head_of_a_stream_lets_the_next_go_on(
    tmp_path: Path, start_engine: Start, start_router: Start
) -> None:
    go_on = asyncio.Event()

    async def script(request: Received, line: Line) -> None:
        await line.send(SSE_HEAD, chunk(event()))
        await go_on.wait()
        await line.send(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")

    engine: FakeEngine = await start_engine(script)
    served: Served = await start_router(entry=HELD)

    async with quiet(served):
        tasks = [asking(served, stream=True) for _ in range(5)]
        await waiting(served, 5, "hold")
        await scale(served, tmp_path, engine)
        # None of them has ended.
        await until(lambda: len(engine.requests) == 5)
        go_on.set()
        await asyncio.gather(*tasks)


async def test_a_backend_that_refuses_connections_is_one_to_try(start_router: Start) -> None:
    models = [{"name": "m", "backends": [f"http://127.0.0.1:{free_port()}"], **HELD}]
    served: Served = await start_router(models=models)

    async with quiet(served):
        answers = [await served.chat() for _ in range(5)]

    assert [error(answer)[:2] for answer in answers] == [(503, "no_backend_available")] * 5
    assert await served.metric("inference_api_queue_wait_seconds_count", kind="hold") == 0


async def test_overload_is_not_held(start_engine: Start, start_router: Start) -> None:
    paced = Paced()
    served: Served = await start_router(await start_engine(paced), entry={**HELD, "max_in_flight": 1})

    async with quiet(served):
        first = asking(served)
        await paced.arrived(1)
        refused = await served.chat()
        paced.answer(0)
        await first

    assert error(refused)[:2] == (503, "overloaded")


async def test_one_that_waits_for_a_place_is_held_if_the_backends_go(start_engine: Start, start_router: Start) -> None:
    paced = Paced()
    entry = {**HELD, "max_in_flight": 1, "queue": {"timeout": 20, "size": 4}}
    engine: FakeEngine = await start_engine(paced)
    sleeper = Sleeper(engine)
    served: Served = await start_router(engine, entry=entry, health_interval=0.1)

    first = asking(served)
    await paced.arrived(1)
    second = asking(served)
    await waiting(served, 1)
    sleeper.is_awake = False
    await says(served, asleep=True)
    paced.answer(0)
    await waiting(served, 1, "hold")
    sleeper.is_awake = True
    await paced.arrived(2)
    paced.answer(1)
    answers = await asyncio.gather(first, second)

    assert [answer.status_code for answer in answers] == [200, 200]
    await until(lambda: len(served.lines) == 2)
    waits = [await served.metric("inference_api_queue_wait_seconds_sum", kind=kind) for kind in ("queue", "hold")]
    # Both together
    assert served.lines[1]["queued_ms"] == pytest.approx(sum(waits) * 1000, abs=0.1)


# Bounds


async def test_after_its_time_a_request_is_refused(start_router: Start) -> None:
    served: Served = await start_router(entry={"hold": 0.3})

    async with quiet(served):
        late = await served.chat()

    text = "The model 'm' is starting; no backend was ready within 0.3 s."
    assert error(late) == (503, "model_loading", text, "10")
    assert await served.metric("inference_api_rejected_requests_total", model_name="m", reason="hold_timeout") == 1
    [line] = served.lines
    assert (line["code"], line["outcome"], line["attempts"]) == ("model_loading", "no_backend", 0)
    assert line["queued_ms"] >= 290


async def test_its_own_deadline_ends_the_wait(start_router: Start) -> None:
    served: Served = await start_router(entry={**HELD, "timeouts": {"total": 0.3}})

    late = await served.chat()

    _, code, message, _ = error(late)
    assert code == "model_loading"
    # A part of it may have gone before.
    (seconds,) = map(
        float, re.findall(r"^The model 'm' is starting; no backend was ready within ([0-9.]+) s\.$", message)
    )
    assert 0 < seconds <= 0.3


async def test_a_hundred_are_held(start_router: Start) -> None:
    served: Served = await start_router(entry=HELD)

    everybody = httpx.AsyncClient(base_url=served.url, limits=httpx.Limits(), timeout=60, trust_env=False)
    async with quiet(served), everybody as client:
        tasks = [asyncio.create_task(client.post(URL, json={"model": "m", "messages": []})) for _ in range(100)]
        await waiting(served, 100, "hold")
        refused = await served.chat()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    assert error(refused)[1:] == ("model_loading", "The model 'm' is starting, and no more requests can wait.", "10")
    assert await served.metric("inference_api_rejected_requests_total", model_name="m", reason="hold_full") == 1


async def test_beyond_the_limit_of_the_process_nothing_is_held(start_router: Start) -> None:
    served: Served = await start_router(entry=HELD, max_in_flight=1)

    async with quiet(served):
        async with raw_client(served.port) as first, raw_client(served.port) as second:
            await first.send(post(URL, {"model": "m", "messages": []}))
            await waiting(served, 1, "hold")
            await second.send(post(URL, {"model": "m", "messages": []}))
            refused = await asyncio.wait_for(read_answer(second.reader), 10)
        await waiting(served, 0, "hold")

    assert orjson.loads(refused.body)["error"]["code"] == "overloaded"


async def test_their_bodies_are_within_the_bytes_of_the_process(
    tmp_path: Path, start_engine: Start, start_router: Start
) -> None:
    engine: FakeEngine = await start_engine()
    served: Served = await start_router(entry=HELD, max_buffered_bytes=3000, max_body_bytes=3000)

    async with quiet(served):
        # Not "x" * 2000 at once: those of a body that comes in pieces count while it comes.
        tasks = [asking(served, "x" * 900)]
        await waiting(served, 1, "hold")
        held = served.router.core.admission.buffered
        tasks.append(asking(served, "x" * 100))
        await waiting(served, 2, "hold")
        refused = await asking(served, "x" * 2000)
        await scale(served, tmp_path, engine)
        answers = await asyncio.gather(*tasks)

    assert held > 900
    assert [answer.status_code for answer in answers] == [200, 200]
    assert refused.status_code == 503
    assert served.router.core.admission.buffered == 0


async def test_a_refusal_gives_all_limits_back(tmp_path: Path, start_router: Start) -> None:
    ana = {"limits": [{"requests": 1, "per": 3600}, {"tokens": 5000, "per": 3600}, {"streams": 1}]}
    served: Served = await start_router(entry={"hold": 0.1}, **callers(tmp_path, ana=ana))

    async with quiet(served):
        answers = [await asking(served, key="ana", stream=True) for _ in range(3)]

    assert [error(answer)[:2] for answer in answers] == [(503, "model_loading")] * 3


# Ends


async def test_a_client_that_leaves_is_not_held_any_more(start_router: Start) -> None:
    served: Served = await start_router(entry=HELD)

    async with quiet(served):
        async with raw_client(served.port) as client:
            await client.send(post(URL, {"model": "m", "messages": []}))
            await waiting(served, 1, "hold")
        await waiting(served, 0, "hold")
        await until(lambda: served.lines)

    [line] = served.lines
    assert (line["status"], line["outcome"], line["attempts"]) == (499, "client_gone", 0)
    assert served.router.core.fleet.models["m"].waiting == ()


async def test_in_a_drain_nothing_is_held(start_router: Start) -> None:
    served: Served = await start_router(entry=HELD)

    async with quiet(served):
        held = asking(served)
        await waiting(served, 1, "hold")
        served.router.drain()
        answers = [await held, await served.chat()]

    assert [error(answer)[:2] for answer in answers] == [(503, "shutting_down")] * 2
    assert "queued_ms" in served.lines[0]


@pytest.mark.parametrize("dies", ["before", "after"])
async def test_an_engine_that_dies_lets_the_next_go_on(
    dies: str, tmp_path: Path, start_engine: Start, start_router: Start
) -> None:
    async def script(request: Received, line: Line) -> None:
        if dies == "after":
            await line.send(SSE_HEAD, chunk(event()))
        line.reset()

    engine: FakeEngine = await start_engine(script)
    served: Served = await start_router(entry=HELD, retry_budget=0)

    async with quiet(served):
        tasks = [asking(served, stream=True) for _ in range(5)]
        await waiting(served, 5, "hold")
        await scale(served, tmp_path, engine)
        await asyncio.gather(*tasks, return_exceptions=True)
        await until(lambda: len(served.lines) == 5)

    assert depth(served, "hold") == 0


@pytest.mark.parametrize("models", [[], [{"name": "m"}]], ids=["without the model", "without hold"])
async def test_a_catalogue_without_them_ends_the_wait(
    models: list[dict[str, Any]], tmp_path: Path, start_router: Start
) -> None:
    served: Served = await start_router(entry=HELD)

    async with quiet(served):
        held = asking(served)
        await waiting(served, 1, "hold")
        model = served.router.core.fleet.models["m"]
        path = tmp_path / "catalogue.json"
        path.write_bytes(orjson.dumps({"models": [*models, {"name": "other"}]}))
        served.router.core.registry.replace_static(load_catalogue(path, ENTRY))
        answer = await held

    assert error(answer)[:2] == (503, "no_backend_available")
    assert (model.waiting, depth(served, "hold")) == ((), 0)


@pytest.mark.parametrize("hold", [0, -1, 3601, "20"])
def test_an_entry_with_another_time_is_refused(hold: Any) -> None:
    [problem] = parse_catalogue({"models": [{"name": "m", "hold": hold}]}, ENTRY).problems

    assert problem.startswith("model 'm': hold")


@pytest.mark.parametrize(("entry", "warned"), [({"hold": 90}, True), ({"hold": 30}, False), ({}, False)])
async def test_a_hold_that_no_request_can_wait_for_is_warned_of(
    entry: dict[str, Any], warned: bool, start_router: Start
) -> None:
    served: Served = await start_router(entry={**entry, "timeouts": {"total": 60}})
    check = served.router.features["hold"].check
    assert check is not None

    text = "model 'm': its hold of 90 s is longer than 60 s, after which a request ends"
    assert list(check()) == ([text] if warned else [])


# The control plane


class FakeControlPlane(ScriptedServer):
    """A registry of one model that is asked to start it; `status` is its answer. `asked`: bodies, by path."""

    def __init__(self) -> None:
        super().__init__(self._answer)
        self.status = "202 Accepted"
        self.activations: list[tuple[str, Any]] = []
        self.models: list[dict[str, Any]] = [{"name": "org/m:1", **HELD}]

    async def _answer(self, request: Received, line: Line) -> None:
        if request.method == "POST":
            assert request.header("authorization") == "Bearer s3cret"
            self.activations.append((request.target, orjson.loads(request.body)))
            await line.send(json_response({"model": "m", "state": "starting"}, self.status))
        else:
            await line.send(json_response({"models": self.models}))


@pytest.fixture
async def control_plane() -> Any:
    async with FakeControlPlane() as made:
        yield made


async def test_the_control_plane_is_asked_to_start_the_model(
    control_plane: FakeControlPlane, start_router: Start
) -> None:
    served: Served = await start_router(registry_url=control_plane.url, registry_token="s3cret")

    held = asking(served, model="org/m:1")
    await until(lambda: control_plane.activations)
    held.cancel()
    await asyncio.gather(held, return_exceptions=True)

    [(path, body)] = control_plane.activations
    assert path == "/activations/org/m:1"
    assert body == {"router": served.router.core.instance, "reason": "hold", "waiting": 1}
    labels = {"model_name": "org/m:1", "result": "ok"}
    assert await served.metric("inference_api_activations_total", **labels) == 1


@pytest.fixture
def fleet() -> Fleet:
    made = Fleet(make_balancer)
    made.update(parse_catalogue({"models": [{"name": "m", **HELD}]}, ENTRY))
    return made


def counts(activations: Activations) -> dict[str, float]:
    return {labels[1]: value for family in activations.collect() for labels, value in family.series}  # type: ignore[misc]


@pytest.mark.parametrize(
    "status", ["404 Not Found", "405 Method Not Allowed", "409 Conflict", "500 Internal Server Error"]
)
async def test_an_answer_that_does_not_help_changes_nothing_and_is_logged_once(
    status: str, control_plane: FakeControlPlane, fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    control_plane.status = status
    headers = {"authorization": "Bearer s3cret"}
    async with httpx.AsyncClient(base_url=control_plane.url, headers=headers, trust_env=False) as client:
        activations = Activations(client, fleet, "router-8000", every=0.01)
        activations.start("m", lambda: 3)
        await until(lambda: len(control_plane.activations) >= 3)
        activations.stop("m")

    assert counts(activations)["error"] >= 2
    assert [record.getMessage() for record in caplog.records if "control plane" in record.getMessage()] == [
        "the control plane does not start a model that is asked for"
    ]


async def test_a_control_plane_that_is_away_is_asked_again(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{free_port()}", trust_env=False) as client:
        activations = Activations(client, fleet, "router-8000", every=0.01)
        activations.start("m", lambda: 3)
        await until(lambda: counts(activations).get("error", 0) >= 3)
        activations.stop("m")

    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1


async def test_requests_that_come_and_go_ask_no_oftener(control_plane: FakeControlPlane, fleet: Fleet) -> None:
    headers = {"authorization": "Bearer s3cret"}
    async with httpx.AsyncClient(base_url=control_plane.url, headers=headers, trust_env=False) as client:
        activations = Activations(client, fleet, "router-8000", every=3600)
        for _ in range(5):
            activations.start("m", lambda: 1)
            activations.start("m", lambda: 1)
            await until(lambda: control_plane.activations)
            await asyncio.sleep(0)
            activations.stop("m")

    assert len(control_plane.activations) == 1


# The room alone


@pytest.fixture
def room() -> Iterator[Room]:
    [entry] = parse_catalogue({"models": [{"name": "m", **HELD, "backends": ["http://127.0.0.1:1"]}]}, ENTRY).values()
    made = Fleet(make_balancer)
    made.update({"m": entry})
    model = made.models["m"]
    backends, model.available = model.available, ()
    room = Room(model, bool)
    yield room
    model.available = backends


async def test_one_that_leaves_as_it_is_let_out_counts_no_more(room: Room) -> None:
    leaves = asyncio.create_task(room.wait(20))
    others = [asyncio.create_task(room.wait(20)) for _ in range(2)]
    await asyncio.sleep(0)
    room.model.refresh()
    assert room.out == 2

    leaves.cancel()
    await asyncio.gather(leaves, return_exceptions=True)
    assert await asyncio.gather(*others) == ["on", "on"]

    assert (room.out, len(room.waiting)) == (2, 0)


async def test_after_its_time_one_goes_on_if_there_is_a_backend(room: Room) -> None:
    """Those before it take long: it is not refused for want of a backend."""
    first = [asyncio.create_task(room.wait(20)) for _ in range(2)]
    last = asyncio.create_task(room.wait(0.05))
    await asyncio.sleep(0)
    room.model.refresh()

    assert await last == "on"
    assert (room.out, len(room.waiting)) == (3, 0)
    await asyncio.gather(*first)
