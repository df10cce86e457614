"""REPORT_INTERVAL: reports as their schema says, whatever the state; and a control plane that does not take them."""

import asyncio
import logging
import re
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from jsonschema import Draft202012Validator

from inference_api.app import GROUPS, build
from inference_api.core import Outside
from inference_api.features.reports import ReportDocument, Reports
from inference_api.routing.catalogue import parse_catalogue
from inference_api.settings import SettingsError, load_settings, make_settings
from tests.command import command
from tests.conftest import Served, serving
from tests.fakes import FakeEngine, hang, json_response, sse, until
from tests.features.control_plane import ControlPlane, override
from tests.policies import FakeRegistry, policy_of
from tests.ports import free_port

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
SCHEMAS = Path(__file__).parents[2] / "docs" / "schemas"
VALIDATOR = Draft202012Validator(orjson.loads((SCHEMAS / "router-report.json").read_bytes()))


@pytest.fixture
async def plane() -> AsyncIterator[ControlPlane]:
    async with ControlPlane() as plane:
        plane.models = None
        yield plane


@pytest.fixture(autouse=True)
def _all_levels(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "inference_api")


def on(plane: Any, **more: Any) -> dict[str, Any]:
    return {"registry_url": plane.url, "report_interval": 0.05, **more}


async def next_report(plane: ControlPlane) -> dict[str, Any]:
    """One that was begun after now."""
    count = len(plane.reports) + 2
    await until(lambda: len(plane.reports) >= count)
    report = plane.reports[-1]
    assert [error.message for error in VALIDATOR.iter_errors(report)] == []
    return report


@pytest.mark.parametrize("name", ["router-report", "overrides"])
def test_the_schemas_are_those_of_the_contract(name: str) -> None:
    shared = Path(f"/work/shared/schemas/{name}.json")
    if not shared.exists():
        pytest.skip("the contract is not on this machine")

    assert orjson.loads((SCHEMAS / f"{name}.json").read_bytes()) == orjson.loads(shared.read_bytes())


async def test_a_report_has_what_the_schema_asks_for(
    plane: ControlPlane, start_engine: Start, start_router: Start
) -> None:
    engine: FakeEngine = await start_engine()
    served: Served = await start_router(engine, **on(plane, usage="registry", registry_token="s3cret", currency="EUR"))
    for _ in range(3):
        assert (await served.chat()).status_code == 200
    await until(lambda: len(plane.stored) == 3)

    report = await next_report(plane)

    core, request = served.router.core, plane.reporters[-1]
    assert (request.method, request.target) == ("PUT", f"/routers/{core.instance}")
    assert request.header("authorization") == "Bearer s3cret"
    assert request.header("content-type") == "application/json"
    assert report["boot"] == core.boot
    assert report["currency"] == "EUR"
    assert report["draining"] is False
    assert report["started_at"] <= report["at"]
    assert report["usage"] == {"made": 3, "delivered": 3, "queued": 0, "spooled": 0, "dropped": 0}
    assert report["models"] == [{"name": "m", "in_flight": 0, "queued": 0, "requests": 3, "errors": 0}]
    [backend] = report["backends"]
    assert (backend["model"], backend["backend"], backend["state"]) == ("m", engine.url[7:], "ready")


async def test_a_report_comes_at_every_interval(plane: ControlPlane, start_router: Start) -> None:
    loop = asyncio.get_running_loop()
    await start_router(**on(plane, report_interval=0.2))
    began = loop.time()
    await until(lambda: len(plane.reports) >= 6)

    # 5 intervals of 0.16 to 0.24 s; the machine may be slow, never fast.
    assert loop.time() - began > 0.7


