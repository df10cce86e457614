"""Which of a name's addresses a connection goes to: RFC 8305, with real sockets where there are any."""

import asyncio
import errno
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_api.discovery.resolver import Resolver
from inference_api.upstream.dial import Dialer, in_turn, race
from inference_api.upstream.transport import Transport
from tests.discovery.names import Names
from tests.fakes import FakeEngine, body_of, full_listener, until
from tests.ports import free_port

pytestmark = pytest.mark.anyio

NAME = "engine.test"


# The order

ADDRESSES = st.lists(st.ip_addresses().map(str), unique=True, min_size=1, max_size=12)


def test_families_take_turns_and_the_systems_first_is_the_first() -> None:
    assert in_turn(["::1", "::2", "::3", "10.0.0.1"]) == ["::1", "10.0.0.1", "::2", "::3"]
    assert in_turn(["10.0.0.1", "10.0.0.2", "::1"]) == ["10.0.0.1", "::1", "10.0.0.2"]
    assert in_turn(["10.0.0.1", "::1", "::2"], {"10.0.0.1"}) == ["::1", "::2", "10.0.0.1"]


@given(ADDRESSES, st.data())
def test_no_address_is_lost_and_those_that_failed_come_last(addresses: list[str], data: st.DataObject) -> None:
    avoided = set(data.draw(st.lists(st.sampled_from(addresses))))
    order = in_turn(addresses, avoided)

    assert sorted(order) == sorted(addresses)
    states = [address in avoided for address in order]
    assert states == sorted(states)
    # Within a family the system's order of preference holds.
    for family in (False, True):
        kept = [a for a in order if (":" in a) is family and a not in avoided]
        assert kept == [a for a in addresses if (":" in a) is family and a not in avoided]
    if avoided != set(addresses):
        assert (":" in order[0]) == (":" in next(a for a in addresses if a not in avoided))


# The race, by itself


