"""How the balancing policies do when several routers share backends but not what they know: a simulation.

python -m benchmarks.simulation --backends 1000 --routers 8 --seed 1

The policies and their keys are the router's own code (`inference_api.routing`), the rest is a model, in `queues`.
A backend works on so many requests at once, each as fast as if it were alone, and keeps the others in a queue. The
unit of time is the mean service of a request whose prefix is not cached. A router counts what it has in flight itself,
and no more, unless --signal has it ask the backends. Requests are a Poisson stream, each a turn of a random session, by
a random router; the load is what is offered if nothing were cached. Equal arguments give equal tables, and the requests
of a cell are the same for every balancing.

What it leaves out: batches that slow each other down, prefill beside decode, retries of answers that were begun, health
checks, slow start, and the probe of a backend that died.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from itertools import product
from statistics import fmean
from typing import Any, get_args

from benchmarks.queues import Case, Event, Result, simulate
from benchmarks.samples import quantile
from inference_api.routing.entries import BalancingName

# Those of a Case that every cell of a run has in common.
_SHARED = ("backends", "slots", "requests", "sigma", "turns", "pause", "saving", "cached", "signal", "seed")
_TITLES: dict[Event, str] = {
    "none": "All backends are well",
    "slow": "One backend works at half speed",
    "dies": "One backend dies in the middle",
}
_HEADINGS = ("balancing", "routers", "load", "mean wait", "p99 wait", "p99 queue", "max/mean", "hits", "busy")
_ODD_HEADINGS: dict[Event, tuple[str, ...]] = {
    "none": (),
    "slow": ("its share", "its p99"),
    "dies": ("cut", "repeats"),
}


def table(event: Event, results: Sequence[Result]) -> Iterator[str]:
    """Lines of Markdown; waits in mean services."""
    headings = (*_HEADINGS, *_ODD_HEADINGS[event])
    yield f"{_TITLES[event]}:"
    yield ""
    yield "| " + " | ".join(headings) + " |"
    yield "|---" + "|---:" * (len(headings) - 1) + "|"
    for result in results:
        yield "| " + " | ".join(_cells(result)) + " |"
    yield ""


def _cells(result: Result) -> tuple[str, ...]:
    case, p99 = result.case, quantile(result.waits, 0.99)
    cells = (
        case.balancing, str(case.routers), f"{case.utilisation:g}", f"{fmean(result.waits):.2f}", f"{p99:.2f}",
        f"{quantile(result.queues, 0.99):.0f}", f"{result.imbalance:.2f}", f"{result.hit_rate:.0%}",
        f"{result.busy:.0%}",
    )  # fmt: skip
    if case.event == "slow":
        return *cells, f"{result.odd_share:.2f}", f"{quantile(result.odd_waits, 0.99):.2f}"
    if case.event == "dies":
        return *cells, str(result.cut), str(result.repeats)
    return cells


def _list_of(read: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: [read(part) for part in text.split(",")]


def _one_of(names: Sequence[str]) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(names)}")
        return text

    return read


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])

    def add(name: str, read: Callable[[str], object], default: str, text: str) -> None:
        parser.add_argument(name, type=read, default=default, help=f"{text}; default {default}")

    policies, events = get_args(BalancingName), get_args(Event)
    add("--policies", _list_of(_one_of(policies)), ",".join(policies), "comma-separated")
    add("--routers", _list_of(int), "1,4,16", "comma-separated")
    add("--utilisations", _list_of(float), "0.5,0.7,0.9", "loads, comma-separated")
    add("--events", _list_of(_one_of(events)), ",".join(events), "what happens to one backend, comma-separated")
    add("--event-utilisation", float, "0.7", "the load when something happens to one backend")
    for field in fields(Case):
        if field.name in _SHARED:
            add(f"--{field.name}", type(field.default), str(field.default), "of every case")
    return parser


def cases(arguments: argparse.Namespace) -> Iterator[tuple[Event, list[Case]]]:
    """The tables to print, each with its cells. Raises ValueError for what cannot be simulated."""
    shared = {name: getattr(arguments, name) for name in _SHARED}
    for event in arguments.events:
        loads = arguments.utilisations if event == "none" else [arguments.event_utilisation]
        cells = product(loads, arguments.policies, arguments.routers)
        yield event, [Case(balancing, routers, load, event, **shared) for load, balancing, routers in cells]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser()
    try:
        tables = list(cases(arguments.parse_args(argv)))
    except ValueError as exc:
        arguments.error(str(exc))
    for event, cells in tables:
        for line in table(event, [simulate(case) for case in cells]):
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
