"""Counters in a real Redis: what routers know of each other, and what happens when it is away."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from inference_api.features.limiting.plans import ONE, Plan, Plans, give_back, take
from inference_api.features.stores.memory import unix_ms
from inference_api.features.stores.redis import RedisStore, SyncTiming
from inference_api.policy.rules import Rule
from tests.fakes import until
from tests.redis_server import RedisServer, redis_server

pytestmark = pytest.mark.anyio

# Long enough for a busy machine, where a test is not about time
PATIENT = SyncTiming(every=0.02, retry=0.02, connect=5, answer=5, patience=5)
HOUR = Rule("key", "k", "requests", 100, 3600, False, None, "key 'k'")


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with TemporaryDirectory() as folder, redis_server(Path(folder)) as running:
        yield running


@pytest.fixture
async def store(server: RedisServer) -> AsyncIterator[Callable[..., RedisStore]]:
    """`store("a")` -> a RedisStore of the router `a`, connected when it first syncs."""
    made: list[RedisStore] = []

    def make(name: str, timing: SyncTiming = PATIENT, clock: Callable[[], int] = unix_ms) -> RedisStore:
        made.append(RedisStore(server.url, name, clock=clock, timing=timing))
        return made[-1]

    yield make
    for each in made:
        await each.aclose()


@asynccontextmanager
async def running(*stores: RedisStore) -> AsyncIterator[None]:
    """Their tasks run, and have had an answer."""
    tasks = [asyncio.create_task(each.run()) for each in stores]
    try:
        await until(lambda: all(each.routers for each in stores))
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def plan(store: RedisStore, *rules: Rule) -> Plan:
    return Plans(store, asks=True).make(rules, "m", "203.0.113.7", 1)


def let_through(store: RedisStore, of: Plan) -> bool:
    """Decide by what is known here, as a request does."""
    store.touch(of)
    return take(of.requests + of.tokens, ONE, store.now()) is not None


def used(store: RedisStore, of: Plan) -> int:
    return of.windows[0].window.used(store.now())


# Names and lives of keys


async def test_the_names_and_lives_of_keys(server: RedisServer, store: Callable[..., RedisStore]) -> None:
    a = store("host-8000")
    rules = [
        Rule("organisation", "team-a", "requests", 9, 60, False, None, ""),
        Rule("key", "k3v9Qm2XbT7a", "output_tokens", 9, 3600, False, ("m",), ""),
        Rule("all", "", "tokens", 9, 1, False, None, ""),
        Rule("user", "ana", "streams", 5, 0, False, None, ""),
    ]
    of = plan(a, *rules)
    await a.sync()
    take(of.windows, (1, 2, 3, 4), a.now())
    of.streams[0].streams.own = 2
    a.touch(of)
    await a.sync()

    now = a.now() // 1000
    # The first 8 hexadecimal digits of SHA-256 of the models
    models = "62c66a7a"
    windows = {
        f"{{ia}}:1:w:organisation:team-a:requests:60:{now // 60}": ("1", 130),
        f"{{ia}}:1:w:key:k3v9Qm2XbT7a:output_tokens:3600:{models}:{now // 3600}": ("4", 7210),
        f"{{ia}}:1:w:all::tokens:1:{now}": ("2", 12),
    }
    found = server.names()
    assert {name for name in found if ":w:" not in name} == {"{ia}:1:routers", "{ia}:1:s:user:ana"}
    for name in (name for name in found if ":w:" in name and ":tokens:1:" not in name):
        assert server.do("GET", name) == windows[name][0]
        assert 0 <= windows[name][1] - server.do("TTL", name) <= 2
    assert len(found) == 5
    assert server.do("HGET", "{ia}:1:s:user:ana", "host-8000").startswith("2:")
    assert server.do("HKEYS", "{ia}:1:routers") == ["host-8000"]


# What routers know of each other


async def test_each_router_knows_what_all_have_counted_after_a_sync(store: Callable[..., RedisStore]) -> None:
    stores = [store(name) for name in "abc"]
    plans = [plan(each, HOUR) for each in stores]
    for each in stores:
        await each.sync()
    for count, each, of in zip((1, 10, 30), stores, plans, strict=True):
        for _ in range(count):
            assert let_through(each, of)

    for _ in range(2):
        for each in stores:
            await each.sync()

    assert [used(each, of) for each, of in zip(stores, plans, strict=True)] == [41, 41, 41]
    assert [each.routers for each in stores] == [3, 3, 3]


async def test_a_refund_reaches_the_others(store: Callable[..., RedisStore]) -> None:
    a, b = store("a"), store("b")
    of_a, of_b = plan(a, HOUR), plan(b, HOUR)
    taken_at = a.now()
    for _ in range(5):
        let_through(a, of_a)
    await a.sync()

    give_back(of_a.windows, ONE, taken_at)
    a.touch(of_a)
    await a.sync()
    b.touch(of_b)
    await b.sync()

    assert used(b, of_b) == 4


async def test_what_is_counted_during_a_sync_is_sent_by_the_next(store: Callable[..., RedisStore]) -> None:
    a, b = store("a"), store("b")
    of_a, of_b = plan(a, HOUR), plan(b, HOUR)
    let_through(a, of_a)

    syncing = asyncio.create_task(a.sync())
    await asyncio.sleep(0)
    let_through(a, of_a)
    await syncing
    assert used(a, of_a) == 2
    await a.sync()
    b.touch(of_b)
    await b.sync()

    assert (used(a, of_a), used(b, of_b)) == (2, 2)


async def test_windows_go_by_the_clock_of_redis(server: RedisServer, store: Callable[..., RedisStore]) -> None:
    late = store("late", clock=lambda: unix_ms() - 7_200_000)
    right = store("right")
    for each in (late, right):
        await each.sync()
    of_late, of_right = plan(late, HOUR), plan(right, HOUR)

    let_through(late, of_late)
    await late.sync()
    right.touch(of_right)
    await right.sync()

    assert abs(late.now() - right.now()) < 1000
    assert used(right, of_right) == 1


async def test_many_counters_go_in_several_calls(server: RedisServer, store: Callable[..., RedisStore]) -> None:
    a = store("a")
    await a.sync()
    plans = [plan(a, HOUR._replace(holder=str(number))) for number in range(1200)]
    for of in plans:
        let_through(a, of)

    await a.sync()

    assert sum(":w:" in name for name in server.names()) == 1200


async def test_an_idle_counter_is_not_read_for_ever(server: RedisServer, store: Callable[..., RedisStore]) -> None:
    a = store("a")
    let_through(a, plan(a, HOUR))
    for _ in range(10):
        await a.sync()
    reads = server.do("INFO", "commandstats")["cmdstat_get"]["calls"]

    await a.sync()

    assert server.do("INFO", "commandstats")["cmdstat_get"]["calls"] == reads


# Streams


async def test_streams_of_all_routers_count(store: Callable[..., RedisStore]) -> None:
    a, b = store("a"), store("b")
    rule = Rule("user", "ana", "streams", 5, 0, False, None, "user 'ana'")
    of_a, of_b = plan(a, rule), plan(b, rule)
    of_a.streams[0].streams.own, of_b.streams[0].streams.own = 2, 3
    for each, of in ((a, of_a), (b, of_b), (a, of_a)):
        each.touch(of)
        await each.sync()
    both = of_a.streams[0].streams.used(a.now()), of_b.streams[0].streams.used(b.now())

    of_b.streams[0].streams.own = 0
    await b.sync()
    await a.sync()

    assert both == (5, 5)
    assert of_a.streams[0].streams.used(a.now()) == 2


async def test_streams_of_a_dead_router_vanish(server: RedisServer, store: Callable[..., RedisStore]) -> None:
    """LiteLLM#20256, #32441: slots of a pod that died stayed taken until Redis was restarted."""
    a = store("a")
    await a.sync()
    of = plan(a, Rule("user", "ana", "streams", 5, 0, False, None, "user 'ana'"))
    for name, age in (("dead", 10_500), ("slow", 8_000)):
        server.do("HSET", "{ia}:1:s:user:ana", name, f"4:{a.now() - age}")
        server.do("HSET", "{ia}:1:routers", name, f"{a.now() - age}:x")

    a.touch(of)
    await a.sync()

    assert of.streams[0].streams.others == 4
    assert a.routers == 2
    assert "dead" not in server.do("HKEYS", "{ia}:1:routers") + server.do("HKEYS", "{ia}:1:s:user:ana")


