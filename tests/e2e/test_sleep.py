"""Engines that are put to sleep, or paused: real ones pass their health checks then, and hold each request."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from inference_api.discovery.gauges import Gauges
from tests.e2e.conftest import Engines, StartRouter
from tests.e2e.processes import Process, until

pytestmark = pytest.mark.e2e

MODEL = "llama-3-8b"
BODY = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 2}


@pytest.fixture(scope="module")
def router(start_router: StartRouter, catalogue: Path) -> Process:
    """With default settings, but for the time that a test would wait."""
    return start_router(catalogue, HEALTH_INTERVAL="1")


@pytest.fixture
def pair(idle_engines: Engines) -> Iterator[list[Process]]:
    """The two engines of the model, awake before and after the test."""
    yield idle_engines[MODEL]
    for engine in idle_engines[MODEL]:
        assert tell(engine, "/wake_up") == tell(engine, "/resume") == 200


def tell(engine: Process, path: str) -> int:
    return httpx.post(engine.url + path, timeout=60, trust_env=False).status_code


def answered(engine: Process) -> float:
    return engine.sample("vllm:request_success_total")


def asleep(router: Process, count: int) -> bool:
    return until(lambda: router.sample("inference_api_backend_asleep") == count, seconds=30, pause=0.2)


def test_what_a_real_engine_tells_of_itself_is_understood(pair: list[Process]) -> None:
    def told() -> Gauges:
        gauges = Gauges("vllm")
        gauges.feed(httpx.get(f"{pair[0].url}/metrics", timeout=10, trust_env=False).content)
        return gauges

    assert told().reading().kv_cache is not None
    assert told().asleep() is False
    assert tell(pair[0], "/sleep") == 200
    assert told().asleep() is True


def test_a_sleeping_engine_gets_no_requests(pair: list[Process], router: Process, client: httpx.Client) -> None:
    sleeper, other = pair
    assert tell(sleeper, "/sleep") == 200
    # Why: it is well by all accounts, idle, and answers nobody.
    assert httpx.get(f"{sleeper.url}/health", timeout=10, trust_env=False).status_code == 200
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{sleeper.url}/v1/completions", json=BODY, timeout=2, trust_env=False)
    assert asleep(router, 1)
    before, by_other = answered(sleeper), answered(other)
    answers = [client.post("/v1/completions", json=BODY) for _ in range(20)]

    assert [answer.status_code for answer in answers] == [200] * 20
    assert (answered(sleeper) - before, answered(other) - by_other) == (0, 20)
    assert router.sample("inference_api_backend_circuit_open") == 0
    assert router.sample("inference_api_backend_up") == 4

    assert tell(sleeper, "/wake_up") == 200
    assert asleep(router, 0)
    assert until(lambda: client.post("/v1/completions", json=BODY).is_success and answered(sleeper) > before, 60)


def test_when_all_engines_sleep_the_client_is_told_at_once(
    pair: list[Process], router: Process, client: httpx.Client
) -> None:
    for engine in pair:
        assert tell(engine, "/sleep") == 200
    assert asleep(router, 2)
    answer = client.post("/v1/completions", json=BODY)

    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_backend_available")
    assert "asleep" in answer.json()["error"]["message"]
    assert answer.headers["retry-after"] == "10"


@pytest.mark.parametrize("path", ["/sleep", "/wake_up", "/pause", "/resume", "/is_sleeping"])
def test_nobody_reaches_these_routes_through_the_router(client: httpx.Client, path: str) -> None:
    for answer in (client.post(path), client.get(path)):
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_url")


def test_a_stream_that_a_pause_ended_is_passed_on_and_is_no_success(
    pair: list[Process], router: Process, client: httpx.Client
) -> None:
    # As the test before has left them.
    assert asleep(router, 0)
    body = BODY | {"max_tokens": 1000, "ignore_eos": True, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        for engine in pair:
            assert tell(engine, "/pause?mode=abort") == 200
        rest = [line for line in lines if line]

    assert '"finish_reason":"abort"' in rest[-2]
    assert rest[-1] == "data: [DONE]"
    aborted = r'inference_api_stream_aborts_total\{.*reason="aborted".*\}'
    assert until(lambda: router.sample(aborted) == 1, seconds=10)
    assert until(lambda: '"outcome":"aborted"' in router.log.read_text(), seconds=10)
    assert router.sample("inference_api_backend_circuit_open") == 0
