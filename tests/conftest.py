"""Fixtures: a clean environment, scripted engines, and a router on a real port in the test's own event loop."""

import gc
import os
import random
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import orjson
import pytest

from inference_api.app import GROUPS, build
from inference_api.application import Application
from inference_api.core import Outside
from inference_api.discovery import resolver
from inference_api.discovery.cluster import Cluster
from inference_api.feature import Feature
from inference_api.observe.log import Fields
from inference_api.server.server import Server, listen, server_config
from inference_api.settings import Settings, make_settings
from inference_api.upstream.transport import Transport
from tests.fakes import FakeEngine, Script, ScriptedServer, in_background, until
from tests.stalls import pytest_addoption, pytest_pyfunc_call

# Hooks of pytest
__all__ = ["pytest_addoption", "pytest_pyfunc_call"]

# Enough to find what is wrong in a rule, few enough for the suite to end within a minute; a file may say otherwise.
hypothesis.settings.register_profile("suite", max_examples=40, deadline=None)
hypothesis.settings.load_profile("suite")


def pytest_collection_finish() -> None:
    """What is there by now stays: otherwise each collection of garbage looks at all tests of the session."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": True}


@pytest.fixture(autouse=True)
def _clean_environ(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test is bent by the settings or proxies of the machine it runs on."""
    for name in list(os.environ):
        if name.startswith(("INFERENCE_API_", "OTEL_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture
async def start_engine() -> AsyncIterator[Callable[..., Any]]:
    """`await start_engine(script)` -> a FakeEngine on a free port; stopped at the end."""
    async with AsyncExitStack() as stack:

        async def start(script: Script | None = None) -> FakeEngine:
            return await stack.enter_async_context(FakeEngine(script))

        yield start


class Served:
    """A running router: `client` talks to it, `router` shows its insides, `lines` are its access log."""

    def __init__(self, router: Application, url: str, client: httpx.AsyncClient, lines: list[Fields]) -> None:
        self.router = router
        self.url = url
        self.port = int(url.rsplit(":", 1)[1])
        self.client = client
        self.lines = lines

    async def chat(self, stream: bool = False, model: str = "m", **more: Any) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "stream": stream}
        return await self.client.post("/v1/chat/completions", json=body | more)

    async def metric(self, name: str, **labels: str) -> float:
        """The value of one sample of /metrics, 0 if it is not there."""
        wanted = {f'{key}="{value}"' for key, value in labels.items()}
        for line in (await self.client.get("/metrics")).text.splitlines():
            if line.startswith((name + "{", name + " ")) and all(label in line for label in wanted):
                return float(line.rsplit(" ", 1)[1])
        return 0.0


@pytest.fixture
async def start_router(tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    """`await start_router(engine, ..., key=value)` -> a Served router whose model `m` has these engines' URLs.

    `models=[...]` gives the whole catalogue instead; `entry={...}` adds to the model `m`; `resolve` stands in for DNS;
    `cluster` tells of Services; `tokens` are the credentials that the environment would have; `features` come
    beside those that the settings turn on; other keywords are settings.
    """
    async with AsyncExitStack() as stack:

        async def start(
            *engines: FakeEngine,
            models: list[dict[str, Any]] | None = None,
            entry: dict[str, Any] | None = None,
            transport: httpx.AsyncBaseTransport | None = None,
            resolve: resolver.Resolve = resolver.resolve,
            cluster: Cluster | None = None,
            tokens: dict[str, str] | None = None,
            rand: random.Random | None = None,
            features: Sequence[Feature] = (),
            linger: float = 2.0,
            **settings: Any,
        ) -> Served:
            backends = [{"url": engine.url} for engine in engines]
            models = models if models is not None else [{"name": "m", "backends": backends, **(entry or {})}]
            path = tmp_path / "catalogue.json"
            path.write_bytes(orjson.dumps({"models": models}))
            lines: list[Fields] = []
            # Clients, routers and engines share one event loop: while it stands still, no connection can be made.
            chosen = make_settings({"catalogue": path, "connect_timeout": 30, **settings}, GROUPS)
            outside = Outside(
                tokens or {},
                write_line=lines.append,
                transport=transport,
                resolve=resolve,
                cluster=cluster,
                rand=rand,
            )
            router = build(chosen, outside, features)
            url = await stack.enter_async_context(serving(router, chosen, linger))
            client = await stack.enter_async_context(
                httpx.AsyncClient(verify=False, base_url=url, timeout=60, trust_env=False)
            )
            return Served(router, url, client, lines)

        yield start


@asynccontextmanager
async def serving(router: Application, settings: Settings, linger: float = 2.0) -> AsyncIterator[str]:
    """Serve the router with the production server on a free port; the URL."""
    listener = listen("127.0.0.1", 0, "PORT")
    server = Server(server_config(router.app, settings, getattr(router, "rejected", lambda *_: None), linger))
    async with in_background(server.serve(sockets=[listener])) as task:
        await until(lambda: server.started or task.done())
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            listener.close()


@pytest.fixture
async def transport() -> AsyncIterator[Transport]:
    transport = Transport()
    yield transport
    await transport.aclose()


@pytest.fixture
async def start() -> AsyncIterator[Callable[..., Any]]:
    """`await start(script)` -> a server on a free port that answers every request so."""
    async with AsyncExitStack() as stack:

        async def start(script: Script) -> ScriptedServer:
            server = ScriptedServer(script)
            await stack.enter_async_context(server)
            return server

        yield start


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and its self-signed certificate for 127.0.0.1 and the name one.test, in one file."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-days", "2", "-subj", "/CN=backend", "-addext", "subjectAltName=IP:127.0.0.1,DNS:one.test"),
            *("-keyout", "key.pem", "-out", "cert.pem"),
        ],
        cwd=folder,
        check=True,
        capture_output=True,
    )
    (folder / "both.pem").write_bytes((folder / "key.pem").read_bytes() + (folder / "cert.pem").read_bytes())
    return folder / "both.pem"
