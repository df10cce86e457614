"""JSON values from JSON schemas: what a model writes that is held to a schema."""

import json
import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

Schema = Mapping[str, Any]

_DECODER = json.JSONDecoder()

_FORMATS = {
    "date": "2026-01-31",
    "time": "12:00:00Z",
    "date-time": "2026-01-31T12:00:00Z",
    "email": "demo@example.com",
    "uuid": "00000000-0000-4000-8000-000000000000",
    "uri": "https://example.com",
}
# Below this, optional parts are left out: a schema may hold itself.
_DEEP, _DEEPEST = 6, 60


def instance(schema: Any, root: Schema | None = None, depth: int = 0) -> Any:
    """A value that fits a simple schema: types, bounds, enum, const, $ref, allOf; of anyOf and oneOf the first."""
    root = schema if root is None else root
    if not isinstance(schema, Mapping) or depth > _DEEPEST:
        return None
    if "$ref" in schema:
        return instance(_referred(schema["$ref"], root), root, depth + 1)
    if "allOf" in schema:
        parts = [_referred(part["$ref"], root) if "$ref" in part else part for part in schema["allOf"]]
        merged = {key: value for part in (schema, *parts) for key, value in part.items() if key != "allOf"}
        return instance(merged, root, depth + 1)
    if "const" in schema:
        return schema["const"]
    # The last is `null` where a schema that holds itself ends.
    for choices in (schema.get("anyOf"), schema.get("oneOf")):
        if choices:
            return instance(choices[-1 if depth > _DEEP else 0], root, depth + 1)
    if schema.get("enum"):
        return schema["enum"][0]
    build = _BUILDERS.get(_type_of(schema))
    return build(schema, root, depth) if build else None


def schema_in(text: str) -> Schema | None:
    """The first object with `properties` that is written in a text: some clients tell a model its schema so."""
    for start in re.finditer(r"\{", text):
        with suppress(ValueError):
            found, _ = _DECODER.raw_decode(text, start.start())
            if "properties" in found:
                return found  # type: ignore[no-any-return]
    return None


def _type_of(schema: Schema) -> str:
    kind = schema.get("type") or ("array" if "items" in schema else "object" if "properties" in schema else "string")
    return str(kind if isinstance(kind, str) else kind[0])


def _referred(pointer: str, root: Schema) -> Any:
    found: Any = root
    for part in pointer.removeprefix("#").split("/")[1:]:
        found = found.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
    return found


def _object(schema: Schema, root: Schema, depth: int) -> dict[str, Any]:
    properties = schema.get("properties", {})
    names = properties if depth <= _DEEP else schema.get("required", ())
    return {name: instance(properties.get(name), root, depth + 1) for name in names}


def _array(schema: Schema, root: Schema, depth: int) -> list[Any]:
    first = list(schema.get("prefixItems", ()))
    least = schema.get("minItems", 1 if depth <= _DEEP else 0)
    rest = min(least, schema.get("maxItems", least)) - len(first)
    return [instance(item, root, depth + 1) for item in first + [schema.get("items")] * rest]


def _string(schema: Schema, root: Schema, depth: int) -> str:
    return (
        _FORMATS.get(schema.get("format", ""))
        or "demo".ljust(schema.get("minLength", 0), "o")[: schema.get("maxLength")]
    )


def _number(schema: Schema, root: Schema, depth: int) -> float:
    step = schema.get("multipleOf", 1)
    above, below = schema.get("exclusiveMinimum", -math.inf), schema.get("exclusiveMaximum", math.inf)
    low, high = max(above, schema.get("minimum", -math.inf)), min(below, schema.get("maximum", math.inf))
    ends = [
        n for end in (low, high) if math.isfinite(end) for n in (step * math.ceil(end / step), step * (end // step))
    ]
    middle = [] if schema["type"] == "integer" or not math.isfinite(low + high) else [(low + high) / 2]
    candidates = [0, *ends, *(n + step for n in ends), *(n - step for n in ends), *middle]
    return next((n for n in candidates if low <= n <= high and above < n < below), 0)


_BUILDERS: Mapping[str, Callable[[Schema, Schema, int], Any]] = {
    "object": _object,
    "array": _array,
    "string": _string,
    "number": _number,
    "integer": lambda *place: int(_number(*place)),
    "boolean": lambda *place: True,
}
