"""The router as a whole: with a real registry, with the real OpenAI SDK, and from its first request to its last."""

import asyncio
import random
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import orjson
import pytest
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from inference_api.app import build
from inference_api.core import Outside
from inference_api.routing.catalogue import CatalogueError
from inference_api.server.server import listen
from inference_api.settings import Settings
from registry_stub.app import create_app
from registry_stub.store import Store
from tests.conftest import Served, serving
from tests.fakes import (
    COMPLETION,
    FakeEngine,
    Line,
    Received,
    ScriptedServer,
    in_background,
    json_response,
    until,
)
from tests.ports import free_port

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
HELLO: list[Any] = [{"role": "user", "content": "hello"}]


# With a registry


@asynccontextmanager
async def registry(
    path: Path, port: int = 0, wrap: Callable[[ASGIApp], ASGIApp] = lambda app: app
) -> AsyncIterator[httpx.AsyncClient]:
    """The registry over the database at `path`, and a client of it."""
    listener = listen("127.0.0.1", port, "PORT")
    port = listener.getsockname()[1]
    with Store(path) as store:
        config = uvicorn.Config(wrap(create_app(store)), log_config=None, access_log=False, lifespan="off", ws="none")
        server = uvicorn.Server(config)
        async with (
            in_background(server._serve([listener])) as task,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client,
        ):
            await until(lambda: server.started or task.done())
            try:
                yield client
            finally:
                server.should_exit = True


async def put(client: httpx.AsyncClient, name: str, *engines: FakeEngine, **more: Any) -> None:
    entry = {"name": name, "backends": [{"url": engine.url} for engine in engines], **more}
    assert (await client.put(f"/models/{name}", json=entry)).status_code in (200, 201)


async def source(served: Served) -> str:
    answer = await served.client.get("/readyz")
    assert (answer.status_code, answer.json()["status"]) == (200, "ready")
    return str(answer.json()["catalogue"])


async def test_a_model_is_served_as_long_as_the_registry_has_it(
    start_engine: Start, start_router: Start, tmp_path: Path
) -> None:
    engine = await start_engine()
    async with registry(tmp_path / "registry.sqlite3") as client:
        await put(client, "first", engine, aliases=["f"])
        served = await start_router(registry_url=str(client.base_url), registry_refresh=0.05)

        # The static model `m` is no longer there: the registry comes first.
        assert await source(served) == "registry"
        assert [(await served.chat(model=name)).status_code for name in ("first", "f", "m")] == [200, 200, 404]
        await put(client, "second", engine)
        await until(lambda: "second" in served.router.core.fleet.models)
        assert (await served.chat(model="second")).status_code == 200
        await client.delete("/models/second")
        await until(lambda: "second" not in served.router.core.fleet.models)
        assert (await served.chat(model="second")).status_code == 404


async def test_a_registry_that_goes_away_is_not_missed(
    start_engine: Start, start_router: Start, tmp_path: Path
) -> None:
    engine = await start_engine()
    async with registry(tmp_path / "registry.sqlite3") as client:
        await put(client, "first", engine)
        served = await start_router(registry_url=str(client.base_url), registry_refresh=0.05)
        assert await source(served) == "registry"
        port = client.base_url.port
        assert port is not None

    await until(lambda: served.router.core.registry.source != "registry")
    assert await source(served) == "stale"
    assert (await served.chat(model="first")).status_code == 200
    assert await served.metric("inference_api_registry_models", source="stale") == 1
    async with registry(tmp_path / "registry.sqlite3", port) as client:
        await until(lambda: served.router.core.registry.source != "stale")
        assert await source(served) == "registry"
        await put(client, "back", engine)
        await until(lambda: "back" in served.router.core.fleet.models)


