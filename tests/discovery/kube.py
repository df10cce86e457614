"""An API server of a cluster, as far as EndpointSlices go: on a real socket, with a memory, and faults on demand."""

import asyncio
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

import orjson

from inference_api.discovery.cluster import Cluster
from tests.fakes import LAST_CHUNK, Line, Received, Script, ScriptedServer, chunk, json_response

LABEL = "kubernetes.io/service-name"
WATCH_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"


def endpoint(address: str, pod: str | None = None, **conditions: bool | None) -> dict[str, Any]:
    """An endpoint that is ready, unless its conditions say otherwise."""
    ready = conditions.get("ready", True)
    said: dict[str, Any] = {"addresses": [address], "conditions": {"ready": ready, "serving": ready} | conditions}
    return said | ({"targetRef": {"kind": "Pod", "name": pod, "uid": f"uid-{pod}"}} if pod else {})


def document(
    name: str,
    service: str,
    *endpoints: dict[str, Any] | str,
    ports: Iterable[tuple[str, int]] = (("http", 8000),),
    family: str = "IPv4",
    namespace: str = "models",
) -> dict[str, Any]:
    """An EndpointSlice as an API server sends it; an endpoint that is only an address is ready."""
    return {
        "metadata": {"name": name, "namespace": namespace, "labels": {LABEL: service}},
        "addressType": family,
        "endpoints": [endpoint(one) if isinstance(one, str) else one for one in endpoints],
        "ports": [{"name": name, "port": number, "protocol": "TCP"} for name, number in ports],
    }


def status(code: int, message: str = "no") -> dict[str, Any]:
    return {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "code": code}


def event(kind: str, document: Any) -> bytes:
    return orjson.dumps({"type": kind, "object": document}) + b"\n"


class Change(NamedTuple):
    """One entry of the server's memory."""

    version: int
    kind: str
    document: dict[str, Any]


class FakeApi(ScriptedServer):
    """Lists and watches of what `slices` holds; `put` and `remove` change that.

    `on_list` and `on_watch` are scripts for the next requests of their kind, in place of a sound answer. `lost`: so
    many of the next changes are never told to a watch. `token`: what it lets in; `forbidden`: namespaces that nobody
    may see. `lists`, `watches`: how many it answered.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(self._serve)
        self.token = "secret-of-the-pod"
        self.forbidden: set[str] = set()
        self.slices: dict[tuple[str, str], dict[str, Any]] = {}
        self.on_list: deque[Script] = deque()
        self.on_watch: deque[Script] = deque()
        self.lost = 0
        self.lists = 0
        self.watches = 0
        self.page_size = 500
        self._version = 1
        self._memory: list[Change] = []
        self._forgotten = 0
        self._changed = asyncio.Event()
        self._closings = 0
        self.cluster = Cluster(self.url, "models", folder / "token", folder / "ca.crt")
        self.cluster.token.write_text(self.token + "\n")

    # What happens in the cluster

    def put(self, slice: dict[str, Any]) -> None:
        key = slice["metadata"]["namespace"], slice["metadata"]["name"]
        kind = "MODIFIED" if key in self.slices else "ADDED"
        self.slices[key] = self._remember(kind, slice)

    def remove(self, name: str, namespace: str = "models") -> None:
        self._remember("DELETED", self.slices.pop((namespace, name)))

    def forget(self) -> None:
        """Versions before this one are gone."""
        self._version += 1
        self._forgotten = self._version

    def close_watches(self) -> None:
        self._closings += 1
        self._wake()

    def bookmark(self) -> None:
        """Tell the watches of the version, and nothing else."""
        self._remember("BOOKMARK", {"kind": "EndpointSlice", "metadata": {}})

    def _remember(self, kind: str, document: dict[str, Any]) -> dict[str, Any]:
        self._version += 1
        told = document | {"metadata": document["metadata"] | {"resourceVersion": str(self._version)}}
        if self.lost:
            self.lost -= 1
        else:
            self._memory.append(Change(self._version, kind, told))
        self._wake()
        return told

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    # What it answers

    async def _serve(self, request: Received, line: Line) -> None:
        parts = urlsplit(request.target)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        if request.header("authorization") != f"Bearer {self.token}":
            await line.send(json_response(status(401, "Unauthorized"), "401 Unauthorized"))
            return
        namespace = parts.path.split("/")[5]
        assert parts.path == f"/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"
        if namespace in self.forbidden:
            await line.send(json_response(status(403, "endpointslices is forbidden"), "403 Forbidden"))
            return
        scripts = self.on_watch if "watch" in query else self.on_list
        if scripts:
            await scripts.popleft()(request, line)
        elif "watch" in query:
            await self._watch(namespace, query, line)
        else:
            await self._list(namespace, query, line)

    async def _list(self, namespace: str, query: dict[str, str], line: Line) -> None:
        self.lists += 1
        found = [one for (at, _), one in sorted(self.slices.items()) if at == namespace and _selected(one, query)]
        begin = int(query.get("continue", "0"))
        end = begin + min(self.page_size, int(query["limit"]))
        metadata = {"resourceVersion": str(self._version)} | ({"continue": str(end)} if end < len(found) else {})
        await line.send(json_response({"metadata": metadata, "items": found[begin:end] or None}))

    async def _watch(self, namespace: str, query: dict[str, str], line: Line) -> None:
        at = int(query["resourceVersion"])
        assert query["allowWatchBookmarks"] == "true"
        if at < self._forgotten:
            await line.send(json_response(status(410, "too old resource version"), "410 Gone"))
            return
        self.watches += 1
        closings = self._closings
        await line.send(WATCH_HEAD)
        gone = asyncio.create_task(line.gone())
        try:
            while closings == self._closings and not gone.done():
                changed = asyncio.create_task(self._changed.wait())
                for change in [change for change in self._memory if change.version > at]:
                    at = change.version
                    if change.kind == "BOOKMARK" or _seen(change.document, namespace, query):
                        await line.send(chunk(event(change.kind, change.document)))
                await asyncio.wait({changed, gone}, return_when=asyncio.FIRST_COMPLETED)
                changed.cancel()
            await line.send(LAST_CHUNK)
            line.close()
        finally:
            gone.cancel()


def _seen(document: dict[str, Any], namespace: str, query: dict[str, str]) -> bool:
    return document["metadata"]["namespace"] == namespace and _selected(document, query)


def _selected(document: dict[str, Any], query: dict[str, str]) -> bool:
    selector = query["labelSelector"]
    if selector == LABEL:
        return LABEL in document["metadata"]["labels"]
    names = selector.removeprefix(f"{LABEL} in (").removesuffix(")").split(",")
    return document["metadata"]["labels"].get(LABEL) in names
