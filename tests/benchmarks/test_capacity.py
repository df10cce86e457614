"""docs/capacity.md says what its formulas, the settings and the simulation say."""

import re
from math import ceil
from pathlib import Path

import pytest

from benchmarks import fleet_size, simulation
from benchmarks.queues import Case, simulate
from benchmarks.report import quantile
from inference_api.routing.catalogue import PolicyName
from inference_api.settings import Settings

TEXT = (Path(__file__).parent.parent.parent / "docs/capacity.md").read_text()
DEFAULTS = Settings()
EVENT_US, JSON_US, IDLE_MB, STREAM_KB, OWN_FILES, TARGET = 19, 69, 58, 21, 48, 0.6


def rows(heading: str) -> list[list[str]]:
    """The cells of the table whose first column has this heading."""
    body = TEXT.partition(f"| {heading} |")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines()[2:]]


def number(cell: str) -> float:
    return float(re.sub(r"[^0-9.]", "", cell))


def test_the_table_follows_from_the_formulas() -> None:
    table = rows("streams")
    assert len(table) > 5
    for row in table:
        streams, rate, events, cores, pods, each, rss, files, by_default, checks = map(number, row)
        assert events == streams * rate
        exact = events * EVENT_US / 1e6 / TARGET
        assert cores == round(exact, 1)
        assert pods == ceil(exact)
        assert each == ceil(streams / pods)
        assert rss == round(IDLE_MB + STREAM_KB * each / 1e3)
        assert files == 2 * each + OWN_FILES
        assert by_default == ceil(streams / DEFAULTS.max_in_flight)
        assert checks == pods * 1000 / DEFAULTS.health_interval


def test_the_figures_in_the_formulas_are_those_that_were_measured() -> None:
    measured = {row[0]: row[1] for row in rows("what")}
    assert number(measured["CPU per JSON request"]) == JSON_US
    assert number(measured["CPU per streamed event"]) == EVENT_US
    assert number(measured["memory (RSS), idle"]) == IDLE_MB
    assert number(measured["memory per open stream"]) == STREAM_KB
    assert number(measured["own file descriptors"]) == OWN_FILES


def test_a_scrape_is_as_large_as_it_says() -> None:
    assert f"15 KB, {len(fleet_size.scrape(fleet_size.build(1, 1000))) / 1e3:.0f} KB with 1,000 replicas" in TEXT
    assert f"{len(fleet_size.scrape(fleet_size.build(1, 1))) / 1e3:.0f} KB, 472 KB" in TEXT


@pytest.mark.parametrize("policy", ["round_robin", "two_choices", "prefix_affinity"])
def test_the_simulation_says_what_is_quoted(policy: PolicyName) -> None:
    """The cells of 16 routers; a change of a policy that moves them is a reason to make the tables anew."""
    small = simulate(Case(policy, 16, 0.9))
    large = simulate(Case(policy, 16, 0.9, slots=32, replicas=30, requests=60_000, cached=256))
    quoted = next(row for row in rows("policy") if row[0] == policy)
    assert quoted[3] == f"{quantile(small.waits, 0.99):.2f}"
    assert quoted[6] == f"{quantile(large.waits, 0.99):.2f}"
    assert quoted[9] == f"{large.hit_rate:.0%}"


def test_its_commands_are_such_that_the_program_understands() -> None:
    commands = re.findall(r"python -m benchmarks\.simulation ([^#\n]*)", TEXT)
    assert len(commands) == 2
    for command in commands:
        assert list(simulation.cases(simulation.parser().parse_args(command.split())))
