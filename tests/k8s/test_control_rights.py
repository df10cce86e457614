"""The rights of the control plane over engines: the chart gives it what its driver asks for, no more, no less."""

from collections.abc import AsyncIterator, Iterable
from contextlib import nullcontext
from itertools import product
from typing import NamedTuple

import pytest

from control_plane.clients.api_server import ApiServer
from control_plane.clients.kubernetes import Kubernetes
from control_plane.pure.lifecycle import DriverError, LogQuery
from tests.control_plane.fake_cluster import FakeCluster
from tests.k8s.chart_values import NAMESPACE
from tests.k8s.charts import Installed, Json, installed, require_helm
from tests.k8s.test_chart_control import pod, settings

require_helm()
pytestmark = [pytest.mark.timeout(600), pytest.mark.anyio]
SWITCHES = [(scale, logs) for scale in (False, True) for logs in (False, True)]
# Of the models of the default values
NAMES = ["gpt2", "llama-3-8b", "mistral-7b"]


class Right(NamedTuple):
    """`name`: of the object, where the Role has names; empty: of any."""

    verb: str
    group: str
    resource: str
    name: str = ""


def looking(scale: bool, logs: bool) -> Installed:
    return installed(f"a control plane with engines, {scale=}, {logs=}")


def role(found: Installed) -> Json:
    return found.one("Role", "control")


def given(rules: Iterable[Json]) -> set[Right]:
    return {
        Right(*one)
        for rule in rules
        for one in product(rule["verbs"], rule["apiGroups"], rule["resources"], rule.get("resourceNames", [""]))
    }


@pytest.fixture
async def cluster() -> AsyncIterator[FakeCluster]:
    async with FakeCluster(NAMESPACE) as cluster:
        for name in NAMES:
            cluster.deployment(name)
        cluster.settle()
        yield cluster


async def use(driver: Kubernetes, cluster: FakeCluster) -> None:
    """Everything that a driver can do, also that which is off, and of which nothing is asked then."""
    for name in await driver.objects():
        cluster.fail(name, previous=["last words"])
        await driver.look(name)
        with nullcontext() if driver.scales else pytest.raises(DriverError):
            await driver.scale(name, 2)
        (instance,) = (await driver.look(name)).instances
        for previous in (False, True):
            with nullcontext() if driver.reads_logs else pytest.raises(DriverError):
                assert [line async for line in driver.log(name, LogQuery(instance.name, previous=previous))]
    await driver.close()


@pytest.mark.parametrize(("scale", "logs"), SWITCHES)
async def test_every_right_is_used_and_no_other_is_needed(scale: bool, logs: bool, cluster: FakeCluster) -> None:
    found = looking(scale, logs)
    cluster.rules = role(found)["rules"]
    read = settings(found)
    on = {"scales": read.kubernetes_scale == "on", "reads_logs": read.kubernetes_logs == "on"}
    await use(Kubernetes(ApiServer(cluster.url), NAMESPACE, fresh=0.0, **on), cluster)

    # A Role has no names of pods, which come and go.
    asked = {Right(*call) if call.resource == "deployments/scale" else Right(*call[:3]) for call in cluster.calls}
    assert given(role(found)["rules"]) == asked
    assert on == {"scales": scale, "reads_logs": logs}


@pytest.mark.parametrize(("scale", "logs"), SWITCHES)
def test_nobody_else_has_them(scale: bool, logs: bool) -> None:
    found = looking(scale, logs)
    (binding,) = found.of("RoleBinding")
    (subject,) = binding["subjects"]
    account = found.one("ServiceAccount", "control")["metadata"]["name"]

    assert [one["metadata"]["name"] for one in found.of("Role")] == [binding["roleRef"]["name"]]
    assert (subject["kind"], subject["name"], subject["namespace"]) == ("ServiceAccount", account, NAMESPACE)
    users = [spec["serviceAccountName"] for _, _, spec in found.pods() if "serviceAccountName" in spec]
    assert users.count(account) == 1
    assert pod(found)["serviceAccountName"] == account
    assert pod(found)["automountServiceAccountToken"] is True


def test_it_is_bound_where_the_engines_are() -> None:
    found = installed("control-engines on 1.37")
    (binding,) = found.of("RoleBinding", "control")

    assert role(found)["metadata"]["namespace"] == binding["metadata"]["namespace"] == "models"
    assert binding["subjects"][0]["namespace"] == NAMESPACE
    assert settings(found).kubernetes_namespace == "models"
    (rule,) = [rule for rule in role(found)["rules"] if rule["resources"] == ["deployments/scale"]]
    assert rule["resourceNames"] == ["llama-3-8b", "mistral-7b"]


def test_what_is_off_has_neither_rights_nor_a_token() -> None:
    found = installed("control on 1.37")

    assert not found.of("Role")
    assert not found.of("RoleBinding")
    assert pod(found)["automountServiceAccountToken"] is False
