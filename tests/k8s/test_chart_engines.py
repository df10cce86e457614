"""The engines that the chart runs: backends of their models, with their GPUs, and as patient as the routers."""

from urllib.parse import urlsplit

import pytest

from inference_api.app import build
from inference_api.core import Outside
from inference_api.observe.families import Families
from inference_api.settings import Settings
from tests.k8s.chart_values import NAMESPACE
from tests.k8s.charts import Installed, Json, catalogue, every_install, installed, require_helm

require_helm()
pytestmark = pytest.mark.timeout(600)


def engines(found: Installed) -> dict[str, Json]:
    return {o["metadata"]["name"]: o["spec"]["template"]["spec"] for o in found.of("Deployment", "engine")}


@every_install
def test_each_engine_is_a_backend_of_its_model(name: str) -> None:
    """By the headless Service's name and port, under the model name that the router sends."""
    found = installed(name)
    services = {o["metadata"]["name"]: o["spec"] for o in found.of("Service", "engine")}
    models = catalogue(found)

    assert services.keys() == engines(found).keys()
    for deployment in found.of("Deployment", "engine"):
        entry = models[deployment["spec"]["template"]["metadata"]["annotations"]["inference-api/model"]]
        (backend,) = entry.backends
        service = services[deployment["metadata"]["name"]]
        assert backend.discovery == "dns"
        assert backend.host == f"{deployment['metadata']['name']}.{NAMESPACE}.svc"
        assert urlsplit(backend.url).port == service["ports"][0]["port"]
        assert service["clusterIP"] == "None"
        assert service["ipFamilyPolicy"] == "SingleStack"
        args = deployment["spec"]["template"]["spec"]["containers"][0]["args"]
        if entry.engine == "vllm":
            assert f"--served-model-name={entry.served_model_name or entry.name}" in args


@every_install
def test_engines_have_their_gpus_as_a_limit_and_a_request(name: str) -> None:
    for engine in engines(installed(name)).values():
        resources = engine["containers"][0]["resources"]
        assert resources["limits"]["nvidia.com/gpu"] == resources["requests"]["nvidia.com/gpu"] >= 1
        assert any(toleration["key"] for toleration in engine["tolerations"])


def test_engines_are_split_over_their_gpus() -> None:
    found = engines(installed("engines on 1.37"))

    assert found.keys() == {"llama-3-8b", "mistral-7b", "meta-llama-llama-3-1-70b"}
    assert "--tensor-parallel-size=4" in found["meta-llama-llama-3-1-70b"]["containers"][0]["args"]
    assert "--num-shard=2" in found["mistral-7b"]["containers"][0]["args"]
    assert not any("parallel" in argument for argument in found["llama-3-8b"]["containers"][0]["args"])
    assert found["mistral-7b"]["nodeSelector"] == {"pool": "gpu", "gpu": "l4"}


def test_engines_listen_where_the_cluster_has_addresses() -> None:
    """In one that has IPv6 only, nobody would reach 0.0.0.0."""
    for name, host in {"engines on 1.37": "0.0.0.0", "marks": "::"}.items():
        arguments = {a for engine in engines(installed(name)).values() for a in engine["containers"][0]["args"]}
        assert {a for a in arguments if a.startswith("--host")} == {f"--host={host}", f"--hostname={host}"}


@every_install
def test_tgi_is_a_release_that_its_user_can_run(name: str) -> None:
    """From 3.1 on its libpython is where only root may read: huggingface/text-generation-inference#3082, open."""
    for engine in engines(installed(name)).values():
        (container,) = engine["containers"]
        if container["command"] == ["text-generation-launcher"]:
            assert engine["securityContext"]["runAsNonRoot"]
            assert container["image"].endswith(":3.0.1")


