"""A transport of the router's own, and servers that it may ask."""

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from inference_api.outbound.transport import Transport
from tests.fakes import Script, ScriptedServer

Start = Callable[..., Any]


@pytest.fixture
async def transport() -> AsyncIterator[Transport]:
    transport = Transport()
    yield transport
    await transport.aclose()


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """`await start(script)` -> a server on a free port that answers every request so."""
    async with AsyncExitStack() as stack:

        async def start(script: Script) -> ScriptedServer:
            server = ScriptedServer(script)
            await stack.enter_async_context(server)
            return server

        yield start
