"""Helm takes the chart: every values file installs and upgrades, and what cannot be is refused in one line."""

import json
import re
from typing import Any

import pytest
import yaml

from inference_api import __version__
from tests.k8s import charts
from tests.k8s.chart_values import BAD_MODELS, DASHBOARD, LIVE, NAMESPACE, REFUSED, RULE
from tests.k8s.charts import CHART, CLUSTERS, INSTALLS, VALUES, installed, outcome

charts.require_helm()
pytestmark = pytest.mark.timeout(600)

KINDS = ["Deployment", "Service", "ServiceAccount", "ConfigMap", "PodDisruptionBudget", "NetworkPolicy"]


def names(kind: str, name: str) -> set[str]:
    return {document["metadata"]["name"] for document in installed(name).of(kind)}


@pytest.mark.parametrize("name", INSTALLS)
def test_it_installs(name: str) -> None:
    """Each object is what the strict schema of the release says, the pods of `helm test` too."""
    found = installed(name)

    assert found.of("Deployment", "router")
    assert len({(o["kind"], o["metadata"]["name"], o["metadata"]["namespace"]) for o in found.objects}) == len(
        found.objects
    )


def test_there_is_a_values_file_for_each_thing_that_can_be_on() -> None:
    """What no file turns on would never be tried."""
    policies = {"keys", "policy", "control-plane", "control", "control-sqlite", "control-engines"}
    assert set(VALUES) == {"default", "minimal", "full", "keda", "endpointslices", "engines", "openshift"} | policies
    assert set(CLUSTERS) == {"gke-europe", "eks-us", "onprem-openshift", "large"}
    kinds = {document["kind"] for name in INSTALLS for document in installed(name).objects}
    optional = (
        "Secret HorizontalPodAutoscaler ScaledObject Ingress HTTPRoute Role RoleBinding ServiceMonitor PodMonitor Job"
    )
    assert kinds >= {*KINDS, *optional.split(), "PersistentVolumeClaim"}


def test_one_install_is_a_router_with_a_registry_and_a_static_fallback() -> None:
    found = installed("default on 1.37")

    assert {document["kind"] for document in found.objects} == set(KINDS)
    catalogue = yaml.safe_load(found.one("ConfigMap")["data"]["catalogue.yaml"])
    assert [model["name"] for model in catalogue["models"]] == ["gpt2", "llama-3-8b", "mistral-7b"]


def test_with_engines_it_is_all_there_is_to_install() -> None:
    models = {"llama-3-8b", "mistral-7b", "gpt2"}

    assert names("Deployment", "openshift on 1.37") == models | {"inference-api", "inference-api-registry"}
    assert names("Service", "gke-europe") > models
    caches = {f"{model}-cache" for model in models}
    assert names("PersistentVolumeClaim", "gke-europe") == caches | {"inference-api-registry"}


def test_a_cluster_without_the_operators_takes_what_is_on_by_default() -> None:
    assert installed("without custom kinds").of("Deployment")


def test_an_old_cluster_is_told_apart() -> None:
    assert "requires kubeVersion: >=1.29.0-0" in outcome("an old cluster").error


def test_an_upgrade_changes_what_it_should_and_no_more() -> None:
    before, after = (
        {(o["kind"], o["metadata"]["name"]): o for o in objects}
        for objects in (installed("upgrade").objects, installed("upgrade").upgraded)
    )

    changed = {place for place in before if before[place].get("spec") != after[place].get("spec")}
    assert changed == {("Deployment", "inference-api")}
    assert after["Deployment", "inference-api"]["spec"]["replicas"] == 3


def test_what_took_long_to_download_outlives_the_release() -> None:
    left = installed("removal").left

    assert {(o["kind"], o["metadata"]["name"]) for o in left} == {
        ("PersistentVolumeClaim", f"{model}-cache") for model in ("llama-3-8b", "mistral-7b", "gpt2")
    }


@pytest.mark.parametrize("name", [*REFUSED, *BAD_MODELS, *LIVE])
def test_values_that_cannot_be_are_refused_in_one_line(name: str) -> None:
    *values, told = (REFUSED | BAD_MODELS | LIVE)[name]
    header = "values don't meet the specifications of the schema", "inference-api:", "execution error at"

    lines = re.sub("^(install|upgrade) failed: ", "", outcome(name).error).strip().splitlines()
    lines = [line for line in lines if line.strip() and not line.startswith(header)]

    assert values
    assert len(lines) == 1, lines
    assert told in lines[0]


def test_helm_lint_has_no_warning() -> None:
    """1 is information: an icon is recommended."""
    assert all(message["Severity"] <= 1 for message in charts.results()["lint"]["lint"]["Messages"] or ())


