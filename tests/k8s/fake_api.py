"""As much of a Kubernetes API server as Helm needs: discovery, objects, the owners of their fields, what is refused.

Runs in the environment of scripts/helm-tools, for tests/k8s/helm.py.
"""

import copy
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import yaml

from tests.k8s import fake_fields
from tests.k8s.fake_fields import Fields, Manager
from tests.k8s.fake_rules import change_problem, problem

Json = dict[str, Any]

# kind, plural, by group and version
KINDS = {
    "v1": {
        "Pod": "pods",
        "Service": "services",
        "ConfigMap": "configmaps",
        "Secret": "secrets",
        "ServiceAccount": "serviceaccounts",
        "PersistentVolumeClaim": "persistentvolumeclaims",
    },
    "batch/v1": {"Job": "jobs"},
    "apps/v1": {"Deployment": "deployments", "StatefulSet": "statefulsets"},
    "autoscaling/v2": {"HorizontalPodAutoscaler": "horizontalpodautoscalers"},
    "policy/v1": {"PodDisruptionBudget": "poddisruptionbudgets"},
    "networking.k8s.io/v1": {"NetworkPolicy": "networkpolicies", "Ingress": "ingresses"},
    "rbac.authorization.k8s.io/v1": {"Role": "roles", "RoleBinding": "rolebindings"},
}
# Of these there are no schemas here: what they say is for the tests to look at.
CUSTOM_KINDS = {
    "gateway.networking.k8s.io/v1": {"HTTPRoute": "httproutes"},
    "keda.sh/v1alpha1": {"ScaledObject": "scaledobjects"},
    # Google's, for its Gateway and its managed Prometheus.
    "networking.gke.io/v1": {"HealthCheckPolicy": "healthcheckpolicies", "GCPBackendPolicy": "gcpbackendpolicies"},
    "monitoring.googleapis.com/v1": {"PodMonitoring": "podmonitorings", "Rules": "rules"},
    "monitoring.coreos.com/v1": {
        "ServiceMonitor": "servicemonitors",
        "PodMonitor": "podmonitors",
        "PrometheusRule": "prometheusrules",
    },
}
# The class of claims that name none.
DEFAULT_CLASS = "standard"
AUTOSCALER = Manager("kube-controller-manager", "Update", "scale")
_CUSTOM = set(CUSTOM_KINDS)
_OBJECT = re.compile(r"^/(?:api/(v1)|apis/([^/]+/[^/]+))/namespaces/([^/]+)/([^/]+)(?:/([^/]+))?$")


