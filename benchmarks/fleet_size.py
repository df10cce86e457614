"""What a catalogue of many backends costs a router: a scrape of /metrics, a choice by each balancing, and memory.

python -m benchmarks.fleet_size --models 1 --backends 1000
python -m benchmarks.fleet_size --models 100 --backends 1 --routes 3
"""

import argparse
import asyncio
import sys
import tracemalloc
from collections.abc import Sequence
from random import Random
from time import perf_counter, process_time, thread_time
from typing import get_args

from prometheus_client import CollectorRegistry

from inference_api.http.head import RequestHeaders
from inference_api.models import Outcome
from inference_api.observe.account import Account
from inference_api.observe.exposition import write
from inference_api.observe.families import Families
from inference_api.observe.metrics import Metrics
from inference_api.observe.scrape import Exposition
from inference_api.routing.balance import make_balancer
from inference_api.routing.catalogue import parse_catalogue
from inference_api.routing.entries import BalancingName
from inference_api.routing.fleet import Fleet
from inference_api.routing.registry import RegistryStatus

_ROUTES = ("chat_completions", "completions", "responses", "messages")
_CHOICES = 2_000
_ANSWERED = (
    Account("", perf_counter, {"path": "", "client": None, "state": {}}, RequestHeaders()([]))
    .end()
    ._replace(status=200, outcome=Outcome.OK, took=1.0, overhead=0.001, tokens=(1, None, 2, None))
)
_STREAMED = _ANSWERED._replace(stream=True, first=0.1)


def build(models: int, backends: int, balancing: BalancingName = "two_choices") -> Fleet:
    """A fleet of so many models, each of so many backends, that has chosen once for each."""
    catalogue = parse_catalogue(
        {
            "models": [
                {"name": f"model-{m}", "balancing": balancing, "backends": _backends(m, backends)}
                for m in range(models)
            ]
        }
    )
    fleet = Fleet(make_balancer)
    fleet.update(catalogue)
    for model in fleet.models.values():
        model.choose("key")
    return fleet


def _backends(model: int, backends: int) -> list[dict[str, str]]:
    places = range(model * backends, (model + 1) * backends)
    return [{"url": f"http://10.{place >> 16}.{place >> 8 & 255}.{place & 255}:8000"} for place in places]


def used(fleet: Fleet, routes: int = 1) -> Families:
    """Every model has answered streams and JSON on so many routes, and every backend a request."""
    metrics = Metrics(lambda: fleet.models)
    for model in fleet.models.values():
        for route in _ROUTES[:routes]:
            metrics.record(_ANSWERED._replace(model_name=model.name, route=route))
            metrics.record(_STREAMED._replace(model_name=model.name, route=route))
        for backend in model.backends:
            metrics.attempt(backend, Outcome.OK)
    return Families(metrics, lambda: RegistryStatus("registry", len(fleet.models), 1e9, {}))


def scrape(fleet: Fleet, routes: int = 1) -> bytes:
    """What Prometheus gets then."""
    return "".join(write(used(fleet, routes)())).encode()


async def scraping(families: Families) -> tuple[int, float, list[float]]:
    """Bytes of a page that is compressed, CPU seconds of it, and those of each of its slices, the longest last."""
    size, done = 0, False
    turns: list[float] = []

    async def turn() -> None:
        before = thread_time()
        while not done:
            await asyncio.sleep(0)
            now = thread_time()
            turns.append(now - before)
            before = now

    beside = asyncio.create_task(turn())
    began = thread_time()
    async for data in Exposition(families, CollectorRegistry()).page(openmetrics=False, gzip=True):
        size += len(data)
    took = thread_time() - began
    done = True
    await beside
    return size, took, sorted(turns)


def choosing_us(fleet: Fleet, busy: int = 2) -> float:
    """CPU of one choice, when every backend has up to `busy` requests in flight."""
    random = Random(1).random
    model = next(iter(fleet.models.values()))
    for backend in model.backends:
        backend.in_flight = backend.origin.in_flight = int(random() * (busy + 1))
    keys = [f"key-{number}" for number in range(_CHOICES)]
    began = process_time()
    for key in keys:
        model.choose(key)
    return (process_time() - began) * 1e6 / _CHOICES


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", type=int, default=1)
    parser.add_argument("--backends", type=int, default=1000, help="of each model, default 1000")
    parser.add_argument("--routes", type=int, default=1, choices=range(1, len(_ROUTES) + 1), help="that were asked for")
    arguments = parser.parse_args(argv)
    fleet = build(arguments.models, arguments.backends)
    page = scrape(fleet, arguments.routes)
    samples = page.count(b"\n") - page.count(b"\n# ")
    compressed, took, slices = min(
        (asyncio.run(scraping(used(fleet, arguments.routes))) for _ in range(5)), key=lambda found: found[1]
    )
    print(
        f"{arguments.models} models of {arguments.backends} backends: {samples:,} samples, {len(page) / 1e3:,.0f} KB, "
        f"{compressed / 1e3:,.0f} KB compressed, {took * 1e3:.0f} ms a scrape in {len(slices)} slices, "
        f"99 % of them up to {slices[int(len(slices) * 0.99) - 1] * 1e3:.1f} ms, the longest {slices[-1] * 1e3:.1f} ms"
    )
    for balancing in get_args(BalancingName):
        tracemalloc.start()
        fleet = build(arguments.models, arguments.backends, balancing)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        print(f"{balancing}: {choosing_us(fleet):.1f} us per choice, {peak / 1e6:.1f} MB at most while it is built")
    return 0


if __name__ == "__main__":
    sys.exit(main())
