"""The simulation of the policies: it agrees with queueing theory where there is one, and loses no request."""

from dataclasses import replace
from math import exp, log, sqrt
from random import Random
from statistics import fmean
from typing import Any, get_args

import pytest

from benchmarks import simulation
from benchmarks.queues import Case, Event, Server, Sessions, Simulation, simulate
from benchmarks.samples import quantile
from inference_api.routing.entries import BalancingName

BALANCING: tuple[BalancingName, ...] = get_args(BalancingName)
# At 0.7 sixteen routers have less than one request in flight at each of the backends.
CASE = Case("two_choices", routers=4, utilisation=0.7, backends=20, requests=4_000)
ALONE = Case("round_robin", routers=1, utilisation=0.5, backends=1, slots=1, saving=0, requests=60_000)


# Theory


@pytest.mark.parametrize("sigma", [0.0, sqrt(log(2)), 1.0])
def test_one_server_waits_as_long_as_pollaczek_and_khinchine_say(sigma: float) -> None:
    """With sigma = sqrt(ln 2) services vary as exponential ones do, and the mean wait is that of M/M/1."""
    load = ALONE.utilisation
    theory = load / (1 - load) * exp(sigma**2) / 2
    result = simulate(replace(ALONE, sigma=sigma))
    assert fmean(result.waits) == pytest.approx(theory, rel=0.1)
    # Who arrives at an idle server does not wait.
    assert sum(wait == 0 for wait in result.waits) / len(result.waits) == pytest.approx(1 - load, abs=0.02)


def test_several_slots_wait_as_long_as_erlang_says() -> None:
    """M/M/4 at 0.8: C = 0.5964 and the mean wait C / (4 - 3.2); log-normal services of its variance come near."""
    result = simulate(replace(ALONE, slots=4, utilisation=0.8, sigma=sqrt(log(2)), requests=120_000))
    assert fmean(result.waits) == pytest.approx(0.5964 / 0.8, rel=0.15)
    assert sum(wait > 0 for wait in result.waits) / len(result.waits) == pytest.approx(0.5964, abs=0.04)


def test_queues_are_as_long_as_little_says() -> None:
    """Mean queue = arrivals per unit of time x mean wait, whatever the balancing."""
    case = replace(CASE, utilisation=0.9, saving=0, requests=60_000)
    result = simulate(case)
    assert fmean(result.queues) == pytest.approx(case.utilisation * case.slots * fmean(result.waits), rel=0.1)


@pytest.mark.parametrize("balancing", BALANCING)
def test_the_slots_are_as_busy_as_the_work_that_comes(balancing: BalancingName) -> None:
    result = simulate(replace(CASE, balancing=balancing, sigma=0.5, requests=12_000))
    expected = CASE.utilisation * (1 - CASE.saving * result.hit_rate)
    assert result.busy == pytest.approx(expected, abs=0.03)


# Every request ends once


@pytest.mark.parametrize("balancing", BALANCING)
@pytest.mark.parametrize("event", ["none", "slow", "dies"])
def test_every_request_ends_once(balancing: BalancingName, event: Event) -> None:
    result = simulate(replace(CASE, balancing=balancing, event=event, utilisation=0.9, requests=1_500))
    assert result.completed + result.cut == 1_500
    assert bool(result.cut) == bool(result.repeats) == (event == "dies")


@pytest.mark.parametrize("event", ["slow", "dies"])
def test_nothing_is_left_in_flight(event: Event) -> None:
    run = Simulation(replace(CASE, event=event, utilisation=1.2, signal=0.5))
    run.run()
    assert [server.load for server in run.servers] == [0] * 20
    assert [view.in_flight for router in run.routers for view in router.known] == [0] * 4 * 20


@pytest.mark.parametrize("routers", [1, 8])
def test_each_router_learns_by_five_failures_that_a_backend_died(routers: int) -> None:
    run = Simulation(replace(CASE, balancing="round_robin", event="dies", routers=routers, utilisation=0.5))
    result = run.run()
    assert result.cut + result.repeats == 5 * routers
    assert {len(router.views) for router in run.routers} == {19}


# The same again


