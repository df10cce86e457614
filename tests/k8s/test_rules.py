"""The rule files: Prometheus takes them, every alert says what it should, and speaks when it should and only then."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from control_plane.pure.causes import CAUSES
from tests.k8s import chart_files
from tests.k8s.chart_files import ROOT, RULES

SCENARIOS = sorted((Path(__file__).parent / "rules").glob("*.yaml"))
ALERTS = chart_files.alerts()
RUNBOOK = ROOT / "k8s/runbook.md"


@pytest.fixture
def promtool() -> str:
    path = shutil.which("promtool")
    if path is None:
        pytest.skip("promtool is not on PATH (Debian: apt-get install prometheus)")
    return path


def run(*command: str | Path) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_prometheus_takes_the_rules(promtool: str) -> None:
    printed = run(promtool, "check", "rules", "--lint=all", "--lint-fatal", *RULES)

    assert sum(map(int, re.findall(r"(\d+) rules found", printed))) == len(chart_files.rules())


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda path: path.stem)
def test_alerts_fire_when_they_should(promtool: str, scenario: Path) -> None:
    run(promtool, "test", "rules", scenario)


def told(fires: bool) -> set[str]:
    """The alerts for which there is a scenario in which they fire, or do not."""
    documents = [yaml.safe_load(path.read_text()) for path in SCENARIOS]
    cases = [case for document in documents for test in document["tests"] for case in test["alert_rule_test"]]
    return {case["alertname"] for case in cases if bool(case["exp_alerts"]) is fires}


def test_every_alert_is_tested_both_ways() -> None:
    assert told(fires=True) == told(fires=False) == set(ALERTS)


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_says_what_it_should(name: str) -> None:
    alert: dict[str, Any] = ALERTS[name]

    assert alert["labels"]["severity"] in ("critical", "warning")
    assert set(alert["annotations"]) == {"summary", "description", "runbook_url"}
    assert alert["annotations"]["summary"].endswith(".")
    assert re.fullmatch(r"\d+m|30s", alert["for"])
    assert alert["annotations"]["runbook_url"] == f"k8s/runbook.md#{name.lower()}"


def test_the_runbook_has_a_section_for_every_alert_and_cause_and_no_other() -> None:
    sections = re.split(r"^## ", RUNBOOK.read_text(), flags=re.MULTILINE)[1:]
    by_name = {section.partition("\n")[0]: section for section in sections}

    assert set(by_name) == {*ALERTS, *(cause.title for cause in CAUSES)}
    for name, section in by_name.items():
        for part in ("**Means**", "**Look**", "**Do**"):
            assert section.count(part) == 1, (name, part)


def test_the_severity_and_the_threshold_in_the_runbook_are_those_of_the_rule() -> None:
    for name, alert in ALERTS.items():
        assert (
            f"## {name}\n\n{alert['labels']['severity'].capitalize()}, after {alert['for']}.\n" in RUNBOOK.read_text()
        )
