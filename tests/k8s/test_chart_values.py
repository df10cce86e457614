"""Values and their schema: every value says what it is for, every key is known, every setting of the app can be set."""

import json
import re
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import BaseModel

from inference_api.app import ENTRY as AN_ENTRY
from inference_api.app import GROUPS
from inference_api.headers import NEVER_FORWARDED
from inference_api.policy.document import (
    SECTIONS,
    Anonymous,
    Budget,
    Key,
    Limit,
    Organisation,
    ScopedBudget,
    ScopedLimit,
)
from inference_api.routing.entries import BackendEntry, Hardware, Timeouts
from inference_api.settings import PREFIX, SettingsError, fields_of, load_settings
from tests.k8s.charts import CHART, CLUSTERS, ROOT

TEXT = (CHART / "values.yaml").read_text()
VALUES: dict[str, Any] = yaml.safe_load(TEXT)
SCHEMA: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())
ENTRY = SCHEMA["definitions"]["model"]["properties"]

# Those that the chart sets itself, from values of their own or from what it knows.
OWN = {
    *("host", "port", "ops_port", "catalogue", "log_level", "log_format", "drain_delay", "drain_timeout"),
    *("connect_timeout", "first_byte_timeout", "idle_timeout", "total_timeout", "stream_timeout"),
    *(
        "max_in_flight",
        "max_body_bytes",
        "max_buffered_bytes",
        "discovery",
        "discovery_interval",
        "registry_url",
        "registry_refresh",
        "registry_token",
        "registry_required",
    ),
    *("auth", "policy", "policy_cache", "key_pepper", "limits", "limits_on_failure", "limits_share", "redis_url"),
    *("trusted_proxies", "usage", "usage_spool", "currency"),
}


