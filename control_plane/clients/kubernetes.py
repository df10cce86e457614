"""Engines in a Kubernetes cluster: Deployments that others have made are looked at, scaled, and their logs read.

Nothing is made, changed or deleted but the number of pods. The rights that it needs are in docs/engines.md.
"""

import asyncio
import os
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Final, Generic, TypeVar

from control_plane.clients.api_server import AGENT, Api, ApiServer, Call, Kind
from control_plane.pure import kubernetes
from control_plane.pure.lifecycle import MOST_LINES, DriverError, DriverName, LogQuery, Observed
from control_plane.pure.lines import LONGEST, Lines
from control_plane.pure.loose import inner, whole
from control_plane.pure.pods import Crash
from control_plane.settings import PREFIX, Settings, SettingsError
from inference_api.discovery.cluster import ClusterError, in_cluster

T = TypeVar("T")
DEPLOYMENTS: Final = Kind("apps", "v1", "deployments")
SCALE: Final = DEPLOYMENTS._replace(part="scale")
PODS: Final = Kind("", "v1", "pods")
LOG: Final = PODS._replace(part="log")
EVENTS: Final = Kind("", "v1", "events")
AUTOSCALERS: Final = Kind("autoscaling", "v2", "horizontalpodautoscalers")
# Seconds that a look may be old; pods of one Deployment at most, by hand
FRESH, LARGEST = 2.0, 100
# Of the log before an exit: lines and bytes, logs that are read with one look, and seconds for them
_TAIL, _TAIL_BYTES, _TAILS, _PATIENCE = 20, 16 * 1024, 10, 3.0
_FOLLOWED = 64 * 1024 * 1024
# Of objects that are told of: events of others would only cost
_TOLD = ("Pod", "ReplicaSet", "Deployment")
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")


class Kubernetes:
    """Deployments of one namespace. `fresh`: seconds that a look may be old."""

    name: DriverName = "kubernetes"
    largest = LARGEST

    def __init__(
        self,
        server: ApiServer,
        namespace: str,
        *,
        scales: bool = False,
        reads_logs: bool = False,
        fresh: float = FRESH,
    ) -> None:
        self.namespace: str | None = namespace
        self.scales = scales
        self.reads_logs = reads_logs
        self._server = server
        self._place = namespace
        self._tails: dict[Crash, tuple[str, ...]] = {}
        self._seen = _Shared(self._look, fresh)

    async def objects(self) -> Sequence[str]:
        return sorted(await self._seen.get())

    async def look(self, object: str) -> Observed:
        return (await self._seen.get()).get(object, Observed(None))

    async def scale(self, object: str, instances: int) -> None:
        if not self.scales:
            fix = f"set {PREFIX}KUBERNETES_SCALE=on, and give its Role 'patch' on 'deployments/scale'"
            raise DriverError("forbidden", f"Scaling of Deployments is off: {fix}.")
        if not 0 <= instances <= self.largest:
            raise DriverError("invalid", f"A Deployment has 0 to {self.largest} pods here, not {instances}.")
        call = Call("patch", SCALE, self._place, _checked("Deployment", object))
        try:
            async with Api(self._server) as api:
                found = await api.merge(call, {"spec": {"replicas": instances}}, fieldManager=AGENT)
            # 0 is left out by Go. Whatever else answered has changed nothing.
            if not found or (whole(inner(found, "spec").get("replicas")) or 0) != instances:
                raise DriverError("garbage", f"The API server did not do what it was asked: to {call}.")
        finally:
            # It may have been changed although the answer got lost.
            self._seen.drop()

    async def log(self, object: str, query: LogQuery) -> AsyncGenerator[str]:
        if not self.reads_logs:
            fix = f"set {PREFIX}KUBERNETES_LOGS=on, and give its Role 'get' on 'pods/log'"
            raise DriverError("forbidden", f"Reading of logs is off: {fix}.")
        container = await self._container(object, query)
        asked = min(max(query.lines, 0), MOST_LINES)
        most = _FOLLOWED if query.follows else asked * LONGEST
        parameters = {"tailLines": str(asked), "limitBytes": str(max(most, 1)), "container": container}
        parameters |= {"previous": "true"} if query.previous else {}
        parameters |= {"follow": "true"} if query.follows else {}
        async for line in self._lines(query.instance, parameters, query.follows):
            yield line

    async def run(self) -> None:
        """Nothing: what is there is asked for when somebody looks."""

    def end(self) -> None:
        """Nothing: it runs no engines, and logs that are followed end with those who read them."""

    async def close(self) -> None:
        await self._seen.close()

    async def _container(self, object: str, query: LogQuery) -> str:
        """Of a pod of that Deployment: logs of other pods are nobody's business here."""
        instances = (await self.look(object)).instances
        pod = next((one for one in instances if one.name == query.instance), None)
        if pod is None:
            what = f"There is no pod '{query.instance[:100]}' of the Deployment '{object[:100]}'."
            raise DriverError("not_found", f"{what} It may have been replaced: look at the list again.")
        chosen = query.container or next(iter(pod.containers), "")
        if chosen not in pod.containers:
            there = ", ".join(pod.containers) or "none yet"
            raise DriverError("not_found", f"The pod has no container '{chosen[:100]}'; it has {there}.")
        return chosen

    async def _lines(self, pod: str, parameters: Mapping[str, str], follows: bool) -> AsyncGenerator[str]:
        call = Call("get", LOG, self._place, _checked("pod", pod))
        lines = Lines()
        try:
            async with Api(self._server) as api, api.open(call, parameters, may_wait=follows) as response:
                async for data in response.aiter_raw():
                    for line in lines.feed(data):
                        yield line
                for line in lines.end():
                    yield line
        except DriverError as exc:
            raise _of_a_log(exc, "previous" in parameters) from None

    async def _look(self) -> Mapping[str, Observed]:
        """Everything in the namespace that is of Deployments."""
        async with Api(self._server) as api:
            deployments = await api.all(DEPLOYMENTS, self._place)
            pods = await api.all(PODS, self._place)
            autoscalers = await api.all(AUTOSCALERS, self._place)
            events = []
            for kind in _TOLD:
                events += await api.all(EVENTS, self._place, fieldSelector=f"involvedObject.kind={kind}")
        listed = kubernetes.Listed(deployments, pods, events, autoscalers)
        try:
            found = await asyncio.to_thread(kubernetes.found, listed)
        except kubernetes.Unreadable as exc:
            raise DriverError("garbage", f"The answer of the API server is not understood: {exc}.") from None
        if self.reads_logs:
            await self._read_tails([crash for one in found.values() for crash in one.crashes])
        return {name: self._with_tails(one) for name, one in found.items()}

    def _with_tails(self, found: kubernetes.Found) -> Observed:
        tails = {crash.pod: self._tails.get(crash, ()) for crash in found.crashes}
        instances = tuple(one._replace(tail=tails.get(one.name, ())) for one in found.observed.instances)
        return found.observed._replace(instances=instances)

    async def _read_tails(self, crashes: Iterable[Crash]) -> None:
        """Once for each exit: its log does not change."""
        self._tails = {crash: self._tails[crash] for crash in crashes if crash in self._tails}
        new = [crash for crash in crashes if crash not in self._tails][:_TAILS]
        self._tails |= zip(new, await asyncio.gather(*map(self._tail, new)), strict=True)

    async def _tail(self, crash: Crash) -> tuple[str, ...]:
        parameters = {"container": crash.container, "tailLines": str(_TAIL), "limitBytes": str(_TAIL_BYTES)}
        parameters |= {"previous": "true"} if crash.previous else {}
        try:
            # A node that is away has no log, and says so late.
            async with asyncio.timeout(_PATIENCE):
                return tuple([line async for line in self._lines(crash.pod, parameters, False)])
        except (DriverError, TimeoutError):
            return ()


