"""Objects of a cluster as its API server sends them: a Deployment, its pods, events, autoscalers.

test_fake_cluster.py holds them against the schemas of Kubernetes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

Json = dict[str, Any]
Stage = Literal["waiting", "pulling", "loading", "ready"]
STAGES: tuple[Stage, ...] = ("waiting", "pulling", "loading", "ready")
# By resource: API version and kind of its items
KINDS = {
    "deployments": ("apps/v1", "Deployment"),
    "pods": ("v1", "Pod"),
    "events": ("v1", "Event"),
    "horizontalpodautoscalers": ("autoscaling/v2", "HorizontalPodAutoscaler"),
}
IMAGE = "vllm/vllm-openai:v0.11.0"


class Ended(NamedTuple):
    """How a container ended. `at`: Unix milliseconds."""

    code: int
    reason: str
    at: int


@dataclass
class Deployment:
    """`held`: the stage that its pods do not leave, and why. `quota`: why no pods are made."""

    name: str
    replicas: int
    containers: tuple[str, ...]
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    made: int
    hash: str = "6d9f7c8b5d"
    held: tuple[Stage, str] | None = None
    quota: str | None = None
    version: int = 1

    @property
    def selector(self) -> dict[str, str]:
        return {"app": self.name}


@dataclass
class Pod:
    """`stage`: how far it has come; `since`: when. `fault`: what its first container waits for, and the words."""

    name: str
    of: Deployment
    uid: str
    address: str
    since: int
    stage: Stage = "waiting"
    stopping: int | None = None
    evicted: bool = False
    restarts: int = 0
    ended: Ended | None = None
    fault: tuple[str, str] | None = None
    log: list[str] = field(default_factory=list)
    previous: list[str] | None = None


def time(at: int) -> str:
    return datetime.fromtimestamp(at // 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def deployment(one: Deployment, namespace: str, pods: Sequence[Pod]) -> Json:
    ready = sum(pod.stage == "ready" and pod.stopping is None and not pod.fault for pod in pods)
    conditions = [_condition("Progressing", True, one.made, "NewReplicaSetAvailable", "it has progressed")]
    if one.quota is not None:
        conditions.append(_condition("ReplicaFailure", True, one.made, "FailedCreate", one.quota))
    labels = {**one.selector, **one.labels}
    containers = [{"name": name, "image": IMAGE} for name in one.containers]
    return {
        "metadata": {
            **_metadata(one.name, namespace, f"uid-of-{one.name}", one.made, labels),
            "annotations": dict(one.annotations),
            "generation": one.version,
        },
        "spec": {
            "replicas": one.replicas,
            "selector": {"matchLabels": one.selector},
            "template": {"metadata": {"labels": labels}, "spec": {"containers": containers}},
        },
        "status": {
            "observedGeneration": one.version,
            "replicas": len(pods),
            "readyReplicas": ready,
            "conditions": conditions,
        },
    }


def scale(one: Deployment, namespace: str, pods: Sequence[Pod]) -> Json:
    return {
        "apiVersion": "autoscaling/v1",
        "kind": "Scale",
        "metadata": {"name": one.name, "namespace": namespace, "uid": f"uid-of-{one.name}"},
        # As Go leaves out what is 0
        "spec": {"replicas": one.replicas} if one.replicas else {},
        "status": {"replicas": len(pods), "selector": ",".join(f"{k}={v}" for k, v in one.selector.items())},
    }


def pod(one: Pod, namespace: str) -> Json:
    labels = {**one.of.selector, **one.of.labels, "pod-template-hash": one.of.hash}
    owner = {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": f"{one.of.name}-{one.of.hash}"}
    metadata = {
        **_metadata(one.name, namespace, one.uid, one.since, labels),
        "ownerReferences": [{**owner, "uid": f"uid-of-{one.of.name}-set", "controller": True}],
    }
    if one.stopping is not None:
        # When it must be gone: the request and its grace.
        metadata |= {"deletionTimestamp": time(one.stopping + 30_000), "deletionGracePeriodSeconds": 30}
    spec: Json = {"containers": [{"name": name, "image": IMAGE} for name in one.of.containers]}
    if one.stage != "waiting":
        spec["nodeName"] = "node-1"
    return {"metadata": metadata, "spec": spec, "status": _status(one)}


def event(number: int, namespace: str, kind: str, name: str, reason: str, message: str, at: int, warns: bool) -> Json:
    return {
        "metadata": _metadata(f"{name}.{number:x}", namespace, f"uid-of-event-{number}", at, {}),
        "involvedObject": {"kind": kind, "namespace": namespace, "name": name},
        "reason": reason,
        "message": message,
        "source": {"component": "kubelet"},
        "firstTimestamp": time(at),
        "lastTimestamp": time(at),
        "count": 1,
        "type": "Warning" if warns else "Normal",
        "eventTime": None,
        "reportingComponent": "kubelet",
        "reportingInstance": "node-1",
    }


def autoscaler(name: str, namespace: str, of: str, scaled_object: str | None, at: int) -> Json:
    labels = {} if scaled_object is None else {"scaledobject.keda.sh/name": scaled_object}
    metadata = _metadata(name, namespace, f"uid-of-{name}", at, labels)
    if scaled_object is not None:
        owner = {"apiVersion": "keda.sh/v1alpha1", "kind": "ScaledObject", "name": scaled_object}
        metadata["ownerReferences"] = [{**owner, "uid": f"uid-of-{scaled_object}", "controller": True}]
    target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": of}
    return {"metadata": metadata, "spec": {"scaleTargetRef": target, "minReplicas": 1, "maxReplicas": 4}}


def status(code: int, reason: str, message: str) -> Json:
    """What an API server says instead of an answer."""
    head = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}
    return {**head, "message": message, "reason": reason, "code": code}


def _metadata(name: str, namespace: str, uid: str, at: int, labels: Mapping[str, str]) -> Json:
    named = {"name": name, "namespace": namespace, "uid": uid, "creationTimestamp": time(at), "resourceVersion": "1"}
    return {**named, "labels": dict(labels)} if labels else named


def _condition(kind: str, holds: bool, at: int, reason: str = "", message: str = "") -> Json:
    found = {"type": kind, "status": "True" if holds else "False", "lastTransitionTime": time(at)}
    return found | ({"reason": reason} if reason else {}) | ({"message": message} if message else {})


def _status(one: Pod) -> Json:
    if one.evicted:
        return {"phase": "Failed", "reason": "Evicted", "message": "The node was low on resource: memory."}
    if one.stage == "waiting":
        message = (one.of.held or ("", ""))[1]
        conditions = [_condition("PodScheduled", False, one.since, "Unschedulable", message)] if message else []
        return {"phase": "Pending", "conditions": conditions}
    ready = one.stage == "ready" and one.fault is None
    conditions = [_condition("PodScheduled", True, one.since), _condition("Ready", ready, one.since)]
    running = one.stage in ("loading", "ready")
    return {
        "phase": "Running" if running and (one.fault is None or one.ended) else "Pending",
        "conditions": conditions,
        "podIP": one.address,
        "containerStatuses": [_container(one, name, ready, running) for name in one.of.containers],
    }


def _container(one: Pod, name: str, ready: bool, running: bool) -> Json:
    first = name == one.of.containers[0]
    state: Json = {"running": {"startedAt": time(one.since)}}
    if not running:
        state = {"waiting": {"reason": "ContainerCreating"}}
    elif first and one.fault is not None:
        state = {"waiting": {"reason": one.fault[0], "message": one.fault[1]}}
    found = {
        "name": name,
        "image": IMAGE,
        "imageID": f"sha256:{'0' * 64}",
        "ready": ready,
        "restartCount": one.restarts if first else 0,
        "state": state,
        "lastState": {},
    }
    if first and one.ended is not None:
        ended = {"exitCode": one.ended.code, "reason": one.ended.reason}
        ended |= {"startedAt": time(one.since), "finishedAt": time(one.ended.at), "containerID": "containerd://1"}
        found["lastState"] = {"terminated": ended}
    return found
