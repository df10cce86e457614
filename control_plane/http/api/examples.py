"""Examples of the OpenAPI document: made from the schemas, and written where these say too little."""

from collections.abc import Mapping
from typing import Any

# Of parts of paths
PARAMETERS = {
    "id": "k3v9Qm2XbT7a",
    "name": "team-a",
    "user": "ana",
    "key": "usage.record_days",
    "label": "production",
    "query": "kv_cache",
    "n": 1,
}
_TIME = "2026-11-28T12:00:00Z"
_BY_NAME: Mapping[str, Any] = {
    "name": "team-a",
    "title": "Team A",
    "email": "ana@example.org",
    "organisation": "team-a",
    "user": "ana",
    "role": "member",
    "platform_role": "operator",
    "password": "correct horse battery staple",
    "created_by": "ana",
    "moved_by": "ana",
    "reason": "driver",
    "note": "shorter",
    "text": "Explain {{topic}} in one sentence.",
    "role_of_message": "user",
    "content": "Hello",
    "address": "10.0.3.4",
    "next": None,
}
_MODEL: dict[str, Any] = {"name": "llama-3-8b", "backends": [{"url": "http://10.0.0.11:8000"}]}
_OVERRIDE: dict[str, Any] = {
    "id": "ovr_01JDSX7Z3W8Q4M5N6P7R8S9T0V",
    "backend": "10.0.0.21:8000",
    "model": None,
    "action": "drain",
    "reason": "driver",
    "created_by": "ana",
    "created_at": "2026-11-28T11:40:00Z",
    "expires_at": "2026-11-28T13:00:00Z",
    "ended_at": None,
    "acknowledged": {"routers": 3, "of": 3, "missing": []},
}
_PRICE: dict[str, Any] = {
    "model": "llama-3-8b",
    "valid_from": _TIME,
    "input": 0.2,
    "cached_input": 0.02,
    "output": 0.6,
    "request": 0,
}
_STORED_PRICE = {"id": "prc_01JDSX7Z3W8Q4M5N6P7R8S9T0V", **_PRICE, "created_at": _TIME, "created_by": "ana"}
_REQUEST: dict[str, Any] = {
    "id": "9f3c5a1e77b04d21-1048",
    "kind": "request",
    "at": 1795862400123,
    "model": "llama-3-8b",
    "key_id": "k3v9Qm2XbT7a",
    "status": 200,
    "outcome": "ok",
    "key_name": "batch",
    "received_at": "2026-11-28T12:00:02Z",
    "related": [],
}
_SUMS: dict[str, Any] = {
    "requests": 1200,
    "errors": 9,
    "input_tokens": 310000,
    "output_tokens": 44000,
    "cost_nanos": 412100000,
}
_USAGE: dict[str, Any] = {
    "start": "2026-11-27T00:00:00Z",
    "end": "2026-11-28T00:00:00Z",
    "bucket": "1d",
    "currency": "USD",
    "group_by": ["model"],
    "totals": _SUMS,
    "series": [{"group": {"model": "llama-3-8b"}, "points": [{"at": "2026-11-27T00:00:00Z", **_SUMS}]}],
    "rows": [{"group": {"model": "llama-3-8b"}, **_SUMS}],
    "coverage": {"received": 1200, "dropped": 0, "share": 1.0, "estimated": 0.03},
}
_INSPECTION: dict[str, Any] = {
    "id": "ins_01JDSX7Z3W8Q4M5N6P7R8S9T0V",
    "source": "hub",
    "ref": "meta-llama/Llama-3.1-8B",
    "at": _TIME,
    "by": "ana",
    "result": {
        "estimate": True,
        "format": "safetensors",
        "parameters": 8030261248,
        "context": 131072,
        "weights_bytes": 16060522496,
        "cache_bytes_per_token": 131072,
        "memory_bytes": {"low": 17134264320, "high": 21420110643},
        "suggestion": {
            "name": "Llama-3.1-8B",
            "hardware": {"gpu": "NVIDIA A100 40GB", "gpu_count": 1, "gpu_memory_gib": 40.0},
            "max_model_len": 131072,
        },
    },
}
_BACKEND = {"model": "llama-3-8b", "backend": "10.0.0.12:8000", "state": "ready", "agree": "3/3"}
_ROUTER = {"instance": "router-7f9c-8000", "version": "0.9.0", "lost": False, "in_flight": 40}

