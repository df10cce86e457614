"""Long work takes its turns: a little of it between everything else, whoever it is for."""

import asyncio
from collections.abc import Generator

import pytest

from inference_api.http.turns import Turns

pytestmark = pytest.mark.anyio


class Clock:
    """One more each time somebody looks."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def work(name: str, slices: int, log: list[str]) -> Generator[None, None, str]:
    for _ in range(slices):
        log.append(name)
        yield
    return name.upper()


async def count_turns(log: list[str]) -> None:
    while True:
        log.append("|")
        await asyncio.sleep(0)


async def test_work_returns_what_it_returns() -> None:
    log: list[str] = []

    assert await Turns(100).run(work("a", 5, log)) == "A"
    assert await Turns(0).run(work("b", 0, log)) == "B"
    assert log == ["a"] * 5


async def test_in_one_turn_of_the_loop_is_as_much_work_as_there_is_time_for() -> None:
    log: list[str] = []
    turns = Turns(3, Clock())
    counting = asyncio.create_task(count_turns(log))

    await asyncio.gather(*(turns.run(work(name, 12, log)) for name in "abc"))
    counting.cancel()

    per_turn = [turn for turn in "".join(log).split("|") if turn]
    assert {len(turn) for turn in per_turn} == {3}
    assert "".join(per_turn).count("a") == 12
    # Nobody waits for the end of another.
    assert {turn[0] for turn in per_turn[:3]} == set("abc")


async def test_an_error_is_its_own() -> None:
    turns, log = Turns(0), list[str]()

    def failing() -> Generator[None, None, str]:
        yield
        raise ValueError("of its own")

    other = asyncio.create_task(turns.run(work("a", 5, log)))
    with pytest.raises(ValueError, match="of its own"):
        await turns.run(failing())
    assert await other == "A"


async def test_who_is_cancelled_keeps_nobody_waiting() -> None:
    turns, log = Turns(0), list[str]()
    tasks = [asyncio.create_task(turns.run(work(name, 50, log))) for name in "abc"]
    for _ in range(8):
        await asyncio.sleep(0)
    tasks[0].cancel()
    tasks[1].cancel()

    assert await tasks[2] == "C"
    assert log.count("a") < 50 > log.count("b")
