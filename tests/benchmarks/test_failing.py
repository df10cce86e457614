"""The router's own code in the simulation: what a backend that fails gets, and that bad requests move nobody."""

from typing import get_args

import pytest

from benchmarks.failing import Case, Failing, Refused, main, simulate
from inference_api.routing.entries import BalancingName

BALANCING = get_args(BalancingName)


@pytest.mark.parametrize("failing", [kind for kind in get_args(Failing) if kind not in ("half", "recovers")])
@pytest.mark.parametrize("balancing", BALANCING)
def test_a_backend_that_fails_gets_a_tenth_of_its_share_at_most(balancing: BalancingName, failing: Failing) -> None:
    assert simulate(Case(balancing, failing, lasts=60.0)).share <= 0.1


@pytest.mark.parametrize("balancing", ["two_choices", "least_in_flight"])
def test_one_that_fails_every_other_time_and_at_once_gets_no_more_for_it(balancing: BalancingName) -> None:
    assert simulate(Case(balancing, "half", lasts=60.0)).share < 0.5


@pytest.mark.parametrize("balancing", BALANCING)
def test_one_that_recovers_has_its_share_again(balancing: BalancingName) -> None:
    assert simulate(Case(balancing, "recovers", lasts=600.0, clients=2)).share == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize("refused", get_args(Refused))
@pytest.mark.parametrize("balancing", BALANCING)
def test_requests_that_all_refuse_open_no_circuit_and_move_no_load(balancing: BalancingName, refused: Refused) -> None:
    result = simulate(Case(balancing, refused=refused, lasts=60.0))

    assert result.out == 0
    # Who has the bad ones in his turn has the good ones in others'.
    if (balancing, refused) != ("round_robin", "one place in turn"):
        assert result.moved < 0.15


def test_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--lasts", "5", "--seeds", "1", "--clients", "2"])

    assert capsys.readouterr().out.count("| least_in_flight |") == len(get_args(Failing)) + len(get_args(Refused))
