"""A real Prometheus scrapes router, engines, control plane: every panel and variable has data, all alerts can speak."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import orjson
import pytest

from inference_api.demo.engine import create_engine
from inference_api.settings import Settings
from tests import prometheus as real
from tests.conftest import serving
from tests.control_plane import processes
from tests.control_plane.test_fleet import report
from tests.fakes import Line, Received, ScriptedServer, event, json_response, raw, sse
from tests.k8s import chart_files
from tests.k8s.everything import HEADERS, PRICE, everything
from tests.ports import free_port
from tests.prometheus import Prometheus

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(240)]
Start = Callable[..., Any]
TOKEN = "service-token-of-the-tests-0123456789"
VARIABLES = {
    "$__rate_interval": "10s",
    "$cluster": "here",
    "$namespace": "models",
    "$model_name": ".*",
    "$instance": ".*",
}


def placed(expression: str) -> str:
    """As Grafana sends it."""
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    return expression


# What is scraped


@pytest.fixture
async def targets(start_engine: Start, start_router: Start, tmp_path: Path) -> AsyncIterator[dict[str, list[str]]]:
    """The addresses to scrape, by job: all that can go wrong with a request does, again and again."""
    async with AsyncExitStack() as stack:
        served: Any = SimpleNamespace(app=create_engine("m", tokens_per_second=500))
        engines = [await stack.enter_async_context(serving(served, Settings())) for _ in range(2)]
        tgi = await stack.enter_async_context(ScriptedServer(real.growing(real.TGI)))
        hosts = [
            await stack.enter_async_context(real.node_exporter(tmp_path)),
            (await stack.enter_async_context(ScriptedServer(real.constant(real.DCGM)))).url,
        ]
        breaking = await start_engine(either(sse(event(), then=Line.reset), raw(json_response({}, "500 No"))))
        cutting = await start_engine(cut)
        failing = await start_engine(raw(json_response({}, "500 No")))
        refusing = await start_engine(raw(json_response({}, "401 Unauthorized")))
        # Beside two live backends a dead one, and one that fails requests but no checks: these are repeated elsewhere.
        several = [*engines, f"http://127.0.0.1:{free_port()}", cutting.url]
        models: list[dict[str, Any]] = [
            {"name": "m", "price": PRICE, "backends": [{"url": url} for url in several]},
            {"name": "breaking", "backends": [{"url": breaking.url}]},
            # One that fails where the other does not is set aside.
            {"name": "uneven", "served_model_name": "m", "backends": [{"url": engines[0]}, {"url": failing.url}]},
            {"name": "limited", "served_model_name": "m", "backends": [{"url": engines[0]}]},
            # AUTH=keys: what a backend refuses are the router's own credentials.
            {"name": "refusing", "backends": [{"url": refusing.url}]},
            {"name": "gone", "backends": [{"url": "http://gone.test", "discovery": "dns"}]},
        ]
        models[0]["balancing"] = models[2]["balancing"] = "round_robin"
        registry = await stack.enter_async_context(ScriptedServer(control_plane({"models": models})))
        router = await start_router(
            models=models,
            resolve=nobody,
            registry_refresh=0.5,
            discovery_interval=0.5,
            health_interval=0.5,
            **everything(tmp_path, registry.url),
        )
        router.client.headers.update(HEADERS)
        file = tmp_path / "control-plane.sqlite3"
        plane = await stack.enter_async_context(processes.served(tmp_path, f"sqlite:///{file}", service_token=TOKEN))
        async with repeated(lambda: requests_of_every_kind(router)), locked_out(plane, file):
            scraped = {"router": [router.url], "engines": engines, "tgi": [tgi.url], "control": [plane.url]}
            yield {**scraped, "hosts": hosts}


@asynccontextmanager
async def locked_out(plane: processes.Served, file: Path) -> AsyncIterator[None]:
    """Reports of a router; every second one meets another process that keeps the database from being written."""

    async def put() -> int:
        headers = {"authorization": f"Bearer {TOKEN}"}
        return (await plane.client.put("/routers/router-1-8000", json=report(), headers=headers)).status_code

    with closing(sqlite3.connect(file, isolation_level=None, timeout=30, check_same_thread=False)) as other:

        async def one_in_two() -> None:
            assert await put() == 200
            await asyncio.to_thread(other.execute, "BEGIN IMMEDIATE")
            try:
                assert await put() == 503
            finally:
                other.rollback()

        async with repeated(one_in_two):
            yield


async def requests_of_every_kind(router: Any) -> None:
    await router.chat()
    await router.chat(stream=True, stream_options={"include_usage": True})
    for model in ("gone", "nobody's", "limited", "refusing"):
        await router.chat(model=model)
    await router.chat(model="breaking")
    # Whose fault it is shows by some dozen requests.
    for _ in range(5):
        await router.chat(model="uneven")
    with pytest.raises(httpx.RemoteProtocolError):
        await router.chat(model="breaking", stream=True)


async def cut(request: Received, line: Line) -> None:
    line.reset()


def either(stream: Any, whole: Any) -> Any:
    async def script(request: Received, line: Line) -> None:
        await (stream if orjson.loads(request.body)["stream"] else whole)(request, line)

    return script


def control_plane(document: Any) -> Any:
    """A registry that answers, and then does not; it takes usage, and tells of an hour ago what was spent."""
    answers = iter(range(10_000))

    async def script(request: Received, line: Line) -> None:
        if request.target == "/usage":
            await line.send(json_response({"accepted": 500, "duplicates": 0, "refused": []}))
        elif request.target == "/spend":
            at = datetime.now(UTC) - timedelta(hours=1)
            await line.send(json_response({"at": f"{at:%Y-%m-%dT%H:%M:%SZ}", "currency": "USD", "budgets": []}))
        else:
            await line.send(json_response(document, "503 No" if next(answers) % 2 else "200 OK"))

    return script


async def nobody(host: str) -> list[str]:
    raise OSError("no such host")


@asynccontextmanager
async def repeated(work: Callable[[], Any]) -> AsyncIterator[None]:
    """Do it again and again, beside the body."""
    done = False

    async def run() -> None:
        while not done:
            await work()
            await asyncio.sleep(0.05)

    task = asyncio.create_task(run())
    try:
        yield
    finally:
        done = True
        async with asyncio.timeout(30):
            await task


# Who scrapes it


@pytest.fixture
async def prometheus(targets: dict[str, list[str]], tmp_path: Path) -> AsyncIterator[Prometheus]:
    labels = {"cluster": "here", "namespace": "models"}
    async with real.prometheus(tmp_path, targets, labels, chart_files.RULES) as running:
        yield running


Look = Callable[[], Coroutine[Any, Any, set[str]]]


async def left(missing: Look) -> set[str]:
    """What is missing still after a minute: rates have data from the second scrape after the first event on."""
    rest = await missing()
    for _ in range(120):
        if not rest:
            break
        await asyncio.sleep(0.5)
        rest = await missing()
    return rest


# They wait for some minutes before they fire, but what goes wrong here they notice at once.
NOTICED = {
    "InferenceRouterModelHasNoBackend",
    "InferenceRouterBackendDown",
    "InferenceRouterRejecting",
    "InferenceRouterUpstreamErrors",
    "InferenceRouterErrorBudgetBurnFast",
    "InferenceRouterLimitsDegraded",
    "ControlPlaneDatabaseErrors",
    "ControlPlaneErrors",
}
NOT_NOTICED = {
    "InferenceRouterDown",
    "InferenceRouterEventLoopStuck",
    "InferenceRouterUsageWaiting",
    "ControlPlaneDown",
    "ControlPlaneRoutersLost",
    "ControlPlaneUsageUnsummed",
    "EngineAdmissionStalled",
    "EngineQueueGrowing",
    "EnginePreemptions",
}


async def test_every_panel_has_data_and_every_alert_can_speak(prometheus: Prometheus) -> None:
    asked = {where: placed(expression) for where, expression in chart_files.panel_expressions()}
    for rule in chart_files.rules():
        # Of an alert that is silent only the series can be seen that it looks at.
        name = rule.get("alert") or rule["record"]
        shown = [rule["record"]] if "record" in rule else []
        asked |= {f"{name}: {selector}": selector for selector in [*shown, *chart_files.selectors(rule["expr"])]}

    async def without_data() -> set[str]:
        for where, expression in list(asked.items()):
            if await prometheus.has(expression):
                del asked[where]
        return set(asked)

    async def silent() -> set[str]:
        return NOTICED - {rule["name"] for rule in await prometheus.rules() if rule.get("state") == "pending"}

    assert await left(without_data) == set()
    assert await left(silent) == set()
    rules = await prometheus.rules()
    assert {rule["name"]: rule.get("lastError") for rule in rules if rule["health"] != "ok"} == {}
    assert {rule["name"] for rule in rules if rule.get("state") in ("pending", "firing")} & NOT_NOTICED == set()
    for dashboard in chart_files.dashboards().values():
        for variable in dashboard["templating"]["list"][1:]:
            assert await prometheus.offers(placed(variable["query"]["query"])), variable["name"]
