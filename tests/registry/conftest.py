"""Each kind of registry, empty: the stub, and the control plane on both databases. Routers cannot tell them apart.

What may differ: the control plane wants a management token for writes, and has `request_id` in its errors.
"""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from control_plane.app import Application
from control_plane.data import schema
from control_plane.data.database import Database, parse_url
from control_plane.settings import Settings
from inference_api.server.server import listen
from registry_stub.app import create_app
from registry_stub.store import Store
from tests.control_plane.conftest import management_token
from tests.postgresql import postgresql

# The time of every registry, in seconds
NOW = 1_700_000_000.9


@contextmanager
def serving(app: Any) -> Iterator[str]:
    listener = listen("127.0.0.1", 0, "PORT")
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        listener.close()
    assert not thread.is_alive()


@contextmanager
def stub(folder: Path) -> Iterator[httpx.Client]:
    with (
        Store(folder / "registry.sqlite3") as store,
        serving(create_app(store, clock=lambda: NOW)) as url,
        httpx.Client(verify=False, base_url=url, timeout=20) as client,
    ):
        yield client


@contextmanager
def plane(url: str) -> Iterator[httpx.Client]:
    asyncio.run(schema.migrate(parse_url(url)))

    async def token() -> str:
        database = Database(parse_url(url))
        try:
            return await management_token(database, "ana", "operator")
        finally:
            await database.close()

    headers = {"authorization": f"Bearer {asyncio.run(token())}"}
    application = Application(Settings(database_url=url), lambda: round(NOW * 1000))
    with serving(application) as base, httpx.Client(verify=False, base_url=base, timeout=20, headers=headers) as client:
        yield client


@pytest.fixture(scope="session", params=["stub", "sqlite", "postgresql"])
def registry(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    if request.param == "postgresql":
        with postgresql() as server, plane(server.url(server.create())) as client:
            yield client
        return
    folder = tmp_path_factory.mktemp(request.param)
    url = f"sqlite:///{folder}/control-plane.sqlite3"
    with stub(folder) if request.param == "stub" else plane(url) as client:
        yield client


@pytest.fixture
def client(registry: httpx.Client) -> httpx.Client:
    """A client of an empty registry, which may write."""
    for model in registry.get("/models").json()["models"]:
        registry.delete(f"/models/{model['name']}").raise_for_status()
    return registry


def put(client: httpx.Client, name: str, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    return client.put(f"/models/{name}", json={"name": name, **fields}, headers=headers)


def detail_of(response: httpx.Response) -> dict[str, Any]:
    """The error of an answer."""
    body = response.json()
    assert body.keys() - {"request_id"} == {"error"}
    detail: dict[str, Any] = body["error"]
    assert set(detail) == {"message", "type", "param", "code"}
    return detail


def error_of(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, detail_of(response)["code"]