@every_install
def test_engines_are_asked_what_the_router_asks_them(name: str) -> None:
    for engine in engines(installed(name)).values():
        (container,) = engine["containers"]
        probes = [container[f"{key}Probe"] for key in ("startup", "readiness", "liveness")]
        assert {probe["httpGet"]["path"] for probe in probes} == {"/health"}
        # Twenty minutes at least: what is loaded may have to be downloaded first.
        assert probes[0]["periodSeconds"] * probes[0]["failureThreshold"] >= 1200


@every_install
def test_engines_end_as_slowly_as_routers(name: str) -> None:
    for engine in engines(installed(name)).values():
        (container,) = engine["containers"]
        (_, delay) = container["lifecycle"]["preStop"]["exec"]["command"]
        told = [a for a in container["args"] if a.startswith("--shutdown-timeout=")]
        drain = int(told[0].partition("=")[2]) if told else 570
        assert engine["terminationGracePeriodSeconds"] == int(delay) + drain + 15
        assert (container["command"] == ["vllm", "serve"]) == bool(told)


@every_install
def test_caches_are_claimed_once_and_kept(name: str) -> None:
    found = installed(name)

    for claim in found.of("PersistentVolumeClaim"):
        assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    for deployment in found.of("Deployment", "engine"):
        assert deployment["spec"]["strategy"]["rollingUpdate"] == {"maxUnavailable": 1, "maxSurge": 0}


# Scaling


def test_an_engine_wakes_by_what_waits_for_it_and_sleeps_when_nothing_is_in_flight() -> None:
    found = installed("engines with KEDA")
    scaled = {o["metadata"]["name"]: o["spec"] for o in found.of("ScaledObject", "engine")}
    deployments = {o["metadata"]["name"]: o["spec"] for o in found.of("Deployment", "engine")}
    (scraped,) = [
        o["metadata"]["name"] for o in found.of("Service") if "inference-api/scrape" in o["metadata"]["labels"]
    ]

    assert scaled.keys() == {"gpt2", "mistral-7b"}
    for name, spec in scaled.items():
        assert spec["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": name}
        # Two must not decide on it.
        assert "replicas" not in deployments[name]
    assert (scaled["gpt2"]["minReplicaCount"], scaled["gpt2"]["maxReplicaCount"]) == (0, 3)
    assert (scaled["mistral-7b"]["minReplicaCount"], scaled["mistral-7b"]["maxReplicaCount"]) == (1, 2)
    # Prometheus away: one pod, for what nobody can count.
    assert scaled["gpt2"]["fallback"]["replicas"] == 1
    (trigger,) = scaled["gpt2"]["triggers"]
    metrics = "inference_api_(queue_depth|requests_in_flight)"
    labels = f'model_name="gpt2", namespace="{NAMESPACE}", service="{scraped}"'
    assert trigger["metadata"]["query"] == f'sum({{__name__=~"{metrics}", {labels}}})'
    assert trigger["metadata"]["activationThreshold"] == "0"
    thresholds = {name: one["triggers"][0]["metadata"]["threshold"] for name, one in scaled.items()}
    assert thresholds == {"gpt2": "32", "mistral-7b": "7"}


def test_its_metrics_are_those_of_a_router_with_this_catalogue() -> None:
    """Also while nothing waits: no series would be no answer."""
    found = installed("engines with KEDA")
    router = build(Settings(), Outside(catalogue=catalogue(found)))
    collectors = [feature.collect for feature in router.features.values() if feature.collect]
    families = Families(router.core.metrics, router.core.registry.status, collectors=collectors)
    exposed = [(family.name, labels) for family in families() for labels, _ in family.series]

    assert ("inference_api_queue_depth", ("gpt2", "hold")) in exposed
    assert ("inference_api_queue_depth", ("gpt2", "queue")) in exposed
    assert ("inference_api_requests_in_flight", ("gpt2",)) in exposed


def test_without_it_no_engine_is_scaled() -> None:
    assert installed("engines on 1.37").of("ScaledObject") == []
