"""The size of a fleet: a scrape grows by the same for every backend, a choice does not."""

from typing import get_args

import pytest

from benchmarks import fleet_size
from inference_api.routing.entries import BalancingName


def test_every_backend_has_its_series_and_costs_less_than_half_a_kilobyte() -> None:
    few, many = (fleet_size.scrape(fleet_size.build(1, backends)) for backends in (100, 300))
    assert many.count(b'inference_api_backend_up{model_name="model-0",backend="') == 300
    assert 300 < (len(many) - len(few)) / 200 < 500


def test_only_least_in_flight_looks_at_every_backend() -> None:
    least, two, affine = (
        fleet_size.choosing_us(fleet_size.build(1, 1000, balancing))
        for balancing in ("least_in_flight", "two_choices", "prefix_affinity")
    )
    assert min(two, affine) > 0
    assert least > 5 * max(two, affine)


def test_the_command_tells_scrape_choice_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert fleet_size.main(["--models", "2", "--backends", "3"]) == 0
    first, *others = capsys.readouterr().out.splitlines()
    assert first.startswith("2 models of 3 backends: ")
    assert [line.partition(":")[0] for line in others] == list(get_args(BalancingName))
