"""The figures of clusters/large.yaml: they follow from what docs/capacity.md says of 100,000 streams."""

from math import ceil

import pytest

from benchmarks.capacity import LARGE, LIMIT, MEASURED, TARGET, after_rollout
from tests.k8s.charts import CLUSTERS, Json, installed, require_helm, router_pod, settings, values_of

require_helm()
pytestmark = pytest.mark.timeout(600)

TEXT = CLUSTERS["large"].read_text()
ROUTER: Json = values_of("large")["router"]
SCALING: Json = ROUTER["autoscaling"]


def test_it_is_for_what_the_capacity_page_counts() -> None:
    assert f"{LARGE.streams:,} streams of {LARGE.rate:g} tokens/s" in TEXT
    assert f"{LARGE.pods} pods at {TARGET:.0%}".replace("%", " %") in TEXT
    assert SCALING["targetCPUUtilizationPercentage"] == TARGET * 100


def test_there_are_pods_for_all_streams_and_for_a_burst() -> None:
    """At least as many as bear them at the limit, at most half as many more than there should be."""
    assert SCALING["minReplicas"] == ceil(LARGE.cores / LIMIT)
    assert SCALING["maxReplicas"] == ceil(LARGE.pods * 1.5)
    # A rollout in four waves leaves the first pods with so many more clients than the rest.
    assert LARGE.pods * TARGET * after_rollout(4)[0] / SCALING["maxReplicas"] < TARGET


def test_a_pod_takes_its_streams_and_as_many_again() -> None:
    """MAX_IN_FLIGHT is what breaks first: about twice the streams per pod, as the capacity page says."""
    read = settings(installed("large"))

    assert f"{LARGE.streams_per_pod:,} streams" in TEXT
    assert 2 * LARGE.streams_per_pod <= read.max_in_flight < 2.1 * LARGE.streams_per_pod


def test_a_pod_has_memory_for_them() -> None:
    read = settings(installed("large"))
    (container,) = router_pod(installed("large"))["containers"]
    needed = MEASURED.idle_mb + MEASURED.stream_kb * read.max_in_flight / 1e3 + read.max_buffered_bytes / 1e6
    given = int(container["resources"]["limits"]["memory"].removesuffix("Mi")) * 2**20 / 1e6

    assert f"= {needed:.0f} MB" in TEXT
    assert given > 1.5 * needed
    assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]


def test_nodes_are_drained_and_pods_given_back_within_hours() -> None:
    (scaler,) = installed("large").of("HorizontalPodAutoscaler")
    (down,) = scaler["spec"]["behavior"]["scaleDown"]["policies"]
    (budget,) = installed("large").of("PodDisruptionBudget")
    grace = router_pod(installed("large"))["terminationGracePeriodSeconds"]

    pods, seconds = SCALING["maxReplicas"], 0
    while pods > SCALING["minReplicas"]:
        pods -= ceil(pods * down["value"] / 100)
        seconds += down["periodSeconds"]
    assert seconds < 3600
    assert LARGE.pods / ceil(LARGE.pods * int(budget["spec"]["maxUnavailable"].removesuffix("%")) / 100) * grace < 7200


def test_it_asks_no_name_server_for_backends_and_checks_them_less_often() -> None:
    read = settings(installed("large"))

    assert read.discovery == "endpointslices"
    assert read.health_interval >= 30
    assert installed("large").one("ServiceMonitor", "router")["spec"]["endpoints"][0]["interval"] == "30s"
