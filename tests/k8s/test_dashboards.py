"""The dashboards are sound, and what they, the rules and the runbook name is exported by somebody."""

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from inference_api.demo.telemetry import Telemetry
from tests.control_plane.processes import served
from tests.fakes import until
from tests.k8s import chart_files
from tests.k8s.chart_files import ROOT, metrics, panels, sample_names
from tests.k8s.everything import HEADERS, PRICE, everything
from tests.prometheus import DCGM, TGI, node_exporter

DASHBOARDS = chart_files.dashboards()
RULES = chart_files.rules()
every_dashboard = pytest.mark.parametrize("dashboard", DASHBOARDS.values(), ids=DASHBOARDS)
Start = Callable[..., Any]


def test_there_are_three() -> None:
    assert set(DASHBOARDS) == {"router", "engines", "hosts"}
    assert len({dashboard["uid"] for dashboard in DASHBOARDS.values()}) == 3


@pytest.mark.parametrize("path", chart_files.DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_is_what_the_script_makes(path: Path) -> None:
    """The console asks the same, from the same file."""
    command = [sys.executable, str(ROOT / "scripts" / "dashboards.py"), path.stem]
    made = subprocess.run(command, capture_output=True, text=True, check=True)

    assert made.stdout == path.read_text(), "run scripts/dashboards.py --write"


@every_dashboard
def test_a_dashboard_works_with_any_data_source(dashboard: dict[str, Any]) -> None:
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    sources = [part["datasource"] for panel in panels(dashboard) for part in (panel, *panel["targets"])]

    chosen = ["instance"] if dashboard["uid"] == "inference-api-hosts" else ["namespace", "model_name"]
    assert list(variables) == ["datasource", "cluster", *chosen]
    assert variables["datasource"]["query"] == "prometheus"
    assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)
    # A Prometheus of one cluster has no such label: all of them must include none.
    assert {variables[name]["allValue"] for name in ("cluster", *chosen)} == {".*"}


@every_dashboard
def test_every_panel_has_a_title_of_its_own_and_a_unit(dashboard: dict[str, Any]) -> None:
    titles = Counter(panel["title"] for panel in dashboard["panels"])
    ids = Counter(panel["id"] for panel in dashboard["panels"])

    assert set(titles.values()) == set(ids.values()) == {1}
    assert all(panel["fieldConfig"]["defaults"]["unit"] for panel in panels(dashboard))
    assert all(
        len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0
        for panel in panels(dashboard)
    )
    assert dashboard["schemaVersion"] >= 39


@every_dashboard
def test_no_panel_covers_another(dashboard: dict[str, Any]) -> None:
    def apart(one: dict[str, int], other: dict[str, int]) -> bool:
        across = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        return across or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]

    places = [panel["gridPos"] for panel in dashboard["panels"]]
    assert all(apart(one, other) for one, other in combinations(places, 2))
    assert all(place["x"] + place["w"] <= 24 for place in places)


@pytest.mark.parametrize(("where", "expression"), list(chart_files.panel_expressions()))
def test_an_expression_obeys_the_variables(where: str, expression: str) -> None:
    for selector in chart_files.selectors(expression):
        # Those of the process too: other programs have metrics of the same names, in every namespace there is.
        own = "instance" if where.startswith("hosts") else "namespace"
        assert f'cluster=~"$cluster", {own}=~"${own}"' in selector, where
        if where.startswith("engines"):
            assert 'model_name=~"$model_name"' in selector, where
    assert set(re.findall(r"\[(.*?)\]", expression)) <= {"$__rate_interval"}
    assert expression.count("(") == expression.count(")")


def test_organisations_keys_and_users_are_no_labels() -> None:
    """They come from usage; a text says so, with a query of the log that a router with USAGE=log writes."""
    (text,) = [panel for panel in DASHBOARDS["router"]["panels"] if panel["type"] == "text"]
    query = re.findall("```\n(.*?)```", text["options"]["content"], re.DOTALL)

    assert "organisation" in query[0]
    for name in re.findall(r"unwrap (\w+)", query[0]) + re.findall(r"by \((\w+)\)", query[0]):
        assert name in usage_fields(), name
    for where, expression in chart_files.panel_expressions():
        assert not re.search(r"\b(organisation|user|key|key_id)\b", expression), where


