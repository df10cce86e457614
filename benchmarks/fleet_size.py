"""What a catalogue of many replicas costs a router: a scrape of /metrics, a choice by each policy, and memory.

python -m benchmarks.fleet_size --models 1 --replicas 1000
"""

import argparse
import sys
import tracemalloc
from collections.abc import Sequence
from random import Random
from time import process_time
from typing import get_args

from prometheus_client import CollectorRegistry, generate_latest

from inference_api.models import Outcome
from inference_api.observe.metrics import Metrics
from inference_api.routing.backend import Fleet
from inference_api.routing.balance import make_policy
from inference_api.routing.catalogue import PolicyName, parse_catalogue
from inference_api.routing.registry import RegistryStatus

_ROUTE = "chat_completions"
_CHOICES = 2_000


def build(models: int, replicas: int, policy: PolicyName = "two_choices") -> Fleet:
    """A fleet of so many models, each of so many replicas, that has chosen once for each."""
    catalogue = parse_catalogue(
        {
            "models": [
                {"name": f"model-{m}", "policy": policy, "backends": _backends(m, replicas)} for m in range(models)
            ]
        }
    )
    fleet = Fleet(make_policy)
    fleet.update(catalogue)
    for model in fleet.models.values():
        model.choose("key")
    return fleet


def _backends(model: int, replicas: int) -> list[dict[str, str]]:
    return [{"url": f"http://10.{model}.{number >> 8}.{number & 255}:8000"} for number in range(replicas)]


def scrape(fleet: Fleet) -> bytes:
    """What Prometheus gets once every model has answered streams and JSON on one route, and every replica a request."""
    metrics = Metrics(fleet.models.values, lambda: RegistryStatus("registry", len(fleet.models), 1e9, {}))
    for model in fleet.models.values():
        metrics.request(model.name, _ROUTE, 200, True, 1.0)
        metrics.request(model.name, _ROUTE, 200, False, 1.0)
        metrics.first_token(model.name, _ROUTE, 0.1)
        metrics.per_token(model.name, _ROUTE, 0.1)
        metrics.tokens(model.name, "input", 1)
        metrics.tokens(model.name, "output", 1)
        for backend in model.backends:
            metrics.attempt(backend, Outcome.OK)
    registry = CollectorRegistry()
    registry.register(metrics)
    return generate_latest(registry)


def choosing_us(fleet: Fleet, busy: int = 2) -> float:
    """CPU of one choice, when every replica has up to `busy` requests in flight."""
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
    parser.add_argument("--replicas", type=int, default=1000, help="of each model, default 1000")
    arguments = parser.parse_args(argv)
    fleet = build(arguments.models, arguments.replicas)
    scrape(fleet)
    began = process_time()
    size = len(scrape(fleet))
    took = process_time() - began
    print(
        f"{arguments.models} models of {arguments.replicas} replicas: {size / 1e3:.0f} KB, {took * 1e3:.0f} ms a scrape"
    )
    for policy in get_args(PolicyName):
        tracemalloc.start()
        fleet = build(arguments.models, arguments.replicas, policy)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        print(f"{policy}: {choosing_us(fleet):.1f} us per choice, {peak / 1e6:.1f} MB at most while it is built")
    return 0


if __name__ == "__main__":
    sys.exit(main())