async def test_a_registry_that_asks_for_a_token_is_told_it(
    start_engine: Start, start_router: Start, tmp_path: Path
) -> None:
    """And backends are not."""
    engine = await start_engine()
    told: list[bytes] = []

    def asking(app: ASGIApp) -> ASGIApp:
        async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["path"] == "/models":
                told.append(dict(scope["headers"]).get(b"authorization", b""))
            await app(scope, receive, send)

        return guarded

    async with registry(tmp_path / "registry.sqlite3", wrap=asking) as client:
        await put(client, "theirs", engine)
        served = await start_router(registry_url=str(client.base_url), registry_token="s3cret", registry_refresh=60)
        assert await source(served) == "registry"
        assert (await served.chat(model="theirs")).status_code == 200

    assert {*told} == {b"Bearer s3cret"}
    assert not any(name == b"authorization" for request in engine.requests for name, _ in request.headers)


async def test_a_registry_that_never_came_leaves_the_static_catalogue(start_engine: Start, start_router: Start) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    served = await start_router(await start_engine(), registry_url=url, registry_refresh=60)

    assert await source(served) == "static"
    assert (await served.chat()).status_code == 200
    assert await served.metric("inference_api_registry_sync_failures_total", reason="connect") >= 1


async def test_a_registry_may_have_a_certificate_of_a_ca_of_ones_own(
    start_engine: Start, start_router: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", "/CN=registry", "-addext", "subjectAltName=IP:127.0.0.1"]
    await asyncio.to_thread(
        subprocess.run, [*command, "-keyout", "key", "-out", "crt"], cwd=tmp_path, check=True, capture_output=True
    )

    async def script(request: Received, line: Line) -> None:
        await line.send(json_response({"models": [{"name": "theirs"}]}))

    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(tmp_path / "crt", tmp_path / "key")
    behind = ScriptedServer(script)
    async with behind, await asyncio.start_server(behind._accept, "127.0.0.1", 0, ssl=tls) as server:
        url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        stranger = await start_router(registry_url=url, registry_refresh=60)
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "crt"))
        friend = await start_router(registry_url=url, registry_refresh=60)

    assert (await source(stranger), await source(friend)) == ("static", "registry")
    assert list(friend.router.core.fleet.models) == ["theirs"]


async def test_backends_that_leave_the_catalogue_lose_their_idle_connections(
    start_engine: Start, start_router: Start, tmp_path: Path
) -> None:
    old, new = await start_engine(), await start_engine()
    async with registry(tmp_path / "registry.sqlite3") as client:
        await put(client, "m", old)
        served = await start_router(registry_url=str(client.base_url), registry_refresh=0.05, upstream_keepalive=60)
        await served.chat()
        assert old.open > 0

        await put(client, "m", new)

        await until(lambda: old.open == 0)
        assert (await served.chat()).status_code == 200
        assert len(new.requests) == 1


# With the OpenAI SDK


async def test_the_asynchronous_sdk_gets_what_the_engine_says(start_engine: Start, start_router: Start) -> None:
    served = await start_router(engine := await start_engine())

    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="KEY", max_retries=0) as client:
        whole = await client.chat.completions.create(model="m", messages=HELLO)
        stream = await client.chat.completions.create(model="m", messages=HELLO, stream=True)
        words = [chunk.choices[0].delta.content async for chunk in stream if chunk.choices]
        models = await client.models.list()
        model = await client.models.retrieve("m")

    assert whole.to_dict() == COMPLETION
    assert words == [f"word{i} " for i in range(5)]
    assert ([card.id for card in models.data], model.id) == (["m"], "m")
    assert whole._request_id == served.lines[0]["request_id"]
    assert all("KEY" not in str(request) for request in engine.requests)


async def test_the_synchronous_sdk_hangs_up_at_done_and_that_is_a_success(
    start_engine: Start, start_router: Start
) -> None:
    served = await start_router(await start_engine())

    def run() -> tuple[str | None, list[str | None], list[str]]:
        with openai.OpenAI(base_url=f"{served.url}/v1/", api_key="KEY", max_retries=0) as client:
            whole = client.chat.completions.create(model="m", messages=HELLO)
            stream = client.chat.completions.create(model="m", messages=HELLO, stream=True)
            words = [chunk.choices[0].delta.content for chunk in stream if chunk.choices]
            return whole.choices[0].message.content, words, [card.id for card in client.models.list()]

    assert await asyncio.to_thread(run) == ("hi", [f"word{i} " for i in range(5)], ["m"])
    await until(lambda: len(served.lines) == 3)
    assert [line["outcome"] for line in served.lines] == ["ok"] * 3
    assert served.lines[1]["completion_tokens"] == 5