class Won:
    """A connection."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.closed = False

    def close(self) -> None:
        self.closed = True


class Attempts:
    """What each address does: lets one in at once (0) or when all took too long ("last"), fails, or swallows (None)."""

    def __init__(self, **does: Any) -> None:
        self.does = does
        self.begun: list[str] = []
        self.made: list[Won] = []
        self.notes: list[tuple[str, bool]] = []

    async def __call__(self, address: str) -> Won:
        self.begun.append(address)
        does = self.does[address]
        if isinstance(does, Exception):
            raise does
        if does == "stubborn":
            with suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
        else:
            if does == "last":
                await until(lambda: len(self.notes) == len(self.does))
            await (asyncio.Event().wait() if does is None else asyncio.sleep(0))
        self.made.append(Won(address))
        return self.made[-1]

    async def race(self, delay: float = 0.05) -> Won:
        async with asyncio.timeout(10):
            return await race(list(self.does), self, delay, lambda *note: self.notes.append(note))


def tasks_since_now() -> Callable[[], set[asyncio.Task[Any]]]:
    """Those that there are then, and that there were not now."""
    before = asyncio.all_tasks()
    return lambda: asyncio.all_tasks() - before


@pytest.mark.parametrize(
    ("does", "winner", "begun", "notes"),
    [
        ({"a": 0.0, "b": 0.0}, "a", "a", [("a", True)]),
        ({"a": OSError("refused"), "b": 0.0, "c": 0.0}, "b", "ab", [("a", False), ("b", True)]),
        ({"a": None, "b": None, "c": 0.0}, "c", "abc", [("a", False), ("b", False), ("c", True)]),
        ({"a": "last", "b": None}, "a", "ab", [("a", False), ("b", False), ("a", True)]),
        ({"a": None, "b": OSError("refused"), "c": 0.0}, "c", "abc", [("a", False), ("b", False), ("c", True)]),
    ],
    ids=["the first", "refused", "swallowed", "slow", "both"],
)
async def test_the_first_connection_wins(does: Any, winner: str, begun: str, notes: Any) -> None:
    others = tasks_since_now()
    attempts = Attempts(**does)

    assert (await attempts.race()).address == winner
    assert (attempts.begun, attempts.notes) == (list(begun), notes)
    await until(lambda: not others())


async def test_a_refusal_is_not_waited_for() -> None:
    attempts = Attempts(a=OSError("refused"), b=OSError("refused"), c=0.0)

    assert (await asyncio.wait_for(attempts.race(delay=60), 10)).address == "c"


async def test_connections_that_come_too_late_are_closed() -> None:
    others = tasks_since_now()
    attempts = Attempts(a="stubborn", b=0.0)
    won = await attempts.race()
    await until(lambda: len(attempts.made) == 2)
    await until(lambda: not others())

    assert [(one.address, one.closed) for one in attempts.made] == [("b", False), ("a", True)]
    assert not won.closed


async def test_two_that_win_in_the_same_turn_are_one_connection_and_one_that_is_closed() -> None:
    others = tasks_since_now()
    gate = asyncio.Event()
    made: list[Won] = []

    async def attempt(address: str) -> Won:
        await gate.wait()
        made.append(Won(address))
        return made[-1]

    racing = asyncio.create_task(race(["a", "b"], attempt, 0.01))
    await until(lambda: len(others()) == 3)
    gate.set()
    won = await racing
    await until(lambda: not others())

    assert len(made) == 2
    assert [one for one in made if not one.closed] == [won]


async def test_who_is_cancelled_leaves_nothing() -> None:
    others = tasks_since_now()
    attempts = Attempts(a=None, b="stubborn", c=None)
    racing = asyncio.create_task(attempts.race(delay=0.01))
    await until(lambda: len(attempts.begun) == 3)
    racing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await racing
    await until(lambda: not others())

    await until(lambda: [one.closed for one in attempts.made] == [True])


async def test_the_first_error_is_told_but_a_lack_of_our_own_before_it() -> None:
    first, lack = OSError(errno.ECONNREFUSED, "first"), OSError(errno.EMFILE, "lack")
    with pytest.raises(OSError, match="first"):
        await Attempts(a=first, b=OSError(errno.ENETUNREACH, "second")).race()
    with pytest.raises(OSError, match="lack"):
        await Attempts(a=first, b=lack).race()
    with pytest.raises(ZeroDivisionError):
        await Attempts(a=ZeroDivisionError(), b=0.0).race()


# With sockets


@asynccontextmanager
async def over(names: Any, **more: Any) -> AsyncIterator[Transport]:
    resolver = Resolver(names)
    async with Transport(resolver=resolver, **more) as transport:
        yield transport
    await resolver.aclose()


async def get(transport: Transport, port: int, connect: float | None = 10) -> int:
    extensions = {"timeout": {"connect": connect}, "fresh": True}
    async with asyncio.timeout(20):
        request = httpx.Request("GET", f"http://{NAME}:{port}/v1/models", extensions=extensions)
        response = await transport.handle_async_request(request)
        assert isinstance(response.stream, httpx.AsyncByteStream)
        await body_of(response.stream)
        return response.status_code


async def test_an_address_that_swallows_connections_is_passed_and_comes_last_from_then_on() -> None:
    async with FakeEngine(host="127.0.0.1") as engine, over(Names(**{NAME: ["127.0.0.2", "127.0.0.1"]})) as transport:
        with full_listener("127.0.0.2", engine.port):
            loop = asyncio.get_running_loop()
            took = []
            for _ in range(5):
                began = loop.time()
                assert await get(transport, engine.port) == 200
                took.append(loop.time() - began)

        # Only the first connection paid for it.
        assert took[0] >= 0.24
        assert min(took[1:]) < 0.2
        assert engine.connections == 5
        transport.retain(set())
        await until(lambda: not engine.open)
        assert "active" not in repr(transport)


async def test_an_address_that_refuses_costs_nothing_within_a_short_time_to_connect() -> None:
    addresses = [f"127.0.0.{number}" for number in range(2, 10)] + ["127.0.0.1"]
    async with FakeEngine(host="127.0.0.1") as engine, over(Names(**{NAME: addresses})) as transport:
        assert await get(transport, engine.port, connect=5) == 200
        assert "1 idle" in repr(transport)


def has_ipv6() -> bool:
    with suppress(OSError), socket.socket(socket.AF_INET6) as sock:
        sock.bind(("::1", 0))
        return True
    return False


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
@pytest.mark.parametrize(("host", "addresses"), [("127.0.0.1", ["::1", "127.0.0.1"]), ("::1", ["127.0.0.1", "::1"])])
async def test_of_two_families_the_one_that_answers_is_taken(host: str, addresses: list[str]) -> None:
    async with FakeEngine(host=host) as engine, over(Names(**{NAME: addresses})) as transport:
        assert await get(transport, engine.port) == 200
        assert engine.connections == 1


async def test_where_all_swallow_the_time_to_connect_is_kept() -> None:
    others = tasks_since_now()
    port = free_port()
    async with over(Names(**{NAME: ["127.0.0.2", "127.0.0.3"]})) as transport:
        with full_listener("127.0.0.2", port), full_listener("127.0.0.3", port):
            loop = asyncio.get_running_loop()
            began = loop.time()
            with pytest.raises(httpx.ConnectTimeout):
                await get(transport, port, connect=0.4)
            assert 0.39 <= loop.time() - began < 3
        await until(lambda: "0 active, 0 idle" in repr(transport))
        with pytest.raises(httpx.ConnectError):
            await get(transport, port, connect=5)
    await until(lambda: not others())


async def test_a_look_up_belongs_to_the_time_to_connect_and_outlives_who_asked() -> None:
    async with FakeEngine(host="127.0.0.1") as engine, over(names := Names()) as transport:
        with pytest.raises(httpx.ConnectTimeout):
            await get(transport, engine.port, connect=0.05)
        names.say(NAME, ["127.0.0.1"])
        assert await get(transport, engine.port) == 200
        assert names.asked == [NAME]


async def test_a_name_that_moved_is_looked_up_again_within_the_same_connection() -> None:
    """What is remembered never fails a request that a look-up of its own would not have failed."""
    async with FakeEngine(host="127.0.0.1") as engine:
        names, now = Names(**{NAME: ["127.0.0.1"]}), [1000.0]
        resolver = Resolver(names, clock=lambda: now[0])
        async with Transport(resolver=resolver) as transport:
            assert await get(transport, engine.port) == 200
            await engine.stop()
            async with FakeEngine(host="127.0.0.2", port=engine.port):
                names.say(NAME, ["127.0.0.2"])
                now[0] += 2  # the answer would be fresh for three seconds more
                assert await get(transport, engine.port) == 200
        assert names.asked == [NAME, NAME]


@pytest.mark.parametrize("refused", ["127.0.0.2", "127.0.0.1"])
async def test_an_address_that_no_backend_may_have_is_not_even_connected_to(refused: str) -> None:
    async with FakeEngine(host="127.0.0.1") as good, FakeEngine(host="127.0.0.2", port=good.port) as other:
        names = Names(**{NAME: ["127.0.0.2", "127.0.0.1"]})
        async with over(names, may_reach=lambda address: address != refused) as transport:
            assert await get(transport, good.port) == 200
        assert (good.connections, other.connections) == ((1, 0) if refused == "127.0.0.2" else (0, 1))
        async with over(names, may_reach=lambda address: False) as transport:
            with pytest.raises(httpx.ConnectError, match="address"):
                await get(transport, good.port)
        assert good.connections + other.connections == 1


async def test_a_name_does_not_make_the_router_knock_at_thousands_of_doors() -> None:
    begun: list[str] = []

    async def attempt(address: str) -> Won:
        begun.append(address)
        raise OSError("refused")

    addresses = [f"10.0.{number // 250}.{number % 250}" for number in range(4000)]
    resolver = Resolver(Names(**{NAME: addresses}))
    with pytest.raises(OSError, match="refused"):
        await Dialer(NAME, resolver).dial(attempt, 10)
    assert begun == addresses[: len(begun)]
    assert len(begun) < 100


async def test_an_address_in_the_url_is_not_looked_up() -> None:
    async with FakeEngine(host="127.0.0.1") as engine, over(names := Names()) as transport:
        request = httpx.Request("GET", f"{engine.url}/v1/models")
        response = await transport.handle_async_request(request)
        assert isinstance(response.stream, httpx.AsyncByteStream)
        await body_of(response.stream)
        assert names.asked == []
