"""Named queries of a real Prometheus: of a history whose values are known, and of what it scrapes just now."""

import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from control_plane.panels import dashboards, queries
from control_plane.pure.promql import placed
from control_plane.pure.series import Subject, places
from control_plane.pure.times import shown
from tests import prometheus as real
from tests.control_plane.conftest import NOON, Clock, Running
from tests.control_plane.history import HOSTILE, model
from tests.fakes import ScriptedServer

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]


async def asked(scraped: Running, query: str, **parameters: Any) -> Any:
    answer = await scraped.admin.get(f"/api/v1/metrics/{query}", params=parameters)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def last(scraped: Running, query: str, **parameters: Any) -> dict[str, Any]:
    """The last value of each series, by name."""
    return {one["name"]: one["points"][-1][1] for one in (await asked(scraped, query, **parameters))["series"]}


LLAMA = {"llama": pytest.approx(2.5)}
BOTH = ("10.0.0.11:9100", "10.0.0.12:9100")
VALUES: dict[str, dict[str, Any]] = {
    "request_rate": {"Request rate": pytest.approx(2.5)},
    "requests": {"200": pytest.approx(2), "503": pytest.approx(0.5)},
    "errors": {"llama": pytest.approx(0.4)},
    "first_token": {"p50": pytest.approx(0.25), "p95": pytest.approx(0.475)},
    "token_time": {"p50": pytest.approx(0.025), "p95": pytest.approx(0.0475)},
    "tokens": {"input": pytest.approx(300), "output": pytest.approx(40)},
    "in_flight": {"llama": 3},
    "rejections": {"unknown_model": pytest.approx(0.2)},
    "aborts": {"upstream_reset": pytest.approx(0.5)},
    "registry_age": {"router-1:9090": 30},
    "loop_lag": {"router-1:9090 p99": pytest.approx(0.0099)},
    "router_cpu": {"router-1:9090": pytest.approx(0.25)},
    "router_memory": {"router-1:9090": 60e6},
    "engine_running": {"llama": 2},
    "engine_waiting": {"llama": 1},
    "kv_cache": {"llama 10.0.0.11:8000": pytest.approx(0.1)},
    "engine_finished": {"stop": pytest.approx(2)},
    "preemptions": {"llama": pytest.approx(0.1)},
    "prefix_cache": {"llama": pytest.approx(0.25)},
    "engine_prompt_tokens": {"llama": pytest.approx(300)},
    "engine_generated_tokens": {"llama": pytest.approx(40)},
    "host_cpu": {"10.0.0.11:9100": pytest.approx(0.75)},
    "host_memory": {"10.0.0.11:9100": pytest.approx(0.75)},
    "host_disk": {"10.0.0.11:9100 /": pytest.approx(0.9)},
    "host_network": {"10.0.0.11:9100 in": pytest.approx(1e6), "10.0.0.11:9100 out": pytest.approx(2e6)},
    "gpu_memory": {
        "gpu-1 GPU 0 used": 20500 * 2**20,
        "gpu-1 GPU 1 used": 0,
        "gpu-1 GPU 0 total": 22500 * 2**20,
        "gpu-1 GPU 1 total": 22500 * 2**20,
    },
    "gpu_utilisation": {"gpu-1 GPU 0": pytest.approx(0.87), "gpu-1 GPU 1": 0},
    "gpu_temperature": {"gpu-1 GPU 0": 61, "gpu-1 GPU 1": 43},
    "gpu_power": {"gpu-1 GPU 0": 68.5, "gpu-1 GPU 1": 16.2},
    "gpu_xid": {"gpu-1 GPU 0": 79, "gpu-1 GPU 1": 0},
}


async def test_every_query_has_the_right_value_of_one_model(scraped: Running) -> None:
    found = {name: await last(scraped, name, model="llama") for name in queries()}

    assert found == VALUES


