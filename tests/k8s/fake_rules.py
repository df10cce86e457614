"""What a real API server has against an object, by itself or as a change of the one that is there; None: nothing."""

import json
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import referencing

Json = dict[str, Any]

_SCHEMAS = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema"
# Of a workload's spec; the rest is for ever.
_CHANGEABLE = {
    "Deployment": None,
    "StatefulSet": {
        *("replicas", "ordinals", "template", "updateStrategy", "revisionHistoryLimit", "minReadySeconds"),
        "persistentVolumeClaimRetentionPolicy",
    },
}
_BINARY = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_SIZE = re.compile(r"([0-9.]+)([A-Za-z]*)")


def problem(body: Json, release: str, custom: set[str]) -> str | None:
    """Of an object alone."""
    if body["apiVersion"] in custom:
        return None
    return schema_problem(body, release) or _selector_problem(body) or _duplicate_problem(body)


def schema_problem(body: Json, release: str) -> str | None:
    """What the strict schema of the release says."""
    error = jsonschema.exceptions.best_match(_validator(release, body["apiVersion"], body["kind"]).iter_errors(body))
    if error is None:
        return None
    return f"{body['kind']} {body['metadata']['name']}: {'.'.join(map(str, error.path))}: {error.message}"


def change_problem(old: Json, new: Json) -> str | None:
    """What cannot be changed once it is there."""
    kind, name = new["kind"], new["metadata"]["name"]
    was, is_now = old.get("spec", {}), new.get("spec", {})
    if kind in _CHANGEABLE and was["selector"] != is_now["selector"]:
        return f'{kind}.apps "{name}" is invalid: spec.selector: field is immutable'
    changeable = _CHANGEABLE.get(kind) or {*was, *is_now}
    if any(was.get(key) != is_now.get(key) for key in {*was, *is_now} - changeable):
        fields = ", ".join(sorted(changeable))
        return f'{kind}.apps "{name}" is invalid: spec: updates to fields other than {fields} are forbidden'
    if kind == "PersistentVolumeClaim" and (found := _claim_problem(was, is_now)):
        return f'{kind} "{name}" is invalid: {found}'
    if kind == "RoleBinding" and old["roleRef"] != new["roleRef"]:
        return f'{kind} "{name}" is invalid: roleRef: cannot change roleRef'
    if kind == "Service" and was.get("clusterIP") != is_now.get("clusterIP"):
        return f'{kind} "{name}" is invalid: spec.clusterIP: field is immutable'
    return None


def _claim_problem(was: Json, is_now: Json) -> str | None:
    fixed = [{key: value for key, value in spec.items() if key != "resources"} for spec in (was, is_now)]
    sizes = [_bytes(spec["resources"]["requests"]["storage"]) for spec in (was, is_now)]
    if fixed[0] != fixed[1]:
        return "spec: Forbidden: spec is immutable after creation except resources.requests for bound claims"
    if sizes[1] < sizes[0]:
        return "spec.resources.requests.storage: Forbidden: field can not be less than previous value"
    return None


def _bytes(quantity: str | float) -> float:
    number, unit = _SIZE.fullmatch(str(quantity)).groups()  # type: ignore[union-attr]
    return float(number) * _BINARY[unit]


def _selector_problem(body: Json) -> str | None:
    """A workload must select its own pods."""
    if body["apiVersion"] != "apps/v1":
        return None
    selector, labels = body["spec"]["selector"]["matchLabels"], body["spec"]["template"]["metadata"]["labels"]
    if selector.items() <= labels.items():
        return None
    return f"{body['kind']} {body['metadata']['name']}: `selector` does not match template `labels`"


def _duplicate_problem(body: Json) -> str | None:
    """Names that pods cannot have twice, however they come; of variables the last one counts."""
    pod = body["spec"] if body["kind"] == "Pod" else body.get("spec", {}).get("template", {}).get("spec")
    if not pod:
        return None
    containers = [*pod["containers"], *pod.get("initContainers", ())]
    lists = {"containers": [c["name"] for c in containers], "volumes": [v["name"] for v in pod.get("volumes", ())]}
    for container in containers:
        place = f"containers[{container['name']}]"
        lists[f"{place}.volumeMounts"] = [mount["mountPath"] for mount in container.get("volumeMounts", ())]
        lists[f"{place}.ports"] = [port["name"] for port in container.get("ports", ())]
    for place, names in lists.items():
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            return (
                f"{body['kind']} {body['metadata']['name']}: spec.template.spec.{place}: Duplicate value: {twice[0]!r}"
            )
    return None


@cache
def _validator(release: str, version: str, kind: str) -> Any:
    group = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", version)
    schema = json.loads((_SCHEMAS / f"v{release}.0-local-strict" / f"{kind.lower()}-{group}.json").read_text())
    return jsonschema.validators.Draft202012Validator(schema, registry=_definitions(release))


@cache
def _definitions(release: str) -> Any:
    path = _SCHEMAS / f"v{release}.0-local-strict" / "_definitions.json"
    return referencing.Resource.from_contents(json.loads(path.read_text())) @ referencing.Registry()