class FakeApi:
    """A cluster of one Kubernetes release, say "1.29", with or without the custom kinds.

    `objects` is what it holds, `sent` what was last sent to make or apply an object: without what the server fills in.
    """

    def __init__(self, release: str, custom: bool = True) -> None:
        self.release = release
        self.kinds = KINDS | (CUSTOM_KINDS if custom else {})
        self.objects: dict[str, Json] = {}
        self.sent: dict[str, Json] = {}
        self.owners: dict[str, dict[Manager, Fields]] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self) -> "FakeApi":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def kubeconfig(self) -> str:
        cluster = {"name": "fake", "cluster": {"server": f"http://127.0.0.1:{self._server.server_address[1]}"}}
        context = {"name": "fake", "context": {"cluster": "fake", "user": "fake"}}
        users = [{"name": "fake", "user": {}}]
        config = {"apiVersion": "v1", "kind": "Config", "current-context": "fake"}
        return yaml.safe_dump({**config, "clusters": [cluster], "contexts": [context], "users": users})

    def get(self, path: str) -> tuple[int, Json]:
        if path == "/version":
            major, minor = self.release.split(".")
            return 200, {"major": major, "minor": minor, "gitVersion": f"v{self.release}.0"}
        if path == "/api":
            return 200, {"kind": "APIVersions", "versions": ["v1"]}
        if path == "/apis":
            return 200, {
                "kind": "APIGroupList",
                "apiVersion": "v1",
                "groups": [_group(v) for v in self.kinds if "/" in v],
            }
        version = path.removeprefix("/apis/").removeprefix("/api/")
        if version in self.kinds:
            return 200, _resources(version, self.kinds[version])
        if path in self.objects:
            return 200, self._shown(path)
        if (found := _OBJECT.match(path)) and not found[5]:
            items = [self._shown(place) for place in self.objects if place.rpartition("/")[0] == path]
            return 200, {
                "kind": "List",
                "apiVersion": found[1] or found[2],
                "metadata": {"resourceVersion": "1"},
                "items": items,
            }
        return _status(404, "NotFound", f"{path} not found")

    def post(self, path: str, body: Json, manager: str) -> tuple[int, Json]:
        path = f"{path}/{body['metadata']['name']}"
        if path in self.objects:
            return _status(409, "AlreadyExists", f"{path} already exists")
        self.sent[path] = _placed(path, body)
        return self._update(path, body, Manager(manager, "Update"), 201)

    def patch(self, path: str, patch: Json, manager: str) -> tuple[int, Json]:
        return self._update(path, _merged(self.objects[path], patch), Manager(manager, "Update"), 200)

    def apply(self, path: str, config: Json, manager: str, force: bool) -> tuple[int, Json]:
        """Server-side: what the manager no longer says goes, if nobody else owns it."""
        if duplicates := fake_fields.duplicates(config):
            return _status(400, "BadRequest", f"failed to create typed patch object ({path}): {duplicates[0]}")
        self.sent[path] = _placed(path, config)
        owners = copy.deepcopy(self.owners.get(path, {}))
        try:
            live = self.objects.get(path, config)
            body = fake_fields.applied(live, config, owners, Manager(manager, "Apply"), force)
        except fake_fields.Conflict as exc:
            return _status(409, "Conflict", f"Apply failed with 1 conflict: {exc}")
        code, answer = self._store(path, body, 200)
        if code == 200:
            self.owners[path] = owners
        return code, answer

    def scale(self, path: str, replicas: int) -> None:
        """As an autoscaler does."""
        live = self.objects[path]
        self._update(path, {**live, "spec": {**live["spec"], "replicas": replicas}}, AUTOSCALER, 200)

    def delete(self, path: str) -> tuple[int, Json]:
        if self.objects.pop(path, None) is None:
            return _status(404, "NotFound", f"{path} not found")
        self.owners.pop(path, None)
        return 200, {"kind": "Status", "apiVersion": "v1", "status": "Success"}

    def _shown(self, path: str) -> Json:
        body = self.objects[path]
        managed = fake_fields.managed_fields(self.owners.get(path, {}))
        return {**body, "metadata": {**body["metadata"], "managedFields": managed}}

    def _update(self, path: str, body: Json, manager: Manager, status: int) -> tuple[int, Json]:
        before = self.objects.get(path, {})
        code, answer = self._store(path, body, status)
        if code == status:
            fake_fields.updated(before, self.objects[path], self.owners.setdefault(path, {}), manager)
        return code, answer

    def _store(self, path: str, body: Json, status: int) -> tuple[int, Json]:
        found = _OBJECT.match(path)
        if not found or found[3] != body["metadata"].get("namespace", found[3]):
            return _status(400, "BadRequest", f"{path} is not where this object belongs")
        old, body = self.objects.get(path), _defaulted(body)
        if told := problem(body, self.release, _CUSTOM) or (old and change_problem(old, body)):
            return _status(422, "Invalid", told)
        self.objects[path] = _placed(path, body)
        return status, self.objects[path]


def _placed(path: str, body: Json) -> Json:
    """With its namespace, which is in the URL at least."""
    namespace = path.split("/namespaces/")[1].partition("/")[0]
    return {**copy.deepcopy(body), "metadata": {"namespace": namespace, **copy.deepcopy(body["metadata"])}}


