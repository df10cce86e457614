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

from inference_api.app import ENTRY, GROUPS
from inference_api.routing.catalogue import Catalogue, parse_catalogue
from inference_api.settings import PREFIX, Settings, load_settings
from tests.k8s.chart_values import (
    BAD_MODELS,
    CANARY,
    CHANGES,
    CONTROL,
    CONTROL_OF_OTHERS,
    CONTROL_PLANE,
    DASHBOARD,
    ENGINES_KEDA,
    EVERYTHING,
    FORGETFUL,
    KEYS,
    LABELS,
    LIVE,
    MESH,
    NEXT_IMAGE,
    NO_MODELS,
    OF_OTHERS,
    OLD_CLAIM,
    PARENT,
    POLICY_LATER,
    PRIVATE_CA,
    REFUSED,
    RULES,
    SCALED_BY_OTHERS,
    SLEEPER,
    VARIABLES,
    VIRTUAL,
    looking,
)

Json = dict[str, Any]

ROOT = Path(__file__).parents[2]
CHART = ROOT / "k8s" / "charts" / "inference-api"
OLDEST, NEWEST = "1.29", "1.37"
VALUES = {path.stem.removesuffix("-values"): path for path in sorted((CHART / "ci").glob("*-values.yaml"))}
CLUSTERS = {path.stem: path for path in sorted((ROOT / "k8s" / "clusters").glob("*.yaml"))}
# Each install on both ends of the range of releases; a cluster's overlay on the newest.
INSTALLS = [f"{name} on {release}" for name in VALUES for release in (OLDEST, NEWEST)] + [*CLUSTERS]
# Of marked-values.yaml, what cannot be together.
MARKED: Json = yaml.safe_load(Path(__file__).with_name("marked-values.yaml").read_text())
_NO_POLICY: Json = {
    "router.auth.mode": "none",
    "router.auth.pepper.existingSecret": "",
    "router.policy.document": {},
    "router.policy.existingSecret": "",
    "router.policy.fromRegistry": False,
    "router.rateLimits.store": "local",
    "router.usage.mode": "none",
    "router.currency": "",
}
_OWN_REGISTRY: Json = {**_NO_POLICY, "router.registry.url": ""}
_ONE: Json = {"router.autoscaling.enabled": False}
_CONTROL_PLANE: Json = {
    **_ONE,
    "registry.enabled": False,
    "router.policy.document": {},
    "router.policy.existingSecret": "",
}
# The chart's own, not one of others.
_CONTROL: Json = {
    **_ONE,
    "registry.kind": "control-plane",
    "router.registry.url": "",
    "router.policy.document": {},
    "router.policy.existingSecret": "",
}
MARKED_INSTALLS: dict[str, Json] = {
    "marks": {**_OWN_REGISTRY, **_ONE},
    "marks with a claim": {**_OWN_REGISTRY, **_ONE, "registry.persistence.existingClaim": "20128"},
    "marks with an HPA": _OWN_REGISTRY,
    "marks with KEDA": {**_NO_POLICY, **_ONE, "router.keda.enabled": True, "registry.enabled": False},
    "marks with a policy": {
        **_ONE,
        "router.registry.url": "",
        "router.policy.existingSecret": "",
        "router.policy.fromRegistry": False,
        "router.usage.mode": "log",
    },
    "marks with a policy of others": {
        **_ONE,
        "router.registry.url": "",
        "router.policy.document": {},
        "router.policy.fromRegistry": False,
        "router.usage.mode": "log",
    },
    "marks with a control plane": _CONTROL_PLANE,
    "marks with a spool": {**_CONTROL_PLANE, "router.usage.spool.persistence.existingClaim": ""},
    "marks with a spool of the pod": {
        **_CONTROL_PLANE,
        "router.usage.spool.persistence.enabled": False,
        "router.usage.spool.persistence.existingClaim": "",
    },
    "marks of a control plane": {**_CONTROL, "control.database.kind": "postgresql"},
    "marks of a control plane with SQLite": {**_CONTROL, "control.replicaCount": 1},
    "marks of a control plane with a claim": {
        **_CONTROL,
        "control.replicaCount": 1,
        "control.database.persistence.existingClaim": "",
    },
}
_RUNNER = (
    "charts.py",
    "chart_values.py",
    "helm.py",
    "fake_api.py",
    "fake_fields.py",
    "fake_rules.py",
    "marked-values.yaml",
)
every_install = pytest.mark.parametrize("name", INSTALLS)
WORKLOADS = ("Deployment",)

