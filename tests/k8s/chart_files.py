"""What the chart's rule files and dashboards hold, and what they ask Prometheus for."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import orjson
import yaml

ROOT = Path(__file__).parent.parent.parent
RULES = sorted((ROOT / "k8s/charts/inference-api/files/rules").glob("*.yaml"))
DASHBOARDS = sorted((ROOT / "k8s/charts/inference-api/files/dashboards").glob("*.json"))

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_LABELS = re.compile(r"\b(?:by|on|without|ignoring|group_left|group_right)\s*\([^()]*\)")
_IDENTIFIER = re.compile(r"(?<![\w:.$])([a-zA-Z_:][\w:]*)(?!\s*\(|[\w:])")
_WORDS = {"or", "and", "unless", "bool", "offset"}


def rules() -> list[dict[str, Any]]:
    """Every rule, in the order in which they are evaluated."""
    documents = [yaml.safe_load(path.read_text()) for path in RULES]
    return [rule for document in documents for group in document["groups"] for rule in group["rules"]]


def alerts() -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def dashboards() -> dict[str, dict[str, Any]]:
    return {path.stem: orjson.loads(path.read_bytes()) for path in DASHBOARDS}


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    """Those that show something of Prometheus."""
    return [panel for panel in dashboard["panels"] if panel["type"] not in ("row", "text")]


def panel_expressions() -> Iterator[tuple[str, str]]:
    """(where, PromQL with Grafana's variables in it)"""
    for name, dashboard in dashboards().items():
        for panel in panels(dashboard):
            for target in panel["targets"]:
                yield f"{name}: {panel['title']} {target['refId']}", target["expr"]


def selectors(expression: str) -> list[str]:
    """The instant selectors of an expression: each metric with its matchers."""
    return [f"{name}{{{matchers}}}" for name, matchers in _read(expression)]


def metrics(expression: str) -> set[str]:
    """The names of the metrics in an expression."""
    return {name for name, _ in _read(expression)}


def _read(expression: str) -> list[tuple[str, str]]:
    # Strings may hold anything, braces too: they are put back at the end.
    strings = _STRING.findall(expression)
    marked = _LABELS.sub("", _STRING.sub('""', expression))
    found = []
    for piece in re.finditer(r"([^{}]*)(?:\{([^{}]*)\})?", re.sub(r"\[[^\]]*\]", "", marked)):
        names = [name for name in _IDENTIFIER.findall(piece.group(1)) if name not in _WORDS]
        matchers = re.sub('""', lambda _: strings.pop(0), piece.group(2) or "")
        # Braces belong to the name before them.
        found += [(name, "") for name in names[:-1]] + [(name, matchers) for name in names[-1:]]
    return found


def sample_names(page: str) -> set[str]:
    """What can be asked for of a page of /metrics, whether it has a sample yet or not."""
    endings = {"histogram": ("_bucket", "_sum", "_count")}
    types = re.findall(r"^# TYPE (\S+) (\S+)$", page, re.MULTILINE)
    return {name + end for name, kind in types for end in endings.get(kind, ("",))}


def recorded(all_rules: Iterable[dict[str, Any]]) -> set[str]:
    return {rule["record"] for rule in all_rules if "record" in rule}
