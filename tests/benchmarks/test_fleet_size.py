"""The size of a fleet: a scrape grows by the same for every replica, and the command says how much there is."""

import pytest

from benchmarks import fleet_size


def test_every_replica_has_its_series_and_costs_less_than_half_a_kilobyte() -> None:
    few, many = (fleet_size.scrape(fleet_size.build(1, replicas)) for replicas in (100, 300))
    assert many.count(b'inference_api_backend_up{backend="') == 300
    assert 300 < (len(many) - len(few)) / 200 < 500


def test_the_command_tells_scrape_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert fleet_size.main(["--models", "2", "--replicas", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["2 models of 3 replicas", "two_choices", "prefix_affinity"]
