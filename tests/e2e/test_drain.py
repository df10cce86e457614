"""A router that is told to stop finishes the streams it has."""

from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import StartRouter
from tests.e2e.processes import until

pytestmark = pytest.mark.e2e


def test_a_stream_outlives_the_signal_to_stop(start_router: StartRouter, catalogue: Path) -> None:
    router = start_router(catalogue)
    body = {"model": "mistral-7b", "prompt": "Once upon a time", "max_tokens": 600, "ignore_eos": True, "stream": True}
    with (
        httpx.Client(base_url=router.url, timeout=60, trust_env=False) as client,
        client.stream("POST", "/v1/completions", json=body) as answer,
    ):
        pieces = answer.iter_raw()
        received = next(pieces)
        router.terminate()
        received += b"".join(pieces)
    assert received.endswith(b"data: [DONE]\n\n")
    assert until(lambda: not router.alive, seconds=20)
    assert router.exit_code == 0
