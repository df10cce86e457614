"""A transport of the router's own, closed at the end."""

from collections.abc import AsyncIterator

import pytest

from inference_api.outbound.transport import Transport


@pytest.fixture
async def transport() -> AsyncIterator[Transport]:
    transport = Transport()
    yield transport
    await transport.aclose()
