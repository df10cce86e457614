"""The chart as real Helm installs it, for every values file there is: once, for all tests and their processes."""

import copy
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from inference_api.routing.catalogue import Catalogue, parse_catalogue
from inference_api.settings import PREFIX, Settings, load_settings

Json = dict[str, Any]

ROOT = Path(__file__).parents[2]
CHART = ROOT / "k8s" / "charts" / "inference-api"
RELEASE, NAMESPACE = "inference-api", "inference"
OLDEST, NEWEST = "1.29", "1.37"
VALUES = {path.stem.removesuffix("-values"): path for path in sorted((CHART / "ci").glob("*-values.yaml"))}
CLUSTERS = {path.stem: path for path in sorted((ROOT / "k8s" / "clusters").glob("*.yaml"))}
# Each install on both ends of the range of releases; a cluster's overlay on the newest.
INSTALLS = [f"{name} on {release}" for name in VALUES for release in (OLDEST, NEWEST)] + [*CLUSTERS]
# Of marked-values.yaml, what cannot be together.
MARKED: Json = yaml.safe_load(Path(__file__).with_name("marked-values.yaml").read_text())
_OWN_REGISTRY: Json = {"router.registry.url": ""}
MARKED_INSTALLS: dict[str, Json] = {
    "marks": {**_OWN_REGISTRY, "router.autoscaling.enabled": False},
    "marks with an HPA": _OWN_REGISTRY,
    "marks with KEDA": {
        "router.autoscaling.enabled": False,
        "router.keda.enabled": True,
        "registry.enabled": False,
    },
}
every_install = pytest.mark.parametrize("name", INSTALLS)
WORKLOADS = ("Deployment", "StatefulSet")

