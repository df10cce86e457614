"""One timer for many that are awaited."""

import asyncio
from time import monotonic
from typing import Any

import pytest

from inference_api.features.hedging.due_dates import DueDates
from tests.fakes import until

pytestmark = pytest.mark.anyio


class One:
    def __init__(self, seconds: float) -> None:
        self.due = monotonic() + seconds
        self.over = False


async def test_what_is_due_is_late_in_order() -> None:
    late: list[One] = []
    watch = DueDates(late.append)
    ones = [One(0.03), One(0.06), One(60)]
    for one in ones:
        watch.add(one)

    await until(lambda: len(late) == 2)

    assert late == ones[:2]
    assert monotonic() >= ones[1].due - 0.002


async def test_what_is_over_is_never_late() -> None:
    late: list[One] = []
    watch = DueDates(late.append)
    ones = [One(0.03), One(0.03), One(0.05)]
    for one in ones:
        watch.add(one)
    ones[1].over = ones[0].over = True
    watch.done()

    await until(lambda: late)

    assert late == ones[2:]


async def test_many_have_one_timer() -> None:
    late: list[One] = []
    watch: Any = DueDates(late.append)
    for _ in range(1000):
        one = One(0.05)
        watch.add(one)
        one.over = True
        watch.done()
    timer = watch._timer

    assert len(watch._awaited) == 0
    last = One(0.05)
    watch.add(last)
    assert watch._timer is timer
    await until(lambda: late)
    assert late == [last]
    await asyncio.sleep(0)
    assert watch._timer is None
