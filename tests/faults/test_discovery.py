"""Backends that come, go, move and come back behind their name, on real sockets: nothing is lost or miscounted."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import suppress
from typing import Any

import httpx
import pytest

from inference_api.routing.backend import Backend
from tests.conftest import Served
from tests.fakes import (
    DONE,
    LAST_CHUNK,
    SSE_HEAD,
    STREAM,
    FakeEngine,
    Line,
    Received,
    ScriptedServer,
    answer,
    chunk,
    event,
    hang,
    json_response,
    raw,
    until,
)
from tests.faults.lab import Pods

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]


class Records:
    """The A records of one name, as the test says; `down` makes every look-up fail."""

    def __init__(self) -> None:
        self.addresses: list[str] = []
        self.down = False

    async def __call__(self, host: str) -> Collection[str]:
        if self.down:
            raise OSError("the name server is down")
        return self.addresses


async def serve(start_router: Start, engines: list[FakeEngine], records: Records, **more: Any) -> Served:
    """A router whose model `m` is the name pods.test; `records` begins with all engines."""
    records.addresses = records.addresses or [engine.host for engine in engines]
    backend = {"url": f"http://pods.test:{engines[0].port}", "discovery": "dns"}
    more = {"discovery_interval": 3600.0, "upstream_keepalive": 60.0} | more
    served: Served = await start_router(
        models=[{"name": "m", "backends": [backend], **more.pop("entry", {})}], resolve=records, **more
    )
    return served


async def change(served: Served, records: Records, *engines: FakeEngine) -> None:
    records.addresses = [engine.host for engine in engines]
    await served.router.core.discovery.poll()


def labels(served: Served) -> list[str]:
    return [backend.label for backend in served.router.core.fleet.models["m"].backends]


class Gate:
    """A script that streams two events, and the rest when it is opened."""

    def __init__(self) -> None:
        self.opened = asyncio.Event()

    async def __call__(self, request: Received, line: Line) -> None:
        await line.send(SSE_HEAD, chunk(event("one")), chunk(event("two")))
        await self.opened.wait()
        await line.send(chunk(event("three") + DONE) + LAST_CHUNK)


async def read_to(body: AsyncIterator[bytes], mark: bytes) -> bytes:
    """Read on until what came holds `mark`."""
    seen = b""
    while mark not in seen:
        seen += await anext(body)
    return seen


async def test_t54_a_record_that_is_removed_is_not_used_any_more(pods: Pods, start_router: Start) -> None:
    engines, records = await pods(3), Records()
    served = await serve(start_router, engines, records, entry={"balancing": "round_robin"})
    for _ in range(6):
        assert (await served.chat()).status_code == 200
    assert [len(engine.requests) for engine in engines] == [2, 2, 2]
    page = (await served.client.get("/metrics")).text
    assert all(f'backend="{engine.host}:{engine.port}"' in page for engine in engines)

    gone, *stay = engines
    await change(served, records, *stay)
    # Its idle connections are closed at once, though the pod is still there and would answer.
    await until(lambda: gone.open == 0)
    for _ in range(10):
        assert (await served.chat()).status_code == 200

    assert [len(engine.requests) for engine in engines] == [2, 7, 7]
    assert f'backend="{gone.host}:' not in (await served.client.get("/metrics")).text
    assert {request.header("host") for engine in engines for request in engine.requests} == {f"pods.test:{gone.port}"}


async def test_t54_it_is_found_without_a_request_within_an_interval(pods: Pods, start_router: Start) -> None:
    engines, records = await pods(2), Records()
    served = await serve(start_router, engines, records, discovery_interval=0.05)
    records.addresses = [engines[1].host]

    await until(lambda: labels(served) == [f"127.0.0.3:{engines[1].port}"])


async def test_t54_a_name_that_the_registry_adds_is_looked_up_at_once(pods: Pods, start_router: Start) -> None:
    engines, records = await pods(2), Records()
    records.addresses = [engine.host for engine in engines]
    backend = {"url": f"http://pods.test:{engines[0].port}", "discovery": "dns"}
    async with ScriptedServer(answer) as registry:
        registry.script = raw(json_response({"models": [{"name": "m", "backends": [{"url": "http://10.9.9.9"}]}]}))
        settings: dict[str, Any] = {"registry_url": registry.url, "registry_refresh": 3600, "discovery_interval": 3600}
        served = await start_router(models=[], resolve=records, **settings)
        registry.script = raw(json_response({"models": [{"name": "m", "backends": [backend]}]}))
        await served.router.core.registry.refresh()

        await until(lambda: len(labels(served)) == 2)
        assert (await served.chat()).status_code == 200


async def test_t54_a_name_server_that_is_down_hides_nothing_for_ever(pods: Pods, start_router: Start) -> None:
    """What left while nobody could tell is gone with the first answer after that."""
    engines, records = await pods(2), Records()
    served = await serve(start_router, engines, records)
    records.down = True
    for _ in range(3):
        await served.router.core.discovery.poll()
    assert len(labels(served)) == 2
    # The pod is gone already; its address is tried, and the request goes to the other one.
    await engines[0].stop()
    for _ in range(6):
        assert (await served.chat()).status_code == 200
    assert await served.metric("inference_api_discovery_failures_total", reason="error") == 3
    assert (await served.client.get("/readyz")).status_code == 200

    records.down = False
    await change(served, records, engines[1])
    assert labels(served) == [f"127.0.0.3:{engines[1].port}"]


@pytest.mark.parametrize("address", ["169.254.169.254", "::ffff:169.254.169.254", "fd00:ec2::254", "0.0.0.0"])
async def test_t57_a_name_that_is_bound_to_a_forbidden_address_later_leads_nowhere(
    pods: Pods, start_router: Start, address: str, caplog: pytest.LogCaptureFixture
) -> None:
    [engine], records = await pods(1), Records()
    served = await serve(start_router, [engine], records)
    records.addresses = [address]
    await served.router.core.discovery.poll()
    assert (await served.chat()).status_code == 200
    assert sum("is refused" in message or "are refused" in message for message in caplog.messages) == 1

    # Beside a good one it is left out.
    records.addresses = [address, engine.host]
    await served.router.core.discovery.poll()
    assert labels(served) == [f"127.0.0.2:{engine.port}"]
    assert address not in repr(served.router.core.transport)


async def test_t57_the_connection_goes_to_the_address_that_was_checked(pods: Pods, start_router: Start) -> None:
    """Only one look-up is ever made: there is no second one to which a name server could say something else."""
    [engine], asked = await pods(1), []

    async def rebinding(host: str) -> list[str]:
        asked.append(host)
        return [engine.host] if len(asked) == 1 else ["169.254.169.254"]

    backend = {"url": f"http://evil.test:{engine.port}", "discovery": "dns"}
    served = await start_router(
        models=[{"name": "m", "backends": [backend]}], resolve=rebinding, discovery_interval=3600
    )
    for _ in range(5):
        # Each on a connection of its own.
        engine.script = close_after
        assert (await served.chat()).status_code == 200

    assert asked == ["evil.test"]
    assert engine.connections >= 5


async def close_after(request: Received, line: Line) -> None:
    await answer(request, line)
    line.close()


async def test_t58_nothing_is_miscounted_however_backends_come_and_go(pods: Pods, start_router: Start) -> None:
    """Requests that end well, fail, hang and are left, while the records change all the time: every count ends at 0."""
    rand = random.Random(58)

    async def moody(request: Received, line: Line) -> None:
        mood = rand.random()
        if mood < 0.6:
            await asyncio.sleep(rand.random() * 0.05)
            await answer(request, line)
        elif mood < 0.7:
            line.reset()
        elif mood < 0.8:
            await line.send(SSE_HEAD, chunk(event()))
            line.reset()
        elif mood < 0.9:
            await line.send(b"HTTP/1.1 500 No\r\ncontent-length: 2\r\n\r\n{}")
        else:
            await hang(request, line)

    engines, records = await pods(4, moody), Records()
    served = await serve(
        start_router, engines, records, first_byte_timeout=0.3, idle_timeout=0.3, upstream_keepalive=0.2
    )
    model = served.router.core.fleet.models["m"]
    seen: set[Backend] = set()

    async def churn() -> None:
        while True:
            await change(served, records, *rand.sample(engines, rand.randint(1, 4)))
            seen.update(model.backends)
            assert all(backend.in_flight >= 0 for backend in seen)
            # One backend has one count, also when it has left with requests and come back.
            busy = [backend.label for backend in seen if backend.in_flight]
            assert len(busy) == len(set(busy))
            await asyncio.sleep(0.01)

    async def client() -> None:
        for _ in range(12):
            body = STREAM | {"stream": rand.random() < 0.5}
            with suppress(httpx.TransportError, TimeoutError):
                async with asyncio.timeout(rand.choice([0.02, 1.0, 5.0])):
                    await served.client.post("/v1/chat/completions", json=body)

    churning = asyncio.create_task(churn())
    await asyncio.gather(*(client() for _ in range(20)))
    assert not churning.done()
    churning.cancel()

    await until(lambda: len(served.lines) >= 1 and model.in_flight == 0, seconds=10)
    await until(lambda: all(backend.in_flight == 0 for backend in seen), seconds=10)
    assert served.router.core.admission.in_flight == 0
    await until(lambda: not any(engine.busy for engine in engines))
    outcomes = {line["outcome"] for line in served.lines}
    assert {"ok", "client_gone", "upstream_5xx"} <= outcomes


@pytest.mark.parametrize("balancing", ["two_choices", "least_in_flight", "round_robin"])
async def test_t59_eight_simultaneous_requests_on_two_idle_backends_split_evenly(
    pods: Pods, start_router: Start, balancing: str
) -> None:
    gate, records = Gate(), Records()
    engines = await pods(2, gate)
    served = await serve(start_router, engines, records, entry={"balancing": balancing})
    asking = [asyncio.create_task(served.chat(stream=True)) for _ in range(8)]
    await until(lambda: sum(len(engine.requests) for engine in engines) == 8)
    gate.opened.set()
    await asyncio.gather(*asking)

    assert [len(engine.requests) for engine in engines] == [4, 4]


async def test_t59_a_key_whose_home_is_dead_is_answered_by_another(pods: Pods, start_router: Start) -> None:
    engines, records = await pods(3), Records()
    served = await serve(start_router, engines, records, entry={"balancing": "prefix_affinity"})
    for _ in range(3):
        await served.chat()
    [home] = [engine for engine in engines if engine.requests]
    assert len(home.requests) == 3
    await home.stop()

    answers = [await served.chat() for _ in range(3)]

    assert [response.status_code for response in answers] == [200] * 3
    # The key's second home, the same one each time.
    assert sorted(len(engine.requests) for engine in engines) == [0, 3, 3]


async def test_t60_an_address_that_moves_takes_new_requests_and_keeps_old_streams(
    pods: Pods, start_router: Start
) -> None:
    gate, records = Gate(), Records()
    old, new = await pods(2)
    old.script = gate
    records.addresses = [old.host]
    served = await serve(start_router, [old, new], records, discovery_interval=0.05, upstream_keepalive=0.2)
    async with served.client.stream("POST", "/v1/chat/completions", json=STREAM) as response:
        body = response.aiter_raw()
        seen = await read_to(body, b"two")
        # The name now means the other pod; the router finds out by itself.
        records.addresses = [new.host]
        await until(lambda: labels(served) == [f"127.0.0.3:{new.port}"])
        for _ in range(3):
            assert (await served.chat()).status_code == 200
        assert (len(old.requests), len(new.requests)) == (1, 3)
        assert old.busy == 1

        gate.opened.set()
        seen += b"".join([data async for data in body])

    assert seen == event("one") + event("two") + event("three") + DONE
    # And then it is closed, without a request that would notice.
    await until(lambda: old.open == 0)
    await until(lambda: len(served.lines) == 4)
    assert {line["outcome"] for line in served.lines} == {"ok"}
    assert [line["backend"] for line in served.lines][-1] == f"127.0.0.2:{old.port}"


async def test_t60_a_backend_that_is_removed_and_added_again_mid_stream_is_not_taken_for_idle(
    pods: Pods, start_router: Start
) -> None:
    gate, records = Gate(), Records()
    engines = await pods(2, gate)
    # The connections of its first life are of no use to its second, and are closed by their age.
    served = await serve(start_router, engines, records, upstream_keepalive=0.2)
    asking = [asyncio.create_task(served.chat(stream=True)) for _ in range(4)]
    await until(lambda: sum(len(engine.requests) for engine in engines) == 4)
    await change(served, records, engines[1])
    await change(served, records, *engines)
    model = served.router.core.fleet.models["m"]
    assert [backend.in_flight for backend in model.backends] == [2, 2]

    gate.opened.set()
    assert {response.status_code for response in await asyncio.gather(*asking)} == {200}
    await until(lambda: [backend.in_flight for backend in model.backends] == [0, 0])
