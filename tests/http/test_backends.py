"""GET /backends, and `inference-api status`, which shows it: a real router before engines that are well and not."""

import time
from collections.abc import Callable
from typing import Any

import httpx
import orjson
import pytest

from inference_api.commands.status import age
from inference_api.routing.backend import Backend
from inference_api.routing.breaker import Circuit
from inference_api.routing.standing import standing
from tests.conftest import Served
from tests.fakes import FakeEngine, json_response, raw, until
from tests.ports import free_port
from tests.test_commands import run

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]


async def cards(served: Served) -> dict[str, Any]:
    answer = await served.client.get("/backends")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    return {card["backend"]: card for card in answer.json()["data"]}


def place(engine: FakeEngine) -> str:
    return engine.url.removeprefix("http://")


async def refused(served: Served, times: int) -> httpx.Response:
    answers = [await served.chat() for _ in range(times)]
    return answers[-1]


async def test_a_backend_that_is_well_is_ready(start_engine: Start, start_router: Start) -> None:
    engine = await start_engine()
    served = await start_router(engine)
    await served.chat()

    assert await cards(served) == {
        place(engine): {"model": "m", "backend": place(engine), "state": "ready", "in_flight": 0, "circuit": "closed"}
    }


async def test_a_backend_that_refuses_connections_is_told_with_time_and_reason(start_router: Start) -> None:
    dead = f"127.0.0.1:{free_port()}"
    served: Served = await start_router(
        models=[{"name": "m", "backends": [f"http://{dead}"]}], breaker_failures=2, health_interval=3600
    )
    before = int(time.time() * 1000)
    answer = await refused(served, 3)

    [card] = (await cards(served)).values()
    assert (card["state"], card["circuit"], card["reason"]) == ("open", "open", "connect_failed")
    assert before <= card["since"] <= int(time.time() * 1000) + 50
    assert before < card["retry_at"]
    assert card["last_error"]["outcome"] == "connect_failed"
    assert before <= card["last_error"]["at"] <= int(time.time() * 1000) + 50
    # A client with two retries is not kept for longer than two seconds.
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")


async def test_a_backend_whose_circuit_is_half_open_waits_for_a_request(
    start_engine: Start, start_router: Start
) -> None:
    dead = f"127.0.0.1:{free_port()}"
    served: Served = await start_router(
        models=[{"name": "m", "backends": [f"http://{dead}", (await start_engine()).url], "balancing": "round_robin"}],
        breaker_failures=1,
        breaker_cooldown=0.001,
        health_interval=3600,
    )
    await refused(served, 2)

    card = (await cards(served))[dead]
    assert (card["state"], card["circuit"]) == ("half_open", "half_open")
    assert card["reason"] == "connect_failed; the next request tries it"


async def test_a_backend_that_is_not_out_yet_is_ready_with_a_reason(start_router: Start) -> None:
    served: Served = await start_router(models=[{"name": "m", "backends": [f"http://127.0.0.1:{free_port()}"]}])
    [origin] = served.router.core.fleet.origins.values()
    await until(lambda: origin.cause)

    [card] = (await cards(served)).values()
    assert (card["state"], card["reason"]) == ("ready", "health check: connection refused")


async def test_a_backend_whose_last_request_failed_is_ready_with_its_outcome(start_router: Start) -> None:
    models = [{"name": "m", "backends": [f"http://127.0.0.1:{free_port()}"]}]
    served: Served = await start_router(models=models, health_interval=60)
    await served.chat()

    [card] = (await cards(served)).values()
    assert (card["state"], card["reason"]) == ("ready", "connect_failed")


