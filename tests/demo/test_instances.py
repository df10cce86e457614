"""Values made from schemas, judged by a real validator."""

from typing import Any

import jsonschema
import pytest

from inference_api.demo.instances import instance, schema_in

TREE = {
    "$defs": {
        "Node": {
            "type": "object",
            "properties": {
                "next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]},
                "children": {"type": "array", "items": {"$ref": "#/$defs/Node"}},
            },
            "required": ["next", "children"],
        }
    },
    "$ref": "#/$defs/Node",
}


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({}, "demo"),
        ({"type": "string"}, "demo"),
        ({"type": "string", "minLength": 6}, "demooo"),
        ({"type": "string", "maxLength": 2}, "de"),
        ({"type": "string", "format": "date"}, "2026-01-31"),
        ({"type": "integer"}, 0),
        ({"type": "integer", "minimum": 3}, 3),
        ({"type": "integer", "exclusiveMinimum": 3, "maximum": 4}, 4),
        ({"type": "integer", "maximum": -2}, -2),
        ({"type": "integer", "minimum": 5, "multipleOf": 4}, 8),
        ({"type": "integer", "minimum": 1.5, "maximum": 2.5}, 2),
        ({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}, 0.5),
        ({"type": "boolean"}, True),
        ({"type": "null"}, None),
        ({"type": ["integer", "null"]}, 0),
        ({"enum": ["a", "b"]}, "a"),
        ({"const": 7}, 7),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, 0),
        ({"oneOf": [{"type": "null"}, {"type": "string"}]}, None),
        ({"type": "array", "items": {"type": "integer"}}, [0]),
        ({"type": "array", "items": {"const": 1}, "minItems": 3}, [1, 1, 1]),
        ({"type": "array", "maxItems": 0}, []),
        ({"type": "array", "prefixItems": [{"const": 1}, {"const": 2}]}, [1, 2]),
        ({"properties": {"a": {"const": 1}}, "required": ["a"]}, {"a": 1}),
        ({"allOf": [{"$ref": "#/$defs/A"}], "description": "x", "$defs": {"A": {"const": 2}}}, 2),
        ({"items": {"$ref": "#/$defs/a~1b"}, "$defs": {"a/b": {"type": "boolean"}}}, [True]),
    ],
)
def test_a_value_fits_its_schema(schema: dict[str, Any], value: Any) -> None:
    jsonschema.validate(value, schema)
    made = instance(schema)
    assert (made, type(made)) == (value, type(value))


def test_a_schema_that_holds_itself_ends() -> None:
    jsonschema.validate(instance(TREE), TREE)


@pytest.mark.parametrize("schema", [True, {"$ref": "#/nowhere"}, {"$ref": "#"}, {"type": "unknown"}])
def test_a_schema_that_cannot_be_met_is_null(schema: Any) -> None:
    assert instance(schema) is None


@pytest.mark.parametrize(
    ("text", "schema"),
    [
        ('Fill {this}: {"properties": {}} or {"properties": {"a": {}}}', {"properties": {}}),
        ('{"a": {"properties": 1}}', {"properties": 1}),
        ("{1} { {", None),
        ("", None),
    ],
)
def test_a_schema_is_found_in_a_text(text: str, schema: Any) -> None:
    assert schema_in(text) == schema
