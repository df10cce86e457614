"""From what the API server of Kubernetes lists to objects of a driver: Deployments, and what there is of them.

ReplicaSets are not read. Pods of a Deployment are those that its selector picks: two Deployments with one selector,
which Kubernetes forbids in words only, show each other's pods.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from control_plane.pure.lifecycle import Event, Observed
from control_plane.pure.loose import Json, inner, moment, objects, string, whole
from control_plane.pure.pods import Crash, instance

# The label that KEDA gives the autoscaler that it makes; also looked for at the Deployment, as label or annotation
SCALED_OBJECT = "scaledobject.keda.sh/name"
# Events of one object, and pods that have ended, at most
_EVENTS, _ENDED = 50, 3


class Unreadable(ValueError):
    """An answer that is not what the API server of a cluster sends."""


class Listed(NamedTuple):
    """The items of the lists of one namespace, decoded from JSON."""

    deployments: Sequence[Any]
    pods: Sequence[Any]
    events: Sequence[Any]
    autoscalers: Sequence[Any]


class Found(NamedTuple):
    """`crashes`: exits of instances that are failing, whose logs say why."""

    observed: Observed
    crashes: tuple[Crash, ...] = ()


def found(listed: Listed) -> dict[str, Found]:
    """All Deployments of the lists by name. Raises Unreadable."""
    pods = [pod for pod in objects(listed.pods) if string(inner(pod, "metadata").get("name"))]
    events = _by_object(listed.events)
    owners = _owners(listed.autoscalers)
    return {
        name: _found(name, one, pods, events, owners)
        for one in objects(listed.deployments)
        if (name := string(inner(one, "metadata").get("name")))
    }


def _found(
    name: str,
    deployment: Json,
    pods: Sequence[Json],
    events: Mapping[tuple[str, str], list[Event]],
    owners: Mapping[str, str],
) -> Found:
    wanted = whole(inner(deployment, "spec").get("replicas"))
    if wanted is None or wanted < 0:
        raise Unreadable(f"spec.replicas of the Deployment '{name}' is not a number")
    picks = selector(inner(deployment, "spec", "selector"))
    own = [pod for pod in pods if picks(inner(pod, "metadata", "labels")) and _is_of_a_set(pod)]
    names = {string(inner(pod, "metadata").get("name")) for pod in own}
    seen = [instance(pod, events.get(("Pod", string(inner(pod, "metadata").get("name"))), ())) for pod in own]
    instances = sorted((one for one, _ in seen), key=lambda one: one.name)
    ended = sorted((one for one in instances if one.state == "stopped"), key=lambda one: -(one.since or 0))
    told = [
        event
        for (kind, of), some in events.items()
        if (kind == "Pod" and of in names)
        or (kind == "Deployment" and of == name)
        # A ReplicaSet has the name of its Deployment, and a hash, which has no hyphen.
        or (kind == "ReplicaSet" and of.rpartition("-")[0] == name)
        for event in some
    ]
    return Found(
        Observed(
            wanted,
            tuple(one for one in instances if one not in ended[_ENDED:]),
            tuple(sorted(told, key=lambda one: -one.at)[:_EVENTS]),
            owners.get(name) or _keda(deployment),
            _problem(deployment),
        ),
        tuple(crash for one, crash in seen if crash is not None and one.state == "failing"),
    )


def selector(document: Json) -> Callable[[Json], bool]:
    """Whether labels are picked by the selector of a Deployment. An empty one picks nothing."""
    wanted = {key: value for key, value in inner(document, "matchLabels").items() if isinstance(value, str)}
    rules = objects(document.get("matchExpressions"))

    def picks(labels: Json) -> bool:
        return bool(wanted or rules) and wanted.items() <= labels.items() and all(_holds(one, labels) for one in rules)

    return picks


def _holds(rule: Json, labels: Json) -> bool:
    key, values = string(rule.get("key")), rule.get("values")
    listed = values if isinstance(values, list) else []
    match rule.get("operator"):
        case "In":
            return labels.get(key) in listed
        case "NotIn":
            return labels.get(key) not in listed
        case "Exists":
            return key in labels
        case "DoesNotExist":
            return key not in labels
    return False


def _is_of_a_set(pod: Json) -> bool:
    """Not of a Job, say, whose pods have the same labels."""
    controllers = [one for one in objects(inner(pod, "metadata").get("ownerReferences")) if one.get("controller")]
    return all(one.get("kind") == "ReplicaSet" for one in controllers)


def _by_object(items: Sequence[Any]) -> dict[tuple[str, str], list[Event]]:
    """Events by kind and name of what they are of, the newest first."""
    by: dict[tuple[str, str], list[Event]] = {}
    for one in objects(items):
        about = inner(one, "involvedObject")
        kind, name = string(about.get("kind")), string(about.get("name"))
        by.setdefault((kind, name), []).append(_event(one, f"{kind} {name}"))
    return {key: sorted(events, key=lambda event: -event.at) for key, events in by.items()}


def _event(document: Json, of: str) -> Event:
    series = inner(document, "series")
    times = (
        series.get("lastObservedTime"),
        *(document.get(key) for key in ("lastTimestamp", "eventTime", "firstTimestamp")),
        inner(document, "metadata").get("creationTimestamp"),
    )
    at = next((found for time in times if (found := moment(time)) is not None), 0)
    warns = document.get("type") == "Warning"
    often = whole(series.get("count")) or whole(document.get("count")) or 1
    return Event(at, warns, string(document.get("reason")), string(document.get("message")), of, often)


def _owners(autoscalers: Sequence[Any]) -> dict[str, str]:
    """Who scales which Deployment."""
    owners = {}
    for one in objects(autoscalers):
        target, metadata = inner(one, "spec", "scaleTargetRef"), inner(one, "metadata")
        if target.get("kind") != "Deployment" or not string(target.get("apiVersion")).startswith("apps/"):
            continue
        makers = [ref for ref in objects(metadata.get("ownerReferences")) if ref.get("kind") == "ScaledObject"]
        keda = string(makers[0].get("name")) if makers else string(inner(metadata, "labels").get(SCALED_OBJECT))
        name = string(metadata.get("name"))
        owners[string(target.get("name"))] = f"ScaledObject {keda}" if keda else f"HorizontalPodAutoscaler {name}"
    return owners


def _keda(deployment: Json) -> str | None:
    for key in ("annotations", "labels"):
        if name := string(inner(deployment, "metadata", key).get(SCALED_OBJECT)):
            return f"ScaledObject {name}"
    return None


def _problem(deployment: Json) -> str | None:
    """What keeps the Deployment from making pods: a quota, or a template that is refused."""
    for one in objects(inner(deployment, "status").get("conditions")):
        failed = one.get("type") == "ReplicaFailure" and one.get("status") == "True"
        stuck = one.get("type") == "Progressing" and one.get("status") == "False"
        # That it takes long is said by the pods, with the reason.
        if failed or (stuck and one.get("reason") != "ProgressDeadlineExceeded"):
            return f"{string(one.get('reason'))}: {string(one.get('message'))}"
    return None
