"""The Dockerfile, without building it: what scripts/image-test would notice late, or not at all."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.k8s.charts import ROOT, VALUES

PATH = ROOT / "Dockerfile"
# A line that ends with a backslash goes on; a comment is none.
LINES = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", PATH.read_text(), flags=re.MULTILINE)).splitlines()
LABELS = "title description licenses version revision created source url documentation vendor authors base.name"


def of(instruction: str) -> list[str]:
    return [rest for word, _, rest in (line.partition(" ") for line in LINES) if word == instruction]


def test_hadolint_has_nothing_against_it() -> None:
    hadolint = shutil.which("hadolint") or shutil.which("hadolint", path=Path(sys.executable).parent)
    if hadolint is None:
        pytest.skip("hadolint has no wheel for this machine")
    done = subprocess.run([hadolint, PATH], check=False, capture_output=True, text=True)

    assert done.returncode == 0, done.stdout + done.stderr


def test_every_stage_begins_with_the_one_base_that_a_release_names_by_digest() -> None:
    assert {base.partition(" ")[0] for base in of("FROM")} == {"${PYTHON_IMAGE}"}
    default = next(argument for argument in of("ARG") if argument.startswith("PYTHON_IMAGE="))
    assert re.fullmatch(r"PYTHON_IMAGE=python:3\.\d+-slim(@sha256:[0-9a-f]{64})?", default)


def test_it_runs_as_nobody_in_particular_and_stops_by_sigterm() -> None:
    """By number, which is what runAsNonRoot can check."""
    (user,) = of("USER")

    assert user == "10001:10001"
    assert of("STOPSIGNAL") == ["SIGTERM"]
    assert of("ENTRYPOINT") == ['["inference-api"]']


def test_the_ports_are_those_of_the_chart() -> None:
    values = (VALUES["default"].parents[1] / "values.yaml").read_text()
    (http, ops) = of("EXPOSE")[0].split()

    assert f"ports: {{http: {http}, ops: {ops}}}" in values


def test_labels_say_where_it_comes_from_and_invent_nothing() -> None:
    """https://github.com/opencontainers/image-spec/blob/main/annotations.md"""
    labels = dict(part.split("=", 1) for part in shlex.split(of("LABEL")[0]))

    assert set(labels) == {f"org.opencontainers.image.{name}" for name in LABELS.split()}
    assert not any("://" in value for value in labels.values())
    known = {argument.partition("=")[0] for argument in of("ARG")}
    assert {name for value in labels.values() for name in re.findall(r"\$\{(\w+)\}", value)} <= known
