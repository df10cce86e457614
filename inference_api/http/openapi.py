"""GET /openapi.json: an OpenAPI 3.1 document, made from the table of routes; GET /docs: the same as a page."""

from collections.abc import Iterable
from functools import cached_property
from html import escape
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route as Page

from inference_api import __version__
from inference_api.errors import InvalidRequest
from inference_api.http.wire import json_bytes
from inference_api.models import Route

_JSON = "application/json"
_ERROR = {"$ref": "#/components/schemas/Error"}
# Statuses of the router; an engine's own are the default.
_FAILURES = {
    400: "The body is not valid JSON, or the request is malformed.",
    404: "The model or response does not exist.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The content type is not supported.",
    431: "The request head is too large.",
    500: "An internal error of the router.",
    502: "The backend gave no usable answer.",
    503: "No backend is available, or a limit is reached; see Retry-After.",
    504: "The backend did not answer in time.",
}
_SCHEMAS: dict[str, Any] = {
    "Error": {
        "type": "object",
        "required": ["error", "request_id"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                    "param": {"type": ["string", "null"]},
                    "code": {"type": "string"},
                },
            },
            "request_id": {"type": "string"},
        },
    },
    "Model": {
        "type": "object",
        "required": ["id", "object", "created", "owned_by"],
        "properties": {
            "id": {"type": "string"},
            "object": {"const": "model"},
            "created": {"type": "integer"},
            "owned_by": {"type": "string"},
            "version": {"type": "string"},
            "aliases": {"type": "array", "items": {"type": "string"}},
            "hardware": {"type": ["object", "null"]},
            "max_model_len": {"type": "integer"},
        },
    },
    "Models": {
        "type": "object",
        "required": ["object", "data"],
        "properties": {
            "object": {"const": "list"},
            "data": {"type": "array", "items": {"$ref": "#/components/schemas/Model"}},
        },
    },
    "Status": {"type": "object", "required": ["status"], "properties": {"status": {"type": "string"}}},
    "Version": {"type": "object", "required": ["version"], "properties": {"version": {"type": "string"}}},
    "Backends": {
        "type": "object",
        "required": ["data"],
        "properties": {
            "data": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["model", "backend", "state", "in_flight", "circuit"],
                    "properties": {
                        "model": {"type": "string"},
                        "backend": {"type": "string"},
                        "state": {"type": "string"},
                        "in_flight": {"type": "integer", "minimum": 0},
                        "circuit": {"enum": ["closed", "open", "half_open"]},
                        "reason": {"type": "string"},
                        "since": {"type": "integer", "description": "Unix milliseconds"},
                        "retry_at": {"type": "integer", "description": "Unix milliseconds"},
                    },
                },
            }
        },
    },
}
# path -> (summary, schema of the answer, other statuses)
_PAGES: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "/v1/models": ("The models of the catalogue.", "Models", ()),
    "/v1/models/{model}": ("A model, by its name or an alias.", "Model", (404, 503)),
    "/": ("Whether the router takes requests.", "Status", (503,)),
    "/readyz": ("Whether the router takes requests.", "Status", (503,)),
    "/health": ("Whether the process runs.", "Status", (503,)),
    "/healthz": ("Whether the process runs.", "Status", (503,)),
    "/version": ("The version of the router.", "Version", ()),
}
_OPS_PAGES: dict[str, tuple[str, str, tuple[int, ...]]] = {"/backends": ("The state of each backend.", "Backends", ())}
_STORED = {
    "/v1/responses/{id}": {"get": "A stored response.", "delete": "Delete a stored response."},
    "/v1/responses/{id}/cancel": {"post": "Cancel a response that is generated in the background."},
}
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a}"
    "table{border-collapse:collapse;width:100%}td,th{text-align:left;padding:.3rem .8rem .3rem 0;border-bottom:1px "
    "solid #ddd;vertical-align:top}code{font-family:ui-monospace,monospace}"
    "@media(prefers-color-scheme:dark){body{background:#111;color:#eee}td,th{border-color:#333}a{color:#8cf}}"
)


