"""As much of a Kubernetes API server as `helm install` needs: discovery, objects in memory, and strict schemas.

Runs in the environment of scripts/helm-tools, for tests/k8s/helm.py.
"""

import json
import re
import threading
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jsonschema
import kubernetes_validate
import referencing
import yaml

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
_SCHEMAS = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema"
_OBJECT = re.compile(r"^/(?:api/(v1)|apis/([^/]+/[^/]+))/namespaces/([^/]+)/([^/]+)(?:/([^/]+))?$")


class FakeApi:
    """A cluster of one Kubernetes release, say "1.29", with or without the custom kinds; `objects` is what it holds."""

    def __init__(self, release: str, custom: bool = True) -> None:
        self.release = release
        self.kinds = KINDS | (CUSTOM_KINDS if custom else {})
        self.objects: dict[str, Json] = {}
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
            return 200, self.objects[path]
        return _status(404, "NotFound", f"{path} not found")

    def post(self, path: str, body: Json) -> tuple[int, Json]:
        path = f"{path}/{body['metadata']['name']}"
        if path in self.objects:
            return _status(409, "AlreadyExists", f"{path} already exists")
        return self._store(path, body, 201)

    def patch(self, path: str, patch: Json) -> tuple[int, Json]:
        return self._store(path, _merged(self.objects[path], patch), 200)

    def delete(self, path: str) -> tuple[int, Json]:
        if self.objects.pop(path, None) is None:
            return _status(404, "NotFound", f"{path} not found")
        return 200, {"kind": "Status", "apiVersion": "v1", "status": "Success"}

    def _store(self, path: str, body: Json, status: int) -> tuple[int, Json]:
        found = _OBJECT.match(path)
        if not found or found[3] != body["metadata"].get("namespace", found[3]):
            return _status(400, "BadRequest", f"{path} is not where this object belongs")
        if problem := schema_problem(body, self.release) or selector_problem(body):
            return _status(422, "Invalid", problem)
        body.setdefault("metadata", {}).setdefault("namespace", found[3])
        self.objects[path] = body
        return status, body


def schema_problem(body: Json, release: str) -> str | None:
    """What the strict schema of the release has against an object; None: nothing."""
    if body["apiVersion"] in CUSTOM_KINDS:
        return None
    error = jsonschema.exceptions.best_match(_validator(release, body["apiVersion"], body["kind"]).iter_errors(body))
    if error is None:
        return None
    return f"{body['kind']} {body['metadata']['name']}: {'.'.join(map(str, error.path))}: {error.message}"


def selector_problem(body: Json) -> str | None:
    """What a real API server has against a workload that does not select its own pods; None: nothing."""
    if body["apiVersion"] != "apps/v1":
        return None
    selector, labels = body["spec"]["selector"]["matchLabels"], body["spec"]["template"]["metadata"]["labels"]
    if selector.items() <= labels.items():
        return None
    return f"{body['kind']} {body['metadata']['name']}: `selector` does not match template `labels`"


@cache
def _validator(release: str, version: str, kind: str) -> Any:
    group = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", version)
    schema = json.loads((_SCHEMAS / f"v{release}.0-local-strict" / f"{kind.lower()}-{group}.json").read_text())
    return jsonschema.validators.Draft202012Validator(schema, registry=_definitions(release))


@cache
def _definitions(release: str) -> Any:
    path = _SCHEMAS / f"v{release}.0-local-strict" / "_definitions.json"
    return referencing.Resource.from_contents(json.loads(path.read_text())) @ referencing.Registry()


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


def _handler(api: FakeApi) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self, status: int, body: Json) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def _body(self) -> Any:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return json.loads(content) if content.startswith(b"{") else None

        def do_GET(self) -> None:
            self._answer(*api.get(urlsplit(self.path).path))

        def do_POST(self) -> None:
            self._answer(*api.post(urlsplit(self.path).path, self._body()))

        def do_PATCH(self) -> None:
            self._answer(*api.patch(urlsplit(self.path).path, self._body()))

        def do_DELETE(self) -> None:
            self._body()
            self._answer(*api.delete(urlsplit(self.path).path))

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: what went wrong is in Helm's error."""

    return Handler