class _Shared(Generic[T]):
    """One answer for all who ask within some seconds, also while it is made; a failure is one, too."""

    def __init__(self, make: Callable[[], Awaitable[T]], seconds: float) -> None:
        self._make = make
        self._seconds = seconds
        self._began = 0.0
        self._task: asyncio.Task[T] | None = None
        self._running: set[asyncio.Task[T]] = set()

    async def get(self) -> T:
        now = asyncio.get_running_loop().time()
        if self._task is None or (self._task.done() and now - self._began > self._seconds):
            self._began = now
            self._task = asyncio.ensure_future(self._made())
            self._running.add(self._task)
            self._task.add_done_callback(self._ended)
        # It goes on for others when one of them leaves.
        return await asyncio.shield(self._task)

    def drop(self) -> None:
        """Who asks from now on gets what is made from now on."""
        self._task = None

    async def close(self) -> None:
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _made(self) -> T:
        return await self._make()

    def _ended(self, task: asyncio.Task[T]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            # Perhaps nobody waits for it any more.
            task.exception()


def _checked(what: str, name: str) -> str:
    """Names become part of a path."""
    if not _NAME.fullmatch(name):
        raise DriverError("not_found", f"'{name[:100]}' is not the name of a {what}.")
    return name


def _of_a_log(exc: DriverError, previous: bool) -> DriverError:
    """What an error of a request for a log means."""
    if exc.reason == "not_found":
        return DriverError("gone", "The pod is gone, and its log with it.")
    if exc.reason == "invalid" and previous:
        return DriverError("gone", "There is no log from before: the container has not ended yet, or was removed.")
    return exc


def driver(settings: Settings) -> Kubernetes | None:
    """As it is set up. Raises SettingsError."""
    namespace, url = settings.kubernetes_namespace, settings.kubernetes_url
    if namespace is None:
        return None
    if url is not None:
        server = ApiServer(url)
    else:
        try:
            cluster = in_cluster(os.environ)
        except ClusterError as exc:
            fix = f"outside of a cluster set {PREFIX}KUBERNETES_URL to that of `kubectl proxy`"
            raise SettingsError(f"{PREFIX}KUBERNETES_NAMESPACE={namespace!r}: {exc}; {fix}") from None
        server = ApiServer(cluster.url, cluster.token, cluster.ca)
    scales, reads_logs = settings.kubernetes_scale == "on", settings.kubernetes_logs == "on"
    return Kubernetes(server, namespace, scales=scales, reads_logs=reads_logs)