def _defaulted(body: Json) -> Json:
    """As an API server fills in what is not said, where that is told apart from what is."""
    if body["kind"] == "Deployment":
        return {**body, "spec": {"replicas": 1, **body["spec"]}}
    if body["kind"] == "Job":
        # Done as soon as it is made, for a hook that is waited for.
        return {**body, "status": {"succeeded": 1, "conditions": [{"type": "Complete", "status": "True"}]}}
    if body["kind"] == "PersistentVolumeClaim":
        return {**body, "spec": {"storageClassName": DEFAULT_CLASS, **body["spec"]}}
    return body


def _group(version: str) -> Json:
    preferred = {"groupVersion": version, "version": version.split("/")[1]}
    return {"name": version.split("/")[0], "versions": [preferred], "preferredVersion": preferred}


def _resources(version: str, kinds: dict[str, str]) -> Json:
    verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
    listed = [
        {"name": plural, "singularName": kind.lower(), "namespaced": True, "kind": kind, "verbs": verbs}
        for kind, plural in kinds.items()
    ]
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": listed}


def _status(code: int, reason: str, message: str) -> tuple[int, Json]:
    status = {"kind": "Status", "apiVersion": "v1", "status": "Failure"}
    return code, {**status, "code": code, "reason": reason, "message": message}


def _merged(old: Any, patch: Any) -> Any:
    """A strategic merge patch, applied: lists are merged where the patch says what order they are to have."""
    if not isinstance(old, dict) or not isinstance(patch, dict):
        return patch
    merged = dict(old)
    for key, value in patch.items():
        if key.startswith("$"):
            continue
        order = patch.get(f"$setElementOrder/{key}")
        if value is None:
            merged.pop(key, None)
        elif order and isinstance(order[0], dict):
            merged[key] = _merged_list(old.get(key, []), value, order)
        else:
            merged[key] = _merged(old.get(key), value)
    return merged


def _merged_list(old: list[Json], patch: list[Json], order: list[Json]) -> list[Json]:
    # The order names elements by what they are merged by: containers by `name`, mounts by `mountPath`.
    (by,) = order[0]
    elements = {element[by]: element for element in old}
    for element in patch:
        elements[element[by]] = _merged(elements.get(element[by]), element)
    return [elements[element[by]] for element in order]


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _answer(self, status: int, body: Json) -> None:
        self._send(status, "application/json", json.dumps(body).encode())

    def _send(self, status: int, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _watched(self, listed: bool) -> None:
        """Nothing happens after a list: whoever watches goes when the list is what it waits for."""
        if listed:
            return self._answer(*_status(400, "Invalid", "no initial events: list first"))
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.close_connection = True
        self.connection.recv(1)

    def _body(self) -> Any:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return json.loads(content) if content.startswith(b"{") else None

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: what went wrong is in Helm's error."""


def _handler(api: FakeApi) -> type[BaseHTTPRequestHandler]:
    class Handler(_Answers):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            if url.path == "/openapi/v2":
                # No schemas: Helm then validates nothing itself.
                return self._send(200, "application/com.github.proto-openapi.spec.v2.v1.0+protobuf", b"")
            if "watch=true" in url.query:
                return self._watched("sendInitialEvents=true" in url.query)
            self._answer(*api.get(url.path))

        def do_POST(self) -> None:
            url = urlsplit(self.path)
            self._answer(*api.post(url.path, self._body(), dict(parse_qsl(url.query)).get("fieldManager", "unknown")))

        def do_PATCH(self) -> None:
            url, body = urlsplit(self.path), self._body()
            query = dict(parse_qsl(url.query))
            manager = query.get("fieldManager", "unknown")
            if self.headers["Content-Type"] == "application/apply-patch+yaml":
                self._answer(*api.apply(url.path, body, manager, query.get("force") == "true"))
            else:
                self._answer(*api.patch(url.path, body, manager))

        def do_DELETE(self) -> None:
            self._body()
            self._answer(*api.delete(urlsplit(self.path).path))

    return Handler
