"""The resolver: one look-up for all who ask, a memory that outlives failures, and names that hang by themselves."""

import asyncio
import logging
import math
import socket
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from inference_api.discovery.resolver import Resolver, resolve
from tests.discovery.names import Names
from tests.fakes import until

pytestmark = pytest.mark.anyio

AWAY = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def make(clock: Clock) -> AsyncIterator[Callable[..., Resolver]]:
    """`make(names, ...)` -> a Resolver by that clock; its look-ups end with the test."""
    made = []

    def make(names: Any, **more: Any) -> Resolver:
        made.append(Resolver(names, clock=clock, **more))
        return made[-1]

    yield make
    for resolver in made:
        await resolver.aclose()


async def test_all_who_ask_for_a_name_share_one_look_up(make: Callable[..., Resolver]) -> None:
    names = Names()
    resolver = make(names)
    asking = [asyncio.create_task(resolver.addresses("a")) for _ in range(50)]
    asking += [asyncio.create_task(resolver.look_up("a")) for _ in range(50)]
    await until(lambda: names.under_way)
    asking.pop(0).cancel()
    names.say("a", ["10.0.0.2", "10.0.0.1"])

    # In the system's order of preference.
    assert await asyncio.gather(*asking) == [["10.0.0.2", "10.0.0.1"]] * 99
    assert names.asked == ["a"]


async def test_an_answer_is_fresh_for_a_time(make: Callable[..., Resolver], clock: Clock) -> None:
    names = Names(a=["10.0.0.1"])
    resolver = make(names, ttl=5)
    await resolver.addresses("a")
    names.say("a", ["10.0.0.2"])
    clock.now += 4.9
    assert await resolver.addresses("a") == ["10.0.0.1"]
    assert names.asked == ["a"]

    clock.now += 0.2
    assert await resolver.addresses("a") == ["10.0.0.2"]
    # What the discovery finds serves connections, too; it never takes what is remembered.
    names.say("a", ["10.0.0.3"])
    assert await resolver.look_up("a") == await resolver.addresses("a") == ["10.0.0.3"]


@pytest.mark.parametrize("fault", [AWAY, OSError(), UnicodeError("label too long"), []])
async def test_a_name_that_cannot_be_looked_up_any_more_keeps_its_addresses(
    fault: Any, make: Callable[..., Resolver], clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "inference_api")
    names = Names(a=["10.0.0.1"])
    resolver = make(names, ttl=5)
    await resolver.addresses("a")
    names.say("a", fault)
    for _ in range(20):
        clock.now += 3600
        assert await resolver.addresses("a") == ["10.0.0.1"]
    assert len(names.asked) == 21
    # A name server in trouble is not asked for each connection, and the trouble is no news after the first time.
    assert await resolver.addresses("a") == ["10.0.0.1"]
    assert len(names.asked) == 21
    assert [message.partition(": ")[0] for message in caplog.messages] == ["the host 'a' cannot be looked up"]

    names.say("a", ["10.0.0.2"])
    clock.now += 2
    assert await resolver.addresses("a") == ["10.0.0.2"]
    assert caplog.messages[1:] == ["the host 'a' resolves again"]


async def test_of_a_name_that_nobody_connects_to_whoever_looks_it_up_says_what_is_wrong(
    make: Callable[..., Resolver], caplog: pytest.LogCaptureFixture
) -> None:
    names = Names(a=["10.0.0.1"])
    resolver = make(names)
    await resolver.look_up("a")
    names.say("a", AWAY)
    with pytest.raises(OSError, match="Temporary"):
        await resolver.look_up("a")

    assert caplog.messages == []


@pytest.mark.parametrize("fault", [AWAY, UnicodeError("label too long"), []])
async def test_a_name_that_was_never_found_is_an_error(
    fault: Any, make: Callable[..., Resolver], caplog: pytest.LogCaptureFixture
) -> None:
    names = Names(a=fault)
    resolver = make(names)
    with pytest.raises((OSError, UnicodeError)):
        await resolver.addresses("a")
    assert caplog.messages == []
    names.say("a", ["10.0.0.1"])
    assert await resolver.addresses("a") == ["10.0.0.1"]


@pytest.mark.parametrize(("seconds", "least"), [(None, 0.25), (2.0, 0.25), (0.08, 0.02)])
async def test_nobody_waits_long_for_news_of_a_name_that_is_known(
    seconds: float | None, least: float, make: Callable[..., Resolver], clock: Clock
) -> None:
    names = Names(a=["10.0.0.1"])
    resolver = make(names, ttl=5)
    await resolver.addresses("a")
    del names.answers["a"]
    clock.now += 6
    loop = asyncio.get_running_loop()

    async def fastest(enough: float) -> float:
        """Of some, for a machine that stands still now and then."""
        took = [math.inf]
        while min(took) >= enough and len(took) < 40:
            began = loop.time()
            assert await resolver.addresses("a", seconds) == ["10.0.0.1"]
            took.append(loop.time() - began)
        return min(took)

    assert least - 0.01 <= await fastest(least + 0.15) < least + 0.15
    # Nor does anybody wait for one that has had its moment.
    clock.now += 0.3
    assert await fastest(0.015) < 0.015
    assert names.asked == ["a", "a"]
    names.say("a", ["10.0.0.2"])
    await until(lambda: not names.under_way)
    assert await resolver.addresses("a") == ["10.0.0.2"]