def usage_fields() -> set[str]:
    schema = orjson.loads((ROOT / "docs/schemas/usage-record.json").read_bytes())
    return {*schema["properties"]}


def test_a_panel_needs_no_rules() -> None:
    """Dashboards may be on where monitoring.prometheusRule is not."""
    recorded = chart_files.recorded(RULES)

    assert [where for where, expression in chart_files.panel_expressions() if metrics(expression) & recorded] == []


def test_replicas_of_the_same_name_in_two_clusters_are_two_lines() -> None:
    (table,) = [panel for panel in panels(DASHBOARDS["router"]) if panel["type"] == "table"]

    assert all("by (cluster, namespace, model_name, backend)" in target["expr"] for target in table["targets"])


def test_the_engines_to_choose_from_are_both_kinds() -> None:
    for variable in DASHBOARDS["engines"]["templating"]["list"][1:]:
        assert '{__name__=~"vllm:num_requests_running|tgi_queue_size"' in variable["query"]["query"], variable["name"]


def test_the_metrics_of_an_expression_are_found() -> None:
    expression = (
        'sum by (le, a) (rate(x_bucket{l="}or y{", m!="z"}[5m])) / on (job) group_left () b:c > bool 0.1 or time()'
    )

    assert metrics(expression) == {"x_bucket", "b:c"}
    assert chart_files.selectors(expression) == ['x_bucket{l="}or y{", m!="z"}', "b:c{}"]


async def page_of_everything(start_engine: Start, start_router: Start, folder: Path) -> str:
    """What a router exports that has every feature on, and has had a request."""
    settings = everything(folder, "http://127.0.0.1:1")
    served = await start_router(await start_engine(), entry={"price": PRICE}, **settings)
    served.client.headers.update(HEADERS)
    assert (await served.chat()).status_code == 200
    # Counted once the answer is sent.
    await until(lambda: served.lines)
    page: str = (await served.client.get("/metrics")).text
    return page


@pytest.mark.anyio
async def test_what_is_asked_for_is_exported(start_engine: Start, start_router: Start, tmp_path: Path) -> None:
    page = await page_of_everything(start_engine, start_router, tmp_path)
    exported = sample_names(page) | sample_names(Telemetry("m", 10).page().decode()) | sample_names(TGI)
    async with served(tmp_path, f"sqlite:///{tmp_path}/control-plane.sqlite3") as plane:
        exported |= sample_names((await plane.client.get("/metrics")).text)
    async with node_exporter(tmp_path) as url, httpx.AsyncClient(trust_env=False) as client:
        exported |= sample_names((await client.get(f"{url}/metrics")).text)
    exported |= chart_files.recorded(RULES) | sample_names(DCGM)
    expressions = [*chart_files.panel_expressions(), *((str(rule), rule["expr"]) for rule in RULES)]
    for where, expression in expressions:
        assert metrics(expression), where
        assert metrics(expression) <= exported, where

    named = re.findall(r"`?\b((?:inference_api|tgi)_[a-z_]+|vllm:[a-z_]+)", (ROOT / "k8s/runbook.md").read_text())
    families = {re.sub("_(bucket|sum|count)$", "", name) for name in exported}
    assert set(named) <= exported | families


@pytest.mark.anyio
async def test_every_metric_of_the_router_is_shown_or_watched(
    start_engine: Start, start_router: Start, tmp_path: Path
) -> None:
    """What nobody looks at would cost for nothing."""
    page = await page_of_everything(start_engine, start_router, tmp_path)
    exported = {name for name in sample_names(page) if name.startswith("inference_api_")}
    used = set().union(*(metrics(expression) for _, expression in chart_files.panel_expressions()))
    used |= set().union(*(metrics(rule["expr"]) for rule in RULES))
    histograms = {re.sub("_(bucket|sum|count)$", "", name) for name in used}

    assert {name for name in exported - used if re.sub("_(bucket|sum|count)$", "", name) not in histograms} == set()
