"""The README says what is true: every setting, metric, error, route and file it names exists, and none is missing."""

import re
from pathlib import Path

import pytest

from inference_api.errors import RouterError
from inference_api.http.pipeline import INFERENCE_ROUTES
from inference_api.observe.families import Families
from inference_api.observe.metrics import Metrics
from inference_api.routing.registry import RegistryStatus
from inference_api.settings import Settings

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = sorted(
    path for pattern in ("*.md", "docs/**/*.md", "k8s/**/*.md", "benchmarks/*.md") for path in ROOT.glob(pattern)
)


def test_every_setting_is_told_and_no_other() -> None:
    section = README.partition("## Configuration")[2].partition("## What it tells")[0]

    told = {name.lower() for name in re.findall(r"`([A-Z_]+)`", section)} - {"inference_api_port"}

    assert told == set(Settings.model_fields)


def test_the_defaults_are_those_of_the_settings() -> None:
    for row in re.findall(r"^\| `[A-Z_`/ ]+.*$", README.partition("## Configuration")[2], re.MULTILINE):
        names, _, default = (cell.strip() for cell in row.strip("|").split("|"))
        for name, value in zip(re.findall(r"`([A-Z_]+)`", names), default.split(" / "), strict=False):
            actual = Settings.model_fields[name.lower()].default
            if isinstance(actual, (int, float)) and actual is not None:
                assert float(value) == actual, name


def test_every_metric_is_told_with_its_labels() -> None:
    rows = re.findall(r"^\| `(inference_api_\w+)` \| (\w+) \| ?([\w, ]*?) ?\|$", README, re.MULTILINE)
    told = {name: (kind, labels.split(", ") if labels else []) for name, kind, labels in rows}

    for family in Families(Metrics(dict), lambda: RegistryStatus("static", 0, 0.0, {}))():
        name = family.name + ("_total" if family.kind == "counter" else "")
        assert told.pop(name) == (family.kind, list(family.labels))
    assert told == {}


def test_every_error_code_is_told() -> None:
    def leaves(kind: type[RouterError]) -> list[type[RouterError]]:
        found = [leaf for child in kind.__subclasses__() for leaf in leaves(child)]
        return found or [kind]

    for kind in leaves(RouterError):
        assert f"`{kind.code}`" in README, kind.__name__
        assert re.search(rf"^\| {kind.status} \|.*`{kind.code}`", README, re.MULTILINE), kind.__name__


@pytest.mark.parametrize("path", [route.path for route in INFERENCE_ROUTES])
def test_every_route_is_told(path: str) -> None:
    assert f"`{path}`" in README


def test_every_link_and_script_exists() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    for script in set(re.findall(r"scripts/[\w-]+", README)):
        assert (ROOT / script).exists(), script


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_left_to_be_filled_in(path: Path) -> None:
    assert re.findall(r"@@|\b(?:TODO|TBD|FIXME|XXX)\b", path.read_text()) == []


def test_every_module_of_the_picture_exists() -> None:
    picture = README.partition("## How it works")[2].partition("A request is one task")[0]
    folder = ""
    for line in picture.splitlines():
        if found := re.match(r"\s+[|v]?\s*(\w+)/\s+(.*)", line):
            folder, line = found.group(1), found.group(2)
        if folder and (names := re.match(r"[\s|]*((?:\w+, )*\w+)  ", line + "  ")):
            for name in names.group(1).split(", "):
                if name not in ("client", "v"):
                    assert (ROOT / "inference_api" / folder / f"{name}.py").exists(), f"{folder}/{name}"