async def test_counts_of_a_model_are_requests_errors_and_broken_streams(
    plane: ControlPlane, start_engine: Start, start_router: Start
) -> None:
    engine: FakeEngine = await start_engine()
    served: Served = await start_router(engine, **on(plane))

    async def status(code: str) -> None:
        async def script(request: Any, line: Any) -> None:
            await line.send(json_response({}, code))

        engine.script = script
        await served.chat()

    await status("200 OK")
    await status("400 Bad Request")
    await status("500 Internal Server Error")
    engine.script = sse(then=lambda line: line.reset())
    with pytest.raises(httpx.RemoteProtocolError):
        await served.chat(stream=True)
    engine.script = hang
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        waiting = group.create_task(served.chat())
        await until(lambda: engine.busy)
        report = await next_report(plane)
        waiting.cancel()

    [model] = report["models"]
    assert model["in_flight"] == report["in_flight"] == 1
    assert model["requests"] == 4
    # The 500, and the stream.
    assert model["errors"] == 2
    # A client that leaves is no error.
    await until(lambda: not served.router.core.admission.in_flight)
    [model] = (await next_report(plane))["models"]
    assert (model["requests"], model["errors"]) == (5, 2)


async def test_what_waits_is_queued(plane: ControlPlane, start_engine: Start, start_router: Start) -> None:
    engine: FakeEngine = await start_engine(hang)
    held = {"name": "h", "backends": [], "hold": 20}
    queued = {"name": "q", "backends": [engine.url], "max_in_flight": 1, "queue": {"timeout": 20, "size": 9}}
    served: Served = await start_router(models=[held, queued], **on(plane))
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        tasks = [group.create_task(served.chat(model=model)) for model in ("h", "h", "q", "q")]
        await until(lambda: engine.busy)
        await until(lambda: plane.reports and [row["queued"] for row in plane.reports[-1]["models"]] == [2, 1])
        for task in tasks:
            task.cancel()


async def test_a_backend_in_every_state_is_as_the_schema_says(
    plane: ControlPlane, start_engine: Start, start_router: Start
) -> None:
    engines = [await start_engine() for _ in range(9)]
    served: Served = await start_router(*engines, **on(plane, health_interval=600))
    core = served.router.core
    out, drained, opened, aside, unhealthy, stuck, asleep, resting, slow = core.fleet.models["m"].backends
    plane.order(override(out.label, "out"), override(drained.label))
    await until(lambda: out.is_out and drained.override)
    now = asyncio.get_running_loop().time()
    opened.origin.opened, opened.origin.cooldown = now, 60.0
    aside.circuit.opened, aside.circuit.cooldown = now - 9, 0.0
    unhealthy.origin.healthy = False
    stuck.origin.stuck_since = now
    asleep.origin.asleep = True
    core.retry_policy.resting.pause(resting, 20, now)
    slow.weigh(0.5)

    report = await next_report(plane)

    states = [row["state"] for row in report["backends"]]
    expected = ["out", "draining", "open", "half_open", "unhealthy", "stuck", "asleep", "resting", "recovering"]
    assert states == expected
    first, second = report["backends"][:2]
    assert first["override"] in report["overrides"]
    assert second["override"] in report["overrides"]
    assert first["reason"] == "driver"


async def test_adapters_count_in_their_model(plane: ControlPlane, start_engine: Start, start_router: Start) -> None:
    engine: FakeEngine = await start_engine()
    served: Served = await start_router(engine, entry={"adapters": ["lora"]}, **on(plane))
    await until(lambda: "lora" in served.router.core.fleet.served)
    await served.chat(model="lora")
    await served.chat()

    report = await next_report(plane)

    assert [(row["name"], row["requests"]) for row in report["models"]] == [("m", 2)]


# The answer


async def test_the_router_asks_for_what_differs(plane: ControlPlane, start_engine: Start, start_router: Start) -> None:
    engine: FakeEngine = await start_engine()
    plane.waits = False
    plane.models = [{"name": "m", "backends": [engine.url]}]
    plane.give("/policy", policy_of())
    served: Served = await start_router(engine, **on(plane, policy="registry", registry_refresh=600))
    await until(lambda: len(plane.reports) > 2)
    # Each once, and once more to find out whether the registry waits for changes.
    await until(lambda: len(plane.polls) == 4)
    polls = len(plane.polls)
    assert {request.target for request in plane.polls} == {"/policy", "/overrides"}
    while not plane.etags().items() <= (await next_report(plane))["etags"].items():
        pass

    # It has what there is, and asks for nothing.
    await next_report(plane)
    assert len(plane.polls) == polls
    plane.order(override(engine.url[7:]))
    await until(lambda: served.router.core.fleet.models["m"].backends[0].override)
    plane.give("/policy", policy_of(limits=[{"scope": "all", "requests": 9, "per": 60}]))
    await until(lambda: served.router.core.snapshots["policy"].etag == plane.etag("/policy"))

    assert len(plane.polls) <= polls + 4
    report = await next_report(plane)
    assert {name: etag for name, etag in report["etags"].items() if etag} == plane.etags()


