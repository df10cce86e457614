"""Answers that are shown again: for how long, and how often they are made."""

import asyncio

import pytest

from control_plane.kept import Kept

pytestmark = pytest.mark.anyio


class Work:
    """Makes one number after the other; each takes `seconds`."""

    def __init__(self, seconds: float = 0) -> None:
        self.now = 0.0
        self.seconds = seconds
        self.made = 0

    async def __call__(self) -> int:
        self.now += self.seconds
        self.made += 1
        # Others get their turn while it is made.
        await asyncio.sleep(0)
        return self.made


async def test_an_answer_holds_for_its_time() -> None:
    kept, work = Kept(), Work()

    found = [await kept.get("a", now, 1000, work) for now in (0, 999, 1000, 1999)]

    assert found == [1, 1, 2, 2]


@pytest.mark.parametrize(("seconds", "holds"), [(0.01, 200), (60, 1000)])
async def test_what_is_cheap_is_made_anew_sooner(seconds: float, holds: int) -> None:
    work = Work(seconds)
    kept = Kept(timer=lambda: work.now)

    found = [await kept.get("a", now, 1000, work, 20) for now in (0, holds - 1, holds)]

    assert found == [1, 1, 2]


async def test_who_asks_while_it_is_made_waits_for_it() -> None:
    kept, work = Kept(), Work()

    found = await asyncio.gather(*(kept.get("a", 0, 1000, work) for _ in range(5)))
    of_a_version = await asyncio.gather(*(kept.made_of("a", "v1", work) for _ in range(5)))

    assert (found, of_a_version) == ([1] * 5, [2] * 5)


async def test_what_is_being_made_anew_is_not_forgotten_for_another_one() -> None:
    kept, work = Kept(), Work()
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def slow() -> int:
        begun.set()
        await go_on.wait()
        return await work()

    await kept.get("a", 0, 1000, work)
    first = asyncio.create_task(kept.get("a", 1000, 1000, slow))
    await begun.wait()
    await kept.get("b", 1000, 1000, Work())
    second = asyncio.create_task(kept.get("a", 1000, 1000, work))
    go_on.set()

    assert (await first, await second) == (2, 2)
    assert work.made == 2


async def test_another_version_is_made_anew_and_names_that_are_gone_are_forgotten() -> None:
    kept, work = Kept(), Work()

    found = [await kept.made_of(("router", "a"), version, work) for version in ("v1", "v1", None, "v2")]
    kept.retain("router", {"a"})
    same = await kept.made_of(("router", "a"), "v2", work)
    kept.retain("router", {"b"})
    anew = await kept.made_of(("router", "a"), "v2", work)

    assert (found, same, anew) == ([1, 1, 2, 3], 3, 4)


async def test_what_is_beyond_the_most_is_made_each_time() -> None:
    kept, work = Kept(most=1), Work()

    found = [await kept.get(name, 0, 1000, work) for name in ("a", "b", "b", "a")]

    assert found == [1, 2, 3, 1]


async def test_what_failed_is_tried_again() -> None:
    kept, work = Kept(), Work()

    async def fails() -> int:
        raise OSError("away")

    with pytest.raises(OSError, match="away"):
        await kept.get("a", 0, 1000, fails)

    assert await kept.get("a", 0, 1000, work) == 1
