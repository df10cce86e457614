"""From a pod, as the API server of Kubernetes describes it, to an instance: its state, and why.

https://kubernetes.io/docs/concepts/workloads/pods/pod-lifecycle/
"""

from collections.abc import Sequence
from typing import NamedTuple

from control_plane.pure.lifecycle import Event, Exit, Instance, State
from control_plane.pure.loose import Json, inner, moment, objects, string, whole

_DEFAULT_CONTAINER = "kubectl.kubernetes.io/default-container"
# Why a container waits in the normal course of things; every other reason is an error.
_NORMAL = {"", "ContainerCreating", "PodInitializing"}
_PULLS = ("Pulling", "Pulled")


class Crash(NamedTuple):
    """Where the log of an exit is: of the container before this one (`previous`), or of the one that is there.

    `restarts`: of that container; the log is another one when the number is.
    """

    pod: str
    container: str
    previous: bool
    restarts: int


class _Container(NamedTuple):
    """`status`: as the kubelet reports it; empty before. `starts`: it must end before others are started."""

    name: str
    status: Json
    starts: bool = False

    @property
    def running(self) -> Json:
        return inner(self.status, "state", "running")

    @property
    def is_running(self) -> bool:
        return isinstance(inner(self.status, "state").get("running"), dict)

    @property
    def waits_for(self) -> str | None:
        """A word of the kubelet; None: it does not wait."""
        waiting = inner(self.status, "state").get("waiting")
        return string(waiting.get("reason")) if isinstance(waiting, dict) else None

    @property
    def is_done(self) -> bool:
        return self.starts and whole(inner(self.status, "state", "terminated").get("exitCode")) == 0

    @property
    def ended(self) -> Exit | None:
        return _exit(inner(self.status, "state", "terminated"))

    @property
    def ended_before(self) -> Exit | None:
        return _exit(inner(self.status, "lastState", "terminated"))

    @property
    def restarts(self) -> int:
        return whole(self.status.get("restartCount")) or 0


class _Finding(NamedTuple):
    state: State
    reason: str | None = None
    since: int | None = None
    culprit: _Container | None = None


def instance(pod: Json, events: Sequence[Event] = ()) -> tuple[Instance, Crash | None]:
    """`events`: of this pod, the newest first."""
    starting, containers = _containers(pod)
    found = _finding(pod, starting, containers, events)
    name, culprit = string(inner(pod, "metadata").get("name")), found.culprit
    exits = [one.ended or one.ended_before for one in ([culprit] if culprit else containers)]
    last = max((one for one in exits if one), key=lambda one: one.at or 0, default=None)
    crash = None
    if culprit is not None and last is not None:
        crash = Crash(name, culprit.name, culprit.ended is None, culprit.restarts)
    reason = found.reason
    if culprit is not None and len(starting) + len(containers) > 1:
        reason = f"{culprit.name}: {reason}"
    seen = Instance(
        name,
        found.state,
        reason,
        found.since,
        sum(one.restarts for one in containers),
        last,
        tuple(one.name for one in (*containers, *starting)),
        string(inner(pod, "status").get("podIP")) or None,
    )
    return seen, crash


def _finding(
    pod: Json, starting: Sequence[_Container], containers: Sequence[_Container], events: Sequence[Event]
) -> _Finding:
    metadata, status = inner(pod, "metadata"), inner(pod, "status")
    if string(metadata.get("deletionTimestamp")):
        # That is when it must be gone.
        end, grace = moment(metadata["deletionTimestamp"]), whole(metadata.get("deletionGracePeriodSeconds"))
        return _Finding("stopping", None, end and end - 1000 * (grace or 0))
    phase = string(status.get("phase"))
    if phase in ("Failed", "Succeeded"):
        # The Deployment makes another one; this one only tells why.
        return _Finding("stopped", _words(status) or "it has ended", moment(metadata.get("creationTimestamp")))
    if phase == "Unknown":
        return _Finding("unknown", _words(status) or "its node does not answer")
    scheduled = _condition(status, "PodScheduled")
    since = moment(scheduled.get("lastTransitionTime")) or moment(metadata.get("creationTimestamp"))
    if scheduled.get("status") != "True" and not string(inner(pod, "spec").get("nodeName")):
        return _Finding("waiting", _words(scheduled) or "it has no node yet", since)
    for one in (*starting, *containers):
        if (wrong := _wrong(one)) is not None:
            return wrong
    return _coming(status, starting, containers, events, since)