_INSTANCE: dict[str, Any] = {
    "name": "llama-3-8b-7f9c-x2x4j",
    "model": "llama-3-8b",
    "state": "ready",
    "reason": None,
    "since": _TIME,
    "restarts": 0,
    "last_exit": None,
    "containers": ["engine"],
    "address": "10.0.0.12",
    "tail": [],
}
_TESTED = {
    "id": "mdt_01JDSX7Z3W8Q4M5N6P7R8S9T0V",
    "model": "llama-3-8b",
    "backend": None,
    "kind": "chat",
    "at": "2026-11-28T12:00:00Z",
    "by": "ana",
    "ok": True,
    "steps": [
        {"name": "health", "verdict": "ok", "words": "As routers report it: Its backend is ready.", "took_ms": 1.2},
        {"name": "listed", "verdict": "ok", "words": "It names 'llama-3-8b'.", "took_ms": 4.1},
        {"name": "call", "verdict": "ok", "words": "chat: “Hello!”, 3 tokens", "took_ms": 212.7},
    ],
}
_DEPLOYMENT: dict[str, Any] = {
    "driver": "kubernetes",
    "namespace": "engines",
    "object": "llama-3-8b",
    "min": 1,
    "max": 2,
    "idle_seconds": None,
    "scale_to_zero": False,
}
_LOOKED: dict[str, Any] = {
    "model": "llama-3-8b",
    **_DEPLOYMENT,
    "last_activation_at": None,
    "was_ready_at": _TIME,
    "state": "ready",
    "ready": 1,
    "wanted": 1,
    "reason": None,
    "since": _TIME,
    "owner": None,
    "instances": [_INSTANCE],
    "events": [],
}

_TRIAGE: dict[str, Any] = {
    "id": "tri_01JDSX7Z3W8Q4M5N6P7R8S9T0V",
    "model": "llama-3-8b",
    "at": _TIME,
    "by": "ana",
    "start": "2026-11-28T11:30:00Z",
    "end": _TIME,
    "logs": [{"pod": _INSTANCE["name"], "previous": True, "lines": 500, "why": None}],
    "groups": [
        {
            "id": "g1",
            "kind": "log",
            "level": "error",
            "template": "torch.OutOfMemoryError: CUDA out of memory. (at linear.py in __init__)",
            "count": 41,
            "first": "2026-11-28T11:58:01Z",
            "last": "2026-11-28T11:59:58Z",
            "runbook": "k8s/runbook.md#engine-out-of-gpu-memory",
        }
    ],
    "more": 0,
    "summary": {
        "model": "mistral-7b",
        "why": None,
        "headline": "The GPU has too little memory.",
        "findings": [{"text": "Weights do not fit.", "group_ids": ["g1"], "confidence": "high"}],
        "unknowns": [],
    },
    "examples": None,
}
_LINE = {"text": "torch.OutOfMemoryError: CUDA out of memory.", "pod": _INSTANCE["name"], "previous": True, "line": 12}


def _page(item: Any) -> dict[str, Any]:
    return {"data": [item], "next": None}