# Precise limits

PRECISE = Rule("key", "p", "requests", 100, 3600, True, None, "key 'p'")


async def test_precise_limits_let_exactly_the_limit_through(store: Callable[..., RedisStore]) -> None:
    stores = [store(name) for name in "abc"]
    plans = [plan(each, PRECISE) for each in stores]

    async with running(*stores):
        answers = await asyncio.gather(
            *(each.ask(of.precise, ONE) for each, of in zip(stores, plans, strict=True) for _ in range(100))
        )

    assert sorted(answers, key=str) == [False] * 200 + [True] * 100


async def test_one_call_carries_all_that_wait(server: RedisServer, store: Callable[..., RedisStore]) -> None:
    a = store("a", PATIENT._replace(every=60))
    of = plan(a, PRECISE)

    async with running(a):
        before = server.do("INFO", "commandstats")["cmdstat_evalsha"]["calls"]
        answers = await asyncio.gather(*(a.ask(of.precise, ONE) for _ in range(50)))
        calls = server.do("INFO", "commandstats")["cmdstat_evalsha"]["calls"] - before

    assert answers == [True] * 50
    assert calls == 1


async def test_a_request_takes_all_its_precise_limits_or_none(
    server: RedisServer, store: Callable[..., RedisStore]
) -> None:
    a = store("a")
    wide, narrow = PRECISE, PRECISE._replace(holder="q", amount=1)
    streams = Rule("user", "ana", "streams", 2, 0, True, None, "user 'ana'")
    of = plan(a, wide, narrow, streams)

    async with running(a):
        answers = [await a.ask(of.precise, ONE) for _ in range(3)]

    assert answers == [True, False, False]
    assert [limit.window.used(a.now()) for limit in of.windows] == [1, 1]
    assert of.all_streams[0].streams.own == 1


