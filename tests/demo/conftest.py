"""Engines on real sockets."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import httpx
import pytest
import uvicorn
from starlette.types import ASGIApp

from inference_api.demo.engine import create_engine

Serve = Callable[[ASGIApp], str]


@contextmanager
def _served(app: ASGIApp) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False, lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Serve an ASGI app on a free port until the test ends; returns its base URL."""
    with ExitStack() as stack:
        yield lambda app: stack.enter_context(_served(app))


@pytest.fixture(scope="module")
def engine() -> Iterator[httpx.Client]:
    """A client of an engine that is too fast to notice its pace."""
    app = create_engine("llama-3-8b", tokens_per_second=1e6, max_model_len=200, clock=lambda: 1700000000.5)
    with _served(app) as url, httpx.Client(verify=False, base_url=url, trust_env=False) as client:
        yield client
