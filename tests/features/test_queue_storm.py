"""Everything at once, for queue and hold: clients that leave, engines that die, backends and limits that change."""

import asyncio
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import orjson
import pytest

from inference_api.app import ENTRY
from inference_api.routing.catalogue import load_catalogue
from tests.conftest import Served
from tests.fakes import (
    COMPLETION,
    DONE,
    LAST_CHUNK,
    SSE_HEAD,
    Answer,
    Line,
    Received,
    chunk,
    event,
    json_response,
    post,
    raw_client,
    read_answer,
)
from tests.faults.quiescence import Quiescence
from tests.features.waiting import URL, depth

pytestmark = pytest.mark.anyio
Start = Callable[..., Any]
REQUESTS = 250


class Storm:
    """What engines, clients and the catalogue do, by one seed."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.answers: Counter[str] = Counter()

    async def engine(self, request: Received, line: Line) -> None:
        await asyncio.sleep(self.random.random() * 0.01)
        what = self.random.random()
        if what < 0.1:
            line.reset()
        elif b'"stream":true' not in request.body:
            await line.send(json_response(COMPLETION))
        else:
            await line.send(SSE_HEAD, chunk(event()))
            if what < 0.2:
                return line.reset()
            await asyncio.sleep(self.random.random() * 0.005)
            await line.send(chunk(DONE) + LAST_CHUNK)

    async def client(self, served: Served, number: int) -> None:
        await asyncio.sleep(self.random.random() * 1.5)
        body = {"model": "m", "messages": [], "stream": self.random.random() < 0.5, "max_tokens": number}
        patience = self.random.random() * 0.1 if self.random.random() < 0.3 else 20.0
        async with raw_client(served.port) as line:
            await line.send(post(URL, body))
            try:
                answer: Answer = await asyncio.wait_for(read_answer(line.reader), patience)
            except TimeoutError:
                self.answers["left"] += 1
            except (asyncio.IncompleteReadError, ConnectionError, ValueError):
                # Cut in mid-stream
                self.answers["broken"] += 1
            else:
                found = orjson.loads(answer.body)["error"]["message"] if answer.status >= 400 else ""
                # Admission refuses nobody whom the queue has let through.
                assert "concurrent requests" not in found
                self.answers[str(answer.status)] += 1

    async def operator(self, served: Served, path: Path, urls: list[str]) -> None:
        while True:
            await asyncio.sleep(self.random.random() * 0.1)
            self.change(served, path, self.random.sample(urls, self.random.randint(0, len(urls))))

    def change(self, served: Served, path: Path, urls: list[str]) -> None:
        bounds = {"timeout": 5, "size": self.random.randint(5, 60), "per_caller": self.random.randint(5, 60)}
        entry = {"max_in_flight": self.random.randint(1, 8), "queue": bounds, "hold": 5}
        path.write_bytes(orjson.dumps({"models": [{"name": "m", "backends": urls, **entry}]}))
        served.router.core.registry.replace_static(load_catalogue(path, ENTRY))


@pytest.mark.parametrize("seed", range(3))
async def test_after_a_storm_nothing_is_left(
    seed: int, tmp_path: Path, start_engine: Start, start_router: Start, caplog: pytest.LogCaptureFixture
) -> None:
    storm = Storm(seed)
    engines = [await start_engine(storm.engine) for _ in range(2)]
    urls = [engine.url for engine in engines]
    entry = {"max_in_flight": 3, "queue": {"timeout": 5, "size": 40, "per_caller": 40}, "hold": 5}
    served: Served = await start_router(*engines, entry=entry, breaker_failures=1000)
    path = tmp_path / "catalogue.json"

    quiescence = Quiescence()
    quiescence.routers, quiescence.engines = [served], engines
    quiescence.begin()

    operator = asyncio.create_task(storm.operator(served, path, urls))
    await asyncio.gather(*(storm.client(served, number) for number in range(REQUESTS)))
    operator.cancel()
    await asyncio.gather(operator, return_exceptions=True)
    # For those that are held, and whose clients have just left.
    storm.change(served, path, urls)
    await quiescence.check(caplog.records)

    model = served.router.core.fleet.models["m"]
    assert (model.in_flight, model.waiting) == (0, ())
    assert depth(served, "queue") == depth(served, "hold") == 0
    assert storm.answers.total() == REQUESTS
    assert storm.answers["200"] > REQUESTS / 4