async def test_the_catalogue_is_asked_for_when_it_differs(
    plane: ControlPlane, start_engine: Start, start_router: Start
) -> None:
    engine: FakeEngine = await start_engine()
    plane.give("/models", {"models": [{"name": "m", "backends": [engine.url]}]})
    served: Served = await start_router(**on(plane, registry_refresh=600))
    assert (await served.chat()).status_code == 200

    plane.give("/models", {"models": [{"name": "n", "backends": [engine.url]}]})
    await until(lambda: "n" in served.router.core.fleet.models)

    assert (await next_report(plane))["etags"]["models"] == plane.etag("/models")


async def test_a_long_poll_that_hears_nothing_is_asked_anew(
    plane: ControlPlane, start_engine: Start, start_router: Start
) -> None:
    engine: FakeEngine = await start_engine()
    served: Served = await start_router(engine, **on(plane, registry_refresh=600))
    await until(lambda: plane.waiting["/overrides"])
    # Another replica has the change; the one that is asked does not tell those who wait.
    plane.documents["/overrides"] = orjson.dumps({"overrides": [override(engine.url[7:])]})

    await until(lambda: served.router.core.fleet.models["m"].backends[0].override)

    assert "prefer" not in plane.polls[-1].names or "prefer" not in plane.polls[-2].names
    # And then waits again.
    await until(lambda: plane.waiting["/overrides"] == 1)


# A control plane that does not take them

AWAY = {
    "500": (json_response({}, "500 Oops"), "status", 0.05),
    "401": (json_response({}, "401 Unauthorized"), "status", 0.05),
    "302": (json_response({}, "302 Found", b"location: /\r\n"), "status", 0.05),
    "not JSON": (b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\nx", "status", 0.05),
    "no etags": (json_response([]), "status", 0.05),
    "no HTTP": (b"hello\r\n\r\n", "connect", 0.05),
    "404": (json_response({}, "404 Not Found"), "status", 60),
    "405": (json_response({}, "405 Method Not Allowed"), "status", 60),
}


@pytest.mark.parametrize("case", AWAY)
async def test_a_report_that_is_not_taken_is_counted_and_told_once(
    case: str, plane: ControlPlane, start_engine: Start, start_router: Start, caplog: pytest.LogCaptureFixture
) -> None:
    answer, reason, pause = AWAY[case]
    plane.report_answer = lambda: answer
    served: Served = await start_router(await start_engine(), **on(plane))
    await until(lambda: len(plane.reports) >= (1 if pause == 60 else 4))

    assert (await served.chat()).status_code == 200
    await until(lambda: [line for line in caplog.records if "reports" in line.message])
    assert await served.metric("inference_api_report_failures_total", reason=reason) >= 1
    warnings = [line for line in caplog.records if "reports" in line.message and line.levelname == "WARNING"]
    assert len(warnings) == 1
    if pause == 60:
        assert "it is no control plane" in warnings[0].message
        await asyncio.sleep(0.3)
        assert len(plane.reports) == 1
        return
    plane.report_answer = lambda: json_response({"etags": {"models": 7, "policy": None, "x": "y"}})
    await until(lambda: any("takes reports again" in line.message for line in caplog.records))


async def test_a_registry_that_takes_none_is_tried_rarely(
    plane: ControlPlane, start_engine: Start, start_router: Start
) -> None:
    plane.report_answer = lambda: json_response({}, "404 Not Found")
    served: Served = await start_router(await start_engine(), **on(plane, report_interval=600))
    core = served.router.core
    assert core.registry_client is not None
    await until(lambda: plane.reports)
    reports = Reports(core, core.registry_client, ReportDocument(core, "USD"), every=600, rarely=0.1)
    task = asyncio.create_task(reports.run())
    await until(lambda: len(plane.reports) >= 4)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)

    assert reports.failures["status"] >= 3


