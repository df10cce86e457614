"""Prints docs/configuration.md, made from the router's Settings; `--control-plane`: the page of the control plane.

`--write` replaces both files.
"""

import sys
from pathlib import Path
from typing import Any

from control_plane import settings as control_plane
from inference_api.app import GROUPS
from inference_api.settings import PREFIX, Settings, fields_of

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "configuration.md"
CONTROL_PLANE_PAGE = DOCS / "control-plane-configuration.md"

# The title of a table, by its first setting.
_TITLES = {
    "host": "Listening",
    "catalogue": "Models and registry",
    "discovery": "Discovery and load",
    "connect_timeout": "Timeouts of backends",
    "header_timeout": "Clients and connections",
    "max_body_bytes": "Limits",
    "max_attempts": "Attempts and headers",
    "breaker_failures": "Health",
    "drain_delay": "Shutdown",
    "log_level": "Log",
    "cors_origins": "Optional features",
}
_HEAD = f"""\
<!-- Made by `.venv/bin/python scripts/configuration.py --write` from inference_api/settings.py; edit that file. -->
# Configuration

The router is configured by environment variables, which it reads once at the start. An unknown or invalid variable
stops the start with a message that names it (exit code 2). `inference-api serve --help` lists the same variables;
`inference-api check` validates them without starting. Each variable has the prefix `{PREFIX}`: `PORT` below is
`{PREFIX}PORT`.

Models are configured in the [catalogue](routing.md#catalogue). It is read again when it changes; the variables are
not. Traces have [variables of OpenTelemetry](tracing.md#variables).
"""
_TAIL = """
## Files and limits of the system

The catalogue file, the files of credentials and the trusted certificates (`SSL_CERT_FILE`) are read again within 5 s
of a change, and at once on SIGHUP: see [reload](routing.md#reload).

A process needs two file descriptors per request. The router raises its soft limit (`ulimit -n`) to the hard limit and
reserves enough descriptors for the backends. It disconnects clients beyond that at once and counts them as 503
`overloaded`.

In Kubernetes a Service named `inference-api` makes the kubelet set `INFERENCE_API_PORT=tcp://...` in every pod of its
namespace. Set `enableServiceLinks: false` on the router's pods, as the chart does.
"""


_CONTROL_PLANE_HEAD = f"""\
<!-- Made by `.venv/bin/python scripts/configuration.py --write` from control_plane/settings.py; edit that file. -->
# Configuration of the control plane

Environment variables, read once at the start; an unknown or invalid one stops it with a message that names it (exit
code 2). Each has the prefix `{control_plane.PREFIX}`: `PORT` below is `{control_plane.PREFIX}PORT`, and `--port` the
option of `control-plane serve` in its place. What can be changed while it runs is under `/api/v1/settings`. KEY_PEPPER
and CURRENCY must equal the routers'. TLS to services outside (router, Prometheus, hub, OpenID provider) trusts the
system's certificates, or those of `SSL_CERT_FILE`, read at the start.

| variable | values | default | meaning |
|---|---|---|---|
"""


def control_plane_page() -> str:
    """The page of the control plane, as Markdown."""
    schema = control_plane.Settings.model_json_schema()["properties"]
    rows = [
        f"| `{name.upper()}` | {_values(schema[name])} | {_default(field.default)} | {field.description} |"
        for name, field in control_plane.Settings.model_fields.items()
    ]
    return _CONTROL_PLANE_HEAD + "\n".join(rows) + "\n"


def page() -> str:
    """The whole page, as Markdown."""
    lines = []
    schema = Settings.model_json_schema()["properties"]
    for group in GROUPS:
        schema |= group.model_json_schema()["properties"]
    for name, field in fields_of(GROUPS).items():
        if title := _TITLES.get(name):
            lines += ["", f"## {title}", "", "| variable | values | default | meaning |", "|---|---|---|---|"]
        lines.append(
            f"| `{name.upper()}` | {_values(schema[name])} | {_default(field.default)} | {field.description} |"
        )
    return _HEAD + "\n".join(lines) + "\n" + _TAIL


def _values(schema: dict[str, Any]) -> str:
    """The values that a setting may have, by its JSON schema."""
    schema = next((each for each in schema.get("anyOf", ()) if each["type"] != "null"), schema)
    if values := schema.get("enum"):
        return ", ".join(f"`{value}`" for value in values)
    if schema["type"] == "array":
        return f"{_values(schema['items'])}s, comma-separated"
    kind = {"string": "text", "number": "number"}.get(schema["type"], schema["type"])
    if "exclusiveMinimum" in schema:
        return f"{kind} > {schema['exclusiveMinimum']:.9g}"
    if "maximum" in schema:
        return f"{kind}, {schema['minimum']:.9g} to {schema['maximum']:.9g}"
    if "minimum" in schema:
        return f"{kind} >= {schema['minimum']:.9g}"
    return {"path": "path", "password": "text, never shown"}.get(schema.get("format", ""), kind)


def _default(value: object) -> str:
    if value is None:
        return "unset"
    if isinstance(value, frozenset | tuple | dict):
        return ",".join(f"`{each}`" for each in sorted(value)) or "none"
    return "packaged" if isinstance(value, Path) else f"`{value}`"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(page())
        CONTROL_PLANE_PAGE.write_text(control_plane_page())
    elif sys.argv[1:] == ["--control-plane"]:
        print(control_plane_page(), end="")
    else:
        print(page(), end="")
