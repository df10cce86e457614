"""LOAD_SIGNAL_INTERVAL: requests go where the engines themselves say that there is least to do."""

from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from inference_api.app import GROUPS
from inference_api.features.engine_load import balancers
from inference_api.routing.backend import Backend
from inference_api.routing.balance import BALANCERS
from inference_api.routing.balancer import Balancer
from inference_api.settings import make_settings
from tests.fakes import FakeEngine, Script, raw, until

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]


def page(running: float, waiting: float) -> Script:
    """What /metrics of a vLLM says; the list of its models comes with it, which nobody reads here."""
    text = f"vllm:num_requests_running {running}\nvllm:num_requests_waiting {waiting}\n".encode()
    return raw(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(text) + text)


def backends_of(*loads: tuple[float, int, float]) -> tuple[Backend, ...]:
    """Weight, in flight, reported."""
    backends = []
    for number, (weight, in_flight, reported) in enumerate(loads):
        backend = Backend("m", f"http://r{number}", weight)
        backend.origin.in_flight, backend.origin.reported = in_flight, reported
        backends.append(backend)
    return tuple(backends)


def balancer(name: str, reported: bool) -> Balancer[Backend]:
    known = {**BALANCERS, **balancers(make_settings({"load_signal_interval": 1.0 if reported else 0.0}, GROUPS))}
    return known[name](Random(1).random)


def shares(name: Any, backends: tuple[Backend, ...], reported: bool) -> list[int]:
    chooser = balancer(name, reported)
    chosen = [chooser.choose(backends, "") for _ in range(300)]
    return [chosen.count(backend) for backend in backends]


@pytest.mark.parametrize("name", ["two_choices", "least_in_flight"])
def test_what_others_have_put_there_counts_where_it_is_asked_for(name: Any) -> None:
    backends = backends_of((1, 1, 5), (1, 2, 0))

    assert shares(name, backends, reported=False) == [300, 0]
    assert shares(name, backends, reported=True) == [0, 300]


@pytest.mark.parametrize("name", ["two_choices", "least_in_flight"])
def test_it_counts_by_weight(name: Any) -> None:
    assert shares(name, backends_of((4, 1, 5), (1, 2, 0)), reported=True)[1] == 0
    assert shares(name, backends_of((1, 1, 5), (4, 2, 0)), reported=True)[0] == 0


def test_of_two_choices_it_is_the_one_that_would_be_less_loaded_with_the_request() -> None:
    """2 / 1 and 7 / 4, though it has 1 / 1 and 6 / 4 now; 1 / 1 and 1 / 4."""
    assert shares("two_choices", backends_of((1, 1, 0), (4, 6, 0)), reported=True) == [0, 300]
    assert shares("two_choices", backends_of((1, 0, 0), (4, 0, 0)), reported=True) == [0, 300]


@pytest.mark.parametrize("name", ["two_choices", "least_in_flight"])
def test_without_a_reading_it_is_as_if_nobody_asked(name: Any) -> None:
    backends = backends_of((1, 2, 0), (1, 1, 0), (1, 3, 0))

    plain, asked = (shares(name, backends, reported) for reported in (False, True))
    # The busiest of three is never the less loaded of two.
    assert plain[2] == asked[2] == 0
    assert sum(plain) == sum(asked) == 300


@pytest.mark.parametrize("name", ["round_robin", "prefix_affinity"])
def test_policies_that_go_by_something_else_stay_as_they_are(name: Any) -> None:
    assert type(balancer(name, reported=True)) is type(balancer(name, reported=False))


@pytest.mark.parametrize("name", ["two_choices", "least_in_flight"])
def test_a_repetition_goes_by_it_too(name: Any) -> None:
    backends = backends_of((1, 0, 0), (1, 0, 9), (1, 1, 0))
    chooser = balancer(name, reported=True)

    assert {chooser.choose(backends, "", [backends[0]]) for _ in range(50)} == {backends[2]}


async def test_a_router_that_asks_shows_what_it_learned_and_goes_by_it(
    start_engine: Start, start_router: Start
) -> None:
    first, second = engines = [await start_engine() for _ in range(2)]
    first.page, second.page = page(8, 1), page(0, 0)
    served = await start_router(*engines, load_signal_interval=0.5)
    one, two = served.router.core.fleet.models["m"].backends
    await until(lambda: one.origin.reading and two.origin.reading)
    for _ in range(10):
        assert (await served.chat()).status_code == 200

    assert (len(first.requests), len(second.requests)) == (0, 10)
    labels = {"model_name": "m", "backend": one.label}
    assert await served.metric("inference_api_backend_running_requests", **labels) == 8
    assert await served.metric("inference_api_backend_queue_depth", **labels) == 1
    assert await served.metric("inference_api_backend_last_scrape_timestamp_seconds", **labels) > 0
    # A backend that only answers scrapes has not been heard to answer requests.
    heard, scrapes = served.router.core.transport.last_read(first.url), asked(first)
    await until(lambda: asked(first) > scrapes + 1)
    assert served.router.core.transport.last_read(first.url) == heard


async def test_a_router_that_is_not_told_to_balances_by_its_own_count(start_engine: Start, start_router: Start) -> None:
    engine = await start_engine()
    engine.page = page(1, 1)
    served = await start_router(engine)
    # Once, for whether it sleeps.
    await until(lambda: asked(engine))

    [backend] = served.router.core.fleet.models["m"].backends
    assert (backend.origin.reported, backend.origin.reading) == (0, None)
    assert (await served.client.get("/metrics")).text.count("inference_api_backend_queue_depth{") == 0


def asked(engine: FakeEngine) -> int:
    """How often the router has asked for its metrics."""
    return engine.asked.count("/metrics")
