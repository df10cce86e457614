"""Intervals and pauses: how far chance spreads them."""

import random

import pytest

from inference_api.pace import back_off, spread


def test_an_interval_is_spread_by_a_fifth_to_either_side() -> None:
    assert [spread(10.0, share) for share in (0.0, 0.5, 1.0)] == pytest.approx([8.0, 10.0, 12.0])


@pytest.mark.parametrize(("failures", "longest"), [(1, 0.025), (2, 0.05), (3, 0.1), (4, 0.2), (5, 0.25), (2000, 0.25)])
def test_a_back_off_doubles_up_to_the_longest(failures: int, longest: float) -> None:
    assert [back_off(failures, 0.025, 0.25, share) for share in (0.0, 0.5, 1.0)] == [0.0, longest / 2, longest]


def test_full_jitter_is_spread_over_the_whole_range() -> None:
    rand = random.Random(1)
    delays = [back_off(1, 0.025, 0.25, rand.random()) for _ in range(1000)]

    assert min(delays) < 0.001
    assert max(delays) > 0.024
    assert sum(delays) / 1000 == pytest.approx(0.0125, rel=0.1)
