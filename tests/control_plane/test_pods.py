"""What the objects of a cluster say of an engine: its state and why, and whatever an API server might send instead."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from control_plane.pure.kubernetes import Listed, Unreadable, found, selector
from control_plane.pure.lifecycle import STATES, Event, Exit, Observed, standing
from control_plane.pure.lines import Lines
from control_plane.pure.pods import Crash, instance
from control_plane.pure.times import read

Json = dict[str, Any]
NOON = "2026-11-28T12:00:00Z"
AT = read(NOON)
SCHEDULED = {"type": "PodScheduled", "status": "True", "lastTransitionTime": NOON}
READY = {"type": "Ready", "status": "True", "lastTransitionTime": NOON}
NOT_READY = {"type": "Ready", "status": "False", "lastTransitionTime": NOON}
RUNNING = {"running": {"startedAt": NOON}}
CREATING = {"waiting": {"reason": "ContainerCreating"}}
PULLING = Event(AT, False, "Pulling", 'Pulling image "vllm"', "Pod llama-1")


def waits(reason: str, message: str = "") -> Json:
    return {"waiting": {"reason": reason, "message": message}}


def ended(code: int, reason: str = "Error", message: str = "") -> Json:
    return {"terminated": {"exitCode": code, "reason": reason, "message": message, "finishedAt": NOON}}


def container(state: Json, last: Json | None = None, name: str = "engine", **more: Any) -> Json:
    return {"name": name, "state": state, "lastState": last or {}, "restartCount": 2 if last else 0, **more}


def pod(
    *containers: Json,
    starting: tuple[Json, ...] = (),
    conditions: tuple[Json, ...] = (SCHEDULED, NOT_READY),
    phase: str = "Running",
    metadata: Json | None = None,
    **status: Any,
) -> Json:
    spec = {
        "nodeName": "node-1" if SCHEDULED in conditions else None,
        "containers": [{"name": one["name"]} for one in containers] or [{"name": "engine"}],
        "initContainers": [{"name": one["name"], "restartPolicy": one.get("restartPolicy")} for one in starting],
    }
    return {
        "metadata": {"name": "llama-1", "creationTimestamp": NOON, **(metadata or {})},
        "spec": spec,
        "status": {
            "phase": phase,
            "conditions": list(conditions),
            "containerStatuses": list(containers),
            "initContainerStatuses": list(starting),
            **status,
        },
    }


CASES: dict[str, tuple[Json, tuple[Event, ...], str, str | None]] = {
    "just made": (pod(conditions=(), phase="Pending"), (), "waiting", "it has no node yet"),
    "unschedulable": (
        pod(
            conditions=({"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no GPU"},),
            phase="Pending",
        ),
        (),
        "waiting",
        "Unschedulable: no GPU",
    ),
    "on its node": (pod(phase="Pending"), (), "pulling", None),
    "creating": (pod(container(CREATING), phase="Pending"), (), "pulling", None),
    "pulling": (pod(container(CREATING), phase="Pending"), (PULLING,), "pulling", 'Pulling image "vllm"'),
    "waiting for a volume": (
        pod(container(CREATING), phase="Pending"),
        (Event(AT, True, "FailedMount", "no such claim", "Pod llama-1"), PULLING),
        "waiting",
        "FailedMount: no such claim",
    ),
    "no image": (
        pod(container(waits("ImagePullBackOff", "Back-off pulling")), phase="Pending"),
        (PULLING,),
        "failing",
        "ImagePullBackOff: Back-off pulling",
    ),
    "no Secret": (
        pod(container(waits("CreateContainerConfigError", 'secret "hf" not found')), phase="Pending"),
        (),
        "failing",
        'CreateContainerConfigError: secret "hf" not found',
    ),
    "a word that is new": (pod(container(waits("Surprised"))), (), "failing", "Surprised"),
    "downloading": (
        pod(container(waits("PodInitializing")), starting=(container(RUNNING, name="fetch"),), phase="Pending"),
        (),
        "loading",
        "fetch is running",
    ),
    "a download that fails": (
        pod(
            container(waits("PodInitializing")),
            starting=(container(waits("CrashLoopBackOff"), ended(1), name="fetch"),),
            phase="Pending",
        ),
        (),
        "failing",
        "fetch: ended with exit code 1 (Error), and is started again after a pause (CrashLoopBackOff)",
    ),
    "after a download": (
        pod(container(RUNNING, ready=False), starting=(container(ended(0, "Completed"), name="fetch"),)),
        (),
        "loading",
        "engine is running, and not ready yet",
    ),
    "beside a sidecar": (
        pod(
            container(RUNNING, ready=True),
            starting=(container(RUNNING, name="mesh", ready=True, restartPolicy="Always"),),
            conditions=(SCHEDULED, READY),
        ),
        (),
        "ready",
        None,
    ),
    "loading": (pod(container(RUNNING, ready=False)), (), "loading", "engine is running, and not ready yet"),
    "a gate": (
        pod(container(RUNNING, ready=True), conditions=(SCHEDULED, {**NOT_READY, "reason": "ReadinessGatesNotReady"})),
        (),
        "loading",
        "ReadinessGatesNotReady",
    ),
    "ready": (pod(container(RUNNING, ready=True), conditions=(SCHEDULED, READY)), (), "ready", None),
    "ready after a crash": (
        pod(container(RUNNING, ended(137, "OOMKilled"), ready=True), conditions=(SCHEDULED, READY)),
        (),
        "ready",
        None,
    ),
    "out of memory": (
        pod(container(waits("CrashLoopBackOff"), ended(137, "OOMKilled"))),
        (),
        "failing",
        "ended with exit code 137 (OOMKilled), and is started again after a pause (CrashLoopBackOff)",
    ),
    "started after a crash": (
        pod(container(RUNNING, ended(1), ready=False)),
        (),
        "failing",
        "ended with exit code 1 (Error), and was started again",
    ),
    "started after a clean end": (
        pod(container(RUNNING, ended(0, "Completed"), ready=False)),
        (),
        "loading",
        "engine is running, and not ready yet",
    ),
    "between two starts": (pod(container(ended(1))), (), "failing", "ended with exit code 1 (Error)"),
    "a command that is none": (
        pod(container(waits("CrashLoopBackOff"), ended(128, "StartError", "exec: vllm: not found"))),
        (),
        "failing",
        "ended with exit code 128 (StartError): exec: vllm: not found, and is started again after a pause "
        "(CrashLoopBackOff)",
    ),
    "evicted": (
        pod(phase="Failed", reason="Evicted", message="low on memory"),
        (),
        "stopped",
        "Evicted: low on memory",
    ),
    "on a node that is away": (pod(container(RUNNING), phase="Unknown"), (), "unknown", "its node does not answer"),
    "stopping": (
        pod(
            container(RUNNING, ready=True),
            conditions=(SCHEDULED, READY),
            metadata={"deletionTimestamp": "2026-11-28T12:00:30Z", "deletionGracePeriodSeconds": 30},
        ),
        (),
        "stopping",
        None,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_pod_says_how_it_is_and_why(case: str) -> None:
    document, events, state, reason = CASES[case]
    seen, _ = instance(document, events)

    assert (seen.name, seen.state, seen.reason) == ("llama-1", state, reason)
    assert seen.since in (AT, None)
    assert seen.containers[0] == "engine"


def test_a_crash_says_where_its_log_is() -> None:
    before, crash = instance(CASES["out of memory"][0])
    _, now = instance(CASES["between two starts"][0])

    assert before.last_exit == Exit(137, "OOMKilled", AT)
    assert before.restarts == 2
    assert crash == Crash("llama-1", "engine", True, 2)
    assert now == Crash("llama-1", "engine", False, 0)
    assert instance(CASES["no image"][0])[1] is None


def test_the_container_that_people_mean_is_the_first() -> None:
    two = container(RUNNING, name="proxy"), container(RUNNING, name="engine")
    said = {"annotations": {"kubectl.kubernetes.io/default-container": "engine"}}

    assert instance(pod(*two))[0].containers == ("proxy", "engine")
    assert instance(pod(*two, metadata=said))[0].containers == ("engine", "proxy")


# A Deployment


def deployment(name: str = "llama", **spec: Any) -> Json:
    return {"metadata": {"name": name}, "spec": {"replicas": 1, "selector": {"matchLabels": {"app": name}}, **spec}}


def of(name: str, labels: Json, **metadata: Any) -> Json:
    return {"metadata": {"name": name, "labels": labels, **metadata}, "spec": {}, "status": {}}


def seen(*pods: Json, events: tuple[Json, ...] = (), **spec: Any) -> Observed:
    return found(Listed([deployment(**spec)], list(pods), list(events), []))["llama"].observed


@pytest.mark.parametrize(
    ("rule", "picked"),
    [
        ({"matchLabels": {"app": "llama", "tier": "gpu"}}, {"a"}),
        ({"matchExpressions": [{"key": "app", "operator": "In", "values": ["llama", "other"]}]}, {"a", "b", "c"}),
        ({"matchExpressions": [{"key": "tier", "operator": "Exists"}]}, {"a"}),
        (
            {"matchLabels": {"app": "llama"}, "matchExpressions": [{"key": "tier", "operator": "DoesNotExist"}]},
            {"b"},
        ),
        ({"matchExpressions": [{"key": "app", "operator": "NotIn", "values": ["llama"]}]}, {"c", "d"}),
        ({"matchExpressions": [{"key": "app", "operator": "Near"}]}, set()),
        ({}, set()),
    ],
)
def test_a_selector_picks_as_that_of_kubernetes(rule: Json, picked: set[str]) -> None:
    labels = {"a": {"app": "llama", "tier": "gpu"}, "b": {"app": "llama"}, "c": {"app": "other"}, "d": {}}

    assert {name for name, one in labels.items() if selector(rule)(one)} == picked


def test_pods_of_a_job_are_no_engines() -> None:
    mine = of("llama-1", {"app": "llama"}, ownerReferences=[{"kind": "ReplicaSet", "controller": True}])
    jobs = of("download", {"app": "llama"}, ownerReferences=[{"kind": "Job", "controller": True}])

    assert [one.name for one in seen(mine, jobs).instances] == ["llama-1"]


def test_a_few_of_those_that_have_ended_are_shown() -> None:
    evicted = [of(f"llama-{number}", {"app": "llama"}) for number in range(9)]
    for one in evicted:
        one["status"] = {"phase": "Failed"}
    running = pod(container(RUNNING, ready=True), conditions=(SCHEDULED, READY), metadata={"labels": {"app": "llama"}})
    running["metadata"]["name"] = "llama-now"
    observed = seen(*evicted, running)

    assert [one.state for one in observed.instances].count("stopped") == 3
    assert standing(observed)[:3] == ("ready", 1, 1)


def test_events_are_those_of_it_and_the_newest_first() -> None:
    def event(kind: str, name: str, second: int, **more: Any) -> Json:
        return {
            "involvedObject": {"kind": kind, "name": name},
            "lastTimestamp": f"2026-11-28T12:00:{second:02}Z",
        } | more

    mine = of("llama-6d9f-1", {"app": "llama"})
    events = (
        event("ReplicaSet", "llama-6d9f", 1),
        event("Deployment", "llama", 2),
        event("Pod", "llama-6d9f-1", 3, count=7, type="Warning", reason="BackOff"),
        event(
            "Pod", "llama-6d9f-1", 0, lastTimestamp=None, eventTime="2026-11-28T12:00:04.123456Z", series={"count": 9}
        ),
        event("ReplicaSet", "llama-next-6d9f", 5),
        event("Pod", "others", 6),
    )
    told = seen(mine, events=events).events

    assert [(one.at - AT, one.times) for one in told] == [(4123, 9), (3000, 7), (2000, 1), (1000, 1)]
    assert (told[1].of, told[1].warns, told[1].reason) == ("Pod llama-6d9f-1", True, "BackOff")


def test_a_template_that_is_refused_is_told() -> None:
    def with_condition(**condition: str) -> str | None:
        one = deployment() | {"status": {"conditions": [condition]}}
        return standing(found(Listed([one], [], [], []))["llama"].observed).reason

    refused = {"type": "Progressing", "status": "False", "reason": "FailedCreate", "message": "no such account"}
    slow = {"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded", "message": "timed out"}
    assert with_condition(**refused) == "FailedCreate: no such account"
    assert with_condition(**slow) is None


# Whatever else is sent

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(NOON),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def broken(draw: st.DrawFn, document: Any) -> Any:
    """The document, with something else in one place of it."""
    deeper = draw(st.integers(0, 4)) > 0
    if isinstance(document, dict) and document and deeper:
        key = draw(st.sampled_from(sorted(document)))
        return document | {key: draw(broken(document[key]))}
    if isinstance(document, list) and document and deeper:
        place = draw(st.integers(0, len(document) - 1))
        return [*document[:place], draw(broken(document[place])), *document[place + 1 :]]
    return draw(ANYTHING)


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_what_is_odd_is_no_accident(data: st.DataObject) -> None:
    case = data.draw(st.sampled_from(sorted(CASES)))
    document = CASES[case][0]
    labelled = document | {"metadata": document["metadata"] | {"labels": {"app": "llama"}}}
    event = {"involvedObject": {"kind": "Pod", "name": "llama-1"}, "lastTimestamp": NOON, "series": {"count": 2}}
    scaler = {"metadata": {"name": "a"}, "spec": {"scaleTargetRef": {"kind": "Deployment", "apiVersion": "apps/v1"}}}
    lists = {"d": [deployment()], "p": [labelled], "e": [event], "h": [scaler]}
    sent: Any = lists
    for _ in range(4):
        sent = data.draw(broken(sent))
    try:
        every = found(Listed._make(sent.get(key) if isinstance(sent, dict) else sent for key in "dpeh"))
    except Unreadable:
        return
    for one in every.values():
        assert {instance.state for instance in one.observed.instances} <= set(STATES)
        assert standing(one.observed).state in STATES


@pytest.mark.parametrize("number", [None, "1", -1, 1.5, True, [1], 2**60])
def test_a_number_of_pods_that_is_none_is_named(number: object) -> None:
    with pytest.raises(Unreadable, match=r"spec.replicas of the Deployment 'llama'"):
        found(Listed([deployment(replicas=number)], [], [], []))


# Lines of logs


@given(st.lists(st.binary(max_size=30)), st.integers(1, 12))
def test_lines_are_the_same_however_they_are_cut(parts: list[bytes], longest: int) -> None:
    whole = b"".join(parts)
    lines, once = Lines(longest), Lines(longest)
    cut = [line for part in parts for line in lines.feed(part)] + lines.end()
    joined = once.feed(whole) + once.end()
    ends = whole.split(b"\n")

    assert cut == joined
    assert len(cut) == len(ends) - (not ends[-1])
    assert all(len(line) <= longest for line in cut)


def test_lines_keep_what_they_can() -> None:
    lines = Lines(4)

    assert lines.feed(b"a\r\n\nlonger\n\xff\xc3") == ["a", "", "long"]
    assert lines.feed(b"\xa9") == []
    assert lines.end() == ["\ufffdé"]
    assert lines.end() == []