async def test_without_a_model_it_is_of_all_and_a_backend_narrows_it(scraped: Running) -> None:
    assert await last(scraped, "engine_running") == {"llama": 2, "other": 4, HOSTILE: 6}
    assert await last(scraped, "engine_running", backend="10.0.0.12:8000") == {"other": 4}
    assert await last(scraped, "engine_running", backend="http://10.0.0.12:8000/v1") == {"other": 4}
    assert await last(scraped, "engine_running", model="llama", backend="10.0.0.12:8000") == {}
    assert set(await last(scraped, "host_cpu")) == {"10.0.0.11:9100", "10.0.0.12:9100"}
    assert set(await last(scraped, "host_cpu", backend="10.0.0.12:8000")) == {"10.0.0.12:9100"}
    # A name is no pattern.
    assert await last(scraped, "engine_running", backend="10.0.0.1.:8000") == {}


async def test_what_is_listed_says_by_what_it_may_be_narrowed(scraped: Running) -> None:
    first = (await scraped.admin.get("/api/v1/metrics", params={"limit": 20})).json()
    rest = (await scraped.admin.get("/api/v1/metrics", params={"limit": 20, "after": first["next"]})).json()
    listed = {one["name"]: one for one in first["data"] + rest["data"]}

    assert listed.keys() == queries().keys()
    assert listed["kv_cache"] == {
        "name": "kv_cache",
        "title": "KV cache used",
        "text": "Of each instance, the fullest cache.",
        "unit": "share",
        "source": "engines",
        "parameters": ["model", "backend"],
    }
    assert listed["requests"]["parameters"] == ["model"]
    assert listed["router_cpu"]["parameters"] == []


async def test_an_answer_says_what_it_is(scraped: Running) -> None:
    found = await asked(scraped, "in_flight", model="llama", start=shown(NOON - 600_000), end=shown(NOON))

    (series,) = found.pop("series")
    assert found.pop("query")["source"] == "routers"
    assert found == {
        "start": shown(NOON - 600_000 + 15_000),
        "end": shown(NOON),
        "step": 15,
        "warnings": [],
        "missing": None,
    }
    assert series["labels"] == {"model_name": "llama"}
    assert len(series["points"]) == 40
    assert series["points"][0] == ["2026-11-28T11:50:15Z", 3]


async def test_where_nothing_was_scraped_is_a_gap(scraped: Running) -> None:
    (series,) = (await asked(scraped, "in_flight", model="llama"))["series"]
    # Five minutes long, Prometheus takes the last value for the present one.
    gap = [at for at, value in series["points"] if value is None]

    assert gap[0] == "2026-11-28T11:35:15Z"
    assert gap[-1] == "2026-11-28T11:40:00Z"
    # So is what is no number.
    broken = await asked(scraped, "gpu_temperature", backend="10.0.0.12:8000")
    assert {value for one in broken["series"] for _, value in one["points"]} == {None}
    assert "DCGM exporter" in broken["missing"]


@pytest.mark.parametrize("days", [1, 90, 400])
async def test_a_long_time_has_few_points(scraped: Running, days: int) -> None:
    found = await asked(scraped, "in_flight", start=shown(NOON - days * 86_400_000), end=shown(NOON))

    assert found["step"] == days * 288
    assert all(len(one["points"]) == 300 for one in found["series"])


async def test_a_name_cannot_change_the_query(scraped: Running) -> None:
    assert await last(scraped, "engine_running", model="hostile") == {HOSTILE: 6}
    assert await last(scraped, "kv_cache", model="hostile", backend="10.0.0.13:8000") == {
        f"{HOSTILE} 10.0.0.13:8000": pytest.approx(0.3)
    }
    for backend in (HOSTILE, "x\n", 'a"}', "a\\", "(", "[::1", "http://", "{{instance}}", "$window", "a|.*", ".*"):
        found = await asked(scraped, "engine_running", backend=backend)
        assert found["series"] == [], backend
        assert "monitoring.enginePodMonitor.enabled" in found["missing"]
    assert (await scraped.admin.get("/api/v1/metrics/in_flight", params={"model": HOSTILE})).status_code == 404
    assert (await scraped.admin.get("/api/v1/metrics/up")).status_code == 404


