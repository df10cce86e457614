"""Makes docs/schemas/catalogue.json, the JSON Schema of a catalogue, for editors; `--write` replaces the file.

It is made from the classes of the entries, with the keys of all features: run it after a key has changed.
"""

import json
import sys
from pathlib import Path
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from inference_api.app import ENTRY
from inference_api.routing.references import beside

FILE = Path(__file__).parents[1] / "docs" / "schemas" / "catalogue.json"

# What an editor shows for a key; of others the text of its class.
_TEXTS = {
    "name": "The name that clients ask for.",
    "version": "Shown in /v1/models.",
    "owner": "Shown in /v1/models.",
    "engine": "The kind of backends; openai: any other engine, or a provider.",
    "backends": "Addresses of the model: a URL, or an object with url, weight and discovery.",
    "aliases": "Further names that clients may ask for.",
    "hardware": "Shown in /v1/models.",
    "served_model_name": "The engine's name of it, if that is another one.",
    "balancing": "How a backend is chosen.",
    "timeouts": "Seconds; null: the router's setting.",
    "max_in_flight": "Requests at once; more get 503, or wait in the queue.",
    "credentials": "The token for the backends, or passthrough: the client's own.",
    "engine_fields": "Whether clients may send kv_transfer_params and ec_transfer_params.",
    "priority": "Who sets vLLM's priority: the client, nobody (ignore), the key (caller), or a number for all.",
    "discover": "Asks the backends for their names and LoRA adapters, and serves them.",
    "adapters": "LoRA adapters; with discover only these of the listed ones are served, else they are assumed on all.",
    "max_model_len": "Tokens of input and output together, until an engine reports its own length.",
    "created": "Unix seconds; /v1/models shows it, 0: unknown.",
    "base_path": "Stands for the leading /v1 of the client's path.",
    "headers": "Headers that replace the client's of these names.",
    "routes": "Labels of the routes that it is served on; absent: all.",
    "price": "In CURRENCY per million tokens, and per request; absent: unknown, never 0.",
    "usage": "Whether streams are asked for their tokens.",
    "fallbacks": "Models that answer instead, in this order.",
    "context_fallbacks": "Models that answer instead if the prompt is too long.",
    "hedge": "A second attempt at another backend when the first one is slow.",
    "cache": "Repeated requests get the bytes of the first answer.",
    "shadow": "A sample of the requests is copied to another model, whose answers are dropped.",
    "queue": "At max_in_flight requests wait for a place.",
    "hold": "Seconds that a request waits for a backend if there is none at all.",
    "split": "A virtual model: variants by weight.",
    "race": "A virtual model: the fastest of several.",
    "consensus": "A virtual model: the majority of several.",
}


class _Generator(GenerateJsonSchema):
    """Money is a number, not also a text."""

    def decimal_schema(self, schema: core_schema.DecimalSchema) -> JsonSchemaValue:
        made = self.float_schema(core_schema.float_schema())
        bounds = {"minimum": schema.get("ge"), "maximum": schema.get("le")}
        return made | {name: float(bound) for name, bound in bounds.items() if bound is not None}


def schema() -> dict[str, Any]:
    """The whole schema."""
    entry: dict[str, Any] = _untitled(ENTRY.model_json_schema(schema_generator=_Generator))
    definitions = entry.pop("$defs")
    keys = entry["properties"]
    keys["backends"]["items"] = {"anyOf": [{"type": "string", "maxLength": 2048}, keys["backends"]["items"]]}
    for name in ("version", "owner"):
        # `version: 2` is a number in YAML, and taken as text.
        keys[name]["type"] = ["string", "number"]
    for name in ("aliases", "backends", "adapters", "routes"):
        _lists(keys[name])["uniqueItems"] = True
    for name, key in keys.items():
        if name in _TEXTS:
            key["description"] = _TEXTS[name]
    entry["allOf"] = [
        {"if": {"required": [name]}, "then": {"propertyNames": {"enum": sorted(allowed)}}}
        for name, allowed in sorted(beside(ENTRY.referring).items())
    ]
    entry["dependentRequired"] = {"queue": ["max_in_flight"]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "catalogue.json",
        "title": "A catalogue: the models that a router serves",
        "description": "Made by scripts/schemas.py --write. See ../routing.md.",
        "type": "object",
        "additionalProperties": False,
        "required": ["models"],
        "properties": {"models": {"type": "array", "items": {"$ref": "#/$defs/CatalogueEntry"}}},
        "$defs": {"CatalogueEntry": entry, **definitions},
    }


def _lists(key: dict[str, Any]) -> dict[str, Any]:
    """The part of the schema of a key that is about lists."""
    if key.get("type") == "array":
        return key
    return next(one for one in key["anyOf"] if one.get("type") == "array")


def _untitled(value: Any, is_names: bool = False) -> Any:
    """Without pydantic's titles, which repeat the names, and closed. `is_names`: the keys are names of properties."""
    if isinstance(value, dict):
        if "patternProperties" in value and not is_names:
            # Names that do not match are refused.
            value = value | {"additionalProperties": False}
        kept = {name: inner for name, inner in value.items() if is_names or name != "title"}
        return {
            name: _untitled(inner, name in ("properties", "$defs") and not is_names) for name, inner in kept.items()
        }
    return [_untitled(inner) for inner in value] if isinstance(value, list) else value


def text() -> str:
    return json.dumps(schema(), indent=1) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        FILE.write_text(text())
    else:
        print(text(), end="")
