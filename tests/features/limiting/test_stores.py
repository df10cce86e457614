"""What every store of counters keeps to, in memory or in Redis."""

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from inference_api.features.limiting.plans import ONE, Plans, give_back, settle, take
from inference_api.features.limiting.windows import Store, Window
from inference_api.features.stores.memory import Counters, MemoryStore
from inference_api.features.stores.redis import RedisStore, SyncTiming
from inference_api.policy.rules import Rule
from tests.redis_server import redis_server

pytestmark = pytest.mark.anyio
NOW = 1_795_862_415_000
# A store of so many counters, and what makes it sync, if it does
Made = tuple[Store, Callable[[], Awaitable[None]]]


async def nothing() -> None: ...


@pytest.fixture(params=["memory", "redis"])
async def made(request: pytest.FixtureRequest) -> AsyncIterator[Made]:
    if request.param == "memory":
        yield MemoryStore(size=20), nothing
        return
    with TemporaryDirectory() as folder, redis_server(Path(folder)) as server:
        store = RedisStore(server.url, "router-1", size=20, timing=SyncTiming(connect=5, answer=5))
        await store.sync()
        yield store, store.sync
        await store.aclose()


async def test_a_name_has_one_counter(made: Made) -> None:
    store, _ = made

    assert store.window("a", 1000) is store.window("a", 1000)
    assert store.window("a", 1000) is not store.window("b", 1000)
    assert store.streams("a") is store.streams("a")


async def test_what_is_taken_given_back_and_settled(made: Made) -> None:
    store, sync = made
    rules = [
        Rule("key", "k", "requests", 3, 3600, False, None, "key 'k'"),
        Rule("key", "k", "tokens", 100, 3600, False, None, "key 'k'"),
    ]
    plan = Plans(store).make(rules, "m", "203.0.113.7", 1)
    requests, tokens = plan.windows
    now = store.now()

    def touch() -> None:
        if isinstance(store, RedisStore):
            store.touch(plan)

    async def used() -> tuple[int, int]:
        touch()
        await sync()
        return requests.window.used(store.now()), tokens.window.used(store.now())

    # Both fit; then one does not, and none is taken; then both are given back, and settled.
    assert take(plan.windows, (1, 60, 0, 0), now) is not None
    assert await used() == (1, 60)
    assert take(plan.windows, (1, 60, 0, 0), now) is None
    assert await used() == (1, 60)
    give_back(plan.windows, (1, 60, 0, 0), now)
    assert await used() == (0, 0)
    assert take(plan.windows, (1, 60, 0, 0), now) is not None
    settle(plan.metered, (1, 60, 0, 0), (1, 10, 0, 0), now, store.now)
    assert await used() == (1, 10)
    assert [take(plan.requests, ONE, now) is not None for _ in range(3)] == [True, True, False]
    assert await used() == (3, 10)


async def test_open_streams_are_not_forgotten(made: Made) -> None:
    store, sync = made
    opened = store.streams("open")
    opened.own = 1

    for number in range(50):
        store.streams(str(number))
    await sync()

    assert store.streams("open") is opened
    assert opened.used(store.now()) == 1


def test_counters_are_bounded_and_the_empty_ones_go_first() -> None:
    evicted: list[int] = []
    counters: Counters[Window] = Counters(100, lambda: evicted.append(len(counters)))

    def get(name: str) -> Window:
        return counters.get(name, lambda: Window(name, 60_000))

    for number in range(100):
        get(str(number)).roll(NOW - (3_600_000 if number % 2 else 0))
    for number in range(100, 150):
        get(str(number)).roll(NOW)

    assert len(counters) == 100
    assert len(evicted) == 50
    left = {counter.name for counter in counters.all()}
    assert {str(number) for number in range(0, 100, 2)} <= left
    assert {str(number) for number in range(100, 150)} <= left