def test_rules_come_from_plain_files() -> None:
    """Their templates are Prometheus' own; an alert that is not wanted is left out, and so is a group without any."""
    (rule,) = installed("with files").of("PrometheusRule")

    link = "https://example.com/r/k8s/runbook.md#some"
    expected: dict[str, Any] = RULE | {
        "annotations": {"summary": "{{ $value }} of {{ $labels.pod }}", "runbook_url": link}
    }
    assert rule["spec"] == {"groups": [{"name": "first", "rules": [expected]}]}


def test_dashboards_come_from_plain_files() -> None:
    found = installed("with files")

    (dashboard,) = [o for o in found.of("ConfigMap") if o["metadata"]["name"] == "inference-api-dashboard-some"]
    assert dashboard["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert dashboard["data"] == {"some.json": DASHBOARD}


def test_every_rule_and_dashboard_of_the_chart_is_installed() -> None:
    found, control = installed("full on 1.37"), installed("control on 1.37")
    files = {path.name: path.read_text() for path in (CHART / "files").glob("*/*.*")}

    told = {group["name"]: group for rule in control.of("PrometheusRule") for group in rule["spec"]["groups"]}
    without = {group["name"] for rule in found.of("PrometheusRule") for group in rule["spec"]["groups"]}
    assert told.keys() - without == {"inference-api.control-plane"}
    # A link only where the repository is known; until then the place in it.
    for rule in (rule for group in told.values() for rule in group["rules"] if "alert" in rule):
        rule["annotations"]["runbook_url"] = rule["annotations"].pop("runbook")
    maps = [o["data"] for o in found.of("ConfigMap") if "dashboard" in o["metadata"]["name"]]
    shown = {name: text for data in maps for name, text in data.items()}

    assert told == {
        group["name"]: group
        for name, text in files.items()
        if name.endswith(".yaml")
        for group in yaml.safe_load(text)["groups"]
    }
    assert {name: json.loads(text) for name, text in shown.items()} == {
        name: json.loads(text) for name, text in files.items() if name.endswith(".json")
    }


def test_the_notes_say_where_it_is_and_when_a_pod_is_gone() -> None:
    notes = installed("default on 1.37").notes

    assert f"http://inference-api.{NAMESPACE}.svc/v1" in notes
    assert "The registry takes no changes" in notes
    assert "is gone after 600 s at the latest" in notes
    assert "WARNING" not in notes


def test_the_notes_warn_of_a_router_that_others_reach() -> None:
    """It asks nobody for a key."""
    (warning,) = [line for line in installed("full on 1.37").notes.splitlines() if "WARNING" in line]

    assert "a Service of type LoadBalancer and an Ingress and an HTTPRoute may be reached from outside" in warning
    assert "loadBalancerSourceRanges, now 192.0.2.0/24)" in installed("full on 1.37").notes
    assert "WARNING: an Ingress may be reached" in installed("eks-us").notes


def test_the_notes_can_be_pasted_where_the_token_is_in_a_secret() -> None:
    notes = installed("full on 1.37").notes

    assert """get secret registry -o go-template='{{index .data "key" | base64decode}}')""" in notes


def test_what_a_release_does_not_know_is_left_out() -> None:
    """trafficDistribution came with 1.30."""
    old, new = (installed(f"full on {release}").one("Service", "registry")["spec"] for release in ("1.29", "1.37"))
    assert old == new
    found = [installed(f"full on {release}").of("Service", "router") for release in ("1.29", "1.37")]

    assert [any("trafficDistribution" in service["spec"] for service in services) for services in found] == [
        False,
        True,
    ]


def test_a_wish_that_a_release_would_refuse_is_left_out() -> None:
    """PreferSameNode and PreferSameZone came with 1.34; before they would fail the whole install."""
    services = [installed(f"near on {release}").of("Service", "router") for release in ("1.33", "1.34")]
    told = [{service["spec"].get("trafficDistribution") for service in pair} for pair in services]

    assert told == [{None}, {None, "PreferSameNode"}]


@pytest.mark.parametrize("name", ["a long name", "default on 1.37"])
def test_names_are_short_enough_for_what_is_made_of_them(name: str) -> None:
    found = installed(name)

    assert max(len(o["metadata"]["name"]) for o in found.objects) <= 63


def test_a_workload_that_does_not_select_its_pods_would_be_noticed() -> None:
    assert "`selector` does not match template `labels`" in outcome("labels that break selectors").error


def test_the_chart_has_the_version_of_the_app() -> None:
    """One number for chart, image and app, so that nobody has to look up which belongs to which."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())

    assert chart["version"] == chart["appVersion"] == __version__


@pytest.mark.parametrize("name", INSTALLS)
def test_the_default_namespace_is_nowhere_assumed(name: str) -> None:
    """All is where the release is, but for the Roles in the namespaces of the backends."""
    elsewhere = {o["kind"] for o in installed(name).objects if o["metadata"]["namespace"] != NAMESPACE}

    assert elsewhere <= {"Role", "RoleBinding"}
