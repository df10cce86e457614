"""Every test here ends with the question whether all is quiet again, asked by the fixtures that start things."""

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from tests.conftest import Served
from tests.fakes import FakeEngine, Script, answer
from tests.faults.lab import Lab, Pods
from tests.faults.quiescence import Quiescence


@pytest.fixture
def quiescence() -> Quiescence:
    return Quiescence()


@pytest.fixture
async def start_engine(start_engine: Callable[..., Any], quiescence: Quiescence) -> AsyncIterator[Callable[..., Any]]:
    """As everywhere; and in the end nobody has a connection to it, be the router in this process or one of its own."""

    async def start(script: Script | None = None) -> FakeEngine:
        engine: FakeEngine = await start_engine(script)
        quiescence.engines.append(engine)
        return engine

    yield start
    await quiescence.check_engines()


@pytest.fixture
async def start_router(
    # Before the router, so that its engines are there for as long as it is.
    start_engine: Callable[..., Any],
    start_router: Callable[..., Any],
    quiescence: Quiescence,
    caplog: pytest.LogCaptureFixture,
) -> AsyncIterator[Callable[..., Any]]:
    """As everywhere; and in the end it is as it was when it had started."""

    async def start(*engines: FakeEngine, **more: Any) -> Served:
        served: Served = await start_router(*engines, **more)
        quiescence.routers.append(served)
        quiescence.begin()
        return served

    yield start
    await quiescence.check(caplog.get_records("call"))


@pytest.fixture
async def pods() -> AsyncIterator[Pods]:
    """`await pods(n, script)` -> engines on 127.0.0.2, 127.0.0.3 ... and one port, as pods have them."""
    async with AsyncExitStack() as stack:

        async def start(count: int, script: Script = answer) -> list[FakeEngine]:
            first = await stack.enter_async_context(FakeEngine(script, "127.0.0.2"))
            others = [FakeEngine(script, f"127.0.0.{number + 2}", first.port) for number in range(1, count)]
            return [first, *[await stack.enter_async_context(other) for other in others]]

        yield start


@pytest.fixture
def lab(start_engine: Callable[..., Any], start_router: Callable[..., Any], quiescence: Quiescence) -> Lab:
    return Lab(start_engine, start_router, quiescence)
