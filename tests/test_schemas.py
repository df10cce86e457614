"""The JSON Schema of catalogues is made from the classes of the entries, and agrees with the router."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest
import yaml
from jsonschema import Draft202012Validator

from inference_api.app import ENTRY, GROUPS, entry_of
from inference_api.routing.catalogue import parse_catalogue
from inference_api.settings import make_settings

ROOT = Path(__file__).parents[1]
FILE = ROOT / "docs" / "schemas" / "catalogue.json"
SCHEMA: dict[str, Any] = orjson.loads(FILE.read_bytes())
VALIDATOR = Draft202012Validator(SCHEMA)


def test_the_schema_is_made_from_the_entries() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "schemas.py")]
    made = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)

    assert made.stdout == FILE.read_text(), "run .venv/bin/python scripts/schemas.py --write"


def test_the_schema_is_valid_and_describes_every_key() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    keys = SCHEMA["$defs"]["CatalogueEntry"]["properties"]

    assert keys.keys() == ENTRY.model_fields.keys()
    assert [name for name, key in keys.items() if not key.get("description")] == []


def blocks() -> list[Any]:
    """Catalogues that the project brings: files, and examples in documents."""
    files = [ROOT / "inference_api" / "catalogue.yaml", *sorted(ROOT.glob("examples/**/*catalogue*.yaml"))]
    files += sorted(ROOT.glob("examples/catalogues/*.yaml"))
    found = [pytest.param(yaml.safe_load(path.read_text()), id=path.name) for path in files]
    for page in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))):
        for text in re.findall(r"^```yaml\n(# catalogue\.yaml.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            found.append(pytest.param(yaml.safe_load(text), id=page.name))
    return found


@pytest.mark.parametrize("document", blocks())
def test_a_catalogue_of_the_project_is_valid(document: Any) -> None:
    assert [error.message for error in VALIDATOR.iter_errors(document)] == []


URL = "http://10.0.0.1"
GOOD: list[dict[str, Any]] = [
    {},
    {"version": 2, "owner": "me", "created": 1700000000, "aliases": ["b", "c"]},
    {"backends": [URL, {"url": "http://a.test", "weight": 2, "discovery": "dns"}]},
    {"engine": "tgi", "served_model_name": "tgi", "balancing": "prefix_affinity"},
    {"hardware": {"gpu": "l4", "gpu_count": 1, "gpu_memory_gib": 24}, "timeouts": {"total": 5, "idle": None}},
    {"hardware": None, "served_model_name": None, "max_in_flight": None, "credentials": None},
    {"credentials": {"env": "BACKEND_X"}},
    {"credentials": {"file": "/run/BACKEND_X", "header": "x-api-key", "scheme": ""}},
    {"credentials": "passthrough"},
    {"priority": -5, "engine_fields": "allow", "usage": "leave"},
    {"discover": True, "adapters": ["x", "y"]},
    {"adapters": []},
    {"price": {"input": 0.2, "output": 0.6}},
    {"price": {"input": 0, "output": 1, "cached_input": 0.1, "request": 0.01}},
    {"base_path": "/v1beta/openai", "headers": {"anthropic-version": "2023-06-01"}, "routes": ["messages"]},
    {"cache": {"ttl": 60, "scope": "org"}},
    {"max_in_flight": 5, "queue": {"timeout": 30, "size": 200}, "hold": 120},
    {"split": {"variants": {"one": 90, "two": 10}}},
    {"race": {"members": ["one", "two"]}, "cache": {"ttl": 5}},
    {"fallbacks": ["one"], "context_fallbacks": ["two"]},
]
BAD: list[dict[str, Any]] = [
    {"name": "a b"},
    {"unknown": 1},
    {"engine": "other"},
    {"backends": "http://a"},
    {"backends": [{"weight": 1}]},
    {"backends": [{"url": URL, "weight": 0}]},
    {"backends": [URL, URL]},
    {"aliases": ["-"]},
    {"max_in_flight": 0},
    {"timeouts": {"idle": 0}},
    {"timeouts": {"other": 1}},
    {"credentials": {"env": "SECRET"}},
    {"credentials": "other"},
    {"priority": "high"},
    {"discover": "often"},
    {"adapters": ["x", "x"]},
    {"adapters": ["a b"]},
    {"adapters": [f"x{number}" for number in range(1001)]},
    {"price": {"input": 1}},
    {"price": {"input": "1", "output": 1}},
    {"price": {"input": -1, "output": 1}},
    {"usage": "count"},
    {"base_path": "v1"},
    {"headers": {"X-Upper": "1"}},
    {"routes": []},
    {"cache": {}},
    {"cache": {"ttl": 0}},
    {"queue": {"timeout": 30, "size": 200}},
    {"hold": 0},
    {"split": {"variants": {"one": 1, "two": 1}}, "backends": [URL]},
    {"race": {"members": ["one", "two"]}, "max_in_flight": 5},
    {"split": {"variants": {"one": 1, "two": 1}}, "discover": True},
]
OTHERS = [{"name": "one"}, {"name": "two"}]


@pytest.mark.parametrize(
    ("entry", "is_valid"), [*((one, True) for one in GOOD), *((one, False) for one in BAD)], ids=str
)
def test_the_schema_decides_as_the_router_does(entry: dict[str, Any], is_valid: bool) -> None:
    document = {"models": [{"name": "m", **entry}, *OTHERS]}

    assert (not parse_catalogue(document, entry_of(make_settings({}, GROUPS))).problems) is is_valid
    assert VALIDATOR.is_valid(document) is is_valid