@pytest.mark.parametrize("balancing", BALANCING)
def test_the_seed_decides_on_everything(balancing: BalancingName) -> None:
    case = replace(CASE, balancing=balancing, event="dies", requests=1_000)
    assert simulate(case) == simulate(case)
    assert simulate(case).waits != simulate(replace(case, seed=2)).waits


def test_the_requests_are_the_same_for_every_policy() -> None:
    """With a slot for everybody nobody waits, and the work is all that is left to differ."""
    roomy = replace(CASE, slots=200, backends=2, utilisation=0.5, saving=0, requests=2_000)
    busy = [simulate(replace(roomy, balancing=balancing)).busy for balancing in BALANCING]
    assert busy == pytest.approx(busy[:1] * len(busy))


# What it is for


def test_two_choices_wait_less_than_a_round_robin() -> None:
    case = replace(CASE, utilisation=0.9, routers=1, requests=12_000)
    robin, two = (simulate(replace(case, balancing=balancing)) for balancing in ("round_robin", "two_choices"))
    assert quantile(two.waits, 0.99) < quantile(robin.waits, 0.99) / 2
    assert fmean(two.queues) < fmean(robin.queues) / 2
    assert two.imbalance < robin.imbalance


def test_routers_that_see_less_balance_worse() -> None:
    case = replace(CASE, utilisation=0.9, requests=12_000)
    one, many = (simulate(replace(case, routers=routers)) for routers in (1, 16))
    assert fmean(one.waits) < fmean(many.waits) / 2
    assert fmean(simulate(replace(case, routers=16, signal=0.25)).waits) < fmean(many.waits) / 2


def test_affinity_finds_the_prefixes_that_others_find_by_chance() -> None:
    two, affine = (simulate(replace(CASE, balancing=balancing)) for balancing in ("two_choices", "prefix_affinity"))
    assert affine.hit_rate > 2 * two.hit_rate
    assert affine.busy < two.busy


def test_affinity_finds_nearly_as_many_where_each_router_sees_a_part() -> None:
    """Sixteen routers with two requests at each backend; by its share alone each would find two thirds of them."""
    case = Case("prefix_affinity", routers=1, utilisation=0.9, backends=20, slots=32, cached=256, requests=16_000)
    one, many = simulate(case), simulate(replace(case, routers=16))
    assert many.hit_rate > 0.88 * one.hit_rate
    assert quantile(many.waits, 0.99) < 0.5


def test_a_slow_backend_gets_less_of_those_who_count_only() -> None:
    robin, least = (
        simulate(replace(CASE, event="slow", balancing=balancing, routers=1))
        for balancing in ("round_robin", "least_in_flight")
    )
    assert robin.odd_share == pytest.approx(1, abs=0.02)
    assert least.odd_share < 0.8
    assert quantile(least.odd_waits, 0.99) < quantile(robin.odd_waits, 0.99) / 4


# Its parts


def test_a_cache_forgets_what_was_not_used_for_longest() -> None:
    server = Server("http://r0:8000", slots=1, cached=2)
    assert [server.recall(key) for key in "abacab"] == [False, False, True, False, True, False]


def test_a_session_has_as_many_turns_as_it_is_told() -> None:
    sessions = Sessions(10, 4.0, Random(1))
    turns = [sessions.turn() for _ in range(8_000)]
    assert len(turns) / len(set(turns)) == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize(
    "bad",
    [{"slots": 0}, {"backends": 1, "event": "dies"}, {"saving": 1.0}, {"utilisation": 0.0}, {"sigma": -1.0}],
)
def test_what_cannot_be_simulated_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        replace(CASE, **bad)


# The command


def test_the_command_prints_a_row_for_every_cell(capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--backends", "10", "--requests", "200", "--seed", "7"]
    assert simulation.main([*size, "--routers", "1,2", "--utilisations", "0.5,0.9"]) == 0
    text = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.count("|") > 2]
    assert len(rows) == 3 * 2 + 4 * 2 * (2 + 1 + 1)
    assert rows[2][:3] == ["round_robin", "1", "0.5"]
    assert {len(row) for row in rows} == {9, 11}


@pytest.mark.parametrize("wrong", ["--policies=random", "--events=fire", "--slots=0", "--routers=many"])
def test_the_command_names_what_it_does_not_know(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        simulation.main([wrong])
    assert wrong.partition("=")[0].strip("-") in capsys.readouterr().err