async def test_precise_tokens_follow_the_formula(store: Callable[..., RedisStore]) -> None:
    a = store("a")
    of = plan(a, Rule("key", "t", "tokens", 1000, 3600, True, None, "key 't'"))

    async with running(a):
        answers = [await a.ask(of.precise, (1, want, 0, 0)) for want in (600, 500, 400, 1)]

    assert answers == [True, False, True, False]
    assert used(a, of) == 1000


async def test_precise_streams_are_counted_together(store: Callable[..., RedisStore]) -> None:
    a, b = store("a"), store("b")
    rule = Rule("user", "ana", "streams", 3, 0, True, None, "user 'ana'")
    of_a, of_b = plan(a, rule), plan(b, rule)

    async with running(a, b):
        answers = [await a.ask(of_a.precise, ONE), await b.ask(of_b.precise, ONE), await b.ask(of_b.precise, ONE)]
        full = [await a.ask(of_a.precise, ONE), await b.ask(of_b.precise, ONE)]
        of_b.all_streams[0].streams.own -= 1
        await until(lambda: of_a.all_streams[0].streams.others == 1)
        free = await a.ask(of_a.precise, ONE)

    assert (answers, full, free) == ([True] * 3, [False] * 2, True)


async def test_a_request_that_leaves_while_it_waits_takes_nothing_and_keeps_the_connection(
    server: RedisServer, store: Callable[..., RedisStore]
) -> None:
    """redis-py#2624, #2665: a cancelled task left its answer in the connection, for the next caller."""
    a = store("a", PATIENT._replace(every=0.02, answer=5))
    of = plan(a, PRECISE)

    async with running(a):
        await a.ask(of.precise, ONE)
        before, granted = connections(server), 0
        for pause in (0, 1, 2, 3, 5, 8):
            asking = [asyncio.create_task(a.ask(of.precise, ONE)) for _ in range(5)]
            for _ in range(pause):
                await asyncio.sleep(0)
            for task in asking:
                task.cancel()
            # Some may have been answered before.
            granted += (await asyncio.gather(*asking, return_exceptions=True)).count(True)
        assert await a.ask(of.precise, ONE) is True
        await until(lambda: used(a, of) == granted + 2)
        await until(lambda: window_of(server, "key:p:requests:3600") == granted + 2)
        after = connections(server)

    assert granted < 30
    assert after == before
    assert a.failures == {"connect": 0, "timeout": 0, "error": 0}


def connections(server: RedisServer) -> set[str]:
    """The clients of the server, by their ids."""
    return {line.split(" ")[0] for line in server.do("CLIENT", "LIST").splitlines()}


def window_of(server: RedisServer, name: str) -> int:
    """The sum of all windows of a counter."""
    return sum(int(server.do("GET", key) or 0) for key in server.names() if key.startswith(f"{{ia}}:1:w:{name}:"))


# Redis is away


