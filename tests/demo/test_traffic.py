"""The sample callers of the demo: what they ask, and that they go on whatever the answer is."""

import json
import os
import random
import signal
import threading
from itertools import islice
from pathlib import Path

import httpx
import pytest

from inference_api.demo.engine import create_engine
from inference_api.demo.history import IssuedKey, history
from inference_api.demo.processes import DemoError
from inference_api.demo.seed import ENGINES, catalogue, remember, seed
from inference_api.demo.traffic import asks, main
from tests.demo.conftest import Serve
from tests.demo.test_engine import until
from tests.ports import free_port

KEYS = {
    name: IssuedKey("secret", "k3v9Qm2XbT7a", "o", None) for name in ("translate", "chatbot", "notebook", "nightly")
}


def test_callers_ask_for_all_there_is_and_for_what_is_not() -> None:
    first, again = (list(islice(asks(random.Random(3)), 500)) for _ in range(2))
    known = {entry["name"] for entry in catalogue(range(len(ENGINES)), 1)} | {"llama3"}

    assert first == again
    assert {ask.key for ask in first} == set(KEYS)
    assert {ask.body["model"] for ask in first} - known == {"llama-4-9000b"}
    assert {ask.path for ask in first} == {"/v1/chat/completions", "/v1/embeddings"}
    assert {ask.body.get("stream") for ask in first} == {True, False, None}
    assert 5 < sum(ask.leaves_after is not None for ask in first) < 50
    assert any("prompt" in ask.body for ask in first)


def test_the_callers_ask_until_they_are_stopped(serve: Serve, tmp_path: Path) -> None:
    router, nobody = serve(create_engine("llama-3-8b", tokens_per_second=1e6)), f"http://127.0.0.1:{free_port()}"
    keys = dict.fromkeys(KEYS, "secret")
    file = tmp_path / "traffic.json"
    file.write_text(json.dumps({"routers": [router, nobody], "keys": keys, "seed": 1, "rate": 200}))

    def interrupt() -> None:
        with httpx.Client(trust_env=False) as client:
            until(lambda: _answered(client.get(f"{router}/metrics").text) > 20)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    main([str(file)])
    thread.join()


def _answered(page: str) -> float:
    return sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith("vllm:request_success_total{"))


def test_the_day_before_is_the_same_each_time_and_has_bad_hours() -> None:
    now = 1_795_867_200_000
    backends = {"llama-3-8b": ["a:1"], "mistral-7b": ["b:1"], "gpt2": ["c:1"]}
    first, again = (list(history(now, KEYS, ["r-1", "r-2"], backends)) for _ in range(2))
    failed = [one for one in first if one["outcome"] != "ok"]
    worst = [one for one in failed if now - 4 * 3_600_000 <= one["at"] < now - 1 * 3_600_000]

    assert first == again
    assert all(now - 25 * 3_600_000 < one["at"] < now for one in first)
    assert len({one["id"] for one in first}) == len(first) > 500
    assert len(worst) > len(failed) / 2 > 5


def test_what_a_control_plane_refuses_ends_the_demo(serve: Serve) -> None:
    """An engine is none."""
    url = serve(create_engine("gpt2"))
    with pytest.raises(DemoError, match="refused POST /session with 404"):
        seed(url, "password", [])
    with pytest.raises(DemoError, match="refused usage records"):
        remember(url, "token", [{}])
    with pytest.raises(DemoError, match="does not answer"):
        seed(f"http://127.0.0.1:{free_port()}", "password", [])
