"""A request leaves nothing that only the garbage collector can free: its pauses would be the streams'."""

import asyncio
import gc
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import Served
from tests.fakes import CHAT, STREAM, Line, Received, answer, post, raw_client, read_answer

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
URL = "/v1/chat/completions"
OF_A_REQUEST = (
    "Cycle",
    "Account",
    "Call",
    "Attempt",
    "Relay",
    "Pump",
    "EventTracker",
    "ResponseStream",
    "Disconnected",
)
MANY = 20


async def reset(request: Received, line: Line) -> None:
    line.reset()


async def redirect(request: Received, line: Line) -> None:
    await line.send(b"HTTP/1.1 302 Found\r\nlocation: http://inside/\r\ncontent-length: 0\r\n\r\n")


CASES: dict[str, tuple[bytes, Any]] = {
    "whole": (post(URL, CHAT), answer),
    "stream": (post(URL, STREAM), answer),
    "invalid": (post(URL, {"model": "m"}), answer),
    "unknown model": (post(URL, {**CHAT, "model": "nope"}), answer),
    "unknown url": (b"GET /nope HTTP/1.1\r\nhost: x\r\n\r\n", answer),
    "page": (b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n", answer),
    "reset": (post(URL, CHAT), reset),
    "redirect": (post(URL, CHAT), redirect),
}


@pytest.mark.parametrize("case", CASES)
async def test_a_request_leaves_no_ring(case: str, start_engine: Start, start_router: Start) -> None:
    request, script = CASES[case]
    served: Served = await start_router(await start_engine(script), breaker_failures=1000)
    async with raw_client(served.port) as client:
        for count in range(MANY + 4):
            if count == 4:
                # From here on heads are known, and connections there.
                gc.collect()
                gc.disable()
            await client.send(request)
            await read_answer(client.reader)
        try:
            for _ in range(3):
                await asyncio.sleep(0)
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            left = Counter(type(found).__name__ for found in gc.garbage)
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()

    # The router's own questions to the engine may leave one or two.
    assert {name: left[name] for name in OF_A_REQUEST if left[name] >= MANY // 2} == {}