async def test_the_sdk_waits_as_long_as_it_is_told_and_tries_again(start_router: Start) -> None:
    served = await start_router(max_in_flight=1)
    # Somebody else's request, for as long as the first attempt takes.
    served.router.core.admission.in_flight = 1

    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="KEY", max_retries=1) as client:
        asyncio.get_running_loop().call_later(0.5, setattr, served.router.core.admission, "in_flight", 0)
        with pytest.raises(openai.InternalServerError, match="no backends"):
            await client.chat.completions.create(model="m", messages=HELLO)

    assert [line["code"] for line in served.lines] == ["overloaded", "no_backend_available"]


# Its parts


async def test_credentials_come_from_the_tokens_it_is_given(start_engine: Start, tmp_path: Path) -> None:
    engine = await start_engine()
    entry = {"name": "m", "backends": [{"url": engine.url}], "credentials": {"env": "BACKEND_TOKEN"}}
    settings = Settings(catalogue=tmp_path / "catalogue.json", forward_headers=frozenset({"x-tenant"}))
    settings.catalogue.write_bytes(orjson.dumps({"models": [entry]}))
    router = build(settings, Outside({"BACKEND_TOKEN": "backends-own"}))

    async with serving(router, settings) as url, httpx.AsyncClient(base_url=url, trust_env=False) as client:
        headers = {"authorization": "Bearer clients-own", "x-tenant": "t", "x-other": "o"}
        await client.post("/v1/score", json={"model": "m"}, headers=headers)

    (request,) = engine.requests
    assert request.header("authorization") == "Bearer backends-own"
    assert (request.header("x-tenant"), request.header("x-other")) == ("t", None)


async def test_a_router_with_a_known_source_of_randomness_mints_known_ids(tmp_path: Path) -> None:
    settings = Settings(catalogue=tmp_path / "catalogue.json")
    settings.catalogue.write_text('{"models": []}')

    async def first_id() -> str:
        router = build(settings, Outside(rand=random.Random(7)))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(router.app), base_url="http://router") as client:
            return (await client.get("/v1/models")).headers["x-request-id"]

    assert await first_id() == await first_id() != ""


async def test_a_router_without_a_catalogue_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(CatalogueError, match="cannot be read"):
        build(Settings(catalogue=tmp_path / "missing.yaml"))


async def test_the_end_closes_what_the_router_opened(start_engine: Start, tmp_path: Path) -> None:
    engine = await start_engine()
    settings = Settings(catalogue=tmp_path / "catalogue.json", registry_url="http://127.0.0.1:1", upstream_keepalive=60)
    settings.catalogue.write_bytes(orjson.dumps({"models": [{"name": "m", "backends": [{"url": engine.url}]}]}))
    registry_client = httpx.AsyncClient(base_url="http://127.0.0.1:1", trust_env=False)
    before = asyncio.all_tasks()

    router = build(settings, Outside(registry_client=registry_client))
    async with serving(router, settings) as url, httpx.AsyncClient(base_url=url, trust_env=False) as client:
        await client.post("/v1/score", json={"model": "m"})
        assert engine.open > 0

    await until(lambda: engine.open == 0)
    assert registry_client.is_closed
    await until(lambda: asyncio.all_tasks() <= before)


async def test_any_httpx_transport_can_carry_the_requests(tmp_path: Path) -> None:
    def engine(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json={"path": request.url.path})

    def listing(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json={"models": [{"name": "r", "backends": [{"url": "http://engine:8000"}]}]})

    settings = Settings(catalogue=tmp_path / "catalogue.json")
    settings.catalogue.write_text('{"models": []}')
    registry_client = httpx.AsyncClient(base_url="http://registry", transport=httpx.MockTransport(listing))
    router = build(settings, Outside(transport=httpx.MockTransport(engine), registry_client=registry_client))

    async with serving(router, settings) as url, httpx.AsyncClient(base_url=url, trust_env=False) as client:
        answer = await client.post("/v1/score", json={"model": "r"})

    assert (answer.status_code, answer.json()) == (200, {"path": "/v1/score"})
