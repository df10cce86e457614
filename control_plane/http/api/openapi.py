"""/api/v1/openapi.json, an OpenAPI 3.1 document, and /api/v1/docs, the same as a page. Both are open.

FastAPI describes the signatures; what all operations have in common is added here, and an example for each.
"""

import base64
import hashlib
import json
from collections.abc import Mapping
from html import escape
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from control_plane.http.api.access import PREFIX, ROUTES
from control_plane.http.api.examples import EXAMPLES, PARAMETERS, example_of
from inference_api import __version__
from inference_api.app import ENTRY

_ABOUT = """\
The registry of the inference routers: models, keys, organisations, limits, budgets, prompts, prices, overrides, usage.

Objects have an `ETag`: PUT, PATCH and DELETE name the version that they change in `If-Match`. Lists come in pages:
`?limit=50&after=<next>`. Times are RFC 3339 in UTC, money is in the currency of the control plane, and every error has
the same shape, with a sentence that says what to do."""
_JSON = "application/json"
_FAILURES = {
    400: "The request or its body cannot be read.",
    401: "Nobody is logged in, and there is no management token that holds.",
    403: "No role of the caller allows it, or a page of another site has sent it.",
    404: "There is no such object, or the caller may not see it.",
    409: "A name is taken, or something else is in the way.",
    410: "It was there, and is gone.",
    412: "The object is not what If-Match or If-None-Match says.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    422: "A value is missing or not valid; `errors` has all of them.",
    428: "If-Match is missing.",
    429: "Too many attempts; see Retry-After.",
    500: "A fault of the control plane; its log has more.",
    502: "What it asks in turn does not answer as it should.",
    503: "The database, or what it asks in turn, is away; see Retry-After.",
}
_EVERY = (400, 401, 403, 413, 422, 429, 500, 503)
_ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error", "request_id"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string", "enum": ["invalid_request_error", "server_error"]},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
                "errors": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "required": ["param", "message"],
                        "properties": {"param": {"type": "string"}, "message": {"type": "string"}},
                    },
                },
            },
        },
        "request_id": {"type": "string"},
    },
    "examples": [
        {
            "error": {
                "message": "There is no key 'k3v9Qm2XbT7a', or you may not see it.",
                "type": "invalid_request_error",
                "param": None,
                "code": "not_found",
            },
            "request_id": "4bf92f3577b34da6",
        }
    ],
}
_SECURITY = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "A management token, `mt-ia-...`."},
    "session": {"type": "apiKey", "in": "cookie", "name": "__Host-ia_session", "description": "The login of a person."},
}
_HEADERS = {
    "If-Match": "ETag of the version that is changed",
    "If-None-Match": "`*`: only if it does not exist",
    "Idempotency-Key": "a text of your own for this request: sent again within 24 hours, it is not done again",
}
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem}"
    "summary{cursor:pointer;padding:.2rem 0}code,pre{font-family:ui-monospace,monospace}pre{overflow:auto}"
    "b{display:inline-block;width:5rem}:root{color-scheme:light dark}"
)


