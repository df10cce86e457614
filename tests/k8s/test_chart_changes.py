"""What a release becomes: upgrades and rollbacks on what is there, by Helm 3's way and by server-side apply."""

import json

import pytest

from inference_api.routing.catalogue import parse_catalogue
from tests.k8s.chart_values import BAD_MODELS, CHANGES, NAMESPACE
from tests.k8s.charts import Installed, Json, installed, outcome, require_helm

require_helm()
pytestmark = pytest.mark.timeout(600)


def one(objects: list[Json], kind: str, name: str) -> Json:
    (found,) = [o for o in objects if o["kind"] == kind and o["metadata"]["name"] == name]
    return found


def router_replicas(objects: list[Json]) -> int:
    replicas: int = one(objects, "Deployment", "inference-api")["spec"]["replicas"]
    return replicas


def variables(found: Installed, kind: str, name: str) -> list[Json]:
    (container,) = one(found.objects, kind, name)["spec"]["template"]["spec"]["containers"]
    listed: list[Json] = container["env"]
    return listed


@pytest.mark.parametrize("ssa", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_what_may_change_does(name: str, ssa: bool) -> None:
    """The fake API server refuses what a real one does: claims, selectors, what a StatefulSet says of its claims."""
    assert installed(f"{name}, {ssa=}").upgraded


def test_a_larger_volume_is_one() -> None:
    claim = one(installed("a larger registry, ssa=True").upgraded, "PersistentVolumeClaim", "inference-api-registry")

    assert claim["spec"]["resources"]["requests"]["storage"] == "2Gi"
    assert claim["metadata"]["annotations"]["backup"] == "daily"


def test_a_change_of_models_restarts_no_router() -> None:
    """They read the catalogue again themselves; the registry, which nobody else can change, is filled anew."""
    found = installed("models, ssa=True")
    pods = {
        name: [one(objects, "Deployment", name)["spec"]["template"] for objects in (found.objects, found.upgraded)]
        for name in ("inference-api", "inference-api-registry")
    }
    catalogues = [one(o, "ConfigMap", "inference-api-catalogue")["data"] for o in (found.objects, found.upgraded)]

    assert catalogues[0] != catalogues[1]
    assert pods["inference-api"][0] == pods["inference-api"][1]
    assert pods["inference-api-registry"][0] != pods["inference-api-registry"][1]


# Who owns what


@pytest.mark.parametrize("name", ["an HPA from now on", "an HPA from now on, applied", "KEDA from now on"])
def test_turning_a_scaler_on_takes_no_pod_away(name: str) -> None:
    """`replicas` that an upgrade removes are 1 until the scaler acts, and a drain under load in the meantime."""
    assert router_replicas(installed(name).upgraded) == 5


@pytest.mark.parametrize("name", ["a rollback with an HPA", "an HPA turned on long ago"])
def test_a_rollback_leaves_the_scaler_its_number(name: str) -> None:
    """By server-side apply a manifest that has `replicas` would be in conflict with the HPA that owns them."""
    expected = {"a rollback with an HPA": 9, "an HPA turned on long ago": 9}

    assert router_replicas(installed(name).left) == expected[name]


def test_numbers_that_are_left_to_others_are_in_no_manifest() -> None:
    found = installed("scaled by others")

    scaled = {o["metadata"]["name"]: "replicas" in o["spec"] for o in found.of("Deployment")}
    assert scaled == {
        "inference-api": False,
        "gpt2": False,
        "llama-3-8b": True,
        "mistral-7b": True,
        "inference-api-registry": True,
    }


def test_a_variable_has_one_value_and_it_is_the_users() -> None:
    """By server-side apply the API server refuses a name that is given twice; before, the last one counted."""
    found = installed("variables of our own")
    expected = {
        ("gpt2", "HF_HOME"): "/models",
        ("inference-api", "BACKEND_TOKEN"): "mine",
        ("inference-api", "OTEL_TRACES_SAMPLER"): "always_on",
        ("inference-api-registry", "REGISTRY_STUB_TOKEN"): "mine",
    }

    for (deployment, name), value in expected.items():
        listed = variables(found, "Deployment", deployment)
        assert [v.get("value") for v in listed if v["name"] == name] == [value]
        assert len({v["name"] for v in listed}) == len(listed)


# What others have


def test_a_service_of_another_release_is_not_taken() -> None:
    told = outcome("a Service of others").error

    assert "models.gpt2.deploy: the Service gpt2 is there already, of the release other: give backends" in told


def test_a_parent_chart_turns_it_on_and_off() -> None:
    assert installed("a parent's").of("Deployment", "router")
    assert not installed("a parent that does without").objects


@pytest.mark.parametrize("name", BAD_MODELS)
def test_the_router_would_refuse_what_the_chart_refuses_of_models(name: str) -> None:
    """Else the chart would be stricter than what it is for."""
    values: Json = {model: {} for model in ("gpt2", "llama-3-8b", "mistral-7b")} | BAD_MODELS[name][0]
    entries = [{"name": model, **entry} for model, entry in values.items()]

    assert parse_catalogue(json.loads(json.dumps({"models": entries}))).problems


def test_a_canary_is_a_model_with_its_own_image_and_a_share_of_another_ones_traffic() -> None:
    found = installed("a canary")
    images = {
        o["metadata"]["name"]: o["spec"]["template"]["spec"]["containers"][0]["image"]
        for o in found.of("Deployment", "engine")
    }
    (next_image,) = [images[name] for name in images if name == "gpt2-next"]

    # Its tag is not overruled by the digest of the image that all others have.
    assert next_image == "mirror.example.com/vllm/vllm-openai:v0.33.0"
    assert images["gpt2"].endswith(f"@sha256:{'0' * 64}")
    strategies = {o["metadata"]["name"]: o["spec"]["strategy"] for o in found.of("Deployment", "engine")}
    assert strategies["gpt2"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    assert strategies["gpt2-next"]["rollingUpdate"] == {"maxUnavailable": 1, "maxSurge": 0}
    services = {o["metadata"]["name"] for o in found.of("Service", "engine")}
    data = one(found.objects, "ConfigMap", "inference-api-catalogue")["data"]["catalogue.yaml"]
    assert {"gpt2", "gpt2-next"} <= services
    assert f"http://gpt2-next.{NAMESPACE}.svc:8000" in data
