"""One uvicorn for all HTTP tests, on which each test mounts an app over a database of its own."""

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from registry_stub.app import create_app
from registry_stub.store import Store

Mount = Callable[[ASGIApp], httpx.Client]


@pytest.fixture(scope="session")
def mount() -> Iterator[Mount]:
    """Puts an app on the running server and returns a client of it."""
    mounted: list[ASGIApp] = []

    async def stage(scope: Scope, receive: Receive, send: Send) -> None:
        await mounted[-1](scope, receive, send)

    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(stage, log_config=None, access_log=False, lifespan="off", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    with httpx.Client(verify=False, base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=20) as client:

        def replace(app: ASGIApp) -> httpx.Client:
            mounted.append(app)
            return client

        yield replace
    server.should_exit = True
    thread.join(timeout=20)
    assert not thread.is_alive()


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "registry.sqlite3"


@pytest.fixture
def store(database: Path) -> Iterator[Store]:
    with Store(database) as store:
        yield store


@pytest.fixture
def client(mount: Mount, store: Store) -> httpx.Client:
    """A client of an empty registry at the time 1700000000."""
    return mount(create_app(store, clock=lambda: 1_700_000_000.9))