def leaves(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if isinstance(value, dict) and value and path[:1] != ("models",):
        return [leaf for key, inner in value.items() for leaf in leaves(inner, (*path, key))]
    return [path]


def node(path: tuple[str, ...]) -> dict[str, Any]:
    """The schema of a value."""
    found = SCHEMA
    for key in path:
        found = SCHEMA["definitions"][found["$ref"].rpartition("/")[2]] if "$ref" in found else found
        if "properties" not in found:
            # A map or an object of Kubernetes: its keys are not the chart's.
            return found
        found = found["properties"][key]
    return found


def objects(schema: Any, place: str = "") -> list[tuple[str, dict[str, Any]]]:
    found = []
    if isinstance(schema, dict):
        if schema.get("type") == "object" and "properties" in schema:
            found.append((place, schema))
        for key, inner in schema.items():
            found += objects(inner, f"{place}/{key}")
    return found


def depth(line: str) -> int:
    return len(line) - len(line.lstrip())


def test_every_value_is_told_what_it_is_for() -> None:
    """By a comment of its own, or by that of what it is part of; a heading needs none, what is in it does."""
    told: list[tuple[int, bool]] = []
    above = ""
    for number, line in enumerate(TEXT.splitlines(), 1):
        if re.match(r" *[A-Za-z0-9-]+:", line):
            told = [outer for outer in told if outer[0] < depth(line)]
            documented = above.strip().startswith("#") or any(whole for _, whole in told)
            assert documented or line.endswith(":"), f"line {number}: {line}"
            told.append((depth(line), above.strip().startswith("# --")))
        # Of a comment of several lines the first one counts.
        if not (line.strip().startswith("#") and above.strip().startswith("#")):
            above = line


@pytest.mark.parametrize("path", leaves(VALUES), ids=".".join)
def test_the_schema_knows_every_value(path: tuple[str, ...]) -> None:
    assert node(path)


def test_the_schema_is_strict() -> None:
    """A key that is mistyped is refused. Under `global` a parent chart may have more; variables are Kubernetes' own."""
    open_objects = [place for place, schema in objects(SCHEMA) if schema.get("additionalProperties") is not False]

    assert open_objects == ["/properties/global", "/definitions/variables/items"]


def test_every_setting_of_the_app_can_be_set() -> None:
    """A new setting is added to `router.settings` in values.schema.json, or gets a value of its own."""
    free = {name.lower() for name in SCHEMA["properties"]["router"]["properties"]["settings"]["properties"]}

    assert free - set(fields_of(GROUPS)) == set()
    assert set(fields_of(GROUPS)) - free - OWN == set()
    assert not free & OWN


NUMBERS: list[Any] = [-1, 0, 0.5, 1, 1.5, 3, 4, 600, "many", ""]
LISTS: dict[str, list[Any]] = {
    "FORWARD_HEADERS": [["x-vllm-priority"], ["X-Forwarded-For"], ["a b"], *([n.decode()] for n in NEVER_FORWARDED)],
    "CORS_ORIGINS": [
        *(["*"], ["https://app.example"], ["http://localhost:3000", "tauri://localhost"], ["http://[::1]:80000"]),
        *(["*", "https://app.example"], ["https://app.example/"], ["app.example"], ["https://App.example"]),
        *(["https://app.example:443"], ["http://app.example:80"], ["https://*.example"], ["null"]),
    ],
    "RETRY_ON_STATUS": [[503], [429, 504], [500], ["many"]],
}
_PROXIES = [["10.0.0.0/8"], ["10.1.2.3/8", "fd00::/8", "::1"], ["10.0.0.0/33"], ["proxy"], ["10.0.0"]]
VALUE_OF: dict[tuple[str, str], list[Any]] = {
    ("trustedProxies", "TRUSTED_PROXIES"): _PROXIES,
    ("rateLimits.share", "LIMITS_SHARE"): NUMBERS,
    ("currency", "CURRENCY"): ["USD", "usd", "EURO", "U5D"],
}
ITEMS: dict[str, type[BaseModel]] = {
    **{"organisation": Organisation, "apiKey": Key, "rateLimits": Limit, "budget": Budget},
    **{"anonymous": Anonymous, "limits": ScopedLimit, "budgets": ScopedBudget},
}


def app_takes(name: str, value: Any) -> bool:
    try:
        load_settings({PREFIX + name: ",".join(map(str, value)) if isinstance(value, list) else str(value)}, GROUPS)
    except SettingsError:
        return False
    return True


def schema_takes(schema: dict[str, Any], value: Any) -> bool:
    return jsonschema.Draft7Validator({**schema, "definitions": SCHEMA["definitions"]}).is_valid(value)


@pytest.mark.parametrize("name", SCHEMA["properties"]["router"]["properties"]["settings"]["properties"])
def test_the_schema_takes_of_a_setting_what_the_app_takes(name: str) -> None:
    """A pod that is restarted with a setting that cannot be used does not come back."""
    schema = node(("router", "settings", name))

    assert [value for value in LISTS.get(name, NUMBERS) if schema_takes(schema, value) != app_takes(name, value)] == []


@pytest.mark.parametrize(("path", "name"), VALUE_OF, ids=[name for _, name in VALUE_OF])
def test_the_schema_takes_of_a_value_what_the_app_takes(path: str, name: str) -> None:
    schema = node(("router", *path.split(".")))

    assert [value for value in VALUE_OF[path, name] if schema_takes(schema, value) != app_takes(name, value)] == []


def test_a_policy_in_the_values_has_the_keys_of_a_policy() -> None:
    sections = SCHEMA["definitions"]["policy"]["properties"]

    assert sections.keys() == {*SECTIONS, "anonymous"}
    told = [{**SCHEMA["definitions"], **sections}[name] for name in ITEMS]
    for schema, model in zip(told, ITEMS.values(), strict=True):
        assert schema.get("items", schema)["properties"].keys() == model.model_fields.keys(), model


def test_a_model_has_the_keys_of_a_catalogue_entry() -> None:
    assert ENTRY.keys() - {"deploy"} == AN_ENTRY.model_fields.keys() - {"name"}
    assert ENTRY["backends"]["items"]["properties"].keys() == BackendEntry.model_fields.keys()
    assert ENTRY["hardware"]["properties"].keys() == Hardware.model_fields.keys()
    assert ENTRY["timeouts"]["properties"].keys() == Timeouts.model_fields.keys()


def test_the_example_models_are_those_that_the_app_brings() -> None:
    """But for the backends, which depend on the namespace, and what engines.enabled runs."""
    packaged = yaml.safe_load((ROOT / "inference_api" / "catalogue.yaml").read_text())["models"]

    told = {model.pop("name"): {key: value for key, value in model.items() if key != "backends"} for model in packaged}

    assert {name: {k: v for k, v in model.items() if k != "deploy"} for name, model in VALUES["models"].items()} == told


def test_the_readme_tells_of_every_cluster_and_links_to_what_exists() -> None:
    readme = (ROOT / "k8s" / "README.md").read_text()
    links = set(re.findall(r"\]\((?!http)([^)#]+)\)", readme))

    assert {f"clusters/{path.name}" for path in CLUSTERS.values()} <= links
    # The runbook comes with the alerts.
    assert [link for link in links - {"runbook.md"} if not (ROOT / "k8s" / link).exists()] == []


def test_the_memory_is_enough_for_what_a_router_may_hold() -> None:
    """The sum in values.yaml, of what docs/capacity.md has measured: a pod that needs more is killed."""
    router = VALUES["router"]
    capacity = (ROOT / "docs" / "capacity.md").read_text()
    idle, stream = (
        int(re.findall(rf"^\| {what} \| (\d+) {unit} ", capacity, re.MULTILINE)[0])
        for what, unit in ((r"memory \(RSS\), idle", "MB"), ("memory of an open stream", "KB"))
    )
    limits = router["limits"]
    needed = idle * 10**6 + stream * 10**3 * limits["maxInFlight"] + limits["maxBufferedBytes"]
    given = int(router["resources"]["limits"]["memory"].removesuffix("Mi")) * 2**20

    assert router["resources"]["requests"]["memory"] == router["resources"]["limits"]["memory"]
    assert f"{idle} MB + {limits['maxInFlight']} x {stream} KB" in TEXT
    assert f"= {needed / 10**6:.0f} MB of {given / 10**6:.0f} MB" in TEXT
    assert needed * 1.5 < given
    assert limits["maxBodyBytes"] < limits["maxBufferedBytes"]


def test_the_readme_has_the_sum_right() -> None:
    drain = VALUES["router"]["drain"]
    readme = (ROOT / "k8s" / "README.md").read_text()

    (shown,) = re.findall(r"^ +(\d+) += +(\d+) +\+ +(\d+) +\+ +(\d+)$", readme, re.MULTILINE)

    assert [*map(int, shown)] == [sum(drain.values()), *drain.values()]