async def test_a_backend_that_fails_its_health_checks_is_told_with_the_cause(
    start_engine: Start, start_router: Start, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    engine = await start_engine()
    engine.page = raw(json_response({}, "500 Internal Server Error"))
    served: Served = await start_router(engine, await start_engine(), health_interval=0.02)
    origin = next(origin for url, origin in served.router.core.fleet.origins.items() if url == engine.url)
    await until(lambda: not origin.healthy)

    card = (await cards(served))[place(engine)]
    assert (card["state"], card["reason"]) == ("unhealthy", "health check: status 500")

    engine.page = raw(json_response({}))
    await until(lambda: origin.healthy)
    card = (await cards(served))[place(engine)]
    assert (card["state"], card["reason"]) == ("recovering", "slow start")
    told = [record for record in caplog.records if record.message.startswith("a backend can")]
    assert [record.message for record in told] == ["a backend cannot be reached", "a backend can be reached again"]
    assert told[0].fields["cause"] == "status 500"  # type: ignore[attr-defined]


async def test_a_backend_that_has_passed_one_health_check_says_that_two_are_needed(
    start_engine: Start, start_router: Start
) -> None:
    served: Served = await start_router(await start_engine(), health_interval=60)
    [origin] = served.router.core.fleet.origins.values()
    await until(lambda: origin.streak == 1)
    origin.healthy = False

    [card] = (await cards(served)).values()
    assert (card["state"], card["reason"]) == ("unhealthy", "health check: one has passed, two must")


async def test_a_backend_that_sent_retry_after_rests(start_engine: Start, start_router: Start) -> None:
    engine = await start_engine(raw(json_response({}, "503 Service Unavailable", b"retry-after: 9\r\n")))
    served: Served = await start_router(engine)
    await served.chat()

    [card] = (await cards(served)).values()
    assert (card["state"], card["reason"]) == ("resting", "it sent Retry-After")
    assert 0 < card["retry_at"] - time.time() * 1000 < 9500


class Closing(Circuit):
    """Closes on another thread, right after it was looked at."""

    looks = 0

    @property
    def opened(self) -> float | None:
        self.looks += 1
        return 1.0 if self.looks == 1 else None

    @opened.setter
    def opened(self, moment: float | None) -> None: ...


def test_a_circuit_that_closes_meanwhile_is_told_as_it_was() -> None:
    backend = Backend("m", "http://10.0.0.1:8000")
    backend.circuit = Closing()

    assert standing(backend, 2.0).circuit == "half_open"


async def test_backends_are_on_the_ops_port_alone_where_there_is_one(start_engine: Start, start_router: Start) -> None:
    served: Served = await start_router(await start_engine(), ops_port=free_port())

    assert (await served.client.get("/backends")).status_code == 404
    transport = httpx.ASGITransport(served.router.ops)
    async with httpx.AsyncClient(transport=transport, base_url="http://ops") as ops:
        assert [card["state"] for card in (await ops.get("/backends")).json()["data"]] == ["ready"]


async def test_status_is_a_table_of_them(start_engine: Start, start_router: Start) -> None:
    engine, dead = await start_engine(), f"127.0.0.1:{free_port()}"
    models = [{"name": "m", "backends": [f"http://{dead}"]}, {"name": "n", "backends": [engine.url]}]
    served: Served = await start_router(models=models, breaker_failures=1, health_interval=3600)
    await served.chat()

    code, out, err = await run("status", "--url", served.url)

    assert (code, err) == (1, [])
    assert out[0].split() == ["MODEL", "BACKEND", "STATE", "SINCE", "IN", "FLIGHT", "REASON"]
    assert out[1].split()[:3] == ["m", dead, "open"]
    assert out[1].split()[4:] == ["s", "0", "connect_failed"]
    assert out[2].split() == ["n", place(engine), "ready", "-", "0", "-"]

    code, out, _ = await run("status", "--json", "--url", served.url)
    assert code == 1
    assert [card["state"] for card in orjson.loads(out[0])["data"]] == ["open", "ready"]


async def test_status_is_exit_code_0_if_all_are_ready(start_engine: Start, start_router: Start) -> None:
    served: Served = await start_router(await start_engine())

    assert (await run("status", "--url", served.url))[0] == 0


async def test_status_of_what_is_no_router_is_exit_code_3(start: Start) -> None:
    other = await start(raw(json_response({"hello": "world"})))

    code, _, err = await run("status", "--url", other.url)

    assert code == 3
    assert err == [f"inference-api: {other.url}/backends: its answer is not that of an inference-api"]


async def test_a_model_without_backends_says_so(start_router: Start) -> None:
    served: Served = await start_router(models=[{"name": "m"}])
    answer = await served.chat()

    assert (answer.status_code, answer.json()["error"]["message"]) == (503, "The model 'm' has no backends.")
    assert (await cards(served)) == {}


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(-1, "0 s"), (42.9, "42 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (200_000, "2 d")],
)
def test_an_age_is_in_its_largest_unit(seconds: float, shown: str) -> None:
    assert age(seconds) == shown
