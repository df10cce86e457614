"""Does a JSON request cost more where there is more of something? Routers of all sizes at once, in turns.

scripts/bench --scaling
"""

import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace

import uvloop

from benchmarks import wire
from benchmarks.candidates import CANDIDATES
from benchmarks.chart import Panel, Point
from benchmarks.client import Client
from benchmarks.loads import LOADS
from benchmarks.measure import Bench
from benchmarks.samples import Sample, points, ratio
from benchmarks.setup import Setup

# Seconds, longer than a round: after its first event a stream is silent.
_SILENCE = 3600.0
_TIMEOUT = 60


@dataclass(frozen=True, slots=True)
class Sweep:
    """A number that grows, and a router with so many of it."""

    name: str
    sizes: Sequence[int]
    setup: Callable[[int], Setup]


SWEEPS = (
    Sweep("models", (1, 10, 100, 1_000, 10_000), lambda size: Setup(models=size)),
    Sweep("backends", (1, 4, 16, 64, 256), lambda size: Setup(backends=size)),
    Sweep("open streams", (0, 250, 500, 1_000, 2_000), lambda size: Setup(streams=size)),
    # Each with some ten series of its own: histograms, counters by status and direction.
    Sweep("models with series", (1, 10, 100, 1_000), lambda size: Setup(models=size, asked=size)),
)


def run(bench: Bench, rounds: int, share: float = 1.0) -> list[Sample]:
    """Samples whose `load` is the sweep's name, and whose `candidate` is the size."""
    samples = []
    for number, sweep in ((number, sweep) for number in range(rounds) for sweep in SWEEPS):
        load = LOADS["json"].scaled(share)
        with ExitStack() as stack:
            routers = []
            for size in sweep.sizes:
                setup = sweep.setup(size)
                pid, port = stack.enter_context(bench.router(CANDIDATES["ours"], setup))
                _prepare(stack, port, setup)
                routers.append((str(size), pid, port, replace(load, name=sweep.name, setup=setup)))
            for part in range(load.slices):
                turn = (number + part) % len(routers)
                for router in routers[turn:] + routers[:turn]:
                    sample = bench.measure(*router)
                    sample.round, sample.slice = number, part
                    samples.append(sample)
                    print(f"round {number + 1}/{rounds}.{part + 1}  {sample}", file=sys.stderr)
    return samples


def _prepare(stack: ExitStack, port: int, setup: Setup) -> None:
    """Streams are open, and models have been asked."""
    for _ in range(setup.streams):
        stream = stack.enter_context(closing(socket.create_connection(("127.0.0.1", port))))
        stream.sendall(wire.request(port, tokens=2, interval=_SILENCE))
        if not stream.recv(65536).startswith(b"HTTP/1.1 200 "):
            raise wire.BadAnswer("a stream was refused")
    uvloop.run(_ask(port, setup.asked_names()))


async def _ask(port: int, names: Sequence[str]) -> None:
    client = Client(port)
    try:
        await client.connect(1)
        for name in names:
            await client.run(wire.request(port, model=name), 1, _TIMEOUT)
    finally:
        client.close()


def table(samples: Sequence[Sample]) -> str:
    """Medians, and ratios to the smallest size within a slice."""
    lines = []
    for sweep in SWEEPS:
        lines += ["", f"{sweep.name:>20}{'us':>8}{'(min - max)':>18}{'ratio':>8}"]
        for point in _costs(samples, sweep):
            times = ratio(samples, sweep.name, point.name, str(sweep.sizes[0])) or 0.0
            span = f"({point.low:.1f} - {point.high:.1f})"
            lines.append(f"{point.name:>20}{point.value:8.1f}{span:>18}{times:8.2f}")
    return "\n".join(lines[1:])


def _costs(samples: Sequence[Sample], sweep: Sweep) -> list[Point]:
    return points(samples, sweep.name, [str(size) for size in sweep.sizes], "cpu_us")


def panels(samples: Sequence[Sample]) -> list[Panel]:
    title = "CPU of a JSON request over the number of {}"
    unit = "us, median; band: least to most"
    return [Panel(title.format(sweep.name), unit, _costs(samples, sweep)) for sweep in SWEEPS]