def _content_policy() -> str:
    """What the page, with this one style sheet, may load: nothing."""
    digest = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    return (
        f"default-src 'none'; style-src 'sha256-{digest}'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    )


class Documented:
    """The document of an app, made once, when it is first asked for."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app
        self._made: dict[str, Any] | None = None

    def document(self) -> dict[str, Any]:
        if self._made is None:
            made = get_openapi(
                title="Control plane",
                version=__version__,
                description=_ABOUT,
                routes=self._app.routes,
                servers=[{"url": PREFIX}],
            )
            self._made = _completed(made)
        return self._made

    async def page(self, request: Request) -> Response:
        return HTMLResponse(_page(self.document()), headers={"Content-Security-Policy": _content_policy()})


def _completed(made: dict[str, Any]) -> dict[str, Any]:
    schemas = made["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    entry = ENTRY.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas.update(entry.pop("$defs", {}))
    schemas.update({"Error": _ERROR, "Model": entry})
    made["components"]["securitySchemes"] = _SECURITY
    made["security"] = [{name: []} for name in _SECURITY]
    # In the document a path is {name}, in the table {name:path}.
    needed = {(method, path.replace(":path}", "}")): one for (method, path), one in ROUTES.items()}
    for path, operations in made["paths"].items():
        for method, operation in operations.items():
            _complete(operation, method.upper(), path, needed[method.upper(), path], schemas)
    return made


def _complete(operation: dict[str, Any], method: str, path: str, needed: str, schemas: Mapping[str, Any]) -> None:
    if path.startswith("/models"):
        _describe_models(operation, method, path)
    operation["summary"] = operation["summary"].capitalize()
    said = operation.get("description", "")
    if needed == "open":
        operation["security"] = []
        rights = "Open to everyone."
    else:
        rights = "For whoever is logged in." if needed == "self" else f"Needs the permission `{needed}`."
    operation["description"] = f"{said}\n\n{rights}" if said else f"{operation['summary']}. {rights}"
    changes = method in ("PUT", "PATCH", "DELETE")
    headers = {"POST": ["Idempotency-Key"], "PUT": ["If-Match", "If-None-Match"]}.get(method, [])
    for name in ["If-Match"] if method in ("PATCH", "DELETE") else headers:
        parameter = {"name": name, "in": "header", "description": _HEADERS[name], "schema": {"type": "string"}}
        operation.setdefault("parameters", []).append(parameter)
    for parameter in operation.get("parameters", ()):
        if parameter["in"] == "path" and "example" not in parameter:
            parameter["example"] = PARAMETERS.get(parameter["name"], "example")
    failures = {*_EVERY, *((404,) if "{" in path or method == "POST" else ())}
    failures |= {409, 412, 428, 404} if changes else {409} if method == "POST" else set()
    # Those that the handler declares
    failures |= {int(status) for status in operation["responses"] if status >= "400"}
    failures |= {415} if "requestBody" in operation else set()
    for status in sorted(failures):
        answer = {
            "description": _FAILURES[status],
            "content": {_JSON: {"schema": {"$ref": "#/components/schemas/Error"}}},
        }
        operation["responses"][str(status)] = answer
    _exemplify(operation, method, path, schemas)


def _describe_models(operation: dict[str, Any], method: str, path: str) -> None:
    """The handlers read and write entries of the catalogue themselves."""
    content = {_JSON: {"schema": {"$ref": "#/components/schemas/Model"}}}
    if method == "PUT":
        operation["requestBody"] = {"required": True, "content": content}
    for status, answer in operation["responses"].items():
        if status in ("200", "201") and path != "/models":
            answer["content"] = content


def _exemplify(operation: dict[str, Any], method: str, path: str, schemas: Mapping[str, Any]) -> None:
    given = EXAMPLES.get((method, path), {})
    body = operation.get("requestBody", {}).get("content", {}).get(_JSON)
    if body is not None:
        body["example"] = given["body"] if "body" in given else example_of(body["schema"], schemas)
    for status, answer in operation["responses"].items():
        content = answer.get("content", {}).get(_JSON)
        if content is None:
            continue
        schema = content.get("schema", {})
        # Beside a reference, the words of the handler's type would hold, too.
        content["schema"] = {"$ref": schema["$ref"]} if "$ref" in schema else schema
        if status.startswith("2"):
            written = given.get(status, given.get("answer"))
            content["example"] = example_of(content["schema"], schemas) if written is None else written


def _page(document: Mapping[str, Any]) -> str:
    parts = []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            parts.append(
                f"<details><summary><b>{method.upper()}</b> <code>{escape(path)}</code> {escape(operation['summary'])}"
                f"</summary><p>{escape(operation['description'])}{_shown(operation)}</details>"
            )
    about = "".join(f"<p>{escape(one)}" for one in document["info"]["description"].split("\n\n"))
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Control plane: API</title><style>{_STYLE}</style>"
        f"<h1>Control plane {escape(document['info']['version'])}: API</h1>{about}"
        f'<p>The same as an OpenAPI document: <a href="openapi.json">openapi.json</a>.{"".join(parts)}</html>'
    )


def _shown(operation: Mapping[str, Any]) -> str:
    found = []
    body = operation.get("requestBody", {}).get("content", {}).get(_JSON)
    if body is not None:
        found.append(f"<p>Body:<pre>{escape(_pretty(body['example']))}</pre>")
    for status, answer in operation["responses"].items():
        example = answer.get("content", {}).get(_JSON, {}).get("example")
        text = "" if example is None else f"<pre>{escape(_pretty(example))}</pre>"
        found.append(f"<p>{status}: {escape(answer['description'])}{text}")
    return "".join(found)


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=1)
