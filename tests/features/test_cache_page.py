"""docs/cache.md, run as it stands there."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import Served
from tests.fakes import FakeEngine

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
PAGE = (Path(__file__).parents[2] / "docs" / "cache.md").read_text()


def block(language: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


async def test_the_example_is_as_the_page_says(start_engine: Start, start_router: Start) -> None:
    engine: FakeEngine = await start_engine()
    [entry] = yaml.safe_load(block("yaml"))["models"]
    served: Served = await start_router(models=[{**entry, "backends": [engine.url]}])
    [line] = re.findall(r"^    (curl .*)$", PAGE, re.MULTILINE)
    _, _, url, _, header, _, body = shlex.split(line)

    first, second = [
        await served.client.post(
            "/" + url.partition("/")[2], content=body.encode(), headers=dict([header.split(": ", 1)])
        )
        for _ in range(2)
    ]

    status, *told = block("http").splitlines()
    assert first.headers["x-inference-cache"] == "miss"
    assert f"HTTP/1.1 {second.status_code} OK" == status
    for one in told:
        name, value = one.split(": ")
        assert second.headers[name] == value
    assert (second.content, len(engine.requests)) == (first.content, 1)
