"""The routes that the router answers itself: the model list, the probes, the metrics."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from inference_api import __version__
from inference_api.app import build
from inference_api.feature import Feature
from inference_api.http.accounts import Accounts
from inference_api.http.head import RequestHeaders
from inference_api.http.pages import Probes, create_pages
from inference_api.observe.scrape import Exposition
from inference_api.routing.balance import make_balancer
from inference_api.routing.catalogue import parse_catalogue
from inference_api.routing.fleet import Fleet
from inference_api.routing.registry import Registry
from inference_api.server.server import listen, ops_thread
from inference_api.settings import Settings
from tests.conftest import Served, serving
from tests.fakes import FakeEngine, post, raw_client, read_answer, until

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
CATALOGUE = [
    {
        "name": "llama",
        "version": "2",
        "owner": "ml",
        "aliases": ["l", "org/llama:8b"],
        "hardware": {"gpu": "nvidia-l4", "gpu_count": 1, "gpu_memory_gib": 24},
        "created": 1700000000,
    },
    {"name": "org/model:7b"},
]


async def get(served: Served, target: str) -> tuple[int, Any]:
    """(status, document) of a target exactly as it is written."""
    async with raw_client(served.port) as client:
        await client.send(f"GET {target} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
        answer = await read_answer(client.reader)
    return answer.status, orjson.loads(answer.body)


# Models


async def test_the_list_has_every_model_with_its_card(start_router: Start) -> None:
    served = await start_router(models=CATALOGUE)

    first, second = [await served.client.get("/v1/models") for _ in range(2)]

    assert first.headers["content-type"] == "application/json"
    assert first.content == second.content
    assert first.json()["object"] == "list"
    llama, org = first.json()["data"]
    assert llama == {
        "id": "llama",
        "object": "model",
        "created": 1700000000,
        "owned_by": "ml",
        "version": "2",
        "aliases": ["l", "org/llama:8b"],
        "hardware": {"gpu": "nvidia-l4", "gpu_count": 1, "gpu_memory_gib": 24.0},
    }
    assert (org["id"], org["owned_by"], org["hardware"]) == ("org/model:7b", "unknown", None)


@pytest.mark.parametrize("target", ["/v1/models/", "//v1/models", "//v1//models//", "/v1/models?a=1"])
async def test_the_list_may_be_asked_for_with_needless_slashes(target: str, served: Served) -> None:
    status, document = await get(served, target)

    assert (status, [card["id"] for card in document["data"]]) == (200, ["m"])


async def test_a_model_is_found_by_its_name_its_alias_and_with_an_escaped_slash(start_router: Start) -> None:
    served = await start_router(models=CATALOGUE)
    names = {
        "llama": "llama",
        "l": "llama",
        "llama/": "llama",
        "org/llama:8b": "llama",
        "org%2Fllama%3A8b": "llama",
        "org/model:7b": "org/model:7b",
        "org%2Fmodel:7b": "org/model:7b",
    }

    found = {name: (await get(served, f"/v1/models/{name}"))[1]["id"] for name in names}

    assert found == names


@pytest.mark.parametrize("name", ["nope", "M", "m/x", "%FF%E2%80%A8", "...", "x" * 300])
async def test_a_model_that_is_not_there_is_named_in_the_404(name: str, served: Served) -> None:
    status, document = await get(served, f"/v1/models/{name}")

    assert (status, document["error"]["code"], document["error"]["param"]) == (404, "model_not_found", "model")
    assert "Known models: m." in document["error"]["message"]
    assert len(document["error"]["message"]) < 150
    assert document["error"]["message"].isprintable()


async def test_the_context_length_appears_when_the_engine_has_told_it(start_engine: Start, start_router: Start) -> None:
    served = await start_router(await start_engine())
    model = served.router.core.fleet.models["m"]

    await until(lambda: model.max_model_len is not None)

    assert (await served.client.get("/v1/models")).json()["data"][0]["max_model_len"] == 1024
    assert (await served.client.get("/v1/models/m")).json()["max_model_len"] == 1024


async def test_the_list_follows_the_catalogue(start_router: Start) -> None:
    served = await start_router(models=CATALOGUE)
    assert len((await served.client.get("/v1/models")).json()["data"]) == 2

    served.router.core.fleet.update(parse_catalogue({"models": [{"name": "new", "aliases": ["l"]}]}))

    assert [card["id"] for card in (await served.client.get("/v1/models")).json()["data"]] == ["new"]
    assert (await served.client.get("/v1/models/l")).json()["id"] == "new"
    assert (await served.client.get("/v1/models/llama")).status_code == 404


async def test_ten_thousand_models_are_no_more_than_a_long_list(start_engine: Start, start_router: Start) -> None:
    models: list[dict[str, Any]] = [{"name": f"model-{i}"} for i in range(9_999)]
    models.append({"name": "last", "backends": [{"url": (await start_engine()).url}]})
    served = await start_router(models=models)

    listed = (await served.client.get("/v1/models")).json()["data"]
    answer = await served.chat(model="last")
    missing = await served.chat(model="nope")

    assert (len(listed), listed[-1]["id"], answer.status_code) == (10_000, "last", 200)
    assert "GET /v1/models" in missing.json()["error"]["message"]
    assert "model-0" not in missing.json()["error"]["message"]


async def test_pages_are_for_reading(served: Served) -> None:
    for path in ("/v1/models", "/v1/models/m", "/", "/health", "/healthz", "/readyz", "/version", "/metrics"):
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH"):
            answer = await served.client.request(method, path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")
            assert answer.headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/m", "/", "/health", "/healthz", "/readyz", "/version"])
async def test_head_is_get_without_a_body(path: str, served: Served) -> None:
    head, whole = await served.client.head(path), await served.client.get(path)

    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(whole.content))


# Probes


async def test_the_process_says_that_it_runs(served: Served) -> None:
    answer = await served.client.get("/healthz")

    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
    assert answer.headers["x-request-id"]


async def test_what_was_made_for_vllm_finds_health_and_version(served: Served) -> None:
    health, version = [await served.client.get(path) for path in ("/health", "/version")]

    assert (health.status_code, health.json()) == (200, {"status": "ok"})
    assert (version.status_code, version.json()) == (200, {"version": __version__})


async def test_readiness_begins_and_ends_with_the_server(tmp_path: Path) -> None:
    settings = Settings(catalogue=tmp_path / "catalogue.yaml")
    settings.catalogue.write_text("models: [{name: a}, {name: b}]")
    router = build(settings)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(router.ops), base_url="http://ops") as client:
        alive = await client.get("/healthz")
        # A load balancer that was told nothing asks for the root.
        before = [await client.get(path) for path in ("/readyz", "/")]
        async with serving(router, settings):
            during = [await client.get(path) for path in ("/readyz", "/")]
        after = [await client.get(path) for path in ("/readyz", "/")]

    assert [alive.status_code, *(answer.status_code for answer in (*before, *during, *after))] == [
        200, 503, 503, 200, 200, 503, 503,
    ]  # fmt: skip
    told = [answer.json()["status"] for answer in (*before, *during, *after)]
    assert told == ["starting", "starting", "ready", "ready", "draining", "draining"]
    assert during[0].json() == {"status": "ready", "catalogue": "static", "models": 2}


@pytest.mark.parametrize(
    ("silence", "ready", "healthy"),
    [(None, 200, 200), (0.3, 200, 200), (5.1, 503, 200), (29.0, 503, 200), (31.0, 503, 503)],
)
async def test_a_loop_that_does_not_come_by_is_not_ready_and_then_not_healthy(
    silence: float | None, ready: int, healthy: int
) -> None:
    probes = Probes(
        Registry(Fleet(make_balancer), parse_catalogue({"models": []}), None, 15),
        Exposition(list, CollectorRegistry()),
        lambda: silence,
    )
    probes.state = "ready"

    app = Accounts(create_pages(probes.routes()), (), RequestHeaders(), lambda: "minted")
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://ops") as client:
        told = [await client.get(path) for path in ("/readyz", "/healthz")]

    assert [answer.status_code for answer in told] == [ready, healthy]
    assert [answer.json()["status"] for answer in told if answer.status_code == 503] == ["hung"] * (
        (ready, healthy).count(503)
    )


async def test_a_router_that_hangs_says_so_on_the_port_of_the_probes(start_router: Start) -> None:
    served = await start_router()
    served.router.probes.late, served.router.probes.hung = 2.5, 3.0

    def ask() -> tuple[list[int], float]:
        with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", trust_env=False) as ops:
            codes = [ops.get(path).status_code for path in ("/readyz", "/healthz")]
            (ticked,) = (
                family.samples[0].value
                for family in parse_text(ops.get("/metrics").text)
                if family.name == "inference_api_event_loop_last_tick_timestamp_seconds"
            )
        return codes, time.time() - ticked

    def later() -> tuple[list[int], float]:
        time.sleep(3.5)
        return ask()

    with listen("127.0.0.1", 0, "OPS_PORT") as listener, ops_thread(served.router.ops, listener):
        before = await asyncio.to_thread(ask)
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(later)
            # Nothing else happens on this loop, which is the router's: it hangs.
            during = asked.result(20)
        await until(lambda: (served.router.core.lag.silence() or 0.0) < 0.5)
        after = await asyncio.to_thread(ask)

    assert [codes for codes, _ in (before, during, after)] == [[200, 200], [503, 503], [200, 200]]
    assert before[1] < 3.0 < during[1]


async def test_a_router_is_ready_with_a_catalogue_of_no_models(start_router: Start) -> None:
    served = await start_router(models=[])

    answer = await served.client.get("/readyz")

    assert (answer.status_code, answer.json()) == (200, {"status": "ready", "catalogue": "static", "models": 0})


async def test_metrics_come_in_the_format_that_is_asked_for(served: Served) -> None:
    await served.chat()

    text = await served.client.get("/metrics")
    openmetrics = await served.client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})

    assert text.headers["content-type"].startswith("text/plain; version=")
    assert openmetrics.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert openmetrics.text.endswith("# EOF\n")
    assert {"inference_api_requests", "process_cpu_seconds"} <= {family.name for family in parse_text(text.text)}
    assert "inference_api_requests" in {family.name for family in parse_openmetrics(openmetrics.text)}  # type: ignore[no-untyped-call]


async def test_probes_are_neither_counted_nor_logged(served: Served) -> None:
    before = await served.metric("inference_api_requests_total", route="other", code="200")

    for path in ("/", "/health", "/healthz", "/readyz", "/metrics", "//healthz/"):
        assert (await get_text(served, path)).startswith("HTTP/1.1 200")

    assert served.lines == []
    assert await served.metric("inference_api_requests_total", route="other", code="200") == before


async def test_everything_else_is_counted_and_logged(served: Served) -> None:
    before = await served.metric("inference_api_requests_total", route="models", code="200")

    await served.client.get("/v1/models", headers={"x-request-id": "abc"})
    await served.client.get("/nope?key=SECRET")

    assert await served.metric("inference_api_requests_total", route="models", code="200") == before + 1
    assert [(line["route"], line["status"], line["outcome"]) for line in served.lines] == [
        ("models", 200, "ok"),
        ("other", 404, "refused"),
    ]
    assert served.lines[0]["request_id"] == "abc"
    assert served.lines[1]["path"] == "/nope"
    assert "SECRET" not in str(served.lines)


async def test_an_error_of_a_page_says_which_in_log_and_metrics(served: Served) -> None:
    before = await served.metric("inference_api_rejected_requests_total", reason="unknown_model")

    await served.client.get("/nope")
    await served.client.get("/v1/models/nope")
    await served.client.delete("/v1/models")
    await served.client.get("/v1/models")

    assert [(line["status"], line.get("code"), line["bytes"] > 0) for line in served.lines] == [
        (404, "unknown_url", True),
        (404, "model_not_found", True),
        (405, "method_not_allowed", True),
        (200, None, True),
    ]
    assert await served.metric("inference_api_rejected_requests_total", reason="unknown_model") == before + 1


async def get_text(served: Served, target: str) -> str:
    async with raw_client(served.port) as client:
        await client.send(f"GET {target} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
        return (await client.reader.read(-1)).decode()


async def test_no_answer_says_what_serves_it(served: Served, engine: FakeEngine) -> None:
    for request in (b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n", post("/v1/score", {"model": "m"})):
        async with raw_client(served.port) as client:
            await client.send(request)
            answer = await read_answer(client.reader)
        assert answer.status == 200
        assert "server" not in answer.headers


# Pages of a port of their own


async def test_the_metrics_leave_the_main_port_when_they_have_their_own(start_router: Start) -> None:
    served = await start_router(ops_port=9090)

    paths = ("/", "/health", "/healthz", "/readyz", "/version", "/metrics", "/v1/models")
    on_main = [(await served.client.get(path)).status_code for path in paths]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(served.router.ops), base_url="http://ops") as client:
        on_ops = [(await client.get(path)).status_code for path in paths]

    # Who balances the clients' connections checks the port that they come to.
    assert on_main == [200, 200, 200, 200, 200, 404, 200]
    assert on_ops == [200, 200, 200, 200, 200, 200, 404]


@pytest.mark.parametrize("begun", [False, True])
async def test_a_page_that_fails_says_nothing_of_why(
    begun: bool, start_router: Start, caplog: pytest.LogCaptureFixture
) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"first"
        raise RuntimeError("SECRET")

    async def boom(request: Request) -> StreamingResponse:
        if begun:
            return StreamingResponse(pieces())
        raise RuntimeError("SECRET")

    served = await start_router(features=[Feature("boom", pages=(Route("/boom", boom),))])
    async with raw_client(served.port) as client:
        await client.send(b"GET /boom HTTP/1.1\r\nhost: x\r\nx-request-id: abc\r\nconnection: close\r\n\r\n")
        told = await client.reader.read(-1)
    await until(lambda: served.lines)

    assert told.count(b"HTTP/1.1") == told.count(b"x-request-id: abc\r\n") == 1
    assert b"SECRET" not in told
    [line] = served.lines
    [failure] = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert (line["request_id"], line["outcome"]) == ("abc", "internal_error")
    assert "SECRET" in caplog.text
    assert failure.fields == {"request_id": "abc"}  # type: ignore[attr-defined]
    if begun:
        assert told.endswith(b"5\r\nfirst\r\n")
    else:
        body = orjson.loads(told.partition(b"\r\n\r\n")[2])
        assert (line["status"], line["code"], body["request_id"]) == (500, "internal_error", "abc")
        assert body["error"]["code"] == "internal_error"
    assert await served.metric("inference_api_requests_total", route="other") == 1
