"""Every test here ends with the question whether all is quiet again."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from tests.faults.lab import Lab


@pytest.fixture
async def lab(
    start_engine: Callable[..., Any], start_router: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> AsyncIterator[Lab]:
    lab = Lab(start_engine, start_router)
    yield lab
    await lab.quiescence.check(caplog.get_records("call"))
