"""docs/capacity.md says what the program, the settings and the simulation say, and the program reckons right."""

import re
import shlex
from dataclasses import replace
from math import ceil
from pathlib import Path

import pytest

from benchmarks import capacity, fleet_size, simulation
from benchmarks.capacity import MEASURED, Measured, Plan, after_rollout
from benchmarks.queues import Case, simulate
from benchmarks.samples import quantile
from inference_api.routing.entries import BalancingName
from inference_api.server import server
from inference_api.settings import Settings

TEXT = capacity.DOCUMENT.read_text()


def rows(first: str, text: str = TEXT) -> list[list[str]]:
    """The cells of the table whose first row begins with this."""
    body = text.partition(f"| {first} |")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines()[2:]]


def number(cell: str) -> float:
    return float(re.sub(r"[^0-9.]", "", cell))


def test_the_document_is_what_the_program_writes() -> None:
    assert capacity.written(TEXT) == TEXT


def test_other_figures_make_another_document() -> None:
    dearer = replace(MEASURED, json_us=140, event_us=50, idle_mb=86)
    assert "| CPU of a JSON request, connections kept | 140 us |" in capacity.measured_table(dearer)
    assert "a core at 60 % passes 12,000 events/s, or 4,286 JSON requests/s" in capacity.derived_list(dearer)
    table = capacity.plans_table([Plan(100_000, 20, dearer)])
    assert number(rows("streams", table)[0][3]) == pytest.approx(2 * 50 + 0.5, abs=0.1)


@pytest.mark.parametrize("broken", ["", TEXT + TEXT])
def test_a_document_without_its_places_is_refused(broken: str) -> None:
    with pytest.raises(ValueError, match="measured"):
        capacity.written(broken)


def test_the_table_follows_from_the_formulas() -> None:
    table = rows("streams")
    assert len(table) == len(capacity.PLANS)
    for row in table:
        streams, rate, events, cores, pods, each, rss, files, connects, in_flight = map(number, row)
        assert events == streams * rate
        answers = events / 500
        exact = (events * MEASURED.event_us + answers * (MEASURED.client_us + MEASURED.backend_us)) / 1e6
        assert cores == round(exact, 1)
        assert exact / pods <= 0.6
        assert exact / (pods - 1) <= 0.9
        assert pods == 2 or exact / (pods - 1) > 0.6 or exact / (pods - 2) > 0.9
        assert each == ceil(streams / pods)
        assert rss == round(MEASURED.idle_mb + MEASURED.stream_kb * each / 1e3)
        assert files == 2 * each + MEASURED.own_files
        assert connects == round(answers / pods + 1000 / Settings().health_interval)
        assert in_flight == pytest.approx(streams / pods / 1000, abs=0.051)


@pytest.mark.parametrize(("streams", "pods"), [(1_000, 2), (1_900, 3), (2_000, 3), (24_000, 20)])
def test_there_are_pods_enough_for_one_of_them_to_die(streams: int, pods: int) -> None:
    """A stream is 0.0005 of a core: 0.5 cores are one pod and one to spare; 0.95 are too much for one that is left."""
    assert Plan(streams, 20, Measured(event_us=25, client_us=0, backend_us=0)).pods == pods


def test_a_rollout_leaves_every_client_somewhere_and_the_first_pods_with_most() -> None:
    """Two waves by hand: the first pods get half of the first old ones', then half of 1.5; the last ones the rest."""
    assert after_rollout(2) == [1.25, 0.75]
    assert after_rollout(1) == [1.0]
    held = after_rollout(4)
    assert sum(held) == pytest.approx(4)
    assert held == sorted(held, reverse=True)


def test_what_the_product_decides_is_what_it_decides() -> None:
    assert MEASURED.own_files == server._OWN_FILES
    many = len(fleet_size.scrape(fleet_size.build(1, 1000))) / 1e3
    assert many == pytest.approx(MEASURED.scrape_kb, rel=0.1)


@pytest.mark.parametrize("balancing", ["round_robin", "least_in_flight", "two_choices", "prefix_affinity"])
def test_the_simulation_says_what_is_quoted(balancing: BalancingName) -> None:
    """The column that is cheap to make; a change that moves it is a reason to make the others anew, too."""
    result = simulate(Case(balancing, 16, 0.8))
    quoted = next(row for row in rows("balancing, 4 slots") if row[0] == balancing)
    assert quoted[-1] == f"{quantile(result.waits, 0.99):.2f}"


def test_its_commands_are_such_that_the_program_understands() -> None:
    commands = re.findall(r"python -m benchmarks\.simulation ([^#\n]*)", TEXT)
    assert len(commands) == 4
    for command in commands:
        assert list(simulation.cases(simulation.parser().parse_args(shlex.split(command))))


def test_the_program_prints_and_writes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert capacity.main([]) == 0
    printed = capsys.readouterr().out
    monkeypatch.setattr(capacity, "DOCUMENT", tmp_path / "capacity.md")
    capacity.DOCUMENT.write_text("".join(f"<!-- {name} -->\n\nbefore\n\n<!-- end -->\n" for name in capacity.BLOCKS))
    assert capacity.main(["--write"]) == 0
    text = capacity.DOCUMENT.read_text()
    assert "\nbefore\n" not in text
    assert all(line in text for line in printed.splitlines())