async def test_redis_that_was_killed_is_away_after_three_failures_and_back_with_the_first_answer(
    server: RedisServer, store: Callable[..., RedisStore], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    a, b = store("a"), store("b")
    of = plan(a, HOUR)
    changes: list[bool] = []
    a.on_change(lambda: changes.append(a.is_away))

    async with running(a, b):
        await until(lambda: a.routers == 2)
        for _ in range(10):
            let_through(a, of)
        await until(lambda: window_of(server, "key:k:requests:3600") == 10)
        server.kill()
        await until(lambda: a.is_away)
        failures = a.failures["connect"]
        for _ in range(5):
            let_through(a, of)
        await until(lambda: a.failures["connect"] >= 6)
        server.start()
        await until(lambda: not a.is_away)
        # It is back empty: what was counted since is there, once, and what was before is not.
        await until(lambda: window_of(server, "key:k:requests:3600") == 5)
        await until(lambda: used(a, of) == 5)

    assert failures >= 3
    assert changes == [True, False]
    lines = [record.message for record in caplog.records if "Redis" in record.message and "inference" in record.name]
    assert sorted(lines) == sorted(
        ["Redis cannot be used for limits", "Redis can be used for limits again"] * 2  # of each router
    )


async def test_redis_that_hangs_stops_nobody_and_gets_each_count_once(
    server: RedisServer, store: Callable[..., RedisStore]
) -> None:
    """LiteLLM#35273: an unreachable Redis hung every request."""
    quick = SyncTiming(every=0.02, retry=0.05, connect=0.2, answer=0.1, patience=0.025)
    a = store("a", quick)
    of, precise = plan(a, HOUR), plan(a, PRECISE)

    async with running(a):
        for _ in range(3):
            let_through(a, of)
        await until(lambda: window_of(server, "key:k:requests:3600") == 3)
        server.hang()
        began = asyncio.get_running_loop().time()
        for _ in range(4):
            assert let_through(a, of)
        answer = await a.ask(precise.precise, ONE)
        took = asyncio.get_running_loop().time() - began
        await until(lambda: a.is_away and a.failures["timeout"] >= 5)
        for _ in range(2):
            let_through(a, of)
        server.go_on()
        await until(lambda: not a.is_away)
        await until(lambda: window_of(server, "key:k:requests:3600") == 9)
        await asyncio.sleep(0.2)

    assert answer is None
    assert took < 5
    # The calls that Redis got while it hung were run later, and none counted twice.
    assert window_of(server, "key:k:requests:3600") == 9
    assert window_of(server, "key:p:requests:3600") == 0


async def test_a_redis_that_comes_back_empty_counts_from_0(
    server: RedisServer, store: Callable[..., RedisStore]
) -> None:
    a = store("a")
    of = plan(a, HOUR)
    await a.sync()
    taken_at = a.now()
    for _ in range(5):
        let_through(a, of)
    await a.sync()
    server.do("FLUSHALL")

    # What the new Redis has never counted is given back.
    for _ in range(3):
        give_back(of.windows, ONE, taken_at)
    a.touch(of)
    await a.sync()

    assert window_of(server, "key:k:requests:3600") == 0
    assert used(a, of) == 0


@pytest.mark.parametrize("refused", [("-evalsha",), ("-evalsha", "-script")])
async def test_eval_is_used_where_evalsha_is_refused(
    refused: tuple[str, ...], server: RedisServer, store: Callable[..., RedisStore]
) -> None:
    """LiteLLM#32232: a proxy that refused SCRIPT meant limits per pod, silently."""
    server.do("ACL", "SETUSER", "default", *refused)
    a, b = store("a"), store("b")
    of_a, of_b = plan(a, HOUR), plan(b, HOUR)

    for each, of in ((a, of_a), (b, of_b), (a, of_a)):
        let_through(each, of)
        await each.sync()
    await b.sync()

    assert used(b, of_b) == 3


async def test_a_redis_without_scripts_is_away(server: RedisServer, store: Callable[..., RedisStore]) -> None:
    server.do("ACL", "SETUSER", "default", "-evalsha", "-eval")
    a = store("a")
    task = asyncio.create_task(a.run())

    await until(lambda: a.is_away)
    failures = dict(a.failures)
    server.do("ACL", "SETUSER", "default", "+evalsha", "+eval")
    await until(lambda: not a.is_away)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task

    assert failures["error"] >= 3
    assert failures["connect"] == failures["timeout"] == 0


async def test_a_router_that_stops_sends_its_last_counts(server: RedisServer, store: Callable[..., RedisStore]) -> None:
    a = store("a", PATIENT._replace(every=60))
    of = plan(a, HOUR)

    async with running(a):
        let_through(a, of)

    assert window_of(server, "key:k:requests:3600") == 1


async def test_alone_a_router_knows_its_own_part(server: RedisServer, store: Callable[..., RedisStore]) -> None:
    a, b = store("a"), store("b")
    of_a, of_b = plan(a, HOUR), plan(b, HOUR)
    for count, each, of in ((2, a, of_a), (40, b, of_b)):
        for _ in range(count):
            let_through(each, of)
        await each.sync()
    await a.sync()
    let_through(a, of_a)
    assert used(a, of_a) == 43

    async with running(a):
        server.kill()
        await until(lambda: a.is_away)
        alone = plan(a, HOUR)
        mine = used(a, alone)
        let_through(a, alone)

    assert mine == 3
    assert used(a, alone) == 4
