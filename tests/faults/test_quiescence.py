"""What the other tests here end with: whose a connection is that an engine still has."""

import asyncio
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests.fakes import FakeEngine, until
from tests.faults.quiescence import STRANGER, Quiescence, own_sockets, owner_of, quiet

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
HOLDS = "import socket, sys; s = socket.create_connection(('127.0.0.1', int(sys.argv[1]))); {}"
# Its parent ends at once, so that it is nobody's child here.
APART = "import os; os.fork() and os._exit(0); sys.stdin.read()"


def holding(engine: FakeEngine, then: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen((sys.executable, "-c", HOLDS.format(then), str(engine.port)), stdin=subprocess.PIPE)


async def owner(engine: FakeEngine) -> str:
    await until(lambda: engine.open)
    (port,) = engine.clients.values()
    return owner_of(port, engine.port, own_sockets())


async def test_an_idle_connection_of_this_process_is_left() -> None:
    async with FakeEngine() as engine:
        _, writer = await asyncio.open_connection("127.0.0.1", engine.port)
        assert await owner(engine) == "ours"
        quiescence = Quiescence(seconds=0.2)
        quiescence.engines.append(engine)
        with pytest.raises(AssertionError, match="to an engine, ours"):
            await quiescence.check_engines()
        writer.close()
        await until(lambda: not engine.open)
        await quiescence.check_engines()


async def test_what_a_stretch_of_a_test_leaves_is_found(start_router: Start) -> None:
    async with FakeEngine() as engine:
        served = await start_router(engine)
        ended = asyncio.Event()
        with pytest.raises(AssertionError, match=r"not quiet.*Event\.wait"):
            async with quiet(served, 0.2):
                task = asyncio.create_task(ended.wait())
        ended.set()
        await task
        with pytest.raises(AssertionError, match=r"not quiet.*socket:"):
            async with quiet(served, 0.2):
                _, writer = await asyncio.open_connection("127.0.0.1", engine.port)
        writer.close()
        async with quiet(served):
            assert (await served.chat()).status_code == 200


@pytest.mark.parametrize(("then", "whose"), [("sys.stdin.read()", "ours"), (APART, STRANGER)])
async def test_that_of_another_process_is_left_if_it_was_started_here(then: str, whose: str) -> None:
    async with FakeEngine() as engine:
        process = holding(engine, then)
        assert process.stdin is not None
        await until(lambda: engine.open and (whose != STRANGER or process.poll() is not None))
        assert await owner(engine) == whose

        quiescence = Quiescence(seconds=0.2)
        quiescence.engines.append(engine)
        if whose == STRANGER:
            await quiescence.check_engines()
        else:
            with pytest.raises(AssertionError, match="not quiet"):
                await quiescence.check_engines()
        process.stdin.close()
        await until(lambda: not engine.open and process.poll() is not None)
