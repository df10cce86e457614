"""The driver `kubernetes`, against an API server on a real socket: what it sees, changes and reads, and what fails."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from control_plane.clients.api_server import ApiLimits, ApiServer
from control_plane.clients.kubernetes import Kubernetes
from control_plane.connections import connections
from control_plane.pure.lifecycle import DriverError, Exit, LogQuery, Observed, standing
from control_plane.pure.lines import LONGEST
from control_plane.settings import Settings, SettingsError
from tests.control_plane.fake_cluster import FakeCluster
from tests.fakes import until

pytestmark = pytest.mark.anyio
TOKEN = "secret-of-the-pod"
# Longer than a busy machine stands still, as what comes after a silence is read by the same driver.
QUICK = ApiLimits(read=2.0, whole=4.0)


@pytest.fixture
async def cluster() -> AsyncIterator[FakeCluster]:
    async with FakeCluster() as cluster:
        yield cluster


@pytest.fixture
async def drive(cluster: FakeCluster) -> AsyncIterator[Callable[..., Kubernetes]]:
    """Makes drivers that may do everything, unless it is told otherwise, and never show what is old."""
    drivers = []

    def make(limits: ApiLimits | None = None, **options: Any) -> Kubernetes:
        chosen = {"scales": True, "reads_logs": True, "fresh": 0.0} | options
        drivers.append(Kubernetes(ApiServer(cluster.url, limits=limits or ApiLimits()), cluster.namespace, **chosen))
        return drivers[-1]

    yield make
    for driver in drivers:
        await driver.close()


@pytest.fixture
def driver(drive: Callable[..., Kubernetes]) -> Kubernetes:
    return drive()


async def lines_of(driver: Kubernetes, object: str, query: LogQuery) -> list[str]:
    return [line async for line in driver.log(object, query)]


def states(observed: Observed) -> list[str]:
    return [one.state for one in observed.instances]


# What it sees


async def test_an_engine_comes_and_goes_step_by_step(cluster: FakeCluster, driver: Kubernetes) -> None:
    cluster.deployment("llama", replicas=0)
    cluster.deployment("gpt2", replicas=0)
    seen = [standing(await driver.look("llama")).state]
    await driver.scale("llama", 1)
    seen.append(standing(await driver.look("llama")).state)
    while cluster.step():
        seen.append(standing(await driver.look("llama")).state)
    await driver.scale("llama", 0)
    seen.append(standing(await driver.look("llama")).state)
    cluster.step()
    seen.append(standing(await driver.look("llama")).state)
    cluster.settle()
    seen.append(standing(await driver.look("llama")).state)

    coming = ["waiting", "pulling", "loading", "ready"]
    # Between the change and what follows from it, there is nothing of it yet: the pod still answers.
    assert seen == ["stopped", "waiting", *coming, "stopping", "stopping", "stopped"]
    assert await driver.objects() == ["gpt2", "llama"]
    assert (await driver.look("gpt2")).instances == ()


async def test_pods_that_are_still_stopping_are_no_engine_that_is_stopped(
    cluster: FakeCluster, driver: Kubernetes
) -> None:
    cluster.deployment("llama")
    cluster.settle()
    cluster.deployments["llama"].replicas = 0
    cluster.step()
    cluster.deployments["llama"].replicas = 1
    observed = await driver.look("llama")

    assert states(observed) == ["stopping"]
    found = standing(observed)
    assert (found.state, found.ready, found.wanted) == ("waiting", 0, 1)
    assert found.reason is not None
    assert "still stopping" in found.reason


async def test_what_does_not_exist_is_not_seen(driver: Kubernetes) -> None:
    assert await driver.look("nothing") == Observed(None)
    assert await driver.objects() == []


async def test_an_engine_without_a_node_says_why(cluster: FakeCluster, driver: Kubernetes) -> None:
    cluster.deployment("llama")
    cluster.hold("llama", "waiting", "0/4 nodes are available: 4 Insufficient nvidia.com/gpu.")
    cluster.settle()
    observed = await driver.look("llama")

    found = standing(observed)
    assert found.state == "waiting"
    assert "4 Insufficient nvidia.com/gpu" in str(found.reason)
    assert [(one.reason, one.warns) for one in observed.events] == [("FailedScheduling", True)]


async def test_a_quota_is_told_though_there_is_no_pod(cluster: FakeCluster, driver: Kubernetes) -> None:
    cluster.deployment("llama")
    cluster.quota("llama", "exceeded quota: gpus, requested: 1, used: 4, limited: 4")
    cluster.settle()

    found = standing(await driver.look("llama"))
    assert found.state == "waiting"
    assert found.reason == "FailedCreate: exceeded quota: gpus, requested: 1, used: 4, limited: 4"


async def test_a_failing_engine_shows_its_exit_and_the_log_before_it(
    cluster: FakeCluster, drive: Callable[..., Kubernetes]
) -> None:
    cluster.deployment("llama")
    cluster.settle()
    lines = [f"line {number}" for number in range(50)]
    cluster.fail("llama", reason="OOMKilled", code=137, previous=lines, log=["starting"])
    (one,) = (await drive().look("llama")).instances
    (without,) = (await drive(reads_logs=False).look("llama")).instances

    assert (one.state, one.restarts) == ("failing", 1)
    assert one.last_exit is not None
    assert one.last_exit[:2] == Exit(137, "OOMKilled")[:2]
    assert "137" in str(one.reason)
    assert "OOMKilled" in str(one.reason)
    assert one.tail == tuple(lines[-20:])
    assert without.tail == ()


async def test_the_log_before_an_exit_is_read_once(cluster: FakeCluster, driver: Kubernetes) -> None:
    cluster.deployment("llama")
    cluster.settle()
    cluster.fail("llama", previous=["first"])
    tails = [(await driver.look("llama")).instances[0].tail for _ in range(3)]
    cluster.fail("llama", previous=["second"])
    tails.append((await driver.look("llama")).instances[0].tail)

    assert tails == [("first",)] * 3 + [("second",)]
    assert [one.resource for one in cluster.calls].count("pods/log") == 2


async def test_a_log_that_cannot_be_read_does_not_hide_the_failure(cluster: FakeCluster, driver: Kubernetes) -> None:
    cluster.deployment("llama")
    cluster.settle()
    cluster.fail("llama", previous=["first"])
    cluster.break_("pods/log", 500)

    (one,) = (await driver.look("llama")).instances
    assert (one.state, one.tail) == ("failing", ())


async def test_pods_of_others_are_not_its_own(cluster: FakeCluster, driver: Kubernetes) -> None:
    for name in ("llama", "llama-2"):
        cluster.deployment(name)
    cluster.settle()
    observed = await driver.look("llama")

    assert [one.name.startswith("llama-6d9f7c8b5d-") for one in observed.instances] == [True]
    assert {one.of for one in observed.events} == {f"Pod {observed.instances[0].name}"}


async def test_many_engines_on_many_pages_cost_one_look(cluster: FakeCluster, drive: Callable[..., Kubernetes]) -> None:
    cluster.page_size = 20
    for number in range(50):
        cluster.deployment(f"engine-{number}")
    cluster.settle()
    driver = drive(fresh=3600.0)
    seen = await asyncio.gather(*(driver.look(f"engine-{number}") for number in range(50)))

    assert {standing(one).state for one in seen} == {"ready"}
    assert [one.resource for one in cluster.calls] == [
        *["deployments"] * 3,
        *["pods"] * 3,
        "horizontalpodautoscalers",
        *["events"] * 5,
    ]


async def test_who_changes_something_sees_it_at_once(cluster: FakeCluster, drive: Callable[..., Kubernetes]) -> None:
    cluster.deployment("llama")
    driver = drive(fresh=3600.0)
    before = (await driver.look("llama")).wanted
    await driver.scale("llama", 3)

    assert (before, (await driver.look("llama")).wanted) == (1, 3)


async def test_one_who_leaves_does_not_spoil_the_look_of_others(
    cluster: FakeCluster, drive: Callable[..., Kubernetes]
) -> None:
    cluster.deployment("llama")
    driver = drive(fresh=3600.0)
    first, second = (asyncio.create_task(driver.look("llama")) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()

    assert (await second).wanted == 1


# Who else scales


@pytest.mark.parametrize(
    ("scaled_object", "owner"), [(None, "HorizontalPodAutoscaler of-llama"), ("llama", "ScaledObject llama")]
)
async def test_an_autoscaler_is_named(
    scaled_object: str | None, owner: str, cluster: FakeCluster, driver: Kubernetes
) -> None:
    for name in ("llama", "gpt2"):
        cluster.deployment(name)
    cluster.autoscaler("of-llama", "llama", scaled_object)

    assert (await driver.look("llama")).owner == owner
    assert (await driver.look("gpt2")).owner is None


@pytest.mark.parametrize("place", ["labels", "annotations"])
async def test_keda_is_named_while_it_has_no_autoscaler(place: str, cluster: FakeCluster, driver: Kubernetes) -> None:
    said: dict[str, Any] = {place: {"scaledobject.keda.sh/name": "of-llama"}}
    cluster.deployment("llama", replicas=0, **said)

    assert (await driver.look("llama")).owner == "ScaledObject of-llama"


# What it may


async def test_it_changes_nothing_where_that_is_off(cluster: FakeCluster, drive: Callable[..., Kubernetes]) -> None:
    cluster.deployment("llama")
    cluster.settle()
    driver = drive(scales=False, reads_logs=False)
    (pod,) = cluster.pods
    with pytest.raises(DriverError, match="CONTROL_PLANE_KUBERNETES_SCALE=on") as scaling:
        await driver.scale("llama", 0)
    with pytest.raises(DriverError, match="CONTROL_PLANE_KUBERNETES_LOGS=on") as reading:
        await lines_of(driver, "llama", LogQuery(pod))

    assert (scaling.value.reason, reading.value.reason) == ("forbidden", "forbidden")
    assert cluster.calls == []


@pytest.mark.parametrize("name", ["../../../secrets", "llama/scale", "", "Llama", "a" * 254])
async def test_a_name_that_is_none_is_not_asked_for(name: str, cluster: FakeCluster, driver: Kubernetes) -> None:
    with pytest.raises(DriverError) as refused:
        await driver.scale(name, 1)

    assert refused.value.reason == "not_found"
    assert cluster.calls == []


@pytest.mark.parametrize("instances", [-1, 101])
async def test_there_is_a_most(instances: int, cluster: FakeCluster, driver: Kubernetes) -> None:
    cluster.deployment("llama")
    with pytest.raises(DriverError) as refused:
        await driver.scale("llama", instances)

    assert refused.value.reason == "invalid"
    assert cluster.calls == []


async def test_the_token_is_read_anew_for_each_request(cluster: FakeCluster, tmp_path: Path) -> None:
    token = tmp_path / "token"
    driver = Kubernetes(ApiServer(cluster.url, token, tmp_path / "ca.crt"), cluster.namespace, fresh=0.0)
    seen = []
    for cluster.token in (TOKEN, "another"):
        token.write_text(f"{cluster.token}\n")
        seen.append(await driver.objects())
    token.write_text("two words")
    with pytest.raises(DriverError, match="not a token") as refused:
        await driver.objects()

    assert seen == [[], []]
    assert "two words" not in str(refused.value)


# Logs


async def test_the_last_lines_of_a_log(cluster: FakeCluster, driver: Kubernetes) -> None:
    cluster.deployment("llama", containers=("engine", "sidecar"))
    cluster.settle()
    (pod,) = cluster.pods
    cluster.log(pod, *(f"line {number}" for number in range(5_000)))

    assert await lines_of(driver, "llama", LogQuery(pod, lines=2)) == ["line 4998", "line 4999"]
    assert await lines_of(driver, "llama", LogQuery(pod, "sidecar")) == []
    # No more than there may be
    assert len(await lines_of(driver, "llama", LogQuery(pod, lines=1_000_000))) == 2_000


async def test_a_log_is_read_while_it_is_written(cluster: FakeCluster, driver: Kubernetes) -> None:
    cluster.deployment("llama")
    cluster.settle()
    (pod,) = cluster.pods
    cluster.log(pod, "one", "two")
    async with asyncio.timeout(20), aclosing(driver.log("llama", LogQuery(pod, lines=1, follows=True))) as lines:
        seen = [await anext(lines)]
        cluster.log(pod, "three", "x" * 20_000)
        seen += [await anext(lines), await anext(lines)]
        following = cluster.following
    # Who reads no more keeps no connection.
    await until(lambda: cluster.following == 0)

    assert following == 1
    assert seen == ["two", "three", "x" * LONGEST]


async def test_a_log_that_is_followed_ends_with_its_pod(cluster: FakeCluster, driver: Kubernetes) -> None:
    cluster.deployment("llama")
    cluster.settle()
    (pod,) = cluster.pods
    cluster.log(pod, "one")
    reading = asyncio.create_task(lines_of(driver, "llama", LogQuery(pod, follows=True)))
    await until(lambda: cluster.following == 1)
    cluster.deployments["llama"].replicas = 0
    cluster.settle()

    assert await asyncio.wait_for(reading, 20) == ["one"]


async def test_the_log_from_before(cluster: FakeCluster, driver: Kubernetes) -> None:
    cluster.deployment("llama")
    cluster.settle()
    (pod,) = cluster.pods
    query = LogQuery(pod, previous=True)
    with pytest.raises(DriverError) as refused:
        await lines_of(driver, "llama", query)
    cluster.fail("llama", previous=["last words"])

    assert refused.value.reason == "gone"
    assert await lines_of(driver, "llama", query) == ["last words"]


@pytest.mark.parametrize(("pod", "container"), [("others", None), ("../llama", None), (None, "none")])
async def test_logs_of_others_are_not_read(
    pod: str | None, container: str | None, cluster: FakeCluster, driver: Kubernetes
) -> None:
    for name in ("llama", "others"):
        cluster.deployment(name)
    cluster.settle()
    mine, theirs = cluster.pods
    chosen = {"others": theirs, None: mine}.get(pod, pod)
    with pytest.raises(DriverError) as refused:
        await lines_of(driver, "llama", LogQuery(str(chosen), container))

    assert refused.value.reason == "not_found"
    assert "pods/log" not in [one.resource for one in cluster.calls]


async def test_a_pod_that_has_gone_meanwhile(cluster: FakeCluster, drive: Callable[..., Kubernetes]) -> None:
    cluster.deployment("llama")
    cluster.settle()
    driver = drive(fresh=3600.0)
    (one,) = (await driver.look("llama")).instances
    cluster.pods.clear()
    with pytest.raises(DriverError) as refused:
        await lines_of(driver, "llama", LogQuery(one.name))

    assert refused.value.reason == "gone"


# What fails


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (401, "forbidden"),
        (403, "forbidden"),
        (404, "not_found"),
        (410, "gone"),
        (422, "invalid"),
        (429, "slow"),
        (500, "away"),
        (503, "away"),
        (504, "slow"),
        (301, "garbage"),
        ("slow", "slow"),
        ("gone", "away"),
        ("garbage", "garbage"),
        ("odd", "garbage"),
    ],
)
@pytest.mark.parametrize("resource", ["deployments", "pods", "events", "horizontalpodautoscalers"])
async def test_a_look_that_fails_says_why(
    how: int | str, reason: str, resource: str, cluster: FakeCluster, drive: Callable[..., Kubernetes]
) -> None:
    cluster.deployment("llama")
    driver = drive(QUICK if how == "slow" else None)
    cluster.break_(resource, how)
    with pytest.raises(DriverError) as refused:
        await driver.look("llama")
    cluster.mend()

    assert refused.value.reason == reason
    assert "10.0.0.1" not in str(refused.value)
    assert str(cluster.port) not in str(refused.value)
    assert (await driver.look("llama")).wanted == 1


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (403, "forbidden"),
        (404, "not_found"),
        (409, "conflict"),
        (422, "invalid"),
        ("slow", "slow"),
        ("garbage", "garbage"),
        ("odd", "garbage"),
    ],
)
async def test_a_change_that_fails_says_why(
    how: int | str, reason: str, cluster: FakeCluster, drive: Callable[..., Kubernetes]
) -> None:
    cluster.deployment("llama")
    cluster.break_("deployments/scale", how)
    with pytest.raises(DriverError, match="deployments/scale") as refused:
        await drive(QUICK if how == "slow" else None).scale("llama", 2)

    assert refused.value.reason == reason
    assert "10.0.0.1" not in str(refused.value)
    assert cluster.deployments["llama"].replicas == 1


async def test_a_list_that_is_too_old_is_begun_once_more(cluster: FakeCluster, driver: Kubernetes) -> None:
    cluster.deployment("llama")
    cluster.break_("pods", 410, times=1)

    assert (await driver.look("llama")).wanted == 1


@pytest.mark.parametrize(
    ("rules", "right"),
    [
        ([], "'list' on 'deployments' of the API group 'apps'"),
        ([{"verbs": ["list"], "apiGroups": ["apps"], "resources": ["deployments"]}], "'list' on 'pods'"),
    ],
)
async def test_a_right_that_is_missing_is_named(
    rules: list[dict[str, Any]], right: str, cluster: FakeCluster, driver: Kubernetes
) -> None:
    cluster.rules = rules
    with pytest.raises(DriverError) as refused:
        await driver.look("llama")

    assert f"give its Role the verb {right}" in str(refused.value)
    assert "system:serviceaccount" not in str(refused.value)


async def test_a_name_that_the_role_does_not_have_is_named(cluster: FakeCluster, driver: Kubernetes) -> None:
    rule = {"verbs": ["patch"], "apiGroups": ["apps"], "resources": ["deployments/scale"], "resourceNames": ["gpt2"]}
    cluster.rules = [rule]
    for name in ("llama", "gpt2"):
        cluster.deployment(name)
    await driver.scale("gpt2", 2)
    with pytest.raises(DriverError, match="'llama' in resourceNames"):
        await driver.scale("llama", 2)


async def test_a_server_that_is_not_there(drive: Callable[..., Kubernetes], cluster: FakeCluster) -> None:
    await cluster.stop()
    with pytest.raises(DriverError, match="cannot be reached") as refused:
        await drive().objects()

    assert refused.value.reason == "away"
    assert str(cluster.port) not in str(refused.value)


async def test_all_who_wait_for_a_slow_server_are_told_at_once(
    cluster: FakeCluster, drive: Callable[..., Kubernetes]
) -> None:
    driver = drive(QUICK, fresh=3600.0)
    cluster.break_("deployments", "slow")
    seen = await asyncio.gather(*(driver.look("llama") for _ in range(20)), return_exceptions=True)

    assert {getattr(one, "reason", None) for one in seen} == {"slow"}
    assert len(cluster.calls) == 1


async def test_more_than_anybody_has_is_refused(cluster: FakeCluster, drive: Callable[..., Kubernetes]) -> None:
    for number in range(5):
        cluster.deployment(f"engine-{number}")
    for limits in (ApiLimits(objects=4), ApiLimits(page=200)):
        with pytest.raises(DriverError) as refused:
            await drive(limits).objects()

        assert refused.value.reason == "garbage"


# How it is set up


def test_it_is_absent_unless_it_is_set_up() -> None:
    assert connections(Settings()).drivers == {}


def test_it_may_what_the_settings_say() -> None:
    reached = {"kubernetes_namespace": "engines", "kubernetes_url": "http://127.0.0.1:8001"}
    found = [
        connections(Settings.model_validate(reached | more)).drivers["kubernetes"]
        for more in ({}, {"kubernetes_scale": "on"}, {"kubernetes_logs": "on"})
    ]

    assert [(one.scales, one.reads_logs) for one in found] == [(False, False), (True, False), (False, True)]
    assert {one.namespace for one in found} == {"engines"}


def test_outside_of_a_cluster_it_needs_a_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(SettingsError, match=r"KUBERNETES_NAMESPACE='engines'.*CONTROL_PLANE_KUBERNETES_URL"):
        connections(Settings(kubernetes_namespace="engines"))
