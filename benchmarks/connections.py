"""What a new connection costs the router: CPU of a JSON request when its client's, or its backend's, is not kept.

python -m benchmarks.connections --rounds 5
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Coroutine, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import uvloop

from benchmarks import cpu, wire
from benchmarks.client import Client
from benchmarks.loads import LOADS
from benchmarks.processes import free_port, running

_CONNECTIONS, _BATCHES = 16, 100
_LOAD = replace(LOADS["json"], connections=_CONNECTIONS, count=_CONNECTIONS * _BATCHES)
# So short that an idle connection to the backend is always too old.
_NEVER = 1e-9


async def _kept(port: int) -> None:
    client = Client(port)
    await client.connect(_CONNECTIONS)
    await _LOAD.run(client)
    client.close()


async def _new(port: int) -> None:
    """As many requests, each over a connection of its own."""
    for _ in range(_BATCHES):
        client = Client(port)
        await client.connect(_CONNECTIONS)
        await replace(_LOAD, count=_CONNECTIONS).run(client)
        client.close()


def _measure(pid: int, load: Callable[[], Coroutine[Any, Any, None]]) -> float:
    members = cpu.members(pid)
    before = cpu.cpu_ns(members)
    uvloop.run(load())
    return (cpu.cpu_ns(members) - before) / 1e3 / _LOAD.count


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args(argv).rounds
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[-1]})
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        engine = free_port()
        command = [sys.executable, "-m", "benchmarks.engine", "--port", str(engine)]
        log = directory / "engine.log"
        stack.enter_context(running(command, core=cores[-1], log=log, port=engine, ready="/health"))
        catalogue = directory / "catalogue.yaml"
        catalogue.write_text(f"models: [{{name: {wire.MODEL}, backends: [{{url: 'http://127.0.0.1:{engine}'}}]}}]\n")

        def router(name: str, keepalive: float) -> tuple[int, int]:
            port = free_port()
            env = {"PORT": str(port), "CATALOGUE": str(catalogue), "UPSTREAM_KEEPALIVE": str(keepalive)}
            env = {f"INFERENCE_API_{key}": value for key, value in env.items()}
            serve = [str(Path(sys.executable).with_name("inference-api")), "serve"]
            log = directory / f"{name}.log"
            pid = running(serve, core=cores[0], log=log, port=port, ready="/readyz", env=env)
            return stack.enter_context(pid), port

        keeping, closing = router("keeping", 3.0), router("closing", _NEVER)
        cases = {
            "both kept": (keeping, _kept),
            "new from each client": (keeping, _new),
            "new to the backend": (closing, _kept),
        }
        samples: dict[str, list[float]] = {name: [] for name in cases}
        for turn in range(rounds + 1):
            for name, ((pid, port), load) in cases.items():
                us = _measure(pid, partial(load, port))
                # The first round warms up.
                if turn:
                    samples[name].append(us)
        print("us of CPU per JSON request, medians")
        base = median(samples["both kept"])
        for name, values in samples.items():
            us = median(values)
            print(f"{name:22} {us:7.1f}  ({min(values):.1f} - {max(values):.1f})  {us - base:+7.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
