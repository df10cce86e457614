"""vLLM closes a connection that was idle for 5 seconds. A request that comes at that very moment does not notice."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import StartRouter
from tests.e2e.processes import Process

pytestmark = pytest.mark.e2e

PAUSES = (4.9, 4.98, 5.0, 5.02, 5.1, 6.0)


def statuses(url: str, model: str) -> list[int]:
    """Of requests with these pauses between them, on one connection to the router."""
    body = {"model": model, "prompt": "Hello", "max_tokens": 1}
    with httpx.Client(base_url=url, timeout=60, trust_env=False, limits=httpx.Limits(keepalive_expiry=None)) as client:
        found = [client.post("/v1/completions", json=body).status_code]
        for pause in PAUSES:
            time.sleep(pause)
            found.append(client.post("/v1/completions", json=body).status_code)
    return found


def test_idle_connections_never_fail_a_request(router: Process, start_router: StartRouter, catalogue: Path) -> None:
    """With the default, and with a router that keeps connections for so long that only vLLM closes them."""
    keeper = start_router(catalogue, UPSTREAM_KEEPALIVE="60")
    tasks = [(url, model) for url in (router.url, keeper.url) for model in ("llama-3-8b", "mistral-7b", "gpt2")]
    with ThreadPoolExecutor(len(tasks)) as pool:
        results = list(pool.map(lambda task: statuses(*task), tasks))
    assert results == [[200] * (len(PAUSES) + 1)] * len(tasks)
