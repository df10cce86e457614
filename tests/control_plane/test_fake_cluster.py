"""Objects of the fake cluster are what a cluster has: by the schemas of Kubernetes, and by how it behaves."""

import json
import subprocess

import pytest

from tests.control_plane.fake_cluster import FakeCluster
from tests.k8s.charts import HOME, NEWEST, OLDEST, ROOT, require_helm

require_helm()
pytestmark = pytest.mark.anyio
_VALIDATE = """
import json, sys
from tests.k8s.fake_rules import schema_problem
found = [schema_problem(one, release) for one in json.load(sys.stdin) for release in sys.argv[1:]]
json.dump([one for one in found if one], sys.stdout)
"""


def problems(documents: list[object]) -> list[str]:
    """What the schemas of the oldest and the newest release have against them."""
    done = subprocess.run(
        [HOME / "venv" / "bin" / "python", "-c", _VALIDATE, OLDEST, NEWEST],
        input=json.dumps(documents),
        text=True,
        capture_output=True,
        check=False,
        cwd=ROOT,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout)
    return found


async def test_its_objects_are_those_of_kubernetes() -> None:
    cluster = FakeCluster()
    for name in ("waiting", "pulling", "loading", "ready", "crashed", "unpulled", "limited", "evicted", "stopping"):
        cluster.deployment(name, containers=("engine", "sidecar"), annotations={"team": "ml"})
    cluster.hold("waiting", "waiting", "0/4 nodes are available")
    for stage in ("pulling", "loading"):
        cluster.hold(stage, stage)
    cluster.quota("limited")
    cluster.settle()
    cluster.fail("crashed", reason="OOMKilled", code=137, previous=["CUDA out of memory"])
    cluster.fail("unpulled", reason="ImagePullBackOff", code=None, message="Back-off pulling image")
    cluster.evict("evicted")
    cluster.deployments["stopping"].replicas = 0
    cluster.step()
    cluster.autoscaler("hpa", "ready")
    cluster.autoscaler("keda-hpa", "ready", "ready")
    documents = cluster.documents()

    assert {one["kind"] for one in documents} == {
        *("Deployment", "Pod", "Event", "HorizontalPodAutoscaler", "Scale"),
    }
    assert problems([*documents]) == []
    # It would be seen.
    (wrong, *_) = documents
    assert problems([wrong | {"spec": {"replicas": "many"}}]) != []
