"""The simulation of the queue: it agrees with queueing theory, loses no request, and is what the page shows."""

from dataclasses import replace
from math import exp
from pathlib import Path
from statistics import fmean

import pytest

from benchmarks import fairness
from benchmarks.fairness import Case, Simulation, Way, jain, satisfaction, shares, simulate

PAGE = Path(__file__).parent.parent.parent / "docs" / "queue.md"
GREEDY = Case("fair", seconds=1000)


def test_a_queue_waits_as_long_as_erlang_says() -> None:
    """M/M/20 at 0.9: C = 0.5508, and the mean wait C / (20 - 18) services of 5 s; services vary a little less here."""
    case = Case("fifo", load=0.9, greedy=0.0, size=10_000, timeout=10_000.0, seconds=20_000)
    waits = [wait for caller in simulate(case) for wait in caller.waits]

    assert fmean(waits) == pytest.approx(0.5508 / 2 * 5 * exp(0.8**2) / 2, rel=0.25)


@pytest.mark.parametrize("way", fairness.WAYS)
def test_nothing_is_left_over(way: Way) -> None:
    simulation = Simulation(replace(GREEDY, way=way))
    callers = simulation.run()

    assert vars(simulation)["_busy"] == len(vars(simulation)["_queue"]) == 0
    assert all(caller.served == len(caller.waits) <= caller.asked for caller in callers)
    # The backends have worked all the time; requests at the end work on after it.
    assert sum(caller.work for caller in callers) == pytest.approx(20 * 50 * 900, rel=0.05)


def test_the_greedy_one_pays_for_itself_alone() -> None:
    refuse, fair = (simulate(replace(GREEDY, way=way)) for way in ("refuse", "fair"))

    assert min(caller.served / caller.asked for caller in fair[1:]) > 0.99
    assert max(caller.served / caller.asked for caller in refuse[1:]) < 0.7
    assert jain(satisfaction(fair, 20 * 50 * 900)) > jain(satisfaction(refuse, 20 * 50 * 900))


def test_shares_are_max_min_fair() -> None:
    assert shares([10, 1, 4], 9) == [4, 1, 4]
    assert shares([1, 1, 1], 9) == [1, 1, 1]
    assert shares([9, 9, 9], 9) == [3, 3, 3]
    assert jain([1.0, 1.0]) == 1.0
    assert jain([1.0, 0.0]) == 0.5


def test_the_page_shows_what_it_prints(capsys: pytest.CaptureFixture[str]) -> None:
    fairness.main([])

    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    page = PAGE.read_text().splitlines()
    assert [line for line in printed if line not in page] == []