_HOME = Path(os.environ.get("HELM_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "inference-api-helm"))
HOME = _HOME.expanduser()
_INSTALLED = next((HOME / "venv").glob("complete-*"), None)

# What is refused: the values, and what the one line must say.
REFUSED: dict[str, tuple[Json, str]] = {
    "a wrong type": ({"router": {"replicaCount": "two"}}, "at '/router/replicaCount': got string, want integer"),
    "an unknown key": ({"router": {"replicas": 2}}, "at '/router': additional properties 'replicas' not allowed"),
    "an unknown setting": (
        {"router": {"settings": {"BREAKER_FAILURE": 3}}},
        "at '/router/settings': additional properties 'BREAKER_FAILURE' not allowed",
    ),
    "the tag latest": ({"image": {"tag": "latest"}}, "image.tag is latest, which is another image tomorrow"),
    "an unknown engine": ({"models": {"gpt2": {"engine": "triton"}}}, "at '/models/gpt2/engine': value must be one of"),
    "an HPA with KEDA": (
        {"router": {"autoscaling": {"enabled": True}, "keda": {"enabled": True, "serverAddress": "http://prometheus"}}},
        "router.autoscaling.enabled and router.keda.enabled exclude each other",
    ),
    "a drain shorter than a stream": (
        {"router": {"timeouts": {"stream": 3600}}},
        "router.drain.timeoutSeconds (570) is shorter than the longest request (3600 s",
    ),
    "a drain shorter than a model's answer": (
        {"models": {"gpt2": {"timeouts": {"total": 900.5}}}},
        "router.drain.timeoutSeconds (570) is shorter than the longest request (901 s",
    ),
    "both sides of a disruption budget": (
        {"router": {"podDisruptionBudget": {"minAvailable": 1}}},
        "router.podDisruptionBudget takes minAvailable or maxUnavailable, not both",
    ),
    "more pods at least than at most": (
        {"router": {"autoscaling": {"enabled": True, "minReplicas": 20}}},
        "router.autoscaling.minReplicas (20) is more than router.autoscaling.maxReplicas (10)",
    ),
    "an HPA without a CPU request": (
        {"router": {"autoscaling": {"enabled": True}, "resources": {"requests": {"cpu": None}}}},
        "router.autoscaling needs router.resources.requests.cpu",
    ),
    "KEDA without Prometheus": ({"router": {"keda": {"enabled": True}}}, "router.keda needs router.keda.serverAddress"),
    "two registries": (
        {"router": {"registry": {"url": "http://registry"}}},
        "router.registry.url is set, so nobody would use the chart's own registry",
    ),
    "nothing to serve": (
        {"registry": {"enabled": False}, "models": {"llama-3-8b": None, "mistral-7b": None, "gpt2": None}},
        "there is nothing to serve",
    ),
    "a watch without the right to it": (
        {"router": {"discovery": {"mode": "endpointslices"}, "rbac": {"create": False}}},
        "router.discovery.mode endpointslices needs the right to watch them",
    ),
    "an Ingress without hosts": (
        {"router": {"ingress": {"enabled": True}}},
        "router.ingress needs router.ingress.hosts",
    ),
    "a route without a Gateway": (
        {"router": {"httpRoute": {"enabled": True}}},
        "router.httpRoute needs router.httpRoute.parentRefs",
    ),
    "traces to nowhere": (
        {"monitoring": {"otel": {"enabled": True}}},
        "monitoring.otel needs monitoring.otel.endpoint",
    ),
    "replicas on a volume of one node": (
        {"engines": {"enabled": True}, "models": {"gpt2": {"deploy": {"replicas": 2}}}},
        "models.gpt2.deploy.replicas is 2, and a cache that is ReadWriteOnce is on one node",
    ),
    "an engine that the chart does not run": (
        {"engines": {"enabled": True}, "models": {"gpt2": {"engine": "sglang"}}},
        "models.gpt2.deploy: the chart runs vllm and tgi, not the engine sglang",
    ),
    "a Service that begins with a digit": (
        {"engines": {"enabled": True}, "models": {"3b": {"deploy": {"model": "some/3b"}}}},
        'models.3b.deploy: its Service would be named "3b", and such names begin with a letter',
    ),
    "all pods always there": (
        {"router": {"podDisruptionBudget": {"minAvailable": 2, "maxUnavailable": None}}},
        "router.podDisruptionBudget.minAvailable (2) is all of the 2 pods that there may be: no node could ever be",
    ),
    "all pods always there, in percent": (
        {"router": {"podDisruptionBudget": {"minAvailable": "100%", "maxUnavailable": None}}},
        "router.podDisruptionBudget.minAvailable (100%) is all of the 2 pods that there may be",
    ),
    "all pods always there, rounded up": (
        {"router": {"replicaCount": 1, "podDisruptionBudget": {"minAvailable": "50%", "maxUnavailable": None}}},
        "router.podDisruptionBudget.minAvailable (50%) is all of the 1 pods that there may be",
    ),
    "as many pods always there as a scaler may leave": (
        {
            "router": {
                "replicaCount": 9,
                "autoscaling": {"enabled": True, "minReplicas": 3},
                "podDisruptionBudget": {"minAvailable": 3, "maxUnavailable": None},
            }
        },
        "router.podDisruptionBudget.minAvailable (3) is all of the 3 pods that there may be",
    ),
    "one port for two things": (
        {"router": {"ports": {"ops": 8000}}},
        "router.ports.http and router.ports.ops are both 8000",
    ),
    "a setting past the chart": (
        {"router": {"extraEnv": [{"name": "INFERENCE_API_DRAIN_TIMEOUT", "value": "9999"}]}},
        "router.extraEnv sets INFERENCE_API_DRAIN_TIMEOUT, which would go past the value that the chart computes with",
    ),
    "a label of the chart's own": (
        {"commonLabels": {"app.kubernetes.io/name": "mine"}},
        "at '/commonLabels",
    ),
    "a watch without a token": (
        {"router": {"discovery": {"mode": "endpointslices"}, "serviceAccount": {"automount": False}}},
        "router.discovery.mode endpointslices needs the token of its service account",
    ),
    "a watch in a namespace without the right to it": (
        {
            "router": {"discovery": {"mode": "endpointslices", "namespaces": ["others"]}},
            "models": {
                "gpt2": {"backends": [{"url": "http://gpt2.models.svc.cluster.local:8000", "discovery": "dns"}]}
            },
        },
        "models.gpt2: http://gpt2.models.svc.cluster.local:8000 is in the namespace models, where the router may not",
    ),
    "a watch in a namespace without the right to it, for short": (
        {
            "router": {"discovery": {"mode": "endpointslices"}},
            "models": {"gpt2": {"backends": [{"url": "http://gpt2.models", "discovery": "dns"}]}},
        },
        "models.gpt2: http://gpt2.models is in the namespace models",
    ),
    "an engine that nobody would ask": (
        {"engines": {"enabled": True}, "models": {"gpt2": {"backends": [{"url": "http://gpt2.example.com"}]}}},
        "models.gpt2 has backends and deploy, so nobody would ask the engine that the chart runs",
    ),
    "a model with the name of the release": (
        {"models": {"Inference_API": {}}},
        "models.Inference_API: its Service would be named inference-api, as one of the release itself",
    ),
    "a model with the name of the registry": (
        {"fullnameOverride": "models", "models": {"models-registry": {"engine": "tgi"}}},
        "models.models-registry: its Service would be named models-registry, as one of the release itself",
    ),
    "two models with one Service": (
        {"engines": {"enabled": True}, "models": {"GPT2": {"deploy": {"model": "openai-community/gpt2"}}}},
        "models.GPT2 and models.gpt2 would have the same Service, gpt2",
    ),
}

# Whatever is in files/ at this time, the templates must cope with what may be there.
RULE = {
    "alert": "Some",
    "expr": 'up{job="x"} == 0',
    "annotations": {"summary": "{{ $value }} of {{ $labels.pod }}", "runbook_url": "k8s/runbook.md#some"},
}
RULES = {"groups": [{"name": "first", "rules": [RULE, RULE | {"alert": "Unwanted"}]}, {"name": "second", "rules": []}]}
EVERYTHING = {
    name: {"enabled": True} for name in ("serviceMonitor", "enginePodMonitor", "prometheusRule", "dashboards")
}
# Names that selectors have.
LABELS = {"app.kubernetes.io/name": "mine", "app.kubernetes.io/instance": "mine", "app.kubernetes.io/component": "mine"}
DASHBOARD = '{"title": "{{model_name}} $__rate_interval", "panels": []}'


def require_helm() -> None:
    """Skip the module that calls this where there is no Helm."""
    if _INSTALLED is None:
        pytest.skip("no Helm here: scripts/helm-tools installs it, with Python 3.12", allow_module_level=True)


class Installed(NamedTuple):
    """What Helm left in the cluster (or the one line why it did not), its test hooks, and what it told the user."""

    error: str
    objects: list[Json]
    hooks: list[Json]
    notes: str
    upgraded: list[Json]
    left: list[Json]

    def of(self, kind: str, component: str | None = None) -> list[Json]:
        return [o for o in self.objects if o["kind"] == kind and component in (None, component_of(o))]

    def one(self, kind: str, component: str | None = None) -> Json:
        (found,) = self.of(kind, component)
        return found

    def pods(self) -> Iterator[tuple[str, Json, Json]]:
        """Name, metadata and spec of every pod there would be, the helm tests included."""
        for document in [*self.objects, *self.hooks]:
            if document["kind"] in WORKLOADS:
                template = document["spec"]["template"]
                yield document["metadata"]["name"], template["metadata"], template["spec"]
            if document["kind"] == "Pod":
                yield document["metadata"]["name"], document["metadata"], document["spec"]


def matches(selector: dict[str, str], labels: dict[str, str]) -> bool:
    return selector.items() <= labels.items()


def templates(found: Installed) -> list[Json]:
    return [o["spec"]["template"] for o in found.objects if o["kind"] in WORKLOADS]


def router_pod(found: Installed) -> Json:
    pod: Json = found.one("Deployment", "router")["spec"]["template"]["spec"]
    return pod


def environ(found: Installed) -> dict[str, str]:
    """The router's settings, as its process would find them."""
    given = {e["name"]: e["value"] for e in router_pod(found)["containers"][0]["env"] if e["name"].startswith(PREFIX)}
    assert given
    return given


def settings(found: Installed) -> Settings:
    return load_settings(environ(found))


def catalogue(found: Installed) -> Catalogue:
    (data,) = [o["data"] for o in found.of("ConfigMap") if o["metadata"]["name"].endswith("-catalogue")]
    return parse_catalogue(yaml.safe_load(data["catalogue.yaml"]))


def component_of(document: Json) -> str:
    component: str = document["metadata"].get("labels", {}).get("app.kubernetes.io/component", "")
    return component


def values_of(name: str) -> Json:
    """The values of an install of INSTALLS."""
    values: Json = yaml.safe_load((CLUSTERS.get(name) or VALUES[name.partition(" on ")[0]]).read_text())
    return values


def installed(name: str) -> Installed:
    """An install of INSTALLS, or another job of _jobs; it must not have failed."""
    found = outcome(name)
    assert not found.error, found.error
    return found


def outcome(name: str) -> Installed:
    result = results()[name]
    absent: Json = {"error": "", "objects": [], "hooks": [], "notes": "", "upgraded": [], "left": []}
    return Installed(**absent | result)


@cache
def results() -> dict[str, Json]:
    """What Helm made of every job; from disk if nothing has changed since."""
    with (HOME / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        kept, key = HOME / "rendered.json", _key()
        known: Json = json.loads(kept.read_text()) if kept.exists() else {}
        if known.get("key") != key:
            known = {"key": key, "results": _run()}
            kept.write_text(json.dumps(known))
        found: dict[str, Json] = known["results"]
        return found


def _jobs(with_files: Path) -> dict[str, Json]:
    chart = str(CHART)
    jobs: dict[str, Json] = {"lint": {"lint": chart}}
    for name in INSTALLS:
        release = name.partition(" on ")[2] or NEWEST
        jobs[name] = {"chart": chart, "values": values_of(name), "kubernetes": release}
    for name, changes in MARKED_INSTALLS.items():
        jobs[name] = {"chart": chart, "values": _changed(MARKED, changes), "kubernetes": NEWEST}
    for name, (values, _) in REFUSED.items():
        jobs[name] = {"chart": chart, "values": values, "kubernetes": NEWEST}
    default = {"chart": chart, "values": {}, "kubernetes": NEWEST}
    more = {"router": {"replicaCount": 3, "logLevel": "debug"}}
    five = {"router": {"replicaCount": 5}}
    keda = {"enabled": True, "serverAddress": "http://prometheus"}
    scraped = {"serviceMonitor": {"enabled": True}}
    near = {"router": {"service": {"trafficDistribution": "PreferSameNode"}}}
    unchecked = with_files.with_name("unchecked")
    return jobs | {
        "upgrade": {**default, "upgrade": more},
        "an HPA from now on": {**default, "values": five, "upgrade": {"router": {"autoscaling": {"enabled": True}}}},
        "KEDA from now on": {**default, "values": five, "upgrade": {"router": {"keda": keda}}},
        "KEDA with its own series": {**default, "values": {"router": {"keda": keda}, "monitoring": scraped}},
        "near on 1.33": {**default, "values": near, "kubernetes": "1.33"},
        "near on 1.34": {**default, "values": near, "kubernetes": "1.34"},
        "no pod may go": {**default, "values": {"router": {"podDisruptionBudget": {"maxUnavailable": 0}}}},
        "a long name": {
            **default,
            "values": {"fullnameOverride": "n" * 63, "engines": {"enabled": True}, "monitoring": EVERYTHING},
        },
        "another name": {**default, "values": {"nameOverride": "gateway", "engines": {"enabled": True}}},
        "labels": {
            **default,
            "values": {
                "commonLabels": {"team": "inference"},
                "router": {"podLabels": LABELS},
                "registry": {"podLabels": LABELS},
                "engines": {"enabled": True, "podLabels": LABELS},
            },
        },
        "labels that break selectors": {**default, "chart": str(unchecked), "values": {"commonLabels": LABELS}},
        "removal": {**default, "values": {"engines": {"enabled": True}}, "upgrade": {"engines": {"enabled": True}}},
        "without custom kinds": {**default, "custom": False},
        "an old cluster": {**default, "kubernetes": "1.28"},
        "with files": {
            "chart": str(with_files),
            "values": {
                "monitoring": {
                    "prometheusRule": {
                        "enabled": True,
                        "disabled": ["Unwanted"],
                        "repositoryUrl": "https://example.com/r/",
                    },
                    "dashboards": {"enabled": True},
                }
            },
            "kubernetes": NEWEST,
        },
    }


def _changed(values: Json, changes: Json) -> Json:
    """Values with some of them, by their path with dots, replaced."""
    values = copy.deepcopy(values)
    for path, value in changes.items():
        *outer, last = path.split(".")
        inner = values
        for key in outer:
            inner = inner[key]
        inner[last] = value
    return values


def _run() -> dict[str, Json]:
    with tempfile.TemporaryDirectory() as folder:
        with_files = Path(folder) / "inference-api"
        shutil.copytree(CHART, with_files, ignore=shutil.ignore_patterns("files"))
        for path, text in {"rules/some.yaml": yaml.safe_dump(RULES), "dashboards/some.json": DASHBOARD}.items():
            (with_files / "files" / path).parent.mkdir(parents=True)
            (with_files / "files" / path).write_text(text)
        # Without what keeps it from being told what cannot be.
        shutil.copytree(
            with_files, with_files.with_name("unchecked"), ignore=shutil.ignore_patterns("values.schema.json")
        )
        done = subprocess.run(
            [HOME / "venv" / "bin" / "python", "-m", "tests.k8s.helm"],
            input=json.dumps(_jobs(with_files)),
            env={"PATH": os.environ["PATH"], "HOME": folder, "HELM_DRIVER": "memory"},
            check=False,
            cwd=ROOT,
            text=True,
            capture_output=True,
            timeout=240,
        )
    assert done.returncode == 0, done.stderr
    found: dict[str, Json] = json.loads(done.stdout)
    return found


def _key() -> str:
    """Of all that the results depend on."""
    assert _INSTALLED is not None
    digest = hashlib.sha256(_INSTALLED.name.encode())
    runner = [Path(__file__).with_name(name) for name in ("charts.py", "helm.py", "fake_api.py", "marked-values.yaml")]
    for path in sorted([*CHART.rglob("*"), *CLUSTERS.values(), *runner]):
        if path.is_file():
            digest.update(f"{path.relative_to(ROOT)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()
