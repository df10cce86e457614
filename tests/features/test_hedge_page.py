"""docs/hedge.md, run as it stands there, and its figures in short."""

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.hedging import Case, measure
from tests.conftest import Served
from tests.fakes import hang, until

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
PAGE = (Path(__file__).parents[2] / "docs" / "hedge.md").read_text()


async def test_the_example_is_as_the_page_says(start_engine: Start, start_router: Start) -> None:
    [catalogue] = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    [model] = yaml.safe_load(catalogue)["models"]
    engines = [await start_engine() for _ in model["backends"]]
    model["backends"] = [engine.url for engine in engines]
    served: Served = await start_router(models=[model])
    for _ in range(100):
        assert (await served.chat(model=model["name"])).status_code == 200

    # The next one is late at whichever backend gets it, and the other one is well.
    engines[0].script = hang
    engines[1].script, well = hang, engines[1].script
    asking = asyncio.create_task(served.chat(model=model["name"]))
    await until(lambda: any(engine.busy for engine in engines))
    for engine in engines:
        engine.script = engine.script if engine.busy else well
    answer = await asking

    assert answer.status_code == 200
    assert await served.metric("inference_api_hedges_total", model_name=model["name"], result="won") == 1


async def test_it_cuts_the_slowest() -> None:
    """The figure of the page has more requests, on a quiet machine; here the slow ones are as slow as ever without."""
    case = Case(requests=500, rate=100, slow=0.15)
    without, hedged = await measure(case), await measure(case._replace(hedge={"after": 150}))

    assert without.p99 >= 1000
    assert hedged.extra <= 0.05
    assert hedged.p99 < without.p99
