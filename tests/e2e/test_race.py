"""Races and hedges on real engines: the generation that lost is gone from its engine within a second."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import yaml

from tests.e2e.conftest import Engines, StartRouter, unfinished
from tests.e2e.processes import Process, until

pytestmark = pytest.mark.e2e

# Some seconds of work, so that it cannot have ended by itself.
LONG = {"prompt": "Once upon a time", "max_tokens": 1000, "ignore_eos": True}


@pytest.fixture(scope="module")
def router(start_router: StartRouter, engines: Engines, tmp_path_factory: pytest.TempPathFactory) -> Process:
    """Two models, a race and a vote of them, and one with two hedged backends."""
    first, second, other = (
        engines[name][number].url for name, number in (("llama-3-8b", 0), ("llama-3-8b", 1), ("gpt2", 0))
    )
    entries = [
        {"name": "llama-3-8b", "backends": [first]},
        {"name": "gpt2", "backends": [other]},
        {"name": "fastest", "race": {"members": ["llama-3-8b", "gpt2"]}},
        {"name": "sure", "consensus": {"members": ["llama-3-8b", "gpt2", "llama-again"]}},
        {"name": "llama-again", "backends": [second], "served_model_name": "llama-3-8b"},
        {
            "name": "hedged",
            "backends": [first, second],
            "served_model_name": "llama-3-8b",
            "hedge": {"after": 50, "budget": 0.5},
        },
    ]
    path = tmp_path_factory.mktemp("catalogue") / "catalogue.yaml"
    path.write_text(yaml.safe_dump({"models": entries}))
    return start_router(path)


def generated(engines: Engines) -> float:
    return sum(engine.sample("vllm:generation_tokens_total") for backends in engines.values() for engine in backends)


def metric(router: Process, name: str, **labels: str) -> float:
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    lines = httpx.get(f"{router.url}/metrics", trust_env=False).text.splitlines()
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in lines
        if line.startswith(name + "{") and all(label in line for label in wanted)
    )


def took(begins: float, wanted: Any) -> float:
    """Seconds until it holds."""
    assert until(wanted, seconds=20, pause=0.02)
    return time.monotonic() - begins


@contextmanager
def busy(engine: Process, count: int) -> Iterator[None]:
    """So many long generations of another client, which leaves at the end."""
    leaves = threading.Event()
    # More at once than it takes to see one that is gone beside them.
    body = {**LONG, "model": "llama-3-8b", "n": count, "stream": True}

    def ask() -> None:
        with httpx.stream("POST", f"{engine.url}/v1/completions", json=body, timeout=120, trust_env=False) as answer:
            for _ in answer.iter_bytes():
                if leaves.is_set():
                    return

    client = threading.Thread(target=ask)
    client.start()
    try:
        assert until(lambda: unfinished(engine) >= count, seconds=30)
        yield
    finally:
        leaves.set()
        client.join(60)


def test_the_loser_of_a_race_is_gone_within_a_second(router: Process, idle_engines: Engines) -> None:
    engines = {"llama-3-8b": idle_engines["llama-3-8b"][0], "gpt2": idle_engines["gpt2"][0]}

    def race() -> float:
        body = {**LONG, "model": "fastest", "stream": True}
        with httpx.stream("POST", f"{router.url}/v1/completions", json=body, timeout=60, trust_env=False) as answer:
            events = answer.iter_lines()
            assert next(events).startswith("data: ")
            began = time.monotonic()
            winner = answer.headers["x-inference-model"]
            loser = next(engine for name, engine in engines.items() if name != winner)
            gone = took(began, lambda: unfinished(loser) == 0)
            # The winner is still at work, so that the loser has not come to its own end.
            assert unfinished(engines[winner]) == 1
        assert until(lambda: unfinished(engines[winner]) == 0, seconds=20)
        return gone

    before = generated(idle_engines)
    # On a machine with other things to do an engine may take longer, also when it is asked directly.
    assert min(race() for _ in range(3)) <= 1

    assert generated(idle_engines) - before < 6 * 1000
    assert metric(router, "inference_api_upstream_attempts_total", outcome="race_lost") == 3
    assert metric(router, "inference_api_race_wins_total", model_name="fastest") == 3


def test_the_loser_of_a_hedge_is_gone_within_a_second(router: Process, idle_engines: Engines) -> None:
    idle, slow = idle_engines["llama-3-8b"]
    body = {**LONG, "model": "hedged", "max_tokens": 300}

    def hedge() -> float:
        """A backend with much to do loses, whichever was asked first."""
        before = slow.sample("vllm:generation_tokens_total")
        with busy(slow, 8):
            answer = httpx.post(f"{router.url}/v1/completions", json=body, timeout=120, trust_env=False)
            began = time.monotonic()
            gone = took(began, lambda: unfinished(slow) == 8)
            assert answer.status_code == 200
            assert answer.json()["usage"]["completion_tokens"] == 300
            # Those of the other client are still at work.
            assert slow.sample("vllm:generation_tokens_total") - before < 8 * 1000
        assert until(lambda: unfinished(slow) == 0, seconds=30)
        return gone

    # The budget is half of the requests, and those that are not hedged cannot lose.
    gone = [hedge() for _ in range(3)]

    lost = metric(router, "inference_api_upstream_attempts_total", outcome="hedge_lost", backend=slow.url[7:])
    assert lost >= 1
    assert metric(router, "inference_api_upstream_attempts_total", outcome="hedge_lost", backend=idle.url[7:]) == 0
    assert min(gone) <= 1


def test_a_vote_of_real_engines(router: Process, idle_engines: Engines) -> None:
    """Two of them have the same weights, and so the same answer."""
    body = {"model": "sure", "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
    answer = httpx.post(f"{router.url}/v1/completions", json=body, timeout=60, trust_env=False)

    direct = httpx.post(
        f"{idle_engines['llama-3-8b'][0].url}/v1/completions",
        json=body | {"model": "llama-3-8b"},
        timeout=60,
        trust_env=False,
    )
    assert answer.headers["x-inference-votes"] == "2/3"
    assert answer.headers["x-inference-model"] == "llama-3-8b"
    assert answer.json()["choices"] == direct.json()["choices"]
