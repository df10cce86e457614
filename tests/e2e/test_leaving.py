"""A client that leaves ends its generation, in whatever phase it is, at the engine itself as behind the router."""

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import orjson
import pytest

from tests.e2e.conftest import BaseURL, Engines, unfinished
from tests.e2e.processes import until

pytestmark = pytest.mark.e2e

# Some seconds of work, so that it cannot have ended by itself.
LONG = {"model": "llama-3-8b", "prompt": "Once upon a time", "max_tokens": 1000, "ignore_eos": True}


def working(engines: Engines) -> float:
    return sum(unfinished(engine) for engine in engines["llama-3-8b"])


def generated(engines: Engines) -> float:
    return sum(engine.sample("vllm:generation_tokens_total") for engine in engines["llama-3-8b"])


@contextmanager
def asked(url: str, **more: Any) -> Iterator[socket.socket]:
    """A client that has sent its request; it leaves at the end of the block, without a word."""
    body = orjson.dumps(LONG | more)
    host, port = url.removeprefix("http://").split(":")
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port)), timeout=10) as client:
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        yield client


def idle_again(engines: Engines) -> float:
    """Seconds until nothing runs any more; what was generated says whether it was ended, or came to its own end."""
    began = time.monotonic()
    assert until(lambda: working(engines) == 0, seconds=20)
    return time.monotonic() - began


def soonest(leave: Callable[[], float]) -> float:
    """Of up to five times. On a machine with other things to do an engine may take longer, also when asked directly."""
    best = leave()
    for _ in range(4):
        if best <= 1:
            break
        best = min(best, leave())
    return best


def test_leaving_a_stream_ends_it(base_url: BaseURL, idle_engines: Engines) -> None:
    def leave() -> float:
        before = generated(idle_engines)
        with asked(base_url("llama-3-8b"), stream=True) as client:
            seen = b""
            while seen.count(b"data: ") < 5:
                seen += client.recv(65536)
            assert working(idle_engines) == 1
        took = idle_again(idle_engines)
        assert generated(idle_engines) - before < 1000
        return took

    assert soonest(leave) <= 1


@pytest.mark.parametrize("stream", [False, True], ids=["json", "stream"])
def test_leaving_before_the_answer_ends_it(base_url: BaseURL, idle_engines: Engines, stream: bool) -> None:
    def leave() -> float:
        before = generated(idle_engines)
        with asked(base_url("llama-3-8b"), stream=stream, n=4):
            assert until(lambda: working(idle_engines) > 0, seconds=20)
        took = idle_again(idle_engines)
        assert generated(idle_engines) - before < 4000
        return took

    assert soonest(leave) <= 1


@pytest.mark.parametrize("stream", [False, True], ids=["json", "stream"])
def test_leaving_at_once_leaves_nothing_behind(base_url: BaseURL, idle_engines: Engines, stream: bool) -> None:
    before = generated(idle_engines)
    for pause in (0.0, 0.002, 0.005, 0.01, 0.02):
        with asked(base_url("llama-3-8b"), stream=stream, prompt=[100] * 300, max_tokens=700):
            time.sleep(pause)
    time.sleep(0.3)  # what left so early may yet have to arrive
    idle_again(idle_engines)
    assert generated(idle_engines) - before < 3500


def test_many_leave_at_once(base_url: BaseURL, idle_engines: Engines) -> None:
    def leave() -> float:
        before = generated(idle_engines)
        with ExitStack() as clients:
            for number in range(20):
                clients.enter_context(asked(base_url("llama-3-8b"), stream=number % 2 == 0))
            assert until(lambda: working(idle_engines) == 20, seconds=20)
        took = idle_again(idle_engines)
        assert generated(idle_engines) - before < 20_000
        return took

    assert soonest(leave) <= 1
