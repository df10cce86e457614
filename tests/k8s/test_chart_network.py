"""Selectors, ports and rights: what is to meet does, and nothing else may."""

from urllib.parse import urlsplit

import pytest

from inference_api import __version__
from tests.k8s import chart_files
from tests.k8s.chart_values import NAMESPACE
from tests.k8s.charts import (
    CLUSTERS,
    INSTALLS,
    WORKLOADS,
    Installed,
    Json,
    catalogue,
    component_of,
    environ,
    every_install,
    installed,
    matches,
    require_helm,
    router_pod,
    settings,
    templates,
    values_of,
)

require_helm()
pytestmark = pytest.mark.timeout(600)


@every_install
def test_workloads_select_their_own_pods_and_no_others(name: str) -> None:
    found = installed(name)

    for workload in (o for o in found.objects if o["kind"] in WORKLOADS):
        selector = workload["spec"]["selector"]["matchLabels"]
        selected = [template for template in templates(found) if matches(selector, template["metadata"]["labels"])]
        assert selected == [workload["spec"]["template"]], workload["metadata"]["name"]
        assert not any(matches(selector, hook["metadata"]["labels"]) for hook in found.hooks)


def selectors(name: str) -> dict[str, dict[str, str]]:
    """Those of the workloads, which are immutable: an upgrade that changed one would fail."""
    found: dict[str, dict[str, str]] = {}
    for workload in (o for o in installed(name).objects if o["kind"] in WORKLOADS):
        selector = dict(workload["spec"]["selector"]["matchLabels"])
        # There may be several engines, each of a model.
        found[selector.get("inference-api/service", component_of(workload))] = selector
    return found


def test_selectors_do_not_change_with_the_values() -> None:
    known: dict[str, dict[str, str]] = {}
    for name in [*INSTALLS, "labels"]:
        for workload, selector in selectors(name).items():
            assert known.setdefault(workload, selector) == selector, (name, workload)

    assert known.keys() >= {"router", "registry", "gpt2", "llama-3-8b", "mistral-7b"}


def test_selectors_change_with_name_override_alone() -> None:
    named = selectors("another name")

    assert {selector.pop("app.kubernetes.io/name") for selector in named.values()} == {"gateway"}
    before = selectors("labels")
    assert {selector.pop("app.kubernetes.io/name") for selector in before.values()} == {"inference-api"}
    assert named == before


