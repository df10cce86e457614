"""A backend that answers with errors beside others that do not, and requests that all of them refuse."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tests.fakes import CHAT, COMPLETION, FakeEngine, Line, Received, Script, answer, json_response, raw, until

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]


def error(status: int) -> Script:
    return raw(json_response({"error": {"message": "no"}}, f"{status} X"))


async def slow(request: Received, line: Line) -> None:
    await asyncio.sleep(0.2)
    await line.send(json_response(COMPLETION))


def counting(requests: int, ask: Callable[[], Awaitable[int]]) -> Callable[[], Awaitable[Counter[int]]]:
    """Workers that ask again when they are answered, so that whoever answers quickly is asked often."""

    async def work() -> Counter[int]:
        left = iter(range(requests))
        seen: Counter[int] = Counter()

        async def worker() -> None:
            for _ in left:
                seen[await ask()] += 1

        await asyncio.gather(*(worker() for _ in range(12)))
        return seen

    return work


async def flag(served: Any, name: str, engine: FakeEngine) -> float:
    """0 where there is no such series."""
    return float(await served.metric(f"inference_api_backend_{name}", backend=engine.url.removeprefix("http://")))


@pytest.mark.parametrize(
    ("status", "balancing"),
    [(500, "two_choices"), (401, "least_in_flight"), (404, "round_robin"), (500, "prefix_affinity")],
)
async def test_a_backend_that_fails_at_once_gets_a_few_requests_and_then_none(
    status: int, balancing: str, start_engine: Start, start_router: Start
) -> None:
    broken, *well = [await start_engine(error(status)), await start_engine(slow), await start_engine(slow)]
    served = await start_router(broken, *well, entry={"balancing": balancing})
    number = 0

    async def ask() -> int:
        nonlocal number
        number += 1
        return int((await served.chat(messages=[{"role": "user", "content": str(number)}])).status_code)

    seen = await counting(300, ask)()

    # Its fair share is 100.
    assert seen[status] == len(broken.requests) <= 20
    before = len(broken.requests)
    assert (await counting(100, ask)()) == Counter({200: 100})
    assert len(broken.requests) == before
    assert await flag(served, "set_aside", broken) == 1
    assert await flag(served, "circuit_open", broken) == (status >= 500)


@pytest.mark.parametrize("balancing", ["two_choices", "least_in_flight", "round_robin", "prefix_affinity"])
@pytest.mark.parametrize("status", [400, 500])
async def test_a_request_that_every_backend_refuses_changes_nothing(
    status: int, balancing: str, start_engine: Start, start_router: Start
) -> None:
    async def script(request: Received, line: Line) -> None:
        await (error(status) if b"wrong" in request.body else answer)(request, line)

    engines = [await start_engine(script) for _ in "abc"]
    served = await start_router(*engines, entry={"balancing": balancing})
    model = served.router.core.fleet.models["m"]
    wrong = [{"role": "user", "content": "wrong"}]

    for number in range(200):
        # The same one again and again, alone and beside others.
        assert (await served.chat(messages=wrong)).status_code == status
        if number >= 100:
            assert (await served.chat(messages=[{"role": "user", "content": str(number)}])).status_code == 200
        assert model.open == ()
        assert model.available is model.backends

    for engine in engines:
        assert [await flag(served, name, engine) for name in ("set_aside", "circuit_open")] == [0, 0]


async def test_one_that_is_well_again_is_found(start_engine: Start, start_router: Start) -> None:
    broken, *well = [await start_engine(error(500)), *[await start_engine() for _ in "ab"]]
    served = await start_router(broken, *well, breaker_cooldown=0.2)

    async def ask() -> int:
        return int((await served.client.post("/v1/chat/completions", json=CHAT)).status_code)

    await counting(200, ask)()
    assert await flag(served, "set_aside", broken) == 1
    broken.script = answer

    async with asyncio.timeout(10):
        while await flag(served, "set_aside", broken):
            assert await ask() == 200
            await asyncio.sleep(0.01)
    # It starts with a tenth of its weight.
    assert [backend.share < 0.5 for backend in served.router.core.fleet.models["m"].backends] == [True, False, False]
    before = len(broken.requests)
    async with asyncio.timeout(40):
        while len(broken.requests) == before:
            assert await counting(100, ask)() == Counter({200: 100})
    await until(lambda: served.router.core.fleet.models["m"].in_flight == 0)