async def test_addresses_that_let_nobody_in_are_looked_up_sooner_but_not_each_time(
    make: Callable[..., Resolver], clock: Clock
) -> None:
    names = Names(a=["10.0.0.1"])
    resolver = make(names, ttl=5)
    resolver.doubt("a")
    await resolver.addresses("a")
    for _ in range(10):
        resolver.doubt("a")
        await resolver.addresses("a")
    assert len(names.asked) == 1

    clock.now += 1.5
    await resolver.addresses("a")
    assert len(names.asked) == 2
    clock.now += 1.5
    await resolver.addresses("a")
    assert len(names.asked) == 2


async def test_names_that_hang_hold_up_each_other_and_nobody_else(make: Callable[..., Resolver]) -> None:
    hanging = [f"h{number}" for number in range(8)]
    names = Names(sound=["10.0.0.1"])
    resolver = make(names, concurrency=2, late=0.2, most_late=100)
    tasks = [asyncio.create_task(resolver.look_up(host)) for host in hanging]
    await asyncio.wait_for(resolver.addresses("sound"), 10)
    await until(lambda: names.under_way == 8)

    # As late as all are now, they may not come back as many.
    for host in hanging:
        names.say(host, AWAY)
    await asyncio.gather(*tasks, return_exceptions=True)
    for host in hanging:
        del names.answers[host]
    names.most = 0
    tasks = [asyncio.create_task(resolver.look_up(host)) for host in hanging]
    await until(lambda: names.under_way == 2)
    await asyncio.wait_for(resolver.look_up("sound"), 10)
    assert names.most == 3

    for host in hanging:
        names.say(host, ["10.0.0.2"])
    assert [await task for task in tasks] == [["10.0.0.2"]] * 8
    # Those that answer are like any other again, once they did so in time.
    await asyncio.gather(*[resolver.look_up(host) for host in hanging])
    names.answers.clear()
    tasks = [asyncio.create_task(resolver.look_up(host)) for host in hanging]
    await until(lambda: names.under_way == 8)
    for host in hanging:
        names.say(host, ["10.0.0.2"])
    await asyncio.gather(*tasks)


async def test_there_is_an_end_to_how_many_are_under_way(make: Callable[..., Resolver]) -> None:
    hosts = [f"h{number}" for number in range(20)]
    names = Names()
    resolver = make(names, concurrency=2, late=0.0, most_late=3)
    tasks = [asyncio.create_task(resolver.look_up(host)) for host in hosts]
    await until(lambda: names.under_way == 5)
    for _ in range(20):
        await asyncio.sleep(0)
    # One that keeps its place, as there are too many late ones already, ends like any other.
    names.say(names.asked[4], ["10.0.0.1"])
    await asyncio.wait_for(tasks[hosts.index(names.asked[4])], 10)
    for host in hosts:
        names.say(host, ["10.0.0.1"])
    await asyncio.gather(*tasks)

    assert names.most == 5
    assert "0 look-ups under way" in repr(resolver)


async def test_the_end_leaves_no_look_up_behind(make: Callable[..., Resolver]) -> None:
    names = Names()
    resolver = make(names, concurrency=1, late=0.01)
    tasks = [asyncio.create_task(resolver.addresses(host)) for host in "abc"]
    await until(lambda: names.under_way == 1)
    await resolver.aclose()

    assert names.under_way == 0
    assert all(
        isinstance(gone, asyncio.CancelledError) for gone in await asyncio.gather(*tasks, return_exceptions=True)
    )


# The machine's own


async def test_look_ups_have_threads_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than libuv has threads, and as many as the loop's executor: all of those stay free."""
    release, real = threading.Event(), socket.getaddrinfo

    def getaddrinfo(host: str, *more: Any, **keywords: Any) -> Any:
        if host.startswith("slow"):
            release.wait(30)
        return real("127.0.0.1", *more, **keywords)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    resolver = Resolver()
    tasks = [asyncio.create_task(resolver.look_up(f"slow{number}.test")) for number in range(15)]
    try:
        await asyncio.sleep(0)
        assert await asyncio.wait_for(resolver.look_up("fine.test"), 10) == ["127.0.0.1"]
        assert await asyncio.wait_for(asyncio.to_thread(lambda: 1), 10) == 1
        assert await asyncio.wait_for(asyncio.get_running_loop().getaddrinfo("localhost", 1), 10)
    finally:
        release.set()
    await asyncio.gather(*tasks)


async def test_the_machines_resolver_gives_each_address_once() -> None:
    found = await resolve("localhost")

    assert "127.0.0.1" in found
    assert len(set(found)) == len(found)
    with pytest.raises(OSError, match=r"."):
        await resolve("no-such-host.invalid")
    with pytest.raises(UnicodeError):
        await resolve("x" * 64 + ".test")