@pytest.mark.parametrize("kind", ["dead", "silent"])
async def test_a_control_plane_that_is_away_costs_requests_nothing(
    kind: str, start_engine: Start, start_router: Start
) -> None:
    async with ControlPlane() as plane:
        plane.report_answer = lambda: None
        url = f"http://127.0.0.1:{free_port()}" if kind == "dead" else plane.url
        engine = await start_engine()
        served: Served = await start_router(engine, registry_url=url, report_interval=0.05)
        core = served.router.core
        assert core.registry_client is not None
        reports = Reports(core, core.registry_client, ReportDocument(core, "USD"), every=0.01, timeout=0.2, grace=0.1)
        task = asyncio.create_task(reports.run())
        reason = "connect" if kind == "dead" else "timeout"
        await until(lambda: reports.failures[reason] >= 2)

        async with asyncio.timeout(10):
            answers = await asyncio.gather(*(served.chat() for _ in range(20)))
        assert {answer.status_code for answer in answers} == {200}
        task.cancel()
        await asyncio.wait([task], timeout=5)
        assert task.cancelled()


# The end


async def test_the_last_report_says_that_the_drain_is_over(
    plane: ControlPlane, start_engine: Start, start_router: Start
) -> None:
    settings = make_settings(on(plane, report_interval=600, usage="registry"), GROUPS)
    engine: FakeEngine = await start_engine()
    catalogue = parse_catalogue({"models": [{"name": "m", "backends": [engine.url]}]})
    router = build(settings, Outside(catalogue=catalogue))

    async with serving(router, settings) as url:
        await until(lambda: plane.reports)
        async with httpx.AsyncClient(base_url=url) as client:
            body = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
            assert (await client.post("/v1/chat/completions", json=body)).status_code == 200

    first, last = plane.reports
    assert (first["draining"], last["draining"]) == (False, True)
    assert VALIDATOR.is_valid(last)
    # With what became of the last records
    assert last["usage"] == {"made": 1, "delivered": 1, "queued": 0, "spooled": 0, "dropped": 0}


async def test_sigterm_ends_with_a_report(plane: ControlPlane, tmp_path: Path, start_engine: Start) -> None:
    engine: FakeEngine = await start_engine()
    async with command(tmp_path, engine, registry_url=plane.url, report_interval=600) as router:
        await until(lambda: plane.reports)
        router.tell(signal.SIGTERM)
        code, _, _ = await router.stop()

    assert code == 0
    first, last = plane.reports
    assert (first["draining"], last["draining"], first["boot"]) == (False, True, last["boot"])
    assert last["at"] > first["at"]


async def test_a_dead_control_plane_delays_no_end(start_engine: Start) -> None:
    async with ControlPlane() as plane:
        plane.report_answer = lambda: None

        settings = make_settings(on(plane, report_interval=600), GROUPS)
        loop = asyncio.get_running_loop()
        async with serving(build(settings), settings):
            await until(lambda: plane.reports)
            began = loop.time()
        assert loop.time() - began < 5


# Settings


def test_reports_without_a_registry_are_refused_with_both_names() -> None:
    with pytest.raises(SettingsError, match=r"^INFERENCE_API_REPORT_INTERVAL='5': .*INFERENCE_API_REGISTRY_URL"):
        build(load_settings({"INFERENCE_API_REPORT_INTERVAL": "5"}, GROUPS))


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "x"])
def test_an_interval_is_a_number_of_seconds(value: str) -> None:
    with pytest.raises(SettingsError, match=f"^INFERENCE_API_REPORT_INTERVAL='{re.escape(value)}': must be "):
        load_settings({"INFERENCE_API_REPORT_INTERVAL": value}, GROUPS)


async def test_off_is_not_built() -> None:
    async with FakeRegistry() as registry:
        router = build(make_settings({"registry_url": registry.url}, GROUPS))
        on = build(make_settings({"registry_url": registry.url, "report_interval": 5}, GROUPS))

    assert {"reports", "overrides"}.isdisjoint(router.features)
    assert router.core.fleet.override_of is None
    assert {"reports", "overrides"} <= on.features.keys()