EXAMPLES: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("GET", "/models"): {"answer": _page(_MODEL)},
    ("GET", "/models/{name}"): {"answer": _MODEL},
    ("PUT", "/models/{name}"): {"body": _MODEL, "answer": _MODEL},
    ("GET", "/inspections"): {"answer": _page(_INSPECTION)},
    ("POST", "/inspections"): {
        "body": {"source": "hub", "ref": "meta-llama/Llama-3.1-8B"},
        "answer": _INSPECTION,
    },
    ("GET", "/inspections/{id}"): {"answer": _INSPECTION},
    ("GET", "/overrides"): {"answer": _page(_OVERRIDE)},
    ("POST", "/overrides"): {
        "body": {"backend": "10.0.0.21:8000", "action": "drain", "reason": "driver", "expires_in": 3600},
        "answer": _OVERRIDE,
        "200": {"ended": [_OVERRIDE["id"]]},
    },
    ("GET", "/overrides/{id}"): {"answer": _OVERRIDE},
    ("GET", "/deployments"): {"answer": _page(_LOOKED)},
    ("GET", "/deployments/{model}"): {"answer": _LOOKED},
    ("PUT", "/deployments/{model}"): {"body": _DEPLOYMENT, "answer": _LOOKED},
    ("POST", "/model-actions"): {
        "body": {"model": "llama-3-8b", "action": "start", "reason": "a demo"},
        "answer": _LOOKED,
    },
    ("GET", "/model-tests"): {"answer": _page(_TESTED)},
    ("GET", "/pods"): {"answer": _page(_INSTANCE)},
    ("GET", "/logs"): {
        "answer": {
            "model": "llama-3-8b",
            "pod": _INSTANCE["name"],
            "container": "engine",
            "previous": False,
            "lines": ["Application startup complete."],
            "truncated": False,
        }
    },
    ("GET", "/triage"): {
        "answer": _page(
            {
                **{name: _TRIAGE[name] for name in ("id", "model", "at", "by")},
                "groups": 1,
                "first": _TRIAGE["groups"][0]["template"],
                "headline": _TRIAGE["summary"]["headline"],
            }
        )
    },
    ("POST", "/triage"): {
        "body": {"model": "llama-3-8b", "minutes": 30, "summary": True},
        "answer": {**_TRIAGE, "examples": {"g1": [_LINE]}},
    },
    ("GET", "/triage/{id}"): {"answer": _TRIAGE},
    ("GET", "/prices"): {"answer": _page(_STORED_PRICE)},
    ("POST", "/prices"): {"body": _PRICE, "answer": _STORED_PRICE},
    ("GET", "/usage"): {"answer": _USAGE},
    ("GET", "/requests"): {"answer": _page(_REQUEST)},
    ("GET", "/requests/{id}"): {"answer": _REQUEST},
    ("GET", "/backends"): {"answer": _page(_BACKEND)},
    ("GET", "/routers"): {"answer": _page(_ROUTER)},
    ("PATCH", "/keys/{id}"): {"body": {"disabled": True}},
    ("PATCH", "/me"): {"body": {"title": "Ana"}},
    ("PATCH", "/organisations/{name}"): {"body": {"title": "Team A", "models": ["llama-*"]}},
    ("PATCH", "/users/{name}"): {"body": {"platform_role": "viewer"}},
    ("PATCH", "/tokens/{id}"): {"body": {"disabled": True}},
}


def example_of(schema: Mapping[str, Any], schemas: Mapping[str, Any], name: str = "", depth: int = 0) -> Any:
    """A value that the schema allows, with what is in it by name."""
    if "$ref" in schema:
        found = schemas.get(schema["$ref"].rpartition("/")[2], {})
        return example_of(found, schemas, name, depth + 1) if depth < 8 else {}
    for key in ("example", "const", "default"):
        if key in schema:
            return schema[key]
    for key in ("examples", "enum"):
        if schema.get(key):
            return schema[key][0]
    either = schema.get("anyOf") or schema.get("oneOf") or schema.get("allOf")
    if either:
        return example_of(either[0], schemas, name, depth + 1)
    kind = schema.get("type")
    if kind == "object" or "properties" in schema:
        properties = schema.get("properties", {})
        return {one: example_of(value, schemas, one, depth + 1) for one, value in properties.items()}
    if kind == "array":
        return [example_of(schema.get("items", {}), schemas, name, depth + 1)] if depth < 8 else []
    if name in _BY_NAME and kind in ("string", None):
        return _BY_NAME[name]
    if name.endswith(("_at", "_until", "expires")) and kind == "string":
        return _TIME
    return {"string": "text", "integer": 1, "number": 1.5, "boolean": False}.get(str(kind))
