"""The pods that the chart makes: restricted, pinned, bounded, with all they mount; and how many there are."""

import pytest

from inference_api.app import build
from inference_api.observe.families import Families
from inference_api.settings import Settings
from tests.k8s.chart_values import NAMESPACE
from tests.k8s.charts import MARKED, every_install, installed, require_helm, values_of

require_helm()
pytestmark = pytest.mark.timeout(600)

# What the values files name and somebody else makes.
OTHERS = {"ServiceAccount": {"default"}, "ConfigMap": {"ca"}, "PersistentVolumeClaim": {"weights"}}


@every_install
def test_pods_keep_to_the_restricted_standard(name: str) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/, and a read-only root file system."""
    for pod, _, spec in installed(name).pods():
        assert spec["securityContext"]["runAsNonRoot"] is True, pod
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, pod
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys(), pod
        for container in (*spec["containers"], *spec.get("initContainers", ())):
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False, pod
            assert context["readOnlyRootFilesystem"] is True, pod
            assert context["capabilities"] == {"drop": ["ALL"]}, pod
            assert not any("hostPort" in port for port in container.get("ports", ())), pod
        allowed = {"name", "configMap", "emptyDir", "persistentVolumeClaim", "projected"}
        assert all(volume.keys() <= allowed for volume in spec.get("volumes", ())), pod


@every_install
def test_pods_run_as_the_images_user_unless_the_cluster_gives_one(name: str) -> None:
    for pod, _, spec in installed(name).pods():
        given = {spec["securityContext"].get(key) for key in ("runAsUser", "runAsGroup", "fsGroup")}
        assert given == ({None} if "openshift" in name else {10001}), pod


@every_install
def test_pods_get_a_token_only_to_use_the_api(name: str) -> None:
    values, found = values_of(name), installed(name)
    watches = values.get("router", {}).get("discovery", {}).get("mode") == "endpointslices"
    looks = values.get("control", {}).get("engines", {}).get("kubernetes", {}).get("enabled", False)

    tokens = [meta for _, meta, spec in found.pods() if spec["automountServiceAccountToken"]]

    components = {meta["labels"]["app.kubernetes.io/component"] for meta in tokens}
    assert components == {name for name, needs in {"router": watches, "control": looks}.items() if needs}
    assert all(account["automountServiceAccountToken"] is False for account in found.of("ServiceAccount"))


@every_install
def test_pods_do_not_take_services_for_settings(name: str) -> None:
    assert all(spec["enableServiceLinks"] is False for _, _, spec in installed(name).pods())


@every_install
def test_containers_say_what_they_need(name: str) -> None:
    """Memory is bounded; CPU is not, since being throttled delays every stream."""
    for pod, _, spec in installed(name).pods():
        for container in (*spec["containers"], *spec.get("initContainers", ())):
            resources = container["resources"]
            assert {"cpu", "memory"} <= resources["requests"].keys(), pod
            assert "memory" in resources["limits"], pod
            assert "cpu" not in resources["limits"], pod


@every_install
def test_containers_have_room_on_their_nodes_disk(name: str) -> None:
    """A pod whose emptyDirs fill a disk that it has no share of is evicted, with all of its streams."""
    for pod, meta, spec in installed(name).pods():
        if meta["labels"]["app.kubernetes.io/component"] == "test":
            continue
        (container, *_) = spec["containers"]
        dirs = [volume["emptyDir"] for volume in spec["volumes"] if "emptyDir" in volume]
        needed = sum(mebibytes(one["sizeLimit"]) for one in dirs if one.get("medium") != "Memory")
        assert mebibytes(container["resources"]["requests"]["ephemeral-storage"]) >= needed, pod


def mebibytes(quantity: str) -> float:
    return float(quantity[:-2]) * {"Mi": 1, "Gi": 1024}[quantity[-2:]]


@every_install
def test_images_are_pinned(name: str) -> None:
    for pod, _, spec in installed(name).pods():
        for container in (*spec["containers"], *spec.get("initContainers", ())):
            place, _, digest = container["image"].partition("@")
            tag = place.rpartition("/")[2].partition(":")[2]
            assert digest or tag, pod
            assert tag != "latest", pod


def test_images_are_pulled_as_they_are_to_be() -> None:
    policies = {
        (container["image"].partition("@")[0].rpartition("/")[2].partition(":")[0], container["imagePullPolicy"])
        for _, _, spec in installed("marks").pods()
        # Others beside the router are the user's own.
        for container in spec["containers"][:1]
    }

    of_all, of_one = MARKED["engines"]["images"], MARKED["models"]["tgi"]["deploy"]["image"]
    images = [MARKED["image"], of_all["vllm"], of_all["tgi"] | of_one]
    assert policies == {(image["repository"], image["pullPolicy"]) for image in images}


@every_install
def test_whatever_a_pod_mounts_is_there(name: str) -> None:
    found = installed(name)
    made = {kind: {o["metadata"]["name"] for o in found.of(kind)} | others for kind, others in OTHERS.items()}

    for pod, meta, spec in found.pods():
        volumes = {volume["name"]: volume for volume in spec.get("volumes", ())}
        mounts = {mount["name"] for container in spec["containers"] for mount in container.get("volumeMounts", ())}
        assert mounts == volumes.keys(), pod
        assert spec.get("serviceAccountName", "default") in made["ServiceAccount"], pod
        alone = meta["labels"]["app.kubernetes.io/component"] in ("test", "migration")
        assert ("serviceAccountName" in spec) != alone, pod
        for volume in volumes.values():
            assert volume.get("configMap", {"name": "ca"})["name"] in made["ConfigMap"], pod
            claim = volume.get("persistentVolumeClaim", {"claimName": "weights"})["claimName"]
            assert claim in made["PersistentVolumeClaim"], pod
            # One that says nothing but its name would be an empty directory.
            assert len(volume) == 2, pod


@every_install
def test_rollouts_never_take_a_router_away_first(name: str) -> None:
    spec = installed(name).one("Deployment", "router")["spec"]

    assert spec["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": "25%"}
    # A pod that ends at once after its start ends the rollout, not the release before it.
    assert spec["minReadySeconds"] >= 5
    assert spec["progressDeadlineSeconds"] > spec["template"]["spec"]["terminationGracePeriodSeconds"]


# Scaling


@every_install
def test_only_one_decides_on_the_number_of_routers(name: str) -> None:
    found = installed(name)
    deployment = found.one("Deployment", "router")
    scalers = [*found.of("HorizontalPodAutoscaler"), *found.of("ScaledObject", "router")]

    assert ("replicas" in deployment["spec"]) == (not scalers)
    assert len(scalers) <= 1
    for scaler in scalers:
        target = scaler["spec"]["scaleTargetRef"]
        assert (target["kind"], target["name"]) == ("Deployment", deployment["metadata"]["name"])
    for scaler in found.of("ScaledObject", "router"):
        fallback = scaler["spec"]["fallback"]
        assert (fallback["replicas"], fallback["behavior"]) == (2, "currentReplicasIfHigher")


def test_a_budget_of_none_is_none() -> None:
    assert installed("no pod may go").one("PodDisruptionBudget")["spec"]["maxUnavailable"] == 0
    assert installed("default on 1.37").one("PodDisruptionBudget")["spec"]["maxUnavailable"] == 1


def test_they_scale_by_a_metric_that_the_router_has() -> None:
    router = build(Settings())
    known = {family.name for family in Families(router.core.metrics, router.core.registry.status)()}
    (_, in_flight) = installed("full on 1.37").one("HorizontalPodAutoscaler")["spec"]["metrics"]
    (trigger, _) = installed("keda on 1.37").one("ScaledObject")["spec"]["triggers"]

    assert in_flight["pods"]["metric"]["name"] in known
    query = trigger["metadata"]["query"]
    assert query == f'sum(inference_api_requests_in_flight{{namespace="{NAMESPACE}"}})'


def test_keda_counts_the_requests_of_its_own_cluster() -> None:
    """One Prometheus may have those of several."""
    trigger, *_ = installed("marks with KEDA").one("ScaledObject", "router")["spec"]["triggers"]

    assert f'cluster="{MARKED["clusterName"]}"' in trigger["metadata"]["query"]
    assert trigger["authenticationRef"] == MARKED["router"]["keda"]["authenticationRef"]


def test_keda_counts_the_requests_of_its_own_release() -> None:
    """By the label that the ServiceMonitor's targets have, where there is one."""
    found = installed("KEDA with its own series")
    (trigger,) = found.one("ScaledObject")["spec"]["triggers"]
    (scraped,) = [
        o["metadata"]["name"] for o in found.of("Service") if "inference-api/scrape" in o["metadata"]["labels"]
    ]

    assert f'{{namespace="{NAMESPACE}", service="{scraped}"}}' in trigger["metadata"]["query"]