_HOME = Path(os.environ.get("HELM_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "inference-api-helm"))
HOME = _HOME.expanduser()
_INSTALLED = next((HOME / "venv").glob("complete-*"), None)


def require_helm() -> None:
    """Skip the module that calls this where there is no Helm."""
    if _INSTALLED is None:
        pytest.skip("no Helm here: scripts/helm-tools installs it, with Python 3.12", allow_module_level=True)


SECRETS = {"KEY_PEPPER": "p" * 32, "REDIS_URL": "rediss://:password@redis:6380/0"}


class Installed(NamedTuple):
    """What Helm left in the cluster (or the one line why it did not), its test hooks, and what it told the user."""

    error: str
    objects: list[Json]
    hooks: list[Json]
    notes: str
    upgraded: list[Json]
    left: list[Json]
    upgrade_hooks: list[Json]

    def of(self, kind: str, component: str | None = None) -> list[Json]:
        return [o for o in self.objects if o["kind"] == kind and component in (None, component_of(o))]

    def one(self, kind: str, component: str | None = None) -> Json:
        (found,) = self.of(kind, component)
        return found

    def pods(self) -> Iterator[tuple[str, Json, Json]]:
        """Name, metadata and spec of every pod there would be, the helm tests included."""
        for document in [*self.objects, *self.hooks]:
            if document["kind"] in (*WORKLOADS, "Job"):
                template = document["spec"]["template"]
                yield document["metadata"]["name"], template["metadata"], template["spec"]
            if document["kind"] == "Pod":
                yield document["metadata"]["name"], document["metadata"], document["spec"]


def matches(selector: dict[str, str], labels: dict[str, str]) -> bool:
    return selector.items() <= labels.items()


def templates(found: Installed) -> list[Json]:
    return [o["spec"]["template"] for o in found.objects if o["kind"] in (*WORKLOADS, "Job")]


def router_pod(found: Installed) -> Json:
    pod: Json = found.one("Deployment", "router")["spec"]["template"]["spec"]
    return pod


def environ(found: Installed) -> dict[str, str]:
    """The router's settings, as its process would find them."""
    listed = [e for e in router_pod(found)["containers"][0]["env"] if e["name"].startswith(PREFIX)]
    # What comes from a Secret is a word of whoever made it.
    given = {e["name"]: e.get("value") or SECRETS.get(e["name"].removeprefix(PREFIX), "secret") for e in listed}
    assert given
    return given


def settings(found: Installed) -> Settings:
    return load_settings(environ(found), GROUPS)


def catalogue(found: Installed) -> Catalogue:
    (data,) = [o["data"] for o in found.of("ConfigMap") if o["metadata"]["name"].endswith("-catalogue")]
    return parse_catalogue(yaml.safe_load(data["catalogue.yaml"]), ENTRY)


def component_of(document: Json) -> str:
    component: str = document["metadata"].get("labels", {}).get("app.kubernetes.io/component", "")
    return component


class _AsHelm(yaml.SafeLoader):
    """Helm takes a time for the text that it is written as."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def values_of(name: str) -> Json:
    """The values of an install of INSTALLS."""
    values: Json = yaml.load((CLUSTERS.get(name) or VALUES[name.partition(" on ")[0]]).read_text(), _AsHelm)
    return values


def installed(name: str) -> Installed:
    """An install of INSTALLS, or another job of _jobs; it must not have failed."""
    found = outcome(name)
    assert not found.error, found.error
    return found


def outcome(name: str) -> Installed:
    result = results()[name]
    absent: Json = {
        "error": "",
        "objects": [],
        "hooks": [],
        "notes": "",
        "upgraded": [],
        "left": [],
        "upgrade_hooks": [],
    }
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
        # On the oldest release as Helm 3 does it, on the newest by server-side apply, as Helm 4 does.
        ssa = release == NEWEST
        jobs[name] = {"chart": chart, "values": values_of(name), "kubernetes": release, "ssa": ssa}
    for name, changes in MARKED_INSTALLS.items():
        jobs[name] = {"chart": chart, "values": _changed(MARKED, changes), "kubernetes": NEWEST}
    default = {"chart": chart, "values": {}, "kubernetes": NEWEST}
    for name, (values, _) in REFUSED.items():
        jobs[name] = {**default, "values": values}
    for name, (models, _) in BAD_MODELS.items():
        jobs[name] = {**default, "values": {"models": models}}
    for name, (before, after, _) in LIVE.items():
        jobs[name] = {**default, "ssa": True, "values": before, "upgrade": after}
    for name, (before, after) in CHANGES.items():
        for ssa in (False, True):
            jobs[f"{name}, {ssa=}"] = {**default, "ssa": ssa, "values": before, "upgrade": after}
    more = {"router": {"replicaCount": 3, "logLevel": "debug"}}
    five = {"router": {"replicaCount": 5}}
    hpa = {"router": {"autoscaling": {"enabled": True}}}
    rollback = [["scale", 7], ["upgrade", hpa], ["scale", 9], ["rollback", 2]]
    parent = with_files.with_name("parent")
    keda = {"enabled": True, "serverAddress": "http://prometheus"}
    scraped = {"serviceMonitor": {"enabled": True}}
    near = {"router": {"service": {"trafficDistribution": "PreferSameNode"}}}
    three = {"enabled": True, "minReplicas": 3}
    unchecked = with_files.with_name("unchecked")
    return jobs | {
        "upgrade": {**default, "upgrade": more},
        "an HPA from now on": {**default, "values": five, "upgrade": hpa},
        "an HPA from now on, applied": {**default, "ssa": True, "values": five, "upgrade": hpa},
        "KEDA from now on": {**default, "values": five, "upgrade": {"router": {"keda": keda}}},
        # What an autoscaler has done since is not undone, nor in the way.
        "a rollback with an HPA": {**default, "ssa": True, "values": hpa, "steps": rollback},
        "an HPA turned on long ago": {
            **default,
            "ssa": True,
            "values": five,
            "steps": [["upgrade", hpa], *rollback[:-1], ["rollback", 3]],
        },
        "a claim of others": {**default, "values": {"registry": {"persistence": {"existingClaim": OLD_CLAIM}}}},
        "a Service of others": {**default, "there": OF_OTHERS, "values": {"engines": {"enabled": True}}},
        "variables of our own": {**default, "ssa": True, "values": VARIABLES},
        "scaled by others": {**default, "ssa": True, "values": SCALED_BY_OTHERS},
        "a canary": {**default, "values": CANARY},
        "virtual models": {**default, "values": VIRTUAL},
        "a parent's": {**default, "chart": str(parent), "values": {"inference-api": {"enabled": True}}},
        "a parent that does without": {
            **default,
            "chart": str(parent),
            "values": {"inference-api": {"enabled": False}},
        },
        "in a mesh": {**default, "values": MESH},
        "in a mesh, a control plane": {
            **default,
            "values": _changed(CONTROL, {"networkPolicy": MESH["networkPolicy"]}),
        },
        "a control plane from the stub": {**default, "ssa": True, "values": {}, "upgrade": CONTROL},
        "a control plane, upgraded": {**default, "values": CONTROL, "upgrade": _changed(CONTROL, NEXT_IMAGE)},
        "a control plane, the same": {**default, "values": CONTROL},
        "a control plane, another image": {**default, "values": _changed(CONTROL, NEXT_IMAGE)},
        "a control plane by Argo CD": {
            **default,
            "values": _changed(CONTROL, {"control.migrations": {"argocd": True}}),
        },
        "a control plane without its Job": {
            **default,
            "values": _changed(CONTROL, {"control.migrations": {"enabled": False}}),
        },
        "a control plane for the policy of others": {**default, "values": CONTROL_OF_OTHERS},
        "a control plane without a console": {
            **default,
            "values": _changed(CONTROL, {"control.console": {"enabled": False}}),
        },
        "a control plane that keeps nothing": {**default, "values": FORGETFUL},
        **{
            f"a control plane with engines, {scale=}, {logs=}": {**default, "values": looking(scale=scale, logs=logs)}
            for scale in (False, True)
            for logs in (False, True)
        },
        "a control plane, no models": {**default, "values": _changed(CONTROL, {"models": NO_MODELS})},
        "a control plane, a private CA": {**default, "values": PRIVATE_CA},
        "keys": {**default, "values": KEYS},
        "keys, an HPA": {**default, "values": _changed(KEYS, {"router.autoscaling": three})},
        "a control plane": {**default, "values": CONTROL_PLANE},
        "a changed policy": {**default, "values": KEYS, "upgrade": _changed(KEYS, {"router.policy": POLICY_LATER})},
        "engines with KEDA": {**default, "values": {"engines": ENGINES_KEDA, **SLEEPER, "monitoring": scraped}},
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
            inner = inner.setdefault(key, {})
        inner[last] = value
    return values


def _run() -> dict[str, Json]:
    with tempfile.TemporaryDirectory() as folder:
        with_files = Path(folder) / "inference-api"
        shutil.copytree(CHART, with_files, ignore=shutil.ignore_patterns("files"))
        for path, text in {"rules/some.yaml": yaml.safe_dump(RULES), "dashboards/some.json": DASHBOARD}.items():
            (with_files / "files" / path).parent.mkdir(parents=True)
            (with_files / "files" / path).write_text(text)
        shutil.copytree(CHART, with_files.with_name("parent") / "charts" / "inference-api")
        (with_files.with_name("parent") / "Chart.yaml").write_text(yaml.safe_dump(PARENT))
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
            timeout=560,
        )
    assert done.returncode == 0, done.stderr
    found: dict[str, Json] = json.loads(done.stdout)
    return found


def _key() -> str:
    """Of all that the results depend on."""
    assert _INSTALLED is not None
    digest = hashlib.sha256(_INSTALLED.name.encode())
    runner = [Path(__file__).with_name(name) for name in _RUNNER]
    for path in sorted([*CHART.rglob("*"), *CLUSTERS.values(), *runner]):
        if path.is_file():
            digest.update(f"{path.relative_to(ROOT)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()