async def test_prometheus_accepts_every_expression(prometheus: real.Prometheus) -> None:
    subjects = [Subject(), Subject(HOSTILE, (HOSTILE, "a"), (HOSTILE,), (HOSTILE, "[::1]"))]
    templates = [
        template
        for dashboard in dashboards().values()
        for row in dashboard.rows
        for panel in row.panels
        for template in panel.templates.values()
    ]

    assert len(templates) > 100
    for subject in subjects:
        for template in templates:
            await prometheus.ask("query", query=placed(template, places(subject, "5m")))


@pytest.mark.parametrize(
    ("start", "end", "param"),
    [("yesterday", None, "start"), ("2026-11-28T12:00:00Z", "2026-11-28T12:00:30Z", "start"), (None, "1", "end")],
)
async def test_a_time_must_be_one(scraped: Running, start: str | None, end: str | None, param: str) -> None:
    parameters = {name: value for name, value in (("start", start), ("end", end)) if value is not None}
    answer = await scraped.admin.get("/api/v1/metrics/in_flight", params=parameters)

    assert (answer.status_code, answer.json()["error"]["param"]) == (422, param)


# What is scraped just now

VLLM = """\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="llama"} 7
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="llama"} 2
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="llama"} 0.42
# TYPE vllm:prefix_cache_hits_total counter
vllm:prefix_cache_hits_total{engine="0",model_name="llama"} 30
# TYPE vllm:prefix_cache_queries_total counter
vllm:prefix_cache_queries_total{engine="0",model_name="llama"} 120
"""


async def test_what_exporters_say_now_is_read(start_sqlite: Start, tmp_path: Path) -> None:
    """vLLM, TGI without a model of its own, DCGM, and the node exporter of this machine."""
    async with AsyncExitStack() as stack:
        pages = [real.growing(VLLM), real.constant(real.TGI), real.constant(real.DCGM)]
        vllm, tgi, dcgm = [(await stack.enter_async_context(ScriptedServer(page))).url for page in pages]
        node = await stack.enter_async_context(real.node_exporter(tmp_path))
        jobs = {"vllm": [vllm], "hosts": [dcgm, node]}
        prometheus = await stack.enter_async_context(real.prometheus(tmp_path, jobs))
        folder = tmp_path / "tgi"
        folder.mkdir()
        with_tgi = await stack.enter_async_context(real.prometheus(folder, {"tgi": [tgi]}, {"model_name": "llama"}))
        clock = Clock(time.time_ns() // 1_000_000)
        plane = await start_sqlite(clock=clock, prometheus_url=prometheus.url)
        await plane.admin.put("/api/v1/models/llama", json=model("llama", vllm), headers={"if-none-match": "*"})
        await prometheus.until_has("rate(vllm:prefix_cache_hits_total[1m])")
        await prometheus.until_has("rate(node_cpu_seconds_total[1m])")
        await with_tgi.until_has("tgi_queue_size")
        # Times of queries are round; the next one is later than the scrapes.
        clock.now = time.time_ns() // 1_000_000 + 15_000

        assert (await last(plane, "prefix_cache", model="llama")) == {"llama": pytest.approx(0.25)}
        (kv_cache,) = (await asked(plane, "kv_cache", model="llama"))["series"]
        assert kv_cache["labels"]["instance"] == vllm.removeprefix("http://")
        # Engine and exporters are on this machine.
        assert await last(plane, "gpu_power", model="llama") == {"gpu-1 GPU 0": 68.5, "gpu-1 GPU 1": 16.2}
        for name in ("host_cpu", "host_memory", "host_disk", "host_network"):
            values = await last(plane, name, model="llama")
            assert values, name
            assert all(value is not None and value >= 0 for value in values.values()), (name, values)
        running = await start_sqlite(clock=clock, prometheus_url=with_tgi.url)
        assert await last(running, "engine_running", model="llama") == {f"TGI llama {tgi.removeprefix('http://')}": 1}