class Document:
    """Renders both on first use. `validation_status`: of a body that is not valid.

    `ops`: operators' pages are on this port, too.
    """

    def __init__(self, routes: Iterable[Route], validation_status: int = InvalidRequest.status, *, ops: bool) -> None:
        self._inference = tuple(routes)
        self._validation_status = validation_status
        self._ops = ops

    def routes(self) -> list[Page]:
        return [Page("/openapi.json", self._openapi), Page("/docs", self._docs)]

    async def _openapi(self, request: Request) -> Response:
        return Response(self._rendered, media_type=_JSON)

    async def _docs(self, request: Request) -> Response:
        policy = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"}
        return HTMLResponse(self._page, headers=policy)

    @cached_property
    def _rendered(self) -> bytes:
        return json_bytes(self.document)

    @cached_property
    def document(self) -> dict[str, Any]:
        pages = _PAGES | (_OPS_PAGES if self._ops else {})
        paths: dict[str, Any] = {
            route.path: {"post": _operation(route, self._validation_status)} for route in self._inference
        }
        paths |= {
            path: {method: _stored(path, method, summary) for method, summary in operations.items()}
            for path, operations in _STORED.items()
        }
        paths |= {path: {"get": _page(path, *about)} for path, about in pages.items()}
        return {
            "openapi": "3.1.0",
            "info": {
                "title": "inference-api",
                "version": __version__,
                "description": "An OpenAI-compatible inference router. Of a body it reads the fields that are listed "
                "here; all others go to the engine as they are, and its answer comes back as it is.",
            },
            "paths": paths,
            "components": {"schemas": _SCHEMAS},
        }

    @cached_property
    def _page(self) -> str:
        rows = "".join(
            f"<tr><td>{method.upper()}<td><code>{escape(path)}</code><td>{escape(operation['summary'])}"
            for path, operations in self.document["paths"].items()
            for method, operation in operations.items()
        )
        return (
            f"<!doctype html><html lang=en><meta charset=utf-8><title>inference-api</title><style>{_STYLE}</style>"
            f"<h1>inference-api {escape(__version__)}</h1><p>{escape(self.document['info']['description'])}"
            '<p>The same as an OpenAPI document: <a href="openapi.json">openapi.json</a>.'
            f"<table><tr><th>Method<th>Path<th>{rows}</table></html>"
        )


def _operation(route: Route, validation_status: int) -> dict[str, Any]:
    kind = "multipart/form-data" if route.multipart else _JSON
    answers: dict[str, Any] = {"*/*": {}}
    if route.end_marks:
        answers["text/event-stream"] = {}
    # With VALIDATION_STATUS=400 one status has both meanings.
    failures = _FAILURES | {
        validation_status: f"{_FAILURES.get(validation_status, '')} A field is missing or not valid.".lstrip()
    }
    return {
        "operationId": _identifier(route.path),
        "summary": f"Sent to a backend of the model: {route.label.replace('_', ' ')}.",
        "requestBody": {"required": True, "content": {kind: {"schema": route.reader.schema()}}},
        "responses": {
            "200": {"description": "The engine's answer.", "content": answers},
            **{str(status): _failure(text) for status, text in sorted(failures.items())},
            "default": {"description": "The engine's own error.", "content": {"*/*": {}}},
        },
    }


def _stored(path: str, method: str, summary: str) -> dict[str, Any]:
    return {
        "operationId": f"{method}_{_identifier(path)}",
        "summary": summary,
        "parameters": [{"name": "id", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}],
        "responses": {
            "200": {"description": "The engine's answer.", "content": {"*/*": {}}},
            **{str(status): _failure(text) for status, text in _FAILURES.items() if status != 415},
            "default": {"description": "The engine's own error.", "content": {"*/*": {}}},
        },
    }


def _page(path: str, summary: str, schema: str, failures: tuple[int, ...]) -> dict[str, Any]:
    answer = {"schema": {"$ref": f"#/components/schemas/{schema}"}}
    responses: dict[str, Any] = {"200": {"description": summary, "content": {_JSON: answer}}}
    for status in failures:
        # A failing probe has the same schema.
        body = answer if status == 503 and schema == "Status" else {"schema": _ERROR}
        responses[str(status)] = {"description": "No.", "content": {_JSON: body}}
    operation: dict[str, Any] = {"operationId": f"get_{_identifier(path)}", "summary": summary, "responses": responses}
    if "{model}" in path:
        operation["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    return operation


def _failure(text: str) -> dict[str, Any]:
    # Engines answer with most of these statuses, too; their errors pass unchanged.
    either = {"anyOf": [_ERROR, {"description": "The engine's own error.", "type": "object"}]}
    return {"description": text, "content": {_JSON: {"schema": either}, "*/*": {}}}


def _identifier(path: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in path).strip("_") or "root"
