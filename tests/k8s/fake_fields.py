"""Who owns which field of an object, and what server-side apply makes of that.

https://kubernetes.io/docs/reference/using-api/server-side-apply/, as far as Helm and an autoscaler need it: a field is
a path of keys; an element of a list that is a map has the value of its key as one of them.
"""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

Json = dict[str, Any]
Path = tuple[str, ...]
Fields = dict[Path, Any]

# What elements are told apart by, in lists that are maps by the API's own definition; all others are of one piece.
_KEYS = {
    **dict.fromkeys(("containers", "initContainers", "volumes", "env", "imagePullSecrets"), ("name",)),
    "volumeMounts": ("mountPath",),
    "ports": ("containerPort", "port", "protocol"),
}
# These have no keys there: rules of a NetworkPolicy, and kinds that are others'.
_WORKLOADS = ("Deployment", "StatefulSet", "Service", "Pod", "ServiceAccount")
_NOBODYS = {("apiVersion",), ("kind",), ("metadata", "name"), ("metadata", "namespace"), ("metadata", "managedFields")}


class Manager(NamedTuple):
    """Of fields: `operation` is Apply or Update; an autoscaler sets `replicas` through the subresource `scale`."""

    name: str
    operation: str
    subresource: str = ""


class Conflict(Exception):
    """Fields that somebody else owns and has given another value."""


def fields(document: Json) -> Fields:
    """Every field that the document says something about."""
    found = dict(_leaves(document, (), document["kind"] in _WORKLOADS))
    return {path: value for path, value in found.items() if path not in _NOBODYS}


def duplicates(document: Json) -> list[str]:
    """Elements that two of one list would be: a map has room for one."""
    keyed = document["kind"] in _WORKLOADS
    paths = [path for path, _ in _elements(document, (), keyed)]
    return [
        f".{'.'.join(path[:-1])}: duplicate entries for key {path[-1]}" for path, n in Counter(paths).items() if n > 1
    ]


def applied(live: Json, config: Json, owners: dict[Manager, Fields], manager: Manager, force: bool) -> Json:
    """The live object with what one manager wants of it; raises Conflict. Changes the owners."""
    wanted, now = fields(config), fields(live)
    others = {path: other for other, owned in owners.items() if other != manager for path in owned}
    clashes = [path for path, value in wanted.items() if path in others and now.get(path, value) != value]
    if clashes and not force:
        path = clashes[0]
        other = others[path]
        through = f' with subresource "{other.subresource}"' if other.subresource else ""
        raise Conflict(f'conflict with "{other.name}"{through} using {live["apiVersion"]}: .{".".join(path)}')
    dropped = owners.get(manager, {}).keys() - wanted.keys() - others.keys()
    owners[manager] = wanted
    _disown(owners, manager, {path: wanted[path] for path in clashes})
    return _built(live, {path: value for path, value in now.items() if path not in dropped} | wanted)


def updated(before: Json, after: Json, owners: dict[Manager, Fields], manager: Manager) -> None:
    """Who changes a field without applying owns it from then on, alone."""
    old, new = fields(before) if before else {}, fields(after)
    changed = {path: value for path, value in new.items() if path not in old or old[path] != value}
    for owned in owners.values():
        for path in old.keys() - new.keys():
            owned.pop(path, None)
    owners[manager] = owners.get(manager, {}) | changed
    _disown(owners, manager, changed)


def managed_fields(owners: dict[Manager, Fields]) -> list[Json]:
    """As an object tells of them."""
    return [
        {
            "manager": manager.name,
            "operation": manager.operation,
            "fieldsType": "FieldsV1",
            "fieldsV1": _nested(owned),
            **({"subresource": manager.subresource} if manager.subresource else {}),
        }
        for manager, owned in owners.items()
        if owned
    ]


def _leaves(value: Any, path: Path, keyed: bool) -> Iterator[tuple[Path, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key), keyed)
    elif keys := _key_names(path, value, keyed):
        for item in value:
            yield from _leaves(item, (*path, _key(item, keys)), keyed)
    else:
        yield path, value


def _elements(value: Any, path: Path, keyed: bool) -> Iterator[tuple[Path, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _elements(inner, (*path, key), keyed)
    elif keys := _key_names(path, value, keyed):
        for item in value:
            place = (*path, _key(item, keys))
            yield place, item
            yield from _elements(item, place, keyed)


def _key_names(path: Path, value: Any, keyed: bool) -> tuple[str, ...]:
    if not (keyed and path and isinstance(value, list) and value and isinstance(value[0], dict)):
        return ()
    return _KEYS.get(path[-1], ())


def _key(item: Json, keys: tuple[str, ...]) -> str:
    return json.dumps({key: item[key] for key in keys if key in item}, separators=(",", ":"), sort_keys=True)


def _built(live: Json, wanted: Fields) -> Json:
    """An object of these fields; lists keep the order in which their elements come."""
    document: Json = {key: live[key] for key in ("apiVersion", "kind")}
    document["metadata"] = {key: live["metadata"][key] for key in ("name", "namespace") if key in live["metadata"]}
    for path, value in wanted.items():
        inner: Any = document
        for key, follows in zip(path, (*path[1:], ""), strict=True):
            if key.startswith("{"):
                found = next((item for item in inner if json.loads(key).items() <= item.items()), None)
                if found is None:
                    inner.append(found := json.loads(key))
                inner = found
            elif follows == "":
                inner[key] = value
            else:
                inner = inner.setdefault(key, [] if follows.startswith("{") else {})
    return document


def _disown(owners: dict[Manager, Fields], but: Manager, changed: Fields) -> None:
    for manager, owned in owners.items():
        if manager != but:
            for path in changed:
                owned.pop(path, None)


def _nested(owned: Fields) -> Json:
    tree: Json = {}
    for path in owned:
        inner = tree
        for key in path:
            inner = inner.setdefault(f"k:{key}" if key.startswith("{") else f"f:{key}", {})
    return tree
