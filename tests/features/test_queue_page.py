"""The example of docs/queue.md, run as it stands there, and its messages, as a router gives them."""

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import Served
from tests.features.waiting import Paced, asking, callers, error, waiting

PAGE = (Path(__file__).parents[2] / "docs" / "queue.md").read_text()
(EXAMPLE,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"\d+(\.\d+)? s|retry-after: \d+")
Start = Callable[..., Any]


def shown(answer: Any) -> str:
    status, code, message, retry_after = error(answer)
    return NUMBER.sub("N", f"{status} {code}  retry-after: {retry_after}  {message}")


@pytest.mark.anyio
async def test_the_example_and_the_messages_of_the_page(
    tmp_path: Path, start_engine: Start, start_router: Start
) -> None:
    paced = Paced()
    engine = await start_engine(paced)
    [entry] = yaml.safe_load(EXAMPLE)["models"]
    entry["backends"] = [{"url": f"http://llama.models:{engine.port}", "discovery": "dns"}]
    # As it stands, but for the numbers, which a test would have to wait for.
    entry |= {"max_in_flight": 1, "queue": {"timeout": 3, "size": 3, "per_caller": 2}}
    there = ["127.0.0.1"]

    async def resolve(host: str) -> list[str]:
        return there

    name = {"model": "llama-3-8b"}
    served: Served = await start_router(models=[entry], resolve=resolve, **callers(tmp_path, a={"priority": 7}, b={}))
    tasks = [asking(served, key="a", **name)]
    await paced.arrived(1)
    for key, waits in (("a", 1), ("a", 2)):
        tasks.append(asking(served, key=key, **name))
        await waiting(served, waits, model="llama-3-8b")
    part = await asking(served, key="a", **name)
    tasks.append(asking(served, key="b", **name))
    await waiting(served, 3, model="llama-3-8b")
    full = await asking(served, key="b", **name)
    late = await tasks[-1]
    paced.answer(0)
    first, *_ = await asyncio.gather(*tasks)

    held: Served = await start_router(models=[{**entry, "backends": [], "hold": 0.1}])
    loading = await held.chat(model="llama-3-8b")

    assert first.status_code == 200
    assert dict(engine.requests[0].headers)["X-Vllm-Priority".lower()] == "7"
    page = NUMBER.sub("N", PAGE)
    for answer in (part, full, late, loading):
        assert shown(answer) in page
