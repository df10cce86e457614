"""An API server of a cluster on a real socket, as far as engines go, and the controllers and kubelet behind it.

Nothing happens by itself: pods appear, load and vanish one `step` at a time, or all at once when a test `settle`s.

    async with FakeCluster() as cluster:
        cluster.deployment("llama", replicas=2)
        cluster.settle()
        cluster.fail("llama", reason="OOMKilled", code=137, previous=["torch.OutOfMemoryError: CUDA out of memory"])
        plane = await start_sqlite(kubernetes_namespace=cluster.namespace, kubernetes_url=cluster.url)
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import count
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

import orjson

from tests.control_plane import cluster_objects as made
from tests.control_plane.cluster_objects import KINDS, STAGES, Deployment, Ended, Json, Pod, Stage
from tests.fakes import LAST_CHUNK, Line, Received, ScriptedServer, chunk, hang, json_response

_LOG_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ntransfer-encoding: chunked\r\n\r\n"
_REASONS = {401: "Unauthorized", 403: "Forbidden", 404: "NotFound", 409: "Conflict", 410: "Expired"}


class Asked(NamedTuple):
    """A request, in the words of a Role. `name`: of one object; empty: of all."""

    verb: str
    group: str
    resource: str
    name: str


class FakeCluster(ScriptedServer):
    """`asked`: what it was asked for. `token`: what it lets in; None: everybody, and nobody may send one.

    `rules`: of a Role, outside of which everything is forbidden; None: all is allowed. `clock`: Unix milliseconds.
    """

    def __init__(self, namespace: str = "engines", clock: Callable[[], int] | None = None) -> None:
        super().__init__(self._serve)
        self.namespace = namespace
        self.token: str | None = None
        self.rules: Sequence[Json] | None = None
        self.calls: list[Asked] = []
        self.queries: list[Mapping[str, str]] = []
        self.deployments: dict[str, Deployment] = {}
        self.pods: dict[str, Pod] = {}
        self.page_size = 500
        self.following = 0
        self._events: list[Json] = []
        self._autoscalers: dict[str, Json] = {}
        self._faults: dict[str, tuple[int | str, int]] = {}
        self._clock = clock or (lambda: time.time_ns() // 1_000_000)
        self._numbers = count(1)
        self._changed = asyncio.Event()

    # What happens in the cluster

    def deployment(
        self,
        name: str,
        replicas: int = 1,
        containers: Sequence[str] = ("engine",),
        labels: Mapping[str, str] | None = None,
        annotations: Mapping[str, str] | None = None,
    ) -> None:
        """Its pods appear with the next step."""
        self.deployments[name] = Deployment(
            name, replicas, tuple(containers), labels or {}, annotations or {}, self._clock()
        )

    def autoscaler(self, name: str, deployment: str, scaled_object: str | None = None) -> None:
        """An HPA; `scaled_object`: of which KEDA has made it."""
        self._autoscalers[name] = made.autoscaler(name, self.namespace, deployment, scaled_object, self._clock())

    def hold(self, name: str, stage: Stage, message: str = "") -> None:
        """Pods of that Deployment come to this stage, and no further. `message`: why they have no node."""
        self.deployments[name].held = stage, message

    def quota(self, name: str, message: str = "exceeded quota: gpus") -> None:
        """No pods are made for it any more."""
        self.deployments[name].quota = message
        self._told("ReplicaSet", f"{name}-{self.deployments[name].hash}", "FailedCreate", message, warns=True)

    def release(self, name: str) -> None:
        """End `hold` and `quota`."""
        self.deployments[name].held = self.deployments[name].quota = None

    def step(self) -> bool:
        """Controllers and kubelet do one thing for each object. Whether there was something to do."""
        gone = [pod for pod in self.pods.values() if pod.stopping is not None]
        for pod in gone:
            del self.pods[pod.name]
        moved = [pod for pod in self.pods.values() if self._advance(pod)]
        changed = [one for one in self.deployments.values() if self._control(one)]
        self._wake()
        return bool(gone or moved or changed)

    def settle(self) -> None:
        while self.step():
            pass

    def fail(
        self,
        name: str,
        reason: str = "Error",
        code: int | None = 1,
        log: Iterable[str] = (),
        previous: Iterable[str] = (),
        message: str = "",
    ) -> None:
        """The first container of its pods has ended, and is started again later; `code` None: it cannot be started.

        `previous`: the log of what has ended; `log`: of what was started since.
        """
        for pod in self.pods_of(name):
            if code is None:
                pod.stage, pod.fault = "loading", (reason, message)
                self._told("Pod", pod.name, "Failed", message or reason, warns=True)
                continue
            pod.stage, pod.restarts, pod.ended = "loading", pod.restarts + 1, Ended(code, reason, self._clock())
            pod.fault = "CrashLoopBackOff", f"back-off 10s restarting failed container of pod {pod.name}"
            pod.previous, pod.log = list(previous), list(log) or list(previous)
            self._told("Pod", pod.name, "BackOff", "Back-off restarting failed container", warns=True)
        self._wake()

    def restart(self, name: str) -> None:
        """Its containers that have ended, or could not be started, are running again, and are loading."""
        for pod in self.pods_of(name):
            pod.stage, pod.fault, pod.since = "loading", None, self._clock()

    def evict(self, name: str) -> None:
        """The node ends its pods; they stay as a memory."""
        for pod in self.pods_of(name):
            pod.evicted = True

    def log(self, pod: str, *lines: str) -> None:
        """More lines of its first container."""
        self.pods[pod].log += lines
        self._wake()

    def pods_of(self, name: str) -> list[Pod]:
        """Those that are not on their way out."""
        return [pod for pod in self.pods.values() if pod.of.name == name and pod.stopping is None and not pod.evicted]

    # What goes wrong between it and its clients

    def break_(self, resource: str, how: int | str, times: int = 1_000_000) -> None:
        """The next answers about a resource, such as `pods/log`: a status, or slow, gone, garbage, odd."""
        self._faults[resource] = how, times

    def mend(self) -> None:
        self._faults.clear()

    def documents(self) -> list[Json]:
        """Everything that it can answer with."""
        scales = [made.scale(one, self.namespace, self._all_of(one)) for one in self.deployments.values()]
        listed = [
            {"apiVersion": KINDS[resource][0], "kind": KINDS[resource][1], **item}
            for resource in KINDS
            for item in self._items(resource)
        ]
        return [*listed, *scales]

    def _told(self, kind: str, name: str, reason: str, message: str, warns: bool = False) -> None:
        number = next(self._numbers)
        self._events.append(made.event(number, self.namespace, kind, name, reason, message, self._clock(), warns))

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _advance(self, pod: Pod) -> bool:
        if pod.evicted or pod.fault is not None or pod.stage == "ready":
            return False
        if pod.of.held is not None and pod.of.held[0] == pod.stage:
            return False
        pod.stage, pod.since = STAGES[STAGES.index(pod.stage) + 1], self._clock()
        if pod.stage == "pulling":
            self._told("Pod", pod.name, "Pulling", f'Pulling image "{made.IMAGE}"')
        return True

    def _control(self, one: Deployment) -> bool:
        there = self.pods_of(one.name)
        for pod in there[one.replicas :]:
            pod.stopping = self._clock()
        missing = 0 if one.quota is not None else one.replicas - len(there)
        for _ in range(missing):
            number = next(self._numbers)
            name = f"{one.name}-{one.hash}-{number:05x}"
            self.pods[name] = Pod(name, one, f"uid-of-{name}", f"10.1.0.{number % 250 + 1}", self._clock())
            if one.held is not None and one.held[0] == "waiting":
                self._told("Pod", name, "FailedScheduling", one.held[1], warns=True)
        return missing > 0 or len(there) > one.replicas

    def _all_of(self, one: Deployment) -> list[Pod]:
        return [pod for pod in self.pods.values() if pod.of is one]

    # What it answers

    async def _serve(self, request: Received, line: Line) -> None:
        parts = urlsplit(request.target)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        call = _call(request.method, parts.path, self.namespace)
        if call is None:
            await _refuse(line, 404, "there is no such path")
            return
        self.calls.append(call)
        self.queries.append(query)
        sent = request.header("authorization")
        if sent != (None if self.token is None else f"Bearer {self.token}"):
            await _refuse(line, 401, "Unauthorized")
        elif not self._allows(call):
            what = f'{call.resource} is forbidden: User "system:serviceaccount:inference:control" cannot {call.verb}'
            await _refuse(line, 403, f'{what} resource "{call.resource}" in API group "{call.group}"')
        elif (how := self._fault(call.resource)) is not None:
            await _break(how, request, line)
        else:
            await self._answer(call, query, request, line)

    async def _answer(self, call: Asked, query: Mapping[str, str], request: Received, line: Line) -> None:
        if call.resource == "pods/log":
            await self._log(call.name, query, line)
        elif call.resource == "deployments/scale":
            await self._scale(call, request, line)
        elif call.verb == "list":
            await self._list(call.resource, query, line)
        else:
            raise AssertionError(f"nobody needs {call}")

    def _allows(self, call: Asked) -> bool:
        return self.rules is None or any(
            call.verb in rule["verbs"]
            and call.group in rule["apiGroups"]
            and call.resource in rule["resources"]
            and (not rule.get("resourceNames") or call.name in rule["resourceNames"])
            for rule in self.rules
        )

    def _fault(self, resource: str) -> int | str | None:
        how, times = self._faults.pop(resource, (None, 0))
        if how is not None and times > 1:
            self._faults[resource] = how, times - 1
        return how

    def _items(self, resource: str) -> list[Json]:
        match resource:
            case "deployments":
                every = self.deployments.values()
                return [made.deployment(one, self.namespace, self._all_of(one)) for one in every]
            case "pods":
                return [made.pod(one, self.namespace) for one in self.pods.values()]
            case "events":
                return self._events
        return list(self._autoscalers.values())

    async def _list(self, resource: str, query: Mapping[str, str], line: Line) -> None:
        items = self._items(resource)
        if "fieldSelector" in query:
            key, _, kind = query["fieldSelector"].partition("=")
            assert key == "involvedObject.kind"
            items = [one for one in items if one["involvedObject"]["kind"] == kind]
        begin = int(query.get("continue", "0"))
        end = begin + min(self.page_size, int(query["limit"]))
        version, kind = KINDS[resource]
        metadata = {"resourceVersion": "1"} | ({"continue": str(end)} if end < len(items) else {})
        # An empty list is null, as Go encodes one that was never made.
        found = {"apiVersion": version, "kind": f"{kind}List", "metadata": metadata, "items": items[begin:end] or None}
        await line.send(json_response(found))

    async def _scale(self, call: Asked, request: Received, line: Line) -> None:
        one = self.deployments.get(call.name)
        if one is None:
            await _refuse(line, 404, f'deployments.apps "{call.name}" not found')
            return
        if call.verb == "patch":
            assert request.header("content-type") == "application/merge-patch+json"
            patch = orjson.loads(request.body)
            assert patch.keys() == {"spec"}
            assert patch["spec"].keys() == {"replicas"}
            one.replicas = patch["spec"]["replicas"]
            one.version += 1
            self._told("Deployment", one.name, "ScalingReplicaSet", f"Scaled replica set to {one.replicas}")
        await line.send(json_response(made.scale(one, self.namespace, self._all_of(one))))

    async def _log(self, name: str, query: Mapping[str, str], line: Line) -> None:
        pod = self.pods.get(name)
        if pod is None:
            await _refuse(line, 404, f'pods "{name}" not found')
        elif query["container"] not in pod.of.containers:
            await _refuse(line, 400, f"container {query['container']} is not valid for pod {name}")
        elif "previous" in query and pod.previous is None:
            await _refuse(line, 400, f'previous terminated container "engine" in pod "{name}" not found')
        elif pod.stage in ("waiting", "pulling"):
            await _refuse(line, 400, f'container "engine" in pod "{name}" is waiting to start: ContainerCreating')
        else:
            await self._send_log(pod, query, line)

    async def _send_log(self, pod: Pod, query: Mapping[str, str], line: Line) -> None:
        lines = pod.previous or [] if "previous" in query else pod.log
        first = query["container"] == pod.of.containers[0]
        sent = max(0, len(lines) - int(query["tailLines"]))
        left = int(query["limitBytes"])
        gone = asyncio.create_task(line.gone())
        self.following += 1
        try:
            await line.send(_LOG_HEAD)
            while not gone.done() and left:
                data = "".join(f"{text}\n" for text in (lines[sent:] if first else ())).encode()[:left]
                changed = asyncio.create_task(self._changed.wait())
                sent, left = len(lines), left - len(data)
                if data:
                    await line.send(chunk(data))
                ended = self.pods.get(pod.name) is not pod or ("previous" not in query and pod.log is not lines)
                if "follow" not in query or ended:
                    changed.cancel()
                    break
                await asyncio.wait({changed, gone}, return_when=asyncio.FIRST_COMPLETED)
                changed.cancel()
            with suppress(ConnectionError):
                await line.send(LAST_CHUNK)
            line.close()
        finally:
            self.following -= 1
            gone.cancel()


def _call(method: str, path: str, namespace: str) -> Asked | None:
    """None: no API server has that."""
    root, _, rest = path.partition(f"/namespaces/{namespace}/")
    group = {"/api/v1": "", "/apis/apps/v1": "apps", "/apis/autoscaling/v2": "autoscaling"}.get(root)
    resource, *more = rest.split("/")
    name = more[0] if more else ""
    verb = {"GET": "get" if name else "list", "PATCH": "patch"}.get(method)
    if group is None or verb is None or not resource:
        return None
    return Asked(verb, group, "/".join([resource, *more[1:]]), name)


async def _refuse(line: Line, code: int, message: str) -> None:
    reason = _REASONS.get(code, "Unknown")
    await line.send(json_response(made.status(code, reason, message), f"{code} {reason}"))


async def _break(how: int | str, request: Received, line: Line) -> None:
    match how:
        case "slow":
            await hang(request, line)
        case "gone":
            await line.send(b'HTTP/1.1 200 OK\r\ncontent-length: 5000\r\n\r\n{"items": [')
            line.close()
        case "garbage":
            await line.send(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\n<html>")
        case "odd":
            odd: Any = {"metadata": None, "items": "none"}
            await line.send(json_response(odd))
        case int(code):
            await _refuse(line, code, "the server at https://10.0.0.1:6443 says no")
        case _:
            raise AssertionError(how)