def _wrong(one: _Container) -> _Finding | None:
    """What is wrong with a container, if it has ended or cannot be started."""
    waits, before = one.waits_for, one.ended_before
    if waits is not None and waits not in _NORMAL:
        words = _words(inner(one.status, "state", "waiting"))
        if waits == "CrashLoopBackOff" and before is not None:
            words = f"{_said(before, one)}, and is started again after a pause ({waits})"
        return _Finding("failing", words, before and before.at, one)
    if one.ended is not None and not one.is_done:
        return _Finding("failing", _said(one.ended, one), one.ended.at, one)
    if one.is_running and one.status.get("ready") is not True and before is not None and before.code:
        # Until it is ready it is not known whether it fails again.
        return _Finding("failing", f"{_said(before, one)}, and was started again", before.at, one)
    return None


def _coming(
    status: Json,
    starting: Sequence[_Container],
    containers: Sequence[_Container],
    events: Sequence[Event],
    since: int | None,
) -> _Finding:
    """Of a pod that has a node, and of whose containers none has failed."""
    first = next((one for one in starting if not one.is_done), None)
    if first is not None and first.is_running:
        return _Finding("loading", f"{first.name} is running", moment(first.running.get("startedAt")))
    if first is not None or not containers or any(not one.is_running for one in containers):
        latest = next((one for one in events if one.warns or one.reason in _PULLS), None)
        if latest is not None and latest.warns:
            return _Finding("waiting", f"{latest.reason}: {latest.message}", since)
        pulls = latest is not None and latest.reason == "Pulling"
        return _Finding("pulling", latest.message if latest is not None and pulls else None, since)
    ready = _condition(status, "Ready")
    if ready.get("status") == "True":
        return _Finding("ready", None, moment(ready.get("lastTransitionTime")))
    slow = [one for one in containers if one.status.get("ready") is not True]
    begun = [at for one in containers if (at := moment(one.running.get("startedAt"))) is not None]
    reason = f"{slow[0].name} is running, and not ready yet" if slow else _words(ready) or "it is not ready yet"
    return _Finding("loading", reason, max(begun, default=since))


def _containers(pod: Json) -> tuple[list[_Container], list[_Container]]:
    """Those that must end first, and all others; the one whose log people want is the first of these."""
    spec, status = inner(pod, "spec"), inner(pod, "status")
    known = {
        string(one.get("name")): one
        for key in ("initContainerStatuses", "containerStatuses")
        for one in objects(status.get(key))
    }
    starting: list[_Container] = []
    names = [string(one.get("name")) for one in objects(spec.get("containers"))]
    containers = [_Container(name, known.get(name, {})) for name in names]
    wanted = string(inner(pod, "metadata", "annotations").get(_DEFAULT_CONTAINER))
    containers.sort(key=lambda one: one.name != wanted)
    for one in objects(spec.get("initContainers")):
        name = string(one.get("name"))
        stays = one.get("restartPolicy") == "Always"
        (containers if stays else starting).append(_Container(name, known.get(name, {}), not stays))
    return starting, containers


def _condition(status: Json, kind: str) -> Json:
    return next((one for one in objects(status.get("conditions")) if one.get("type") == kind), {})


def _exit(terminated: Json) -> Exit | None:
    if not terminated:
        return None
    code, reason = whole(terminated.get("exitCode")), string(terminated.get("reason"))
    return Exit(code, reason or None, moment(terminated.get("finishedAt")))


def _said(exit: Exit, one: _Container) -> str:
    code = "without an exit code" if exit.code is None else f"with exit code {exit.code}"
    reason = f" ({exit.reason})" if exit.reason else ""
    state = inner(one.status, "state", "terminated") or inner(one.status, "lastState", "terminated")
    # Only where it never ran is the message that of the runtime; else it is the engine's.
    why = f": {string(state.get('message'))}" if exit.reason in ("StartError", "ContainerCannotRun") else ""
    return f"ended {code}{reason}{why}"


def _words(of: Json) -> str | None:
    """Reason and message of a condition or state."""
    return ": ".join(part for part in (string(of.get("reason")), string(of.get("message"))) if part) or None
