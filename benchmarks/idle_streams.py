"""What open streams cost that say nothing: CPU of a new request beside them, and memory of each.

python -m benchmarks.idle_streams --streams 0,500,1000,2000
"""

import argparse
import asyncio
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import uvloop

from benchmarks import cpu, wire
from benchmarks.candidates import CANDIDATES, Site
from benchmarks.client import Client
from benchmarks.loads import LOADS
from benchmarks.processes import free_port, running
from benchmarks.setup import Setup, allow_files

# Longer than the whole measurement: after its first event a stream is silent.
_SILENCE = 3600.0
_ROUNDS = 5


async def _open(port: int, count: int) -> list[asyncio.StreamWriter]:
    """So many streams whose first event has come."""
    request = wire.request(port, tokens=2, interval=_SILENCE)
    limit = asyncio.Semaphore(64)

    async def one() -> asyncio.StreamWriter:
        async with limit:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request)
            await reader.readuntil(b"data: ")
            return writer

    return await asyncio.gather(*(one() for _ in range(count)))


async def _measure(pid: int, port: int, counts: list[int]) -> None:
    load, members = LOADS["json"], cpu.members(pid)
    client = Client(port)
    await client.connect(load.connections)
    await load.run(client)
    empty = cpu.resident_bytes(members)
    samples: dict[int, list[float]] = {count: [] for count in counts}
    memory: dict[int, float] = {}
    for turn in range(_ROUNDS):
        # Up and down again and again: what the machine does meanwhile happens to all of them.
        for count in counts if turn % 2 == 0 else counts[::-1]:
            streams = await _open(port, count)
            await asyncio.sleep(0.5)
            before = cpu.cpu_ns(members)
            _, exchanges = await load.run(client)
            samples[count].append((cpu.cpu_ns(members) - before) / 1e3 / len(exchanges))
            if count and count not in memory:
                memory[count] = (cpu.resident_bytes(members) - empty) / 1e3 / count
            for stream in streams:
                stream.close()
            await asyncio.sleep(0.5)
    client.close()
    base = median(samples[counts[0]])
    print("streams  us per JSON request  (min - max)    ratio   KB per stream")
    for count in counts:
        us = samples[count]
        kb = f"{memory[count]:.1f}" if count in memory else "-"
        print(f"{count:7} {median(us):19.1f}  ({min(us):.1f} - {max(us):.1f})  {median(us) / base:7.2f}   {kb:>13}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--streams", default="0,500,1000,2000")
    counts = [int(count) for count in parser.parse_args().streams.split(",")]
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[-1]})
    allow_files(4 * max(counts) + 1000)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        engine_port, port = free_port(), free_port()
        engine = [sys.executable, "-m", "benchmarks.engine", "--port", str(engine_port)]
        log = directory / "engine.log"
        stack.enter_context(running(engine, core=cores[-1], log=log, port=engine_port, ready="/health"))
        start = CANDIDATES["ours"].start(port, Site(engine_port, Setup(streams=max(counts)), directory))
        log = directory / "ours.log"
        pid = stack.enter_context(
            running(start.command, core=cores[0], log=log, port=port, ready="/readyz", env=start.env)
        )
        began = time.monotonic()
        uvloop.run(_measure(pid, port, counts))
        print(f"{_ROUNDS} rounds in {time.monotonic() - began:.0f} s, medians; CPU time of the router's process")
    return 0


if __name__ == "__main__":
    sys.exit(main())