@every_install
def test_services_lead_to_ports_of_one_workload(name: str) -> None:
    found = installed(name)

    for service in found.of("Service"):
        (template,) = [t for t in templates(found) if matches(service["spec"]["selector"], t["metadata"]["labels"])]
        open_ports = {port["name"] for port in template["spec"]["containers"][0]["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= open_ports, service["metadata"]["name"]


@every_install
def test_budgets_and_network_policies_select_pods_and_their_ports(name: str) -> None:
    found = installed(name)

    for document in [*found.of("PodDisruptionBudget"), *found.of("NetworkPolicy")]:
        spec = document["spec"]
        selector = (spec.get("podSelector") or spec["selector"])["matchLabels"]
        selected = [t for t in templates(found) if matches(selector, t["metadata"]["labels"])]
        assert selected, document["metadata"]["name"]
        if document["kind"] == "PodDisruptionBudget":
            assert spec["unhealthyPodEvictionPolicy"] == "AlwaysAllow"
        for rule in spec.get("ingress", ()):
            for template in selected:
                open_ports = {port["name"] for port in template["spec"]["containers"][0]["ports"]}
                assert {port["port"] for port in rule["ports"]} <= open_ports


@every_install
def test_a_policys_peers_in_the_release_exist_and_have_the_port(name: str) -> None:
    found = installed(name)
    pods = [(meta["labels"], spec) for _, meta, spec in found.pods()]

    for policy in found.of("NetworkPolicy"):
        for rule in [*policy["spec"].get("ingress", ()), *policy["spec"].get("egress", ())]:
            for peer in [*rule.get("from", ()), *rule.get("to", ())]:
                if "podSelector" not in peer:
                    continue
                peers = [spec for labels, spec in pods if matches(peer["podSelector"]["matchLabels"], labels)]
                assert peers, policy["metadata"]["name"]
                if "to" in rule:
                    ports = {port["name"] for port in peers[0]["containers"][0]["ports"]}
                    assert {port["port"] for port in rule["ports"]} <= ports


def rules_of(found: Installed, component: str, direction: str) -> list[Json]:
    """The rules of a component's policy, helm tests included."""
    policies = [o for o in (*found.objects, *found.hooks) if o["kind"] == "NetworkPolicy"]
    (policy,) = [policy for policy in policies if component_of(policy) == component]
    rules: list[Json] = policy["spec"].get(direction, [])
    return rules


@pytest.mark.parametrize("component", ["router", "registry", "control", "migration", "engine", "test"])
def test_a_mesh_may_take_all_connections_on_its_port(component: str) -> None:
    """In ambient mode they come in on 15008, whoever they are from, and go out to it."""
    through = {"ports": [{"port": 15008, "protocol": "TCP"}]}
    found = installed("in a mesh, a control plane" if component in ("control", "migration") else "in a mesh")

    assert through in rules_of(found, component, "egress")
    assert through in rules_of(found, component, "ingress") or component in ("migration", "test")
    for policy in installed("default on 1.37").of("NetworkPolicy"):
        assert "15008" not in str(policy)


@every_install
def test_helm_tests_may_ask_where_nothing_else_is_allowed(name: str) -> None:
    found = installed(name)
    if not found.of("NetworkPolicy", "router"):
        return
    rules = rules_of(found, "test", "egress")
    asked = {
        rule["to"][0]["podSelector"]["matchLabels"]["app.kubernetes.io/component"]: {p["port"] for p in rule["ports"]}
        for rule in rules
        if "to" in rule
    }
    tested = {hook["metadata"]["name"].rpartition("-")[2] for hook in found.hooks if hook["kind"] == "Pod"}

    assert asked == {name: {"http"} if name == "control" else {"http", "ops"} for name in tested}
    assert any(port["port"] == 53 for rule in rules for port in rule["ports"])
    assert rules_of(found, "test", "ingress") == []


def test_engines_may_download_where_nothing_else_is_allowed() -> None:
    ports = [p["port"] for rule in rules_of(installed("engines on 1.37"), "engine", "egress") for p in rule["ports"]]

    assert {53, 443} <= {*ports}
    (policy,) = installed("gke-europe").of("NetworkPolicy", "engine")
    assert policy["spec"]["policyTypes"] == ["Ingress"]


@every_install
def test_who_reads_metrics_cannot_reach_what_takes_changes(name: str) -> None:
    found = installed(name)
    if not found.of("NetworkPolicy", "registry"):
        return
    for rule in rules_of(found, "registry", "ingress"):
        if {port["port"] for port in rule["ports"]} == {"http"}:
            known = {
                peer.get("podSelector", {}).get("matchLabels", {}).get("app.kubernetes.io/component")
                for peer in rule["from"]
            }
            more = values_of(name).get("registry", {}).get("networkPolicy", {}).get("from", [])
            assert known <= {"router", "test", *([None] if more else [])}


@every_install
def test_the_router_may_connect_to_what_it_is_told_to(name: str) -> None:
    found = installed(name)
    policies = [
        policy["spec"] for policy in found.of("NetworkPolicy", "router") if "Egress" in policy["spec"]["policyTypes"]
    ]
    variables = {v["name"]: v.get("value", "") for v in router_pod(found)["containers"][0]["env"]}
    urls = {variables.get(name, "") for name in ("INFERENCE_API_REGISTRY_URL", "OTEL_EXPORTER_OTLP_ENDPOINT")} - {""}
    urls |= {backend.url for model in catalogue(found).values() for backend in model.backends}
    pods = {meta["labels"]["app.kubernetes.io/component"]: spec for _, meta, spec in found.pods()}

    for spec in policies:
        allowed: set[int] = set()
        for rule in spec["egress"]:
            for port in rule.get("ports", ()):
                if isinstance(port["port"], str):
                    (peer,) = [
                        pods[to["podSelector"]["matchLabels"]["app.kubernetes.io/component"]] for to in rule["to"]
                    ]
                    (number,) = [
                        p["containerPort"] for p in peer["containers"][0]["ports"] if p["name"] == port["port"]
                    ]
                    allowed.add(number)
                else:
                    assert "to" not in rule
                    allowed.add(port["port"])
        for url in urls:
            parts = urlsplit(url)
            assert (parts.port or {"http": 80, "https": 443}[parts.scheme]) in allowed, url


def test_there_is_an_egress_policy_with_each_kind_of_url() -> None:
    """What the test above would not see if no values file had it: registry, collector, backends, the API server."""
    policies = [o["spec"].get("egress", ()) for n in INSTALLS for o in installed(n).of("NetworkPolicy", "router")]
    ports = [{port["port"] for rule in rules for port in rule.get("ports", ())} for rules in policies]

    assert {53, 5353, 443} in ports
    assert {53, 5353, "http", 8000, 443, 4318} in ports
    assert {53, 5353, "http", 8000, 443, 6443} in ports


@every_install
def test_metrics_and_the_registry_are_not_for_everybody(name: str) -> None:
    found = installed(name)

    for policy in found.of("NetworkPolicy"):
        for rule in policy["spec"].get("ingress", ()):
            if component_of(policy) != "router" or rule["ports"][0]["port"] == "ops":
                assert rule["from"], policy["metadata"]["name"]
    for service in found.of("Service", "router"):
        if service["spec"].get("type", "ClusterIP") != "ClusterIP":
            assert [port["name"] for port in service["spec"]["ports"]] == ["http"]


@every_install
def test_what_stands_in_front_leads_to_the_port_that_it_is_for(name: str) -> None:
    """Of clients, or of people: never both by one host."""
    found = installed(name)
    wanted = {"router": "http", "control": "api"}
    hosts: dict[str, set[str]] = {component: set() for component in wanted}
    ports = {o["metadata"]["name"]: {p["name"]: p["port"] for p in o["spec"]["ports"]} for o in found.of("Service")}

    for ingress in found.of("Ingress"):
        hosts[component_of(ingress)] |= {rule["host"] for rule in ingress["spec"]["rules"]}
        for path in (path for rule in ingress["spec"]["rules"] for path in rule["http"]["paths"]):
            target = path["backend"]["service"]
            assert target["port"] == {"name": wanted[component_of(ingress)]}
            assert target["port"]["name"] in ports[target["name"]]
    for route in found.of("HTTPRoute"):
        hosts[component_of(route)] |= set(route["spec"].get("hostnames", ()))
        (rule,) = route["spec"]["rules"]
        (target,) = rule["backendRefs"]
        assert ports[target["name"]][wanted[component_of(route)]] == target["port"]
        if component_of(route) == "control":
            continue
        longest = max(settings(found).stream_timeout, settings(found).total_timeout)
        # GKE's Gateway refuses a route with timeouts.
        assert ("timeouts" in rule) == (name != "gke-europe")
        assert int(rule.get("timeouts", {"request": "999999s"})["request"].removesuffix("s")) > longest
    assert not hosts["router"] & hosts["control"]


@every_install
def test_monitors_find_what_they_scrape(name: str) -> None:
    found = installed(name)

    for monitor in found.of("ServiceMonitor"):
        (endpoint,) = monitor["spec"]["endpoints"]
        assert endpoint["honorLabels"] is False
        selector = monitor["spec"]["selector"]["matchLabels"]
        (service,) = [o for o in found.of("Service") if matches(selector, o["metadata"]["labels"])]
        assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
        assert monitor["spec"]["jobLabel"] in service["metadata"]["labels"]
        # A router that drains, or cannot start, is what one wants to see.
        assert service["spec"].get("publishNotReadyAddresses", False) == (component_of(monitor) == "router")
    for monitor in found.of("PodMonitor"):
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        # vLLM's own model_name stays.
        assert endpoint["honorLabels"] is True
        selector = monitor["spec"]["selector"]["matchLabels"]
        if monitor["spec"]["namespaceSelector"]["matchNames"] != [NAMESPACE]:
            continue
        engines = [t for t in templates(found) if matches(selector, t["metadata"]["labels"])]
        assert engines
        for engine in engines:
            assert engine["metadata"]["labels"]["app.kubernetes.io/component"] == "engine"
            assert monitor["spec"]["jobLabel"] in engine["metadata"]["labels"]
            assert endpoint["port"] in {port["name"] for port in engine["spec"]["containers"][0]["ports"]}


# Clusters of their own kind


@pytest.mark.parametrize(("name", "kept"), [("gke-europe", 600), ("eks-us", 600)])
def test_the_balancer_closes_idle_connections_first(name: str, kept: int) -> None:
    """A request that meets a connection which the pod just closed is a 502."""
    found = installed(name)
    balancer = [
        int(value.partition("idle_timeout.timeout_seconds=")[2])
        for ingress in found.of("Ingress")
        for value in ingress["metadata"]["annotations"].values()
        if "idle_timeout" in value
    ]

    assert balancer in ([], [kept])
    assert settings(found).keepalive_timeout > kept


def test_an_alb_asks_and_waits_as_it_should() -> None:
    found = installed("eks-us")
    (ingress,) = found.of("Ingress")
    told = {key.rpartition("/")[2]: value for key, value in ingress["metadata"]["annotations"].items()}
    read = settings(found)
    (container,) = router_pod(found)["containers"]

    assert (int(told["healthcheck-port"]), told["healthcheck-path"]) == (
        read.ops_port,
        container["readinessProbe"]["httpGet"]["path"],
    )
    assert int(told["load-balancer-attributes"].rpartition("=")[2]) > read.total_timeout
    assert int(told["target-group-attributes"].rpartition("=")[2]) >= read.drain_timeout
    # It notices that a pod is not ready before that stops to accept.
    noticed = int(told["healthcheck-interval-seconds"]) * int(told["unhealthy-threshold-count"])
    assert noticed < read.drain_delay


@pytest.mark.parametrize("name", CLUSTERS)
def test_clusters_name_the_release_that_they_are_for(name: str) -> None:
    """Whatever is built later, an overlay installs what it was tried with."""
    image = values_of(name)["image"]

    assert image.get("digest") or image["tag"] == __version__


def test_googles_load_balancer_asks_what_the_router_answers() -> None:
    """By itself it asks the port of clients, and gives up after 30 s."""
    found = installed("gke-europe")
    health, backend = found.one("HealthCheckPolicy")["spec"], found.one("GCPBackendPolicy")["spec"]
    (container,) = router_pod(found)["containers"]
    read = settings(found)

    for policy in (health, backend):
        target = policy["targetRef"]
        assert (target["kind"], target["name"]) == ("Service", found.one("HTTPRoute")["metadata"]["name"])
    asked = health["default"]["config"]["httpHealthCheck"]
    assert {"port": asked["port"], "path": asked["requestPath"]} == {
        "port": read.ops_port,
        "path": container["readinessProbe"]["httpGet"]["path"],
    }
    assert backend["default"]["timeoutSec"] > read.stream_timeout
    assert backend["default"]["connectionDraining"]["drainingTimeoutSec"] >= read.drain_timeout
    # It learns that a pod is not ready before that stops to accept.
    assert health["default"]["checkIntervalSec"] * health["default"]["unhealthyThreshold"] < read.drain_delay


def test_googles_health_checks_are_let_in() -> None:
    rules = [
        rule for policy in installed("gke-europe").of("NetworkPolicy", "router") for rule in policy["spec"]["ingress"]
    ]
    peers = [peer for rule in rules if rule["ports"][0]["port"] == "ops" for peer in rule["from"]]

    assert {peer["ipBlock"]["cidr"] for peer in peers if "ipBlock" in peer} == {"130.211.0.0/22", "35.191.0.0/16"}


def test_googles_prometheus_reads_kinds_of_its_own() -> None:
    found = installed("gke-europe")
    pods = [(meta["labels"], spec) for _, meta, spec in found.pods()]
    scraped = set()

    for monitoring in found.of("PodMonitoring"):
        (endpoint,) = monitoring["spec"]["endpoints"]
        selector = monitoring["spec"]["selector"]["matchLabels"]
        for labels, spec in pods:
            if matches(selector, labels):
                scraped.add(labels["app.kubernetes.io/component"])
                assert endpoint["port"] in {port["name"] for port in spec["containers"][0]["ports"]}
    assert scraped == {"router", "registry", "engine"}
    assert not {"ServiceMonitor", "PodMonitor", "PrometheusRule"} & {o["kind"] for o in found.objects}
    told = [rule for rules in found.of("Rules") for group in rules["spec"]["groups"] for rule in group["rules"]]
    for rule in (rule for rule in told if "alert" in rule):
        rule["annotations"]["runbook_url"] = rule["annotations"].pop("runbook")
    # Without a control plane, none of its alerts: its absence would be one.
    assert {rule.get("record") or rule["alert"]: rule for rule in told} == {
        name: rule
        for rule in chart_files.rules()
        if not (name := rule.get("record") or rule["alert"]).startswith("ControlPlane")
    }
    peers = [
        peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
        for policy in found.of("NetworkPolicy")
        for rule in policy["spec"]["ingress"]
        for peer in rule.get("from", ())
        if "namespaceSelector" in peer
    ]
    assert peers == ["gmp-system"] * 3


@every_install
def test_a_bundle_of_certificates_that_is_named_is_mounted(name: str) -> None:
    (container,) = router_pod(installed(name))["containers"]
    named = {v["value"] for v in container["env"] if v["name"] == "SSL_CERT_FILE"}
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}

    assert {path.rpartition("/")[0] for path in named} <= mounts
    if ".internal" in environ(installed(name)).get("INFERENCE_API_REGISTRY_URL", ""):
        assert named, "a private CA that nobody would trust"


# Rights


@every_install
def test_rights_are_only_those_to_watch_endpointslices(name: str) -> None:
    found = installed(name)
    discovery = values_of(name).get("router", {}).get("discovery", {})
    namespaces = {NAMESPACE, *discovery.get("namespaces", ())} if discovery.get("mode") == "endpointslices" else set()

    # Those of the control plane are held by test_control_rights.py.
    assert {role["metadata"]["namespace"] for role in found.of("Role", "router")} == namespaces
    assert {binding["metadata"]["namespace"] for binding in found.of("RoleBinding", "router")} == namespaces
    for role in found.of("Role", "router"):
        (rule,) = role["rules"]
        verbs = ["get", "list", "watch"]
        assert rule == {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": verbs}
    for binding in found.of("RoleBinding", "router"):
        (subject,) = binding["subjects"]
        assert subject["namespace"] == NAMESPACE
        assert subject["name"] == router_pod(found)["serviceAccountName"]
        assert binding["roleRef"]["name"] in {role["metadata"]["name"] for role in found.of("Role", "router")}


@every_install
def test_backends_in_other_namespaces_are_within_the_rights(name: str) -> None:
    found = installed(name)
    if not found.of("Role", "router"):
        return
    places = {backend.host.split(".")[1] for model in catalogue(found).values() for backend in model.backends}

    assert places <= {role["metadata"]["namespace"] for role in found.of("Role", "router")}
